"""How people write models: modules, constants of a file, writes in place, masks, missing data."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.nn.functional import softplus

from benchmarks.coverage_models.data import (
    Collection,
    binary,
    counts,
    labels,
    members,
    missing,
    normal,
    positive,
)

IDIOMS = Collection()

_ZERO, _ONE = torch.tensor([0.0, 1.0], dtype=torch.float64)
_SLOPE = dist.Normal(_ZERO, _ONE)
_SCALE = dist.HalfNormal(2.0 * _ONE)


@IDIOMS.case(x=normal(40), y=normal(40))
def priors_of_the_file(x, y):
    slope = pyro.sample("slope", _SLOPE)
    scale = pyro.sample("scale", _SCALE)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(slope * x, scale), obs=y)


_PRIORS = {
    "level": dist.Normal(_ZERO, _ONE),
    "share": dist.Beta(2.0 * _ONE, 2.0 * _ONE),
    "rates": dist.Gamma(2.0 * _ONE, _ONE).expand([3]).to_event(1),
    "weights": dist.Dirichlet(_ONE.expand(3)),
}


@IDIOMS.case(group=members(30, 3), y=positive(30))
def priors_in_a_dictionary(group, y):
    draws = {name: pyro.sample(name, prior) for name, prior in _PRIORS.items()}
    rate = draws["rates"][group] * (1 + draws["share"]) * draws["weights"].max()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Gamma(1.0 + draws["level"].exp(), rate), obs=y)


class BayesianRegression(PyroModule):
    """The linear layer of Pyro's regression tutorial."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


IDIOMS.case(x=normal(80, 3), y=normal(80))(BayesianRegression)


class BayesianNetwork(PyroModule):
    """Two hidden layers, all weights with priors."""

    def __init__(self):
        super().__init__()
        sizes = [2, 6, 6, 1]
        layers = [
            PyroModule[torch.nn.Linear](i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True)
        ]
        self.layers = PyroModule[torch.nn.ModuleList](layers)
        for layer in self.layers:
            o, i = layer.weight.shape
            scale = math.sqrt(2.0 / i)
            layer.weight = PyroSample(dist.Normal(0.0, scale).expand([o, i]).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([o]).to_event(1))

    def forward(self, x, y):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        mean = self.layers[-1](x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.Gamma(0.5, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean, sigma.square() + 1e-3), obs=y)


IDIOMS.case(x=normal(30, 2), y=normal(30))(BayesianNetwork)


class LiftedNetwork(PyroModule):
    """Priors set in a loop over the parameters of an ordinary network."""

    def __init__(self):
        super().__init__()
        net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
        pyro.nn.module.to_pyro_module_(net)
        for module in net.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
                setattr(module, name, PyroSample(prior))
        self.net = net

    def forward(self, x, y):
        logits = self.net(x)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


IDIOMS.case(x=normal(30, 2), y=labels(30, of=3))(LiftedNetwork)


class DependentPriors(PyroModule):
    """A prior that is a function of the module, and a learnt constant."""

    def __init__(self):
        super().__init__()
        self.spread = PyroSample(dist.HalfNormal(1.0))
        self.floor = PyroParam(torch.tensor(0.1), constraint=dist.constraints.positive)
        self.effect = PyroSample(
            lambda self: dist.Normal(0.0, self.spread + self.floor).expand([5]).to_event(1)
        )

    @pyro.nn.pyro_method
    def mean(self, group):
        return self.effect[group]

    def forward(self, group, y):
        mean = self.mean(group)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


IDIOMS.case(group=members(25, 5), y=normal(25))(DependentPriors)


@IDIOMS.case(y=normal(12, 4))
def columns_written_in_place(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 0.5))
    mu = torch.zeros(12, 4)
    mu[:, 0] = a[0]
    for t in range(1, 4):
        mu[:, t] = a[t] + b * (y[:, t - 1] - mu[:, t - 1])
    mu[:-1] += 0.1 * b
    with pyro.plate("row", 12, dim=-2), pyro.plate("column", 4, dim=-1):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@IDIOMS.case(y=normal(10, 3))
def diagonal_written_in_place(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    coupling = pyro.sample("coupling", dist.Normal(0.0, 0.1))
    covariance = coupling.tanh() * torch.full((3, 3), 0.2)
    covariance.fill_diagonal_(0.0)
    covariance = covariance + torch.diag_embed(scale.expand(3))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), covariance), obs=y)


