# %% [markdown]
# # Two Gaussians: how a flow loses a mode, and how it is found
#
# A flow trained by the reverse divergence alone settles on one mode and reports an excellent bound.
# A flow trained beside one walker learns the mode in which the walker stays; beside walkers in
# both it learns both. A population that cools from the prior needs no such hint.

# %%
from __future__ import annotations

import os
from functools import partial

import arviz
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import zuko

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
SMOKE = "SMOKE" in os.environ

# %% [markdown]
# ## The system: a quarter of the mass on the left, three on the right; log Z is 0

# %%
WIDE = dist.Normal(torch.zeros(2), 4.0).to_event(1)
PARTS = dist.Normal(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.6).to_event(1)
TARGET = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.25, 0.75])), PARTS)


def two_gaussians():
    place = pyro.sample("place", WIDE)
    pyro.factor("target", TARGET.log_prob(place) - WIDE.log_prob(place))


def share_left(place):
    return float((place[..., 0] < 0).double().mean())


# %% [markdown]
# ## Collapse: the reverse divergence sees no mode that the flow does not draw from
# The bound of a flow that has lost the smaller mode is short by log 4/3 alone.


# %%
STEPS = 200 if SMOKE else 1500


def spline_flow(start):
    torch.manual_seed(3)
    flow = partial(zuko.flows.NSF, transforms=3, hidden_features=(32, 32))
    return phf.AutoFlow(two_gaussians, flow, start=start)


def trained(start, loss):
    guide = spline_flow(start)
    phf.fit_guide(two_gaussians, guide, loss=loss, num_steps=STEPS, seed=1, disable_progbar=True)
    return guide


at_one_mode = dist.Normal(torch.tensor([3.0, 0.0]), 1.0).to_event(1)
collapsed = trained(at_one_mode, phf.ReverseKL())
weighted = phf.importance_sample(two_gaussians, collapsed, seed=0)
print("reverse divergence:", share_left(collapsed.draw(4000)[0]), weighted, weighted.message)

# %% [markdown]
# ## Training beside chains: what walkers do not visit is not learned
# One walker in the larger mode, then one in each; jumps come from the flow that learns from them.


# %%
def beside_walkers(places):
    kernel = phf.NUTS(two_gaussians)
    walkers = phf.MCMC(
        kernel, 500, num_chains=len(places), seed=2, initial_params={"place": places}
    )
    walkers.run()
    seen = {"place": walkers.get_samples()["place"]}
    around_all = dist.Normal(seen["place"].mean(0), seen["place"].std(0) + 1.0).to_event(1)
    guide = trained(around_all, phf.ForwardKL(seen))
    jumps = phf.MCMC(phf.FlowMH(two_gaussians, guide), 2000, warmup_steps=0, num_chains=4, seed=3)
    jumps.run()
    return jumps.get_samples()["place"]


left, right = torch.tensor([-3.0, 0.0]), torch.tensor([3.0, 0.0])
one_walker = beside_walkers(right[None])
two_walkers = beside_walkers(torch.stack([left, right]))
print(f"left share: one walker {share_left(one_walker):.3f}, two {share_left(two_walkers):.3f}")

# %% [markdown]
# ## Discovery: a population that cools from the prior
# `FlowNUTS` does it before its chains start, and is told of no mode.

# %%
mcmc = phf.MCMC(phf.FlowNUTS(two_gaussians), 300 if SMOKE else 1000, num_chains=8, seed=4)
mcmc.run()
places = mcmc.get_samples(group_by_chain=True)["place"]
on_left = (places[..., 0] < 0).double()
share, error = float(on_left.mean()), float(arviz.mcse(on_left.numpy()))
population = phf.AnnealedSampler(two_gaussians, num_particles=2000, seed=5)
population.run()
print(f"FlowNUTS: left share {share:.3f} +- {error:.3f}; log Z {population.log_evidence:.3f}")

# %% [markdown]
# ## The picture, and the check

# %%
shown = {
    "reverse divergence": collapsed.draw(2000)[0],
    "one walker": one_walker,
    "one walker in each": two_walkers,
    "population, then jumps": places.flatten(0, 1),
}
figure, panels = plt.subplots(1, 4, figsize=(16, 3), sharey=True, layout="constrained")
for panel, (name, cloud) in zip(panels, shown.items(), strict=True):
    panel.plot(*cloud[:2000].detach().mT, ".", ms=2)
    panel.set(title=f"{name}: {share_left(cloud):.2f} on the left", xlim=(-6, 6), ylim=(-3, 3))
figure.savefig("two_gaussians.png", dpi=120)

if not SMOKE:
    assert share_left(shown["reverse divergence"]) < 0.01  # collapse
    assert share_left(one_walker) < 0.01  # not discovered
    assert abs(share_left(two_walkers) - 0.25) < 0.05
assert abs(share - 0.25) < 4 * error
assert abs(population.log_evidence) < 4 * population.log_evidence_error
