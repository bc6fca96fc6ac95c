"""Flows between temperatures: whatever they have learned, the evidence is right."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import AFT, CRAFT, AnnealedSampler
from pyro_hamflow.flows.near_identity import NearIdentity
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.model.tempered import TemperedTarget
from pyro_hamflow.smc.annealing import find_schedule, follow
from pyro_hamflow.smc.particles import Particles
from pyro_hamflow.smc.resampling import conditional_size
from pyro_hamflow.smc.transport import flow_to
from tests.helpers.densities import normal, of_density, two_modes
from tests.helpers.evidence import assert_evidence, share


def far():
    """A normal posterior far from its prior: a flow can carry one onto the other."""
    x = pyro.sample("x", normal(2, 1.0))
    pyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=torch.tensor([2.0, -1.0]))


FAR = float(dist.Normal(0.0, 1.09**0.5).log_prob(torch.tensor([2.0, -1.0])).sum())


def bent():
    """A curved density of two modes, by the logarithms of its two parts."""

    def log_density(x):
        parts = [normal(2, 0.7).log_prob(x - m) for m in (-1.5, 1.5)]
        return torch.logaddexp(parts[0] + math.log(0.3), parts[1] + math.log(0.7))

    return of_density(normal(2, 2.0), log_density)


def of_asymmetric():
    """The two-dimensional mixture of the paper on annealed flow transport; its evidence is one."""
    narrow = torch.tensor([[0.7, 0.0], [0.0, 0.05]])
    slanted = torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    centres = [torch.tensor(m) for m in ([3.0, 0.0], [-2.5, 0.0], [2.0, 3.0])]
    parts = [
        dist.MultivariateNormal(m, c)
        for m, c in zip(centres, (narrow, narrow, slanted), strict=True)
    ]

    def log_density(x):
        terms = [part.log_prob(point) for part in parts for point in (x, x.flip(-1))]
        return torch.stack(terms).logsumexp(0) - math.log(6.0)

    return of_density(normal(2, 3.0), log_density)


def random_flow(scale=0.1):
    flow = NearIdentity(torch.tensor([0.3, -0.2]), torch.tensor([[1.0, 0.0], [0.5, 2.0]]), 4, (8,))
    with torch.no_grad():
        for part in flow.parameters():
            part.add_(scale * torch.randn_like(part))
    return flow.requires_grad_(False)


def test_growth_of_volume_is_that_of_the_map():
    flow, x = random_flow(), torch.randn(20, 2)
    moved, growth = flow(x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: flow(row[None])[0][0]))(x)
    torch.testing.assert_close(growth, torch.linalg.slogdet(jacobian)[1])
    assert float((moved - x).abs().max()) > 0.1


def test_begins_as_the_identity():
    flow = NearIdentity(torch.ones(3), 2.0 * torch.eye(3), 4, (8,))
    x = torch.randn(5, 3)
    moved, growth = flow(x)
    torch.testing.assert_close(moved, x)
    torch.testing.assert_close(growth, torch.zeros(5))


def path(model):
    potential = Potential(model)
    return TemperedTarget(Prior(potential), potential)


def evidences(model, change, *, num_replicates=200, seed=0):
    """Ratios of estimates to the truth, of populations that nothing is learned from."""
    torch.manual_seed(seed)
    target = path(model)
    schedule, *_ = find_schedule(target, (8, 100), 0.5, 1, None, None)
    population = follow(target, (num_replicates, 20), change(schedule), 1, 0, None, moves_on=False)
    return population.parts_log_evidence.exp()


def assert_unbiased(ratios):
    error = float(ratios.std()) / math.sqrt(len(ratios))
    assert abs(float(ratios.mean()) - 1.0) < 3.0 * error
    return error


def with_random_flows(schedule):
    return [replace(rung, flow=random_flow()) for rung in schedule]


def test_evidence_has_no_bias_by_any_flow():
    assert assert_unbiased(evidences(bent(), with_random_flows)) < 0.1


def test_evidence_has_no_bias_without_flows():
    assert assert_unbiased(evidences(bent(), lambda schedule: schedule)) < 0.1


def test_weights_without_the_growth_of_volume_are_noticed(monkeypatch):
    forward = NearIdentity.forward

    def still(self, position):
        moved, growth = forward(self, position)
        return moved, torch.zeros_like(growth)

    monkeypatch.setattr(NearIdentity, "forward", still)
    with pytest.raises(AssertionError):
        assert_unbiased(evidences(bent(), with_random_flows))


@pytest.mark.parametrize("flow", [AFT(num_steps=100), CRAFT(num_passes=60)])
def test_trained_flows_have_no_bias(flow):
    torch.manual_seed(0)
    sampler = AnnealedSampler(bent(), flow, num_particles=4000, num_replicates=200, num_moves=1)
    sampler.run()
    ratios = sampler.population.parts_log_evidence.exp()
    assert assert_unbiased(ratios) < 0.05
    found, error = share(sampler.population, (sampler.position.sum(-1) < 0.0).double())
    assert abs(found - 0.3) < 3.0 * error and error < 0.03


@pytest.mark.parametrize(
    "flow",
    [
        AFT(num_layers=0, learning_rate=0.03),
        CRAFT(num_layers=0, learning_rate=0.06, num_passes=80, num_particles=128),
    ],
)
def test_flows_carry_a_normal_to_another(flow):
    plain = AnnealedSampler(far, conditional_ess=0.2, seed=0)
    carried = AnnealedSampler(far, flow, conditional_ess=0.2, seed=0)
    plain.run()
    carried.run()
    assert_evidence(carried.population, FAR, 0.02)
    assert min(p.ess for p in carried.population.passages) > 0.9
    assert min(p.ess for p in plain.population.passages) < 0.35
    assert carried.log_evidence_error < 0.5 * plain.log_evidence_error


def test_a_flow_that_makes_weights_worse_is_left_out():
    """One step of training too long to lead anywhere good."""
    torch.manual_seed(0)
    particles = Particles(path(two_modes(2)), (8, 250))
    steep = AFT(num_steps=1, learning_rate=3.0)
    flow = flow_to(steep, 0.05, particles)
    staying = conditional_size(particles.log_weights, particles.reach(0.05, None)[0])
    reached = conditional_size(particles.log_weights, particles.reach(0.05, flow)[0])
    assert reached >= staying


def test_a_start_of_infinite_energy_may_be_carried_to_a_finite_one():
    def half():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(x > 0.0, 0.0, -torch.inf))

    torch.manual_seed(0)
    particles = Particles(path(half), (2, 10_000))
    flow = NearIdentity(torch.zeros(1), torch.eye(1), 0, ())
    with torch.no_grad():
        flow.shift.fill_(0.5)
    increments = particles.reach(1.0, flow)[0]
    inside = particles.position.reshape(2, -1) > -0.5
    assert torch.equal(increments > -torch.inf, inside)
    ratio = increments.exp()
    error = float(ratio.std()) / math.sqrt(20_000)
    assert abs(float(ratio.mean()) - 0.5) < 4.0 * error


@pytest.mark.slow
@pytest.mark.parametrize("flow", [None, AFT(), CRAFT()])
def test_mixture_of_the_paper(flow):
    sampler = AnnealedSampler(of_asymmetric(), flow, num_particles=4000, seed=1)
    sampler.run()
    assert_evidence(sampler.population, 0.0, 0.1)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (AFT, "num_layers", -1),
        (AFT, "num_steps", 0),
        (AFT, "learning_rate", 0.0),
        (CRAFT, "num_passes", 0),
        (CRAFT, "num_particles", 1),
    ],
)
def test_arguments(settings, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is .*: expected"):
        settings(**{name: value})