@IDIOMS.case(y=normal(30), observed=labels(30, of=2))
def boolean_writes(y, observed):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    seen = observed.bool()
    log_density = torch.zeros(len(y))
    log_density[seen] = dist.Normal(mu, sigma).log_prob(y[seen])
    log_density[~seen] = (1 - dist.Normal(mu, sigma).cdf(y[~seen])).clamp(min=1e-8).log()
    pyro.factor("censored", log_density.sum())


@IDIOMS.case(y=normal(20), observed=labels(20, of=2))
def boolean_reads(y, observed):
    with pyro.plate("unit", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    seen = observed.bool()
    pyro.sample("y", dist.Normal(x[seen], 0.5).to_event(1), obs=y[seen])


@IDIOMS.case(y=missing(normal(40)), x=normal(40))
def missing_by_index(y, x):
    a, b = pyro.sample("line", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    seen = ~y.isnan()
    with pyro.plate("data", int(seen.sum())):
        pyro.sample("y", dist.Normal(a + b * x[seen], 1.0), obs=y[seen])


@IDIOMS.case(y=missing(normal(40)), x=normal(40))
def missing_filled(y, x):
    """Numbers in place of missing ones, under a mask."""
    a, b = pyro.sample("line", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y.nan_to_num())


@IDIOMS.case(y=missing(normal(40)))
def missing_written_in(y):
    """Sites in the place of missing numbers, in a copy of the data."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    gaps = y.isnan()
    unseen = dist.Normal(mean, 1.0).expand([int(gaps.sum())]).to_event(1).mask(False)
    full = y.clone()
    full[gaps] = pyro.sample("unseen", unseen)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=full)


@IDIOMS.case(y=counts(20, 4))
def multinomial(y):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("data", len(y)):
        total = int(y.sum(-1).max())
        padded = torch.cat([y, (total - y.sum(-1))[:, None]], -1)
        family = dist.Multinomial(total, torch.cat([share, torch.ones(1)]) / 2)
        pyro.sample("y", family, obs=padded)


@IDIOMS.case(y=normal(30), weight=positive(30))
def weighted(y, weight):
    """Weights of a survey, and a penalty."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    scale = softplus(pyro.sample("raw", dist.Normal(0.0, 1.0)))
    with pyro.plate("data", len(y)), poutine.scale(scale=weight):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)
    pyro.factor("penalty", -0.5 * (mu * scale).square())


@IDIOMS.case(y=normal(3, 5), seen=binary(3, 5))
def loops_over_plates(y, seen):
    """Sequential plates, and a branch that follows the data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("row", 3):
        row = pyro.sample(f"row_{i}", dist.Normal(mu, 1.0))
        for j in pyro.plate(f"column_{i}", 5):
            if seen[i, j]:
                pyro.sample(f"y_{i}_{j}", dist.Normal(row, 1.0), obs=y[i, j])


@IDIOMS.case(y=normal(40), group=labels(40, of=4))
def scatter_and_gather(y, group):
    """Sums by group with scattered additions."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([40]).to_event(1))
    total = torch.zeros(4).scatter_add(0, group, x)
    number = torch.bincount(group, minlength=4).clamp(min=1)
    mean = total / number
    pyro.sample("y", dist.Normal(mean.gather(0, group), 1.0).to_event(1), obs=y)


@IDIOMS.case(y=normal(20))
def truncated_prior(y):
    """A normal cut off at zero, from a uniform number."""
    floor = dist.Normal(0.0, 1.0).cdf(torch.tensor(0.0))
    share = pyro.sample("share", dist.Uniform(0.001, 0.999))
    mu = pyro.deterministic("mu", dist.Normal(0.0, 1.0).icdf(floor + share * (1 - floor)))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([20]).to_event(1), obs=y)


@IDIOMS.case(y=positive(25), x=normal(25))
def transformed_likelihood(y, x):
    """A likelihood made of a chain of transforms."""
    a, b = pyro.sample("line", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    base = dist.Normal(a + b * x, 1.0)
    family = dist.TransformedDistribution(
        base, [dist.transforms.AffineTransform(0.1, 0.5), dist.transforms.ExpTransform()]
    )
    with pyro.plate("data", len(y)):
        pyro.sample("y", family, obs=y)
