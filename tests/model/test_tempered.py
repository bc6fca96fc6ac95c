"""Paths from a density that can be drawn from to a posterior."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import AutoNeuralHamiltonianFlow
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.model.tempered import GuideReference, TemperedTarget

Y = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)
NONE = torch.zeros(4, 0, dtype=torch.float64)


def conjugate(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


class Wide:
    """A guide that is N(1, 3)."""

    fn = dist.Normal(1.0, 3.0)

    def prepare(self, *args, **kwargs):
        pass

    def draw(self, num_samples):
        position = self.fn.sample((num_samples, 1))
        return position, self.log_ratio(position)

    def log_ratio(self, position):
        return self.fn.log_prob(position)[:, 0]


def references():
    potential = Potential(conjugate, (Y,))
    prior = dist.Normal(torch.tensor(0.0), 2.0)
    yield Prior(potential), prior, potential
    yield GuideReference(Wide(), potential), Wide.fn, potential


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("inverse_temperature", [0.0, 0.3, 1.0])
def test_energy_lies_between_the_ends(which, inverse_temperature):
    reference, fn, potential = list(references())[which]
    target = TemperedTarget(reference, potential)
    target.inverse_temperature.fill_(inverse_temperature)
    position = torch.tensor([[-2.0], [0.0], [0.5], [3.0]]).requires_grad_()
    end = dist.Normal(0.0, 2.0).log_prob(position)[:, 0]
    end = end + dist.Normal(position, 1.0).log_prob(Y).sum(-1)
    start = fn.log_prob(position)[:, 0]
    expected = -(1.0 - inverse_temperature) * start - inverse_temperature * end
    (slope,) = torch.autograd.grad(expected.sum(), position)
    value, gradient = target.graph("gradient", 4)(position.detach(), NONE)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, slope)
    torch.testing.assert_close(target.evaluate(position.detach(), NONE).value, expected.detach())


@pytest.mark.parametrize("which", [0, 1])
def test_captured_moves_follow_the_temperature(which):
    reference, fn, potential = list(references())[which]
    target = TemperedTarget(reference, potential)
    transition = HMCTransition(target, 4000)
    tuning = Tuning(0.7, GaussianKinetic(torch.ones(1)))
    noise = torch.zeros(4000, 0)
    for inverse_temperature in (0.0, 1.0, 0.4):
        target.inverse_temperature.fill_(inverse_temperature)
        precision = (1.0 - inverse_temperature) / fn.scale**2 + inverse_temperature * 3.25
        linear = (1.0 - inverse_temperature) * fn.loc / fn.scale**2 + inverse_temperature * Y.sum()
        state = transition.state_at(torch.full((4000, 1), 0.5), noise)
        for _ in range(40):
            state, _ = transition.step(state, tuning, 5)
        error = state.position.mean() - linear / precision
        assert abs(float(error)) < 4.0 * float((precision * 4000) ** -0.5)
        ratio = float(state.position.var() * precision)
        assert abs(ratio - 1.0) < 4.0 * (2.0 / 4000) ** 0.5


def test_a_guide_without_a_density_of_positions_is_refused():
    guide = AutoNeuralHamiltonianFlow(conjugate, hidden=(4,))
    guide.prepare(Y)
    with pytest.raises(ValueError, match="draws momenta beside"):
        GuideReference(guide, Potential(conjugate, (Y,)))
