"""Populations annealed to posteriors: evidence, moments and weights of modes against the truth."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import marginalize
from pyro_hamflow.flows.population import flow_for
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.tempered import GuideReference
from pyro_hamflow.smc import annealing, particles
from pyro_hamflow.smc.annealing import anneal
from pyro_hamflow.smc.machine import compiled_gradient, machine_gradient
from tests.helpers.densities import POSITIVE, WELL, many_well, two_modes
from tests.helpers.evidence import assert_evidence, share
from tests.helpers.targets import effects
from tests.helpers.zoo import SCHOOLS_SIGMA, SCHOOLS_Y

Y = torch.tensor([1.2, -0.3, 2.0, 0.4, 0.9], dtype=torch.float64)


def conjugate(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def conjugate_evidence(y):
    covariance = torch.eye(len(y)) + 4.0
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def test_conjugate_posterior():
    population = anneal(Potential(conjugate, (Y,)))
    assert_evidence(population, conjugate_evidence(Y), 0.03)
    weights, position = population.log_weights.softmax(0), population.position[:, 0]
    mean = float((weights * position).sum())
    precision = 0.25 + len(Y)
    expected = float(Y.sum()) / precision
    error = math.sqrt(1.0 / precision / len(position))
    assert abs(mean - expected) < 4.0 * error
    variance = float((weights * (position - expected).square()).sum())
    assert abs(variance * precision - 1.0) < 4.0 * math.sqrt(2.0 / len(position))


@pytest.mark.parametrize("tries", [4, 0])
def test_first_steps_that_are_too_long_are_tried_anew(monkeypatch, tries):
    """A spike in the prior is thirty times narrower than the slab, by which the first steps go."""
    monkeypatch.setattr(annealing, "_TRIES", tries)
    generator = torch.Generator().manual_seed(11)
    x, noise = torch.randn(2, 25, 8, generator=generator).double()
    y = 0.9 * x[:, 0] + 0.5 * x[:, 2] + 0.8 * noise[:, 0]
    widths = torch.tensor([0.05, 1.5]).double()
    mixing = torch.tensor([0.75, 0.25]).double()

    def model():
        parts = dist.Normal(torch.zeros(2), widths)
        prior = dist.MixtureSameFamily(dist.Categorical(mixing), parts)
        b = pyro.sample("b", prior.expand([8]).to_event(1))
        pyro.sample("y", dist.Normal(x @ b, 0.8).to_event(1), obs=y)

    torch.manual_seed(0)
    population = anneal(Potential(model), 800)
    slab = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    covariance = x * widths[slab].square()[:, None] @ x.mT + 0.64 * torch.eye(25)
    each = dist.MultivariateNormal(torch.zeros(25).double(), covariance).log_prob(y)
    truth = float((each + mixing[slab].log().sum(1)).logsumexp(0))
    assert abs(population.log_evidence - truth) < 4.0 * population.log_evidence_error
    worst = min(passage.acceptance_rate for passage in population.passages)
    assert (worst > 0.2) == (tries > 0)


def test_data_may_be_of_a_finer_type_than_the_prior():
    prior = dist.Normal(*torch.tensor([0.0, 2.0], dtype=torch.float32))

    def model(y):
        mean = pyro.sample("mean", prior)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    assert_evidence(anneal(Potential(model, (Y,))), conjugate_evidence(Y), 0.03)


def test_gradient_is_the_posteriors():
    potential = Potential(conjugate, (Y,))
    population = anneal(potential, 200)
    expected = potential.graph("gradient", 200)(population.position, population.noise)[1]
    torch.testing.assert_close(population.gradient, expected)


def test_eight_schools():
    data = (torch.as_tensor(SCHOOLS_SIGMA), torch.as_tensor(SCHOOLS_Y))
    population = anneal(Potential(schools, tuple(part.double() for part in data)))
    assert_evidence(population, -31.3114, 0.1)


def test_many_well():
    population = anneal(Potential(many_well(3)), 4000)
    assert_evidence(population, 3 * WELL, 0.1)
    for pair in range(3):
        found, error = share(population, (population.position[:, pair] > 0.0).double())
        assert abs(found - POSITIVE) < 3.0 * error
        assert error < 0.03


def test_weights_of_modes():
    population = anneal(Potential(two_modes(16)), 4000, conditional_ess=0.95)
    assert_evidence(population, 0.0, 0.1)
    found, error = share(population, (population.position.sum(-1) < 0.0).double())
    assert error < 0.03
    assert abs(found - 0.25) < 3.0 * error


def test_a_marginal_model_with_its_noise():
    marginal = marginalize(effects, ["x"], num_particles=4, proposal="prior")
    population = anneal(Potential(marginal, (Y,), separate_noise=True), 4000)
    assert population.noise.shape[0] == 4000
    covariance = torch.eye(len(Y)) + 4.0
    expected = dist.MultivariateNormal(torch.zeros(len(Y)), covariance).log_prob(Y)
    assert_evidence(population, float(expected), 0.1)


def test_from_a_guide():
    class Aside:
        fn = dist.Normal(-3.0, 1.0)

        def prepare(self, *args, **kwargs):
            pass

        def draw(self, num_samples):
            position = self.fn.sample((num_samples, 1))
            return position, self.log_ratio(position)

        def log_ratio(self, position):
            return self.fn.log_prob(position)[:, 0]

    potential = Potential(conjugate, (Y,))
    population = anneal(potential, reference=GuideReference(Aside(), potential))
    assert_evidence(population, conjugate_evidence(Y), 0.1)


def half_missing():
    """Data that allow half of the prior: three quarters of it, for two values."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    allowed = torch.where(x > 0.0, 0.0, -torch.inf)
    pyro.factor("f", allowed - 0.5 * x.square())


