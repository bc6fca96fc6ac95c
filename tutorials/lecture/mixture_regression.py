# %% [markdown]
# # Two regressions mixed: effects of groups integrated out, and jumps between labelings
#
# Each of 12 groups follows one of two lines, nobody knows which, with an effect of its own. The
# effects are integrated out by an unbiased estimate of each group's likelihood; which line is the
# first is not told by the data, so that the posterior has two modes, which are each other's mirror.
# No local move leads from one to the other, and R-hat of chains in one of them is perfect. Flow
# jumps on the marginal model do. Gaussian proposals of the effects that were fitted to one labeling
# hide the other: the run notices, and takes particles from the prior.

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

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
SMOKE = "SMOKE" in os.environ

# %% [markdown]
# ## Data: 12 groups of 6, a third of them on a falling line

# %%
GROUPS, EACH, ERROR = (8, 5, 0.5) if SMOKE else (12, 6, 0.5)
torch.manual_seed(7)
x = torch.randn(GROUPS, EACH)
falls = torch.arange(GROUPS) % 3 == 0
slopes = torch.where(falls, -0.6, 0.9)[:, None]
y = slopes * x + 0.4 * torch.randn(GROUPS, 1) + ERROR * torch.randn(GROUPS, EACH)


def regressions(x, y):
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    lines = dist.Categorical(torch.stack([share, 1.0 - share], -1))
    with pyro.plate("group", len(x)):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
        mean = effect[..., None, None] + slope[:, None] * x[..., None, :]
        rows = dist.Normal(mean, ERROR).to_event(1)
        pyro.sample("y", dist.MixtureSameFamily(lines, rows), obs=y)


# %% [markdown]
# ## The truth: given everything else an effect is Gaussian
# So it can be integrated out in closed form.


# %%
def closed_form(x, y):
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    covariance = ERROR**2 * torch.eye(EACH) + spread**2 * torch.ones(EACH, EACH)
    residual = y[:, None] - slope[:, None] * x[:, None]
    density = dist.MultivariateNormal(torch.zeros(EACH), covariance).log_prob(residual)
    both = torch.stack([share.log(), (-share).log1p()])
    pyro.factor("y", (density + both).logsumexp(-1).sum())


# %% [markdown]
# ## The run: `marginalize`, then `FlowNUTS`, with nothing to tune

# %%
marginal = phf.marginalize(regressions, ["effect"])
few = {"num_particles": 200} if SMOKE else {}
draws = {}
for name, kernel in (
    ("local moves alone", phf.PseudoMarginalNUTS(marginal)),
    ("and jumps", phf.FlowNUTS(marginal, **few)),
    ("closed form, and jumps", phf.FlowNUTS(closed_form, **few)),
):
    mcmc = phf.MCMC(kernel, 60 if SMOKE else 500, num_chains=8, seed=1)
    mcmc.run(x, y)
    draws[name] = mcmc.get_samples(group_by_chain=True)
    first = (draws[name]["slope"][..., 0] > draws[name]["slope"][..., 1]).double()
    crossed = float((first[:, 1:] != first[:, :-1]).double().mean())
    print(f"{name}: P(first is larger) {float(first.mean()):.3f}, crossings a draw {crossed:.3f}")
    names = ["share", "slope", "spread"]
    print(arviz.summary(phf.to_inference_data(mcmc), var_names=names).to_string())


# %% [markdown]
# ## The picture, and the check
# What does not depend on the labeling must agree with the closed form, and labelings are equally
# likely.


# %%
def unlabeled(found):
    """The larger slope, the smaller, the spread, and the share of groups on the rising line."""
    slope, share = found["slope"], found["share"]
    rising = torch.where(slope[..., 0] > slope[..., 1], share, 1.0 - share)
    return torch.stack([slope.amax(-1), slope.amin(-1), found["spread"], rising], -1)


shared = {"sharex": True, "sharey": True, "layout": "constrained"}
figure, panels = plt.subplots(1, len(draws), figsize=(12, 4), **shared)
for panel, (name, found) in zip(panels, draws.items(), strict=True):
    for chain in found["slope"]:
        panel.plot(*chain.mT, ".", ms=2)
    panel.set(title=name, xlabel="slope of the first line", ylabel="slope of the second")
figure.savefig("mixture_regression.png", dpi=120)

for name in ("and jumps", "closed form, and jumps"):
    first = (draws[name]["slope"][..., 0] > draws[name]["slope"][..., 1]).double()
    assert float((first[:, 1:] != first[:, :-1]).double().mean()) > 0.05
    if not SMOKE:
        assert abs(float(first.mean()) - 0.5) < 4 * float(arviz.mcse(first.numpy()))
exact, estimated = (unlabeled(draws[name]) for name in ("closed form, and jumps", "and jumps"))
for column in range(4):
    values = [part[..., column].numpy() for part in (exact, estimated)]
    error = sum(float(arviz.mcse(value)) ** 2 for value in values) ** 0.5
    if not SMOKE:
        assert abs(values[0].mean() - values[1].mean()) < 4 * error, (column, values, error)
