# %% [markdown]
# # A field on a torus: how far jumps of a flow reach
#
# Sites of a periodic L x L lattice are double wells, coupled to their neighbours. Below a critical
# coupling of about .68 the field is disordered; above it nearly all of it has one sign, which no
# local move changes. Jumps do, while the lattice is small. The flow that is built by default knows
# nothing of a lattice: at L = 8 one in twenty of its single proposals is accepted, for which 32 at
# once make up. A flow that does know has the same law at every site, correlations that depend on
# distance alone, and both signs: half of its proposals are accepted at L = 8. Three quarters are if
# every other site is drawn so, and the rest given these, which can be done exactly. What is still
# wrong is wrong everywhere, so that acceptance falls with the number of sites whatever the flow: at
# L = 14 to a fifth, and to a half. Below the critical coupling local moves do: no jumps are made.

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

# %% [markdown]
# ## The action: exp(-S) with S of links and wells

# %%
WELL = 0.5


def well(field):
    return field.square() + WELL * (field.square() - 1.0).square()


def action(field, coupling):
    links = field * (field.roll(1, -1) + field.roll(1, -2))
    return (well(field) - coupling * links).sum((-1, -2))


def lattice(size, coupling):
    prior = dist.Normal(torch.zeros(size, size), 1.0).to_event(2)
    field = pyro.sample("field", prior)
    pyro.factor("boltzmann", -action(field, coupling) - prior.log_prob(field))


# %% [markdown]
# ## A flow that knows the lattice
# Standard normal fields with the correlations of the one phase, told by Fourier transforms, and one
# bend for all sites, which takes normal quantiles to the field's. Then, if wished, sites of the
# other colour of a chequerboard: given these, they are independent of each other.

# %%
KNOTS = torch.linspace(-3.5, 3.5, 71)
GRID = torch.linspace(-4.0, 4.0, 801)  # beyond which a site has no density
NEAR = torch.linspace(-12.0, 12.0, 481)  # sums of four neighbours
APART = 10.0  # rows of a table that are searched as one


def interpolate(x, start, end):
    """Where knots are taken to others, linearly between them, and the log of the slope."""
    place = torch.searchsorted(start, x.contiguous()).clamp(1, len(start) - 1)
    slope = (end[place] - end[place - 1]) / (start[place] - start[place - 1])
    return end[place] + slope * (x - start[place]), slope.log()


class Site:
    """The law of a site given the sum of its neighbours: of the two nearest of a table, mixed."""

    def __init__(self, coupling):
        log_density = coupling * NEAR[:, None] * GRID - well(GRID)
        density = (log_density - log_density.amax(-1, keepdim=True)).exp() + 1e-9
        below = torch.nn.functional.pad((density[:, 1:] + density[:, :-1]).cumsum(-1), (1, 0))
        rows = torch.arange(len(NEAR))[:, None]
        self.levels = (rows + below / below[:, -1:]).flatten()
        self.places = (rows * APART + GRID).flatten()

    def rows(self, near):
        row = ((near - NEAR[0]) / (NEAR[1] - NEAR[0])).clamp(0.0, len(NEAR) - 2.0)
        return row.floor(), row.frac()

    def draw(self, near):
        row, share = self.rows(near)
        row = row + (torch.rand_like(row) < share)
        place, _ = interpolate(row + torch.rand_like(row), self.levels, self.places)
        return place - row * APART

    def log_density(self, x, near):
        row, share = self.rows(near)
        parts = (interpolate((row + up) * APART + x, self.places, self.levels)[1] for up in (0, 1))
        return torch.lerp(*(part.exp() for part in parts), share).log()


