"""Sites of the likelihood follow the parameters that move it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf
from pyro_hamflow.marginal.likelihood_site import LikelihoodSite
from pyro_hamflow.model.potential import Potential

TIMES = torch.tensor([-0.5, 0.2, 1.3], dtype=torch.float64)


def parameters():
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    gap = pyro.sample("gap", dist.LogNormal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    return beta[0] + beta[1] * TIMES + gap, s


def one(y):
    line, s = parameters()
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(0.3, s))
        with pyro.plate("visit", 3, dim=-1):
            pyro.sample("y", dist.Normal(x + line, 0.9), obs=y)


def two(y):
    line, s = parameters()
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(0.3, s))
        w = pyro.sample("w", dist.Normal(0.5 * x, 0.7))
        with pyro.plate("visit", 3, dim=-1):
            pyro.sample("y", dist.Normal(x + w * TIMES + line, 0.9), obs=y)


def nested(y):
    line, s = parameters()
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(0.3, s))
        with pyro.plate("visit", 3, dim=-1):
            w = pyro.sample("w", dist.Normal(0.5 * x, 0.7))
            pyro.sample("y", dist.Normal(w + line, 0.9), obs=y)


def vector(y):
    line, s = parameters()
    root = torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=s * root))
        with pyro.plate("visit", 3, dim=-1):
            mean = x[..., 0] + x[..., 1] * TIMES + line
            pyro.sample("y", dist.Normal(mean, 0.9), obs=y)


Y = torch.tensor([[0.3, 1.2, 2.0], [-1.0, 0.4, -0.3], [2.2, 0.9, 1.0]], dtype=torch.float64)
MODELS = {"one": (one, ["x"]), "two": (two, ["x", "w"]), "vector": (vector, ["x"])} | {
    "nested": (nested, ["x", "w"])
}


def here(intercept, slope, gap, s):
    values = {"beta": torch.tensor([intercept, slope]), "gap": torch.tensor(gap)}
    return {name: v.double() for name, v in (values | {"s": torch.tensor(s)}).items()}


def spread(model, sites, y, at, fitted_at):
    """The standard deviation of the log estimate, where the proposal was fitted elsewhere."""
    marginal = phf.marginalize(model, sites, num_particles=4, proposal="laplace")
    marginal.fit(y, pilot=fitted_at)
    return phf.estimator_quality(marginal, at, y).standard_deviation


@pytest.mark.parametrize(("model", "sites"), MODELS.values(), ids=MODELS)
def test_estimate_of_a_gaussian_model_hardly_varies_anywhere(model, sites, monkeypatch):
    """There the proposal is the posterior itself: nothing is left that could vary."""
    fitted_at, at = here(0.0, 0.0, 1.0, 0.8), here(1.5, -1.0, 2.0, 0.8)
    assert spread(model, sites, Y, fitted_at, fitted_at) < 0.07  # a quarter comes from the prior
    assert spread(model, sites, Y, at, fitted_at) < (0.2 if model is nested else 0.07)
    monkeypatch.setattr(LikelihoodSite, "moved", lambda site, shift: site)
    assert spread(model, sites, Y, at, fitted_at) > 0.5


def test_what_does_not_move_a_site_is_not_followed():
    marginal = phf.marginalize(one, ["x"], proposal="laplace")
    marginal.fit(Y, pilot=here(0.0, 0.0, 1.0, 0.8))
    anchor = marginal.proposal.fitted.anchor
    assert anchor.followed == ("beta", "gap")
    assert torch.allclose(anchor.shift(here(1.5, -1.0, 2.0, 3.0)), torch.tensor([1.5, -1.0, 1.0]))


def counts(y):
    level = pyro.sample("level", dist.Normal(0.0, 10.0))
    with pyro.plate("subject", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, 0.6))
        pyro.sample("y", dist.Poisson((level + u).exp()), obs=y)


def differences_with_the_noise_held(y):
    """Of the log likelihood between two levels: the estimate's, its error, and by quadrature."""
    low, high = (torch.tensor([level], dtype=torch.float64) for level in (2.9, 3.2))
    marginal = phf.marginalize(counts, ["u"], num_particles=2, proposal="laplace")
    marginal.fit(y, pilot={"level": torch.tensor(3.0).double()})
    potential = Potential(marginal, (y,), separate_noise=True)
    noise = potential.draw_noise(500)
    values = [potential.value(level.expand(500, 1), noise) for level in (low, high)]
    grid = torch.linspace(-4.0, 4.0, 8001)[:, None]

    def exact(level):
        joint = dist.Normal(0.0, 0.6).log_prob(grid) + dist.Poisson((level + grid).exp()).log_prob(
            y
        )
        return joint.logsumexp(0).sum() + dist.Normal(0.0, 10.0).log_prob(level).sum()

    return values[0] - values[1], exact(high) - exact(low)


def test_estimate_follows_the_likelihood_while_its_noise_is_held(monkeypatch):
    """So parameters move as freely with the noise held as if there were none."""
    y = dist.Poisson((3.0 + 0.6 * torch.randn(100)).exp()).sample()
    found, exact = differences_with_the_noise_held(y)
    assert (found - exact).abs().mean() < 0.4
    monkeypatch.setattr(LikelihoodSite, "moved", lambda site, shift: site)
    found, _ = differences_with_the_noise_held(y)
    assert (found - exact).abs().mean() > 4.0