def test_particles_of_infinite_energy_count_as_weight_zero():
    population = anneal(Potential(half_missing), 4000)
    assert_evidence(population, math.log(0.5 / math.sqrt(2.0)), 0.05)
    assert bool((population.position[population.log_weights > -torch.inf] > 0.0).all())


def test_evidence_that_drops_infinite_particles_is_noticed(monkeypatch):
    def dropping(values):
        good = values.isfinite()
        return values.logsumexp(-1) - good.sum(-1).double().log()

    monkeypatch.setattr(particles, "log_mean_exp", dropping)
    population = anneal(Potential(half_missing), 4000)
    with pytest.raises(AssertionError):
        assert_evidence(population, math.log(0.5 / math.sqrt(2.0)), 0.05)


def test_resampling_that_ignores_weights_is_noticed(monkeypatch):
    def ignoring(log_weights):
        return torch.arange(log_weights.shape[1]).expand(log_weights.shape)

    monkeypatch.setattr(particles, "resample_systematically", ignoring)
    population = anneal(Potential(many_well(3)), 4000)
    with pytest.raises(AssertionError):
        assert_evidence(population, 3 * WELL, 0.1)


def test_a_prior_that_never_meets_the_data_is_refused():
    def impossible():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(x > 50.0, 0.0, -torch.inf))

    with pytest.raises(ValueError, match="no draw to start from has a posterior density"):
        anneal(Potential(impossible), 200)


def test_a_flow_of_some_data_is_where_to_begin_for_all():
    some = Potential(conjugate, (Y[:2],))
    population = anneal(some, 1000)
    flow = flow_for(some, population.position, population.gradient, population.log_weights)
    whole = Potential(conjugate, (Y,))
    from_flow = anneal(whole, reference=GuideReference(flow, whole))
    assert_evidence(from_flow, conjugate_evidence(Y), 0.02)
    assert len(from_flow.passages) < len(anneal(whole, 1000).passages)


def test_machine_code_moves_a_population_as_the_graph_does():
    potential = Potential(conjugate, (Y,))
    machine = compiled_gradient(potential)
    population = anneal(potential, machine=machine)
    assert_evidence(population, conjugate_evidence(Y), 0.03)
    _, gradient, _ = potential.gradients(population.position, population.noise)
    torch.testing.assert_close(population.gradient, gradient)
    torch.manual_seed(0)
    first = anneal(potential, 200, machine=machine, only_first=True)
    torch.manual_seed(0)
    second = anneal(potential, 200, only_first=True)
    torch.testing.assert_close(first.position, second.position)


def test_machine_code_is_taken_where_it_pays():
    assert machine_gradient(Potential(conjugate, (Y,)), 100) is None
    assert machine_gradient(Potential(conjugate, (Y.repeat(100),)), 2000) is not None
    marginal = marginalize(effects, ["x"], num_particles=4, proposal="prior")
    assert (
        machine_gradient(Potential(marginal, (Y.repeat(100),), separate_noise=True), 2000) is None
    )