class OnePhase:
    """The phase of positive mean, as fields of either sign show it: a guide."""

    def __init__(self, fields, coupling, *, alternate):
        size = fields.shape[-1]
        fields = fields * fields.mean((-1, -2), keepdim=True).sign()
        self.bend = torch.quantile(fields.flatten(), torch.special.ndtr(KNOTS))
        normal, _ = interpolate(fields, self.bend, KNOTS)
        power = torch.fft.fft2(normal).abs().square().mean(0) / size**2
        correlation = torch.fft.ifft2(0.5 * (power + power.mT)).real
        row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        first = (row + column) % 2 == 0 if alternate else row >= 0
        row, column = row[first], column[first]
        covariance = correlation[row[:, None] - row, column[:, None] - column]
        self.law = dist.MultivariateNormal(torch.zeros(len(row)), covariance)
        self.first, self.site = first, Site(coupling)

    def prepare(self, *args, **kwargs):
        pass

    def near(self, field):
        """The sums of the neighbours of those sites that are not drawn first."""
        field = torch.where(self.first, field, 0.0)
        return sum(field.roll(by, axis) for by in (1, -1) for axis in (-1, -2))[:, ~self.first]

    def draw(self, num_samples):
        field = torch.zeros(num_samples, *self.first.shape)
        field[:, self.first], _ = interpolate(self.law.sample((num_samples,)), KNOTS, self.bend)
        field[:, ~self.first] = self.site.draw(self.near(field))
        position = field.flatten(1)
        return position, self.log_ratio(position)

    def log_ratio(self, position):
        field = position.reshape(-1, *self.first.shape)
        normal, log_slope = interpolate(field[:, self.first], self.bend, KNOTS)
        rest = self.site.log_density(field[:, ~self.first], self.near(field))
        return self.law.log_prob(normal) + log_slope.sum(-1) + rest.sum(-1)


# %% [markdown]
# ## Sizes: single jumps of the lattice's flow, fitted to a population and made symmetric

# %%
SIZES = (4,) if SMOKE else (4, 6, 8, 10, 12, 14)
ORDERED, DISORDERED = 0.75, 0.5
DRAWS = 30 if SMOKE else 200
MIRROR = [dist.transforms.AffineTransform(0.0, -1.0)]
found, accepted = {}, {}


def run(kernel, size, coupling, kind):
    mcmc = phf.MCMC(kernel, DRAWS, num_chains=16, seed=1)
    mcmc.run(size, coupling)
    mean = mcmc.get_samples(group_by_chain=True)["field"].mean((-1, -2))
    statistics = phf.to_inference_data(mcmc).sample_stats
    rate = float(statistics.global_accepted.mean()) if "global_accepted" in statistics else 0.0
    found[kind, size, coupling], accepted[kind, size, coupling] = mean, rate
    absolute = mean.abs().numpy()
    print(
        f"L {size}, coupling {coupling}, {kind}: E|m| {absolute.mean():.4f} +- "
        f"{arviz.mcse(absolute):.4f}, P(m > 0) {float((mean > 0).double().mean()):.3f}, "
        f"jumps accepted {rate:.3f}, of {kernel.settings['num_proposals']} proposals"
    )


def single(guide, size, coupling, kind):
    kernel = phf.FlowNUTS(lattice, guide, adapt_flow=False, num_proposals=1)
    run(kernel, size, coupling, kind)


for size in SIZES:
    population = phf.AnnealedSampler(lattice, num_particles=400 if SMOKE else 2000, seed=0)
    population.run(size, ORDERED)
    fields = population.resample(len(population.position))["field"]
    for kind, alternate in (("lattice's flow", False), ("and every other site", True)):
        guide = phf.SymmetrisedGuide(OnePhase(fields, ORDERED, alternate=alternate), MIRROR)
        single(guide, size, ORDERED, kind)

# %% [markdown]
# ## The default, with nothing to tune

# %%
for coupling in (DISORDERED,) if SMOKE else (DISORDERED, ORDERED):
    run(phf.FlowNUTS(lattice, num_particles=200 if SMOKE else 2000), 8, coupling, "default")

# %% [markdown]
# ## The picture, and the check against a cluster algorithm

# %%
TRUTH = {0.5: (0.1741, 0.0006), 0.75: (0.9467, 0.0009)}  # E|m| at L = 8, and its standard error
figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
for kind in dict.fromkeys(kind for kind, _, coupling in accepted if coupling == ORDERED):
    sizes = [size for known, size, coupling in accepted if (known, coupling) == (kind, ORDERED)]
    panel.plot(sizes, [accepted[kind, size, ORDERED] for size in sizes], "o-", label=kind)
panel.set(title=f"coupling {ORDERED}", xlabel="L", ylabel="jumps accepted", ylim=(0, 1))
panel.legend()
figure.savefig("phi4_plane.png", dpi=120)

if not SMOKE:
    for (_, size, coupling), mean in found.items():
        if size == 8:
            truth, error = TRUTH[coupling]
            absolute = mean.abs().numpy()
            assert abs(absolute.mean() - truth) < 3 * math.hypot(error, arviz.mcse(absolute))
    assert accepted["lattice's flow", 8, ORDERED] > 0.4
    assert accepted["and every other site", 8, ORDERED] > 0.6
