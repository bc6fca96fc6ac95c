"""Small models, one for each feature of Pyro that a potential has to understand.

They take no arguments and make their data in torch's default type, without random numbers.
"""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

SCHOOLS_Y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
_SCALAR = torch.Size()
SCHOOLS_SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def _wave(*shape: int) -> Tensor:
    """Data without random numbers, between -1.5 and 1.5."""
    return 1.5 * torch.sin(1.7 * torch.arange(1.0, 1 + torch.Size(shape).numel())).reshape(shape)


def eight_schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        scale = torch.tensor(SCHOOLS_SIGMA)
        pyro.sample("y", dist.Normal(theta, scale), obs=torch.tensor(SCHOOLS_Y))


def eight_schools_noncentred() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("school", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        scale = torch.tensor(SCHOOLS_SIGMA)
        pyro.sample("y", dist.Normal(theta, scale), obs=torch.tensor(SCHOOLS_Y))


def correlations() -> None:
    scale = pyro.sample("scale", dist.HalfCauchy(1.0).expand([3]).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 1.5))
    with pyro.plate("data", 5):
        root = scale[:, None] * corr
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=root), obs=_wave(5, 3))


def categories() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0])))
    with pyro.plate("data", 6):
        pyro.sample("y", dist.Categorical(weights), obs=torch.tensor([0, 1, 1, 2, 2, 2]))


def families() -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Beta(1.5, rate))
    df = pyro.sample("df", dist.Uniform(2.5, 9.0))
    effect = pyro.sample("effect", dist.StudentT(df, share, 1.0 + rate))
    order = pyro.sample("order", dist.Weibull(rate, 1.5))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Laplace(effect, order), obs=_wave(4))


def gaussian_process() -> None:
    lengthscale = pyro.sample("lengthscale", dist.InverseGamma(3.0, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    x = torch.linspace(0.0, 1.0, 6)
    gap = (x[:, None] - x) / lengthscale
    covariance = (-0.5 * gap.square()).exp() + (noise.square() + 1e-3) * torch.eye(6)
    root = torch.linalg.cholesky(covariance)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(6), scale_tril=root), obs=_wave(6))


def mixture_likelihood() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    parts = dist.Normal(loc, torch.tensor([0.5, 1.0]))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=_wave(5))


def enumerated_mixture() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("component", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 5):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[label], 0.7), obs=_wave(5))


def hidden_markov() -> None:
    stay = pyro.sample("stay", dist.Beta(3.0, 1.0).expand([2]).to_event(1))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    moves = torch.stack([torch.stack([stay[0], 1 - stay[0]]), torch.stack([1 - stay[1], stay[1]])])
    state = 0
    for step in pyro.markov(range(3)):
        state = pyro.sample(f"state_{step}", dist.Categorical(moves[state]))
        pyro.sample(f"y_{step}", dist.Normal(loc[state], 1.0), obs=_wave(3)[step])


def weighted_terms() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -a.pow(4))
    with poutine.scale(scale=0.3), pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(a, 1.0), obs=_wave(4))
    with pyro.plate("partial", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("z", dist.Normal(a.exp(), 1.0), obs=_wave(3))


def learned_parameter() -> None:
    scale = pyro.param("scale", torch.tensor(1.3), constraint=dist.constraints.positive)
    a = pyro.sample("a", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.4))


class Network(PyroModule):
    """A Bayesian neural network with one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = PyroModule[torch.nn.Linear](2, 3)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        self.out = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self) -> None:
        mean = torch.tanh(self.hidden(_wave(6, 2))) @ self.out
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=_wave(6))


@functools.cache
def _network() -> Network:
    return Network()


def network() -> None:
    _network()()


def nested_plates() -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("district", 3, dim=-2):
        district = pyro.sample("district_effect", dist.Normal(top, 1.0))
        with pyro.plate("school", 2, dim=-1):
            school = pyro.sample("school_effect", dist.Normal(district, 0.5))
            with pyro.plate("pupil", 4, dim=-3):
                pyro.sample("y", dist.Normal(school, 1.0), obs=_wave(4, 3, 2))


def in_place_writes() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    path = torch.zeros(4)
    path[0] = a
    for step in range(1, 4):
        path[step] = 0.5 * path[step - 1] + b.tanh()
    path[1:3] += a * b
    pyro.sample("y", dist.Normal(path, 1.0).to_event(1), obs=_wave(4))


class Shaped(dist.TorchDistribution):
    """A density that has a support and nothing else."""

    def __init__(self, support, example, log_prob) -> None:
        self._support, self._example, self._log_prob = support, example, log_prob
        super().__init__(torch.Size(), example.shape, validate_args=False)

    @property
    def support(self):
        return self._support

    def sample(self, sample_shape: torch.Size = _SCALAR) -> Tensor:
        return self._example.expand(sample_shape + self._example.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_prob(value)


def constraints() -> None:
    angle = pyro.sample("angle", dist.SoftLaplace(0.3, 2.0))
    box = pyro.sample(
        "box", Shaped(dist.constraints.interval(-1.0, 2.0), torch.tensor(0.5), lambda x: -x)
    )
    ordered = pyro.sample(
        "ordered",
        Shaped(
            dist.constraints.ordered_vector,
            torch.tensor([-1.0, 0.0, 2.0]),
            lambda x: dist.Normal(0.0, 1.0).log_prob(x).sum(-1),
        ),
    )
    level = ordered.sum() * box + angle.sin()
    pyro.sample("y", dist.Normal(level, 1.0), obs=torch.tensor(0.2))


def random_walk() -> None:
    step = pyro.sample("step", dist.LogNormal(-1.0, 0.5))
    moves = pyro.sample("moves", dist.Normal(0.0, step).expand([4]).to_event(1))
    path = torch.cumsum(moves, -1)
    pyro.sample("y", dist.Poisson(path.exp()).to_event(1), obs=torch.tensor([1.0, 0.0, 3.0, 2.0]))


def truncated_steps() -> None:
    """Elementwise selection and sorting, which need no control flow."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    level = torch.where(a > 0.2, a, a.square()).clamp(max=2.0).sort().values
    pyro.sample("y", dist.Normal(level.cumsum(-1), 1.0).to_event(1), obs=_wave(3))


ZOO = {
    model.__name__: model
    for model in (
        eight_schools,
        eight_schools_noncentred,
        correlations,
        categories,
        families,
        gaussian_process,
        mixture_likelihood,
        enumerated_mixture,
        hidden_markov,
        weighted_terms,
        learned_parameter,
        network,
        nested_plates,
        in_place_writes,
        constraints,
        random_walk,
        truncated_steps,
    )
}
