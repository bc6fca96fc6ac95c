# %% [markdown]
# # The Müller-Brown potential: weights, walks, gradients, jumps
#
# Three valleys joined by bent passes are a chemist's picture of a reaction. Importance sampling
# from one Gaussian is ruled by the Gaussian's width; a random walk and Langevin moves stay in the
# valley where they begin; a flow that has seen all valleys jumps between them.

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
# ## The system: density exp(-U / kT) on the plane
# Pyro wants a prior: a wide Gaussian, which the factor takes away again.

# %%
TEMPERATURE = 15.0
DEEPEST, RIGHT = torch.tensor([-0.558, 1.442]), torch.tensor([0.623, 0.028])
DEPTH = torch.tensor([-200.0, -100.0, -170.0, 15.0])
CENTRE = torch.tensor([[1.0, 0.0], [0.0, 0.5], [-0.5, 1.5], [-1.0, 1.0]])
SHAPE = torch.tensor([[-1.0, 0, -10], [-1.0, 0, -10], [-6.5, 11, -6.5], [0.7, 0.6, 0.7]])
WIDE = dist.Normal(torch.tensor([-0.2, 0.7]), 1.0).to_event(1)


def energy(place):
    east, north = (place[..., None, :] - CENTRE).unbind(-1)
    exponent = SHAPE[:, 0] * east**2 + SHAPE[:, 1] * east * north + SHAPE[:, 2] * north**2
    return (DEPTH * exponent.exp()).sum(-1)


def muller_brown():
    place = pyro.sample("place", WIDE)
    pyro.factor("boltzmann", -energy(place) / TEMPERATURE - WIDE.log_prob(place))


def upper_valley(place):
    return place[..., 1] - place[..., 0] > 1.2


# %% [markdown]
# ## The truth, on a grid

# %%
axes = torch.linspace(-2.0, 1.5, 1001), torch.linspace(-0.75, 2.5, 1001)
grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
log_density = -energy(grid) / TEMPERATURE
log_z = float(log_density.flatten().logsumexp(0) + cell.log())
truth = float(((log_density - log_z).exp() * cell)[upper_valley(grid)].sum())
print(f"on a grid: log Z {log_z:.4f}, share of the upper valley {truth:.4f}")

# %% [markdown]
# ## Importance sampling from a Gaussian at the deepest point
# Too narrow, and the other valleys are missed with a small error and nothing to tell of it; too
# wide, and few draws count.


# %%
class Gaussian:
    """A guide of one's own: where it draws, and how likely."""

    def __init__(self, variance):
        self.normal = dist.Normal(DEEPEST, variance**0.5).to_event(1)

    def prepare(self, *args, **kwargs):
        pass

    def draw(self, num_samples):
        place = self.normal.sample((num_samples,))
        return place, self.normal.log_prob(place)


variances = [0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 5.0]
weighted = [
    phf.importance_sample(muller_brown, Gaussian(v), num_samples=10_000, seed=0) for v in variances
]
for variance, found in zip(variances, weighted, strict=True):
    share = float(found.mean(upper_valley(found.samples["place"]).double()))
    print(
        f"variance {variance:4.2f}: log Z {found.log_evidence:7.4f}, k {found.pareto_k:5.2f}, "
        f"ESS {found.ess:6.0f}, share {share:.4f}"
    )

# %% [markdown]
# ## Chains: a random walk, Langevin moves, and NUTS with jumps
# Four chains start on the right, four at the deepest point, but for `FlowNUTS`, which looks for the
# valleys itself.

# %%
begin = {"place": torch.cat([RIGHT.expand(4, 2), DEEPEST.expand(4, 2)])}
kernels = {
    "random walk": (phf.RandomWalk(muller_brown), begin),
    "MALA": (phf.MALA(muller_brown), begin),
    "NUTS and a flow": (phf.FlowNUTS(muller_brown), None),
}
draws, crossed = {}, {}
for name, (kernel, start) in kernels.items():
    mcmc = phf.MCMC(kernel, 200 if SMOKE else 1000, num_chains=8, seed=1, initial_params=start)
    mcmc.run()
    draws[name] = mcmc.get_samples(group_by_chain=True)["place"]
    up = upper_valley(draws[name])
    crossed[name] = float((up[:, 1:] != up[:, :-1]).double().sum(1).mean())
    share = float(up.double().mean())
    print(f"{name}: share {share:.3f}, crossings of a chain {crossed[name]:.1f}")

# %% [markdown]
# ## The picture, and the check

# %%
figure, panels = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
panels[0].semilogx(variances, [found.ess for found in weighted], "o-")
panels[0].set(xlabel="variance of the proposal", ylabel="ESS of 10,000", title="weights")
for panel, (name, places) in zip(panels[1:], draws.items(), strict=True):
    panel.contour(*axes, log_density.mT, levels=torch.arange(-6.0, 12.0, 1.5), cmap="viridis")
    panel.plot(*places[0].mT, ".-", lw=0.3, ms=2, color="tab:red")
    panel.set(title=f"{name}: one chain", xlim=(-1.5, 1.2), ylim=(-0.4, 2.1))
figure.savefig("muller_brown.png", dpi=120)

error = arviz.mcse(upper_valley(draws["NUTS and a flow"]).double().numpy())
assert abs(share - truth) < 4 * error, (share, truth, error)
wide = weighted[variances.index(1.0)]
assert abs(wide.log_evidence - log_z) < 4 * wide.log_evidence_error
assert crossed["NUTS and a flow"] > 10 * max(crossed["MALA"], 0.2)
