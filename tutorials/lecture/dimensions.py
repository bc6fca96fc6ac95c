# %% [markdown]
# # More and more dimensions: who still visits both modes?
#
# Two Gaussians of weights 1:3 at -2.5 and 2.5 in every coordinate. In a flow's coordinates (NeuTra)
# the modes stay apart, however many dimensions: a map of the real line to itself cannot join them.
# Chains that never cross keep the share that they began with: it has no error, and means nothing.
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
# Neither is told where the modes are. Where no chain crosses from one mode to the other, draws tell
# how many chains began in which, and nothing of the share.


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
        told = f"share {share:.3f} +- {error:.3f}, {crossings:.1f} crossings of each chain"
        if crossings == 0.0:
            told = (
                f"no chain crosses: {share:.3f} of them are in the smaller mode, whatever its share"
            )
        print(f"{name}, d={dimension}: {told}")

# %% [markdown]
# ## The picture, and the check

# %%
figure, (shares, crossed) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, results in found.items():
    share, error, crossings = torch.tensor([*results.values()]).mT
    (line,) = crossed.plot([*results], crossings, "o-", label=name)
    dimension, colour, still = torch.tensor([*results]), line.get_color(), crossings == 0
    known = [values[~still] for values in (dimension, share, error)]
    shares.errorbar(*known, fmt="o-", color=colour, label=name)
    if still.any():
        shares.scatter(
            dimension[still], share[still], fc="none", ec=colour, label=f"{name}: no chain crosses"
        )
shares.axhline(SHARE, color="black", lw=0.5)
shares.set(xlabel="dimension", ylabel="share of the smaller mode", xscale="log", ylim=(0, 1))
crossed.set(xlabel="dimension", ylabel="crossings of a chain in its draws", xscale="log")
shares.legend()
figure.savefig("dimensions.png", dpi=120)

if not SMOKE:
    for share, error, _ in found["flow jumps"].values():
        assert error < 0.02
        assert abs(share - SHARE) < 4 * error
    for _, error, _ in found["NeuTra"].values():  # none tells the share
        assert not error < 0.02
