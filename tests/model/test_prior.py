"""Priors apart from likelihoods: their densities, and draws from them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import marginalize
from pyro_hamflow.model.function import FunctionPotential
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from tests.helpers.exact_draws import skewed, skewed_draws
from tests.helpers.targets import effects

Y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def regression(y):
    scale = pyro.sample("scale", dist.HalfCauchy(2.0))
    slope = pyro.sample("slope", dist.Normal(1.0, scale))
    pyro.factor("penalty", -slope.abs())
    pyro.deterministic("twice", 2.0 * slope)
    with pyro.plate("data", len(y)), pyro.poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(slope, 1.0), obs=y)


def switching(y):
    """A site whose prior depends on one that is summed out."""
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        x = pyro.sample("x", dist.Normal(4.0 * k.to(y.dtype), 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def test_density_is_that_of_latent_sites_alone_on_the_real_line():
    prior = Prior(Potential(regression, (Y,)))
    position = torch.tensor([[0.3, -1.2], [-2.0, 0.4]])
    scale = position[:, 0].exp()
    expected = dist.HalfCauchy(2.0).log_prob(scale) + position[:, 0]
    expected = expected + dist.Normal(1.0, scale).log_prob(position[:, 1])
    torch.testing.assert_close(prior.value(position, torch.zeros(2, 0)), -expected)


def test_sites_that_are_summed_out_stay_summed_out():
    prior = Prior(Potential(switching, (Y,)))
    position = torch.tensor([[0.0, 4.0, 2.0]])
    parts = [w * dist.Normal(m, 1.0).log_prob(position).exp() for w, m in ((0.3, 0.0), (0.7, 4.0))]
    expected = -(parts[0] + parts[1]).log().sum(-1)
    torch.testing.assert_close(prior.value(position, torch.zeros(1, 0)), expected)


def test_gradient_is_that_of_the_value():
    prior = Prior(Potential(regression, (Y,)))
    position = torch.tensor([[0.3, -1.2], [-2.0, 0.4]])
    value, gradient = prior.graph("gradient", 2)(position, torch.zeros(2, 0))
    step = torch.tensor([1e-5, 0.0])
    above, below = (prior.value(position + s * step, torch.zeros(2, 0)) for s in (1.0, -1.0))
    torch.testing.assert_close((above - below) / 2e-5, gradient[:, 0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(value, prior.value(position, torch.zeros(2, 0)))


def assert_alike(draws, exact):
    """Means and mean squares within 4 standard errors."""
    for power in (1, 2):
        a, b = draws**power, exact**power
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() < 4.0 * error).all())


def test_draws_follow_the_density():
    position, noise = Prior(Potential(skewed)).draw(4000)
    assert noise.shape == (4000, 0)
    assert_alike(position, skewed_draws(20_000))


def test_draws_of_a_site_whose_sampler_fills_tensors_in_place_differ():
    def heavy():
        with pyro.plate("three", 3):
            pyro.sample("cauchy", dist.HalfCauchy(2.0))
            pyro.sample("laplace", dist.Laplace(0.0, 1.0))
            pyro.sample("wait", dist.Exponential(3.0))

    position, _ = Prior(Potential(heavy)).draw(20_000)
    exact = torch.cat(
        [
            dist.HalfCauchy(2.0).sample((20_000, 3)).log(),
            dist.Laplace(0.0, 1.0).sample((20_000, 3)),
            dist.Exponential(3.0).sample((20_000, 3)).log(),
        ],
        1,
    )
    assert_alike(position, exact)
    correlation = torch.corrcoef(position.mT) - torch.eye(9)
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(20_000)


def test_draws_of_what_cannot_be_batched_are_made_one_after_the_other():
    def stubborn():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x if x.item() > 100.0 else -x, 0.5))

    with pytest.warns(RuntimeWarning, match="could not be captured"):
        position, _ = Prior(Potential(stubborn)).draw(2000)
    first = dist.Normal(0.0, 1.0).sample((2000,))
    assert_alike(position, torch.stack([first, dist.Normal(-first, 0.5).sample()], 1))


def test_noise_is_drawn_beside_the_parameters_of_a_marginal_model():
    marginal = marginalize(effects, ["x"], num_particles=3, proposal="prior")
    potential = Potential(marginal, (Y,), separate_noise=True)
    prior = Prior(potential)
    position, noise = prior.draw(4000)
    assert_alike(position, dist.Normal(0.0, 2.0).sample((4000, 1)))
    assert_alike(noise, torch.randn_like(noise))
    expected = -dist.Normal(0.0, 2.0).log_prob(position[:, 0])
    torch.testing.assert_close(prior.value(position, noise), expected)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (dist.ImproperUniform(dist.constraints.real, (), ()), "site 'x' is improper"),
        (dist.Normal(0.0, 1.0).mask(False), "site 'x' is masked"),  # noqa: FBT003
    ],
)
def test_a_prior_that_cannot_be_drawn_is_refused_by_name(site, message):
    def model():
        x = pyro.sample("x", site)
        pyro.factor("f", -x.square())

    with pytest.raises(ValueError, match=message + ".*: expected a proper prior, or a guide"):
        Prior(Potential(model))


def test_a_scaled_prior_is_refused_by_name():
    def model():
        with pyro.poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'x' is scaled"):
        Prior(Potential(model))


def test_a_function_has_no_prior():
    potential = FunctionPotential(lambda z: z["x"].square(), {"x": torch.zeros(())})
    with pytest.raises(ValueError, match="`potential_fn` has no prior"):
        Prior(potential)


def test_programs_of_a_prior_are_captured_once_for_a_model_and_its_data():
    def model(y):
        regression(y)

    first = Prior(Potential(model, (Y,)))
    position, noise = torch.tensor([[0.3, -1.2], [-2.0, 0.4]]), torch.zeros(2, 0)
    gradient = first.graph("gradient", 2)(position, noise)[1]
    value = first.value(position, noise)
    assert list(first.programs.captured.bases) == ["gradient"]
    again = Prior(Potential(model, (Y,)))
    assert again.programs.captured.bases["gradient"] is first.programs.captured.bases["gradient"]
    torch.testing.assert_close(again.value(position, noise), value)
    torch.testing.assert_close(again.graph("gradient", 2)(position, noise)[1], gradient)
    other = Prior(Potential(model, (Y[:2],)))
    assert other.programs.captured is not first.programs.captured


def test_a_prior_that_has_changed_is_captured_anew():
    centre = torch.zeros(())

    def model():
        pyro.sample("x", dist.Normal(centre, 1.0))

    potential = Potential(model)
    centre += 1.0
    moved = Prior(Potential(model))
    assert float(moved.value(torch.ones(1, 1), torch.zeros(1, 0))) == pytest.approx(
        0.9189, abs=1e-4
    )
    assert potential.programs.captured is not moved.potential.programs.captured
