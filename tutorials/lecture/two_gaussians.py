# %% [markdown]
# # Two Gaussians: how a flow loses a mode, and how it is found
#
# A flow trained by the reverse divergence alone settles on one mode and reports an excellent bound.
# A flow trained beside one walker learns the mode in which the walker stays; beside walkers in
# both it learns both. A population that cools from the prior needs no such hint.

# %%
from __future__ import annotations

import os

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
    make = lambda features: zuko.flows.NSF(features, transforms=3, hidden_features=(32, 32))
    return phf.AutoFlow(two_gaussians, make, start=start)


def trained(start, loss):
    guide = spline_flow(start)
    phf.fit_guide(two_gaussians, guide, loss=loss, num_steps=STEPS, seed=1, disable_progbar=True)
    return guide


at_one_mode = dist.Normal(torch.tensor([3.0, 0.0]), 1.0).to_event(1)
collapsed = trained(at_one_mode, phf.ReverseKL())
weighted = phf.importance_sample(two_gaussians, collapsed, seed=0)
print("reverse divergence:", share_left(collapsed.draw(4000)[0]), weighted, weighted.message)
