"""Pyro's larger examples: forecasting, epidemics, deep families, its `contrib` modules."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.autoname import scope
from pyro.contrib.epidemiology.models import OverdispersedSIRModel, SimpleSIRModel
from pyro.contrib.forecast import ForecastingModel
from pyro.infer.reparam import DiscreteCosineReparam, HaarReparam
from pyro.nn import PyroModule
from pyro.poutine import reparam

from benchmarks.coverage_models.data import Collection, binary, counts, normal

EXAMPLES = Collection()


class Forecast(ForecastingModel):
    """Pyro's first forecasting tutorial: a linear predictor and a local level."""

    def model(self, zero_data, covariates):
        bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
        weight = pyro.sample("weight", dist.Normal(0.0, 0.1).expand([2]).to_event(1))
        with self.time_plate:
            jumps = pyro.sample("jumps", dist.Normal(0.0, 0.1).expand([1]).to_event(1))
        prediction = bias + (weight * covariates).sum(-1, keepdim=True) + jumps.cumsum(-2)
        scale = pyro.sample("scale", dist.LogNormal(-2.0, 2.0))
        self.predict(dist.Normal(0.0, scale), prediction)


EXAMPLES.case(data=normal(20, 1), covariates=normal(20, 2))(Forecast)


@EXAMPLES.case(y=normal(16))
def cosine_reparametrised(y):
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
    with reparam(config={"path": DiscreteCosineReparam()}):
        steps = dist.Normal(0.0, 1.0).expand([16]).to_event(1)
        path = pyro.sample("path", steps)
    pyro.sample("y", dist.Normal(scale * path.cumsum(-1), 1.0).to_event(1), obs=y)


@EXAMPLES.case(y=normal(16))
def haar_reparametrised(y):
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
    with reparam(config={"path": HaarReparam()}):
        path = pyro.sample("path", dist.Normal(0.0, scale).expand([16]).to_event(1))
    pyro.sample("y", dist.Normal(path, 1.0).to_event(1), obs=y)


class _Epidemic(torch.nn.Module):
    """One of Pyro's compartment models as MCMC sees it: real numbers, by matched moments."""

    def compartments(self, cases):
        return SimpleSIRModel(population=100, recovery_time=4.0, data=cases)

    def forward(self, cases):
        inner = self.compartments(cases)
        inner.num_quant_bins, inner.relaxed = 1, True
        inner._relaxed_model()


class RelaxedEpidemic(_Epidemic):
    """The simplest of them."""


EXAMPLES.case(cases=counts(8, rate=2.0))(RelaxedEpidemic)


class OverdispersedEpidemic(_Epidemic):
    """Infections that cluster."""

    def compartments(self, cases):
        return OverdispersedSIRModel(population=100, recovery_time=4.0, data=cases)


EXAMPLES.case(cases=counts(8, rate=2.0))(OverdispersedEpidemic)


@EXAMPLES.case(x=counts(6, 5))
def sparse_gamma_family(x):
    """Three layers of gamma variables."""
    wide, narrow = 4, 3
    bottom = pyro.sample("bottom", dist.Gamma(0.3, 0.3).expand([wide, 5]).to_event(2))
    top = pyro.sample("top", dist.Gamma(0.3, 0.3).expand([narrow, wide]).to_event(2))
    with pyro.plate("data", len(x)):
        z_top = pyro.sample("z_top", dist.Gamma(0.3, 0.3).expand([narrow]).to_event(1))
        mean = z_top @ top
        z = pyro.sample("z", dist.Gamma(0.3, 0.3 / mean.clamp(min=1e-3)).to_event(1))
        pyro.sample("x", dist.Poisson((z @ bottom).clamp(min=1e-3)).to_event(1), obs=x)


@EXAMPLES.case(y=normal(20))
def scoped(y):
    """Names by scopes."""

    @scope(prefix="group")
    def group():
        return pyro.sample("mean", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.HalfNormal(1.0))

    mean, scale = group()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


@EXAMPLES.case(steps=normal(5, 3), pixels=binary(5, 4))
def deep_markov(steps, pixels):
    """A small deep Markov model whose weights are latent, and its path."""
    gate = pyro.sample("gate", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
    emission = pyro.sample("emission", dist.Normal(0.0, 1.0).expand([2, 4]).to_event(2))
    z = torch.zeros(2)
    for t in pyro.markov(range(len(pixels))):
        share = torch.sigmoid(z @ gate)
        mean = share * torch.tanh(z @ gate.mT) + (1 - share) * z
        z = pyro.sample(f"z_{t}", dist.Normal(mean, 0.5).to_event(1))
        family = dist.Bernoulli(logits=z @ emission).to_event(1)
        pyro.sample(f"x_{t}", family, obs=pixels[t])


class Decoder(PyroModule):
    """A decoder with learnt weights; the codes are sampled."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 5), torch.nn.Softplus(), torch.nn.Linear(5, 6)
        )

    def forward(self, x):
        pyro.module("decoder", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


EXAMPLES.case(x=binary(8, 6))(Decoder)


@EXAMPLES.case(time=normal(30), arm=binary(30), y=normal(30))
def prior_elicitation(time, arm, y):
    """Effects of a treatment over time, a covariance of coefficients known from elicitation."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.2, 0.1, 0.5]])
    coefficient = pyro.sample(
        "coefficient", dist.MultivariateNormal(torch.zeros(3), scale_tril=root)
    )
    precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
    x = torch.stack([torch.ones(30), time, arm], -1)
    scale = precision.rsqrt()
    pyro.sample("y", dist.Normal(x @ coefficient, scale).to_event(1), obs=y)


@EXAMPLES.case(distance=normal(25), hit=binary(25))
def logistic_growth(distance, hit):
    """Growth to a plateau, a share of answers guessed."""
    plateau = pyro.sample("plateau", dist.Beta(5.0, 2.0))
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    middle = pyro.sample("middle", dist.Normal(0.0, 1.0))
    share = 0.05 + 0.9 * plateau * torch.sigmoid(rate * (distance - middle))
    with pyro.plate("trial", len(hit)):
        pyro.sample("hit", dist.Bernoulli(share), obs=hit)
