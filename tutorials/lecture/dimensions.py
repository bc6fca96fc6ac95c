# %% [markdown]
# # More and more dimensions: who still visits both modes?
#
# Two Gaussians of weights 1:3 at -2.5 and 2.5 in every coordinate. In a flow's coordinates (NeuTra)
# the modes stay apart, however many dimensions: a map of the real line to itself cannot join them.
# Jumps beside local moves visit both, as long as the flow can be learned.

# %%
from __future__ import annotations

import math
import os

import arviz
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
SMOKE = "SMOKE" in os.environ
SHARE = 0.25

# %% [markdown]
# ## The system, in any dimension


# %%
def two_modes(dimension):
    wide = dist.Normal(torch.zeros(dimension), 4.0).to_event(1)
    places = torch.tensor([-2.5, 2.5])[:, None].expand(2, dimension)
    parts = dist.Normal(places, math.sqrt(0.5)).to_event(1)
    target = dist.MixtureSameFamily(dist.Categorical(torch.tensor([SHARE, 1 - SHARE])), parts)

    def model():
        place = pyro.sample("place", wide)
        pyro.factor("target", target.log_prob(place) - wide.log_prob(place))

    return model


# %% [markdown]
# ## The share of the smaller mode, its error, and crossings, for both samplers
# Neither is told where the modes are.


# %%
def visits(kernel):
    mcmc = phf.MCMC(kernel, 200 if SMOKE else 1000, num_chains=8, seed=1)
    mcmc.run()
    left = mcmc.get_samples(group_by_chain=True)["place"].mean(-1) < 0
    crossings = float((left[:, 1:] != left[:, :-1]).double().sum(1).mean())
    error = arviz.mcse(left.double().numpy()) if crossings else math.nan
    return float(left.double().mean()), float(error), crossings


samplers = {
    "flow jumps": (phf.FlowNUTS, (2,) if SMOKE else (2, 4, 8, 16, 32, 64)),
    "NeuTra": (lambda model: phf.NUTS(model, transport="flow"), (2,) if SMOKE else (2, 8, 32)),
}
found = {name: {} for name in samplers}
for name, (kernel, dimensions) in samplers.items():
    for dimension in dimensions:
        share, error, crossings = found[name][dimension] = visits(kernel(two_modes(dimension)))
        print(f"{name}, d={dimension}: share {share:.3f} +- {error:.3f}, {crossings:.1f} crossings")

# %% [markdown]
# ## The picture, and the check

# %%
figure, (shares, crossed) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, results in found.items():
    share, error, crossings = zip(*results.values(), strict=True)
    shares.errorbar([*results], share, torch.tensor(error).nan_to_num(0.0), fmt="o-", label=name)
    crossed.plot([*results], crossings, "o-", label=name)
shares.axhline(SHARE, color="black", lw=0.5)
shares.set(xlabel="dimension", ylabel="share of the smaller mode", xscale="log")
crossed.set(xlabel="dimension", ylabel="crossings of a chain in its draws", xscale="log")
shares.legend()
figure.savefig("dimensions.png", dpi=120)

for share, error, _ in found["flow jumps"].values():
    assert error < 0.02 or SMOKE
    assert abs(share - SHARE) < 4 * error
