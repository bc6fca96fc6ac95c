"""Hamiltonian motion: reversible, preserving volume, of second order; and kinetic energies."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from pyro_hamflow.dynamics import integrators
from pyro_hamflow.dynamics.integrators import (
    PhasePoint,
    drift,
    leapfrog_step,
    rotate,
    rotating_leapfrog_step,
)
from pyro_hamflow.dynamics.kinetic import GaussianKinetic, times
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import JointTransition
from tests.helpers.laws import LIMIT, assert_order, assert_reversible, assert_volume_preserving

MASSES = {
    "identity": torch.ones(2).double(),
    "diagonal": torch.tensor([2.0, 0.3]).double(),
    "dense": torch.tensor([[2.0, 0.5], [0.5, 0.3]]).double(),
}


@pytest.fixture(params=MASSES)
def inverse_mass(request):
    return MASSES[request.param]


def potential(z, u):
    """Asymmetric, convex, and coupling positions and noise."""
    tilt = torch.nn.functional.softplus(2.0 * z[..., 0] - u[..., 0] + 0.3 * u[..., 2])
    bend = torch.nn.functional.softplus(-z[..., 1] + 0.5 * u[..., 1])
    square = (z[..., 0] - 0.4 * z[..., 1] - 0.2).square() + 0.3 * z[..., 1].square()
    return tilt + 0.7 * bend + 0.5 * square


def gradients(z, u):
    """The potential and both gradients, differentiable themselves if that is wanted."""
    wanted = z.requires_grad or u.requires_grad
    with torch.enable_grad():
        z, u = (part if part.requires_grad else part.detach().requires_grad_() for part in (z, u))
        value = potential(z, u)
        both = torch.autograd.grad(value.sum(), (z, u), create_graph=wanted)
    return value.detach(), *both


def gradient(z, u):
    return gradients(z, u)[:2]


def phase_of(num_chains):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(num_chains, n, generator=generator).double() for n in (2, 2, 3, 3))


def flip(parts):
    """Turns the momenta round, which are every second part."""
    return tuple(-part if i % 2 else part for i, part in enumerate(parts))


class Plain:
    """A target whose programs are the functions themselves: derivatives flow through them.

    Arguments:
        gradients: From positions and noise to the potential and its gradients in both.
    """

    dimension, noise_dimension = 2, 3
    example = torch.zeros(()).double()

    def __init__(self, gradients):
        self.gradients = gradients

    def graph(self, kind, num_chains):
        last = {"gradient": 2, "gradients": 3}[kind]
        return lambda z, u: self.gradients(z, u)[:last]

    def vectors(self, num_chains):
        return self.example.expand(num_chains, 2), self.example.expand(num_chains, 3)

    def accelerate(self, name, function, *examples):
        return function


def leapfrog(inverse_mass, noise, size, num_steps):
    """The trajectory that HMC makes, as a move of position and momentum."""

    def move(parts):
        z, r = parts
        transition, sizes = HMCTransition(Plain(gradients), len(z)), torch.full((len(z), 1), size)
        state = transition.state_at(z, noise)
        return transition.trajectory(state, r, inverse_mass, sizes, num_steps)[:2]

    return move


def split(inverse_mass, size, num_steps, gradients=gradients):
    """The trajectory that joint moves make, as a move of the whole phase."""

    def move(parts):
        phase, sizes = PhasePoint(*parts), torch.full((len(parts[0]), 1), size)
        transition = JointTransition(Plain(gradients), len(phase.z))
        return tuple(transition.trajectory(phase, inverse_mass, sizes, num_steps))

    return move


def rotating_leapfrog(inverse_mass, size, num_steps):
    """Steps of the splitting integrator in its other order, as a move of the whole phase."""

    def move(parts):
        phase, step_size = PhasePoint(*parts), torch.tensor(size)
        _, *here = gradients(phase.z, phase.u)
        for _ in range(num_steps):
            phase, _, *here = rotating_leapfrog_step(
                gradients, phase, *here, inverse_mass, step_size
            )
        return tuple(phase)

    return move


SPLITTINGS = {"drift first": split, "kick first": rotating_leapfrog}


@pytest.fixture(params=SPLITTINGS.values(), ids=SPLITTINGS)
def splitting_move(request):
    return request.param


def energy(inverse_mass, phase):
    z, r, u, p = phase
    kinetic = GaussianKinetic(inverse_mass).energy(r)
    return potential(z, u) + kinetic + 0.5 * (u.square() + p.square()).sum(-1)


# --- reversibility and volume -------------------------------------------------------------------


def test_reversibility_leapfrog(inverse_mass):
    z, r, u, _ = phase_of(4)
    assert_reversible(leapfrog(inverse_mass, u, 0.1, 1000), flip, (z, r))


def test_reversibility_splitting(splitting_move, inverse_mass):
    assert_reversible(splitting_move(inverse_mass, 0.1, 300), flip, phase_of(4))


def test_reversibility_rotate():
    _, _, u, p = phase_of(4)

    def move(parts):
        for _ in range(1000):
            parts = rotate(*parts, torch.tensor(0.1))
        return parts

    assert_reversible(move, flip, (u, p))


def test_reversibility_drift(inverse_mass):
    def move(parts):
        return tuple(drift(PhasePoint(*parts), inverse_mass, torch.tensor(0.7)))

    assert_reversible(move, flip, phase_of(4))


def test_volume_leapfrog(inverse_mass):
    z, r, u, _ = phase_of(1)
    assert_volume_preserving(leapfrog(inverse_mass, u, 0.4, 5), (z, r))


def test_volume_splitting(splitting_move, inverse_mass):
    assert_volume_preserving(splitting_move(inverse_mass, 0.4, 5), phase_of(1))


def test_volume_rotate():
    _, _, u, p = phase_of(1)
    assert_volume_preserving(lambda parts: rotate(*parts, torch.tensor(0.4)), (u, p))


def test_volume_drift(inverse_mass):
    def move(parts):
        return tuple(drift(PhasePoint(*parts), inverse_mass, torch.tensor(0.7)))

    assert_volume_preserving(move, phase_of(1))


def test_spoilt_leapfrog_is_found_out():
    """A first half kick that is a little too strong keeps the volume, but cannot be undone."""
    z, r, u, _ = phase_of(4)

    def move(parts):
        z, r = parts
        return leapfrog(MASSES["identity"], u, 0.1, 10)((z, r - 0.01 * gradient(z, u)[1].detach()))

    with pytest.raises(AssertionError, match="from the start"):
        assert_reversible(move, flip, (z, r))


def test_step_size_that_depends_on_position_is_found_out():
    z, r, u, _ = phase_of(1)

    def move(parts):
        z, r = parts
        size = 0.2 + 0.1 * z[:, :1].tanh()
        z, r, _, _ = leapfrog_step(gradient, z, r, gradient(z, u)[1], u, MASSES["identity"], size)
        return z, r

    with pytest.raises(AssertionError, match="log determinant"):
        assert_volume_preserving(move, (z, r))


# --- energy -------------------------------------------------------------------------------------


def _leapfrog_error(inverse_mass, size):
    z, r, u, p = phase_of(64)
    new_z, new_r = leapfrog(inverse_mass, u, size, round(1.2 / size))((z, r))
    return energy(inverse_mass, (new_z, new_r, u, p)) - energy(inverse_mass, (z, r, u, p))


def _splitting_error(inverse_mass, size, move=split):
    start = phase_of(64)
    end = move(inverse_mass, size, round(1.2 / size))(start)
    return energy(inverse_mass, end) - energy(inverse_mass, start)


_kick_first_error = partial(_splitting_error, move=rotating_leapfrog)
SIZES = [0.1, 0.05, 0.025]


@pytest.mark.parametrize("error", [_leapfrog_error, _splitting_error, _kick_first_error])
def test_order_of_energy_error(inverse_mass, error):
    assert_order(lambda size: error(inverse_mass, size), SIZES)


def test_rotation_of_wrong_sign_is_found_out(monkeypatch):
    """It preserves volume and can be undone, but leads uphill."""
    monkeypatch.setattr(integrators, "rotate", lambda u, p, angle: rotate(u, p, -angle))
    with pytest.raises(AssertionError, match="order"):
        assert_order(lambda size: _splitting_error(MASSES["identity"], size), SIZES)


def test_energy_splitting_without_potential(inverse_mass):
    """Exactly conserved where the potential is constant, however long the steps."""

    def flat(z, u):
        return torch.zeros(len(z)), torch.zeros_like(z), torch.zeros_like(u)

    start = PhasePoint(*phase_of(4))
    end = PhasePoint(*split(inverse_mass, 1.7, 50, flat)(start))

    def energy(phase):
        kinetic = GaussianKinetic(inverse_mass).energy(phase.r)
        return kinetic + 0.5 * (phase.u.square() + phase.p.square()).sum(-1)

    assert torch.allclose(energy(end), energy(start), rtol=1e-12)


# --- rotation -----------------------------------------------------------------------------------


def test_norm_rotate():
    _, _, u, p = phase_of(5)
    v, q = rotate(u, p, torch.tensor(0.9))
    assert torch.allclose(v.square() + q.square(), u.square() + p.square(), rtol=1e-13)


def test_inverse_rotate():
    _, _, u, p = phase_of(5)
    back = rotate(*rotate(u, p, torch.tensor(0.9)), torch.tensor(-0.9))
    assert torch.allclose(back[0], u, atol=1e-14)
    assert torch.allclose(back[1], p, atol=1e-14)


def test_composition_rotate():
    _, _, u, p = phase_of(5)
    twice = rotate(*rotate(u, p, torch.tensor(0.9)), torch.tensor(0.4))
    once = rotate(u, p, torch.tensor(1.3))
    assert torch.allclose(twice[0], once[0], atol=1e-14)
    assert torch.allclose(twice[1], once[1], atol=1e-14)


def test_direction_rotate():
    """Noise moves with its momentum: du/dt = p and dp/dt = -u."""
    _, _, u, p = phase_of(5)
    du, dp = torch.autograd.functional.jacobian(lambda t: rotate(u, p, t), torch.tensor(0.0))
    assert torch.equal(du, p)
    assert torch.equal(dp, -u)


# --- kinetic energies ---------------------------------------------------------------------------


def _full(inverse_mass):
    return torch.diag(inverse_mass) if inverse_mass.dim() == 1 else inverse_mass


def test_covariance_of_momenta(inverse_mass):
    """Second moments of r are M, the mass; of each pair, within its standard error."""
    count = 200_000
    r = GaussianKinetic(inverse_mass).sample(count)
    assert r.shape == (count, 2)
    mass = torch.linalg.inv(_full(inverse_mass))
    products = r[:, :, None] * r[:, None, :]
    score = (products.mean(0) - mass) / (products.std(0) / math.sqrt(count))
    assert score.abs().max() <= LIMIT
    assert (r.mean(0) / (r.std(0) / math.sqrt(count))).abs().max() <= LIMIT


def test_value_of_kinetic_energy(inverse_mass):
    _, r, _, _ = phase_of(5)
    expected = 0.5 * torch.einsum("ci,ij,cj->c", r, _full(inverse_mass), r)
    assert torch.allclose(GaussianKinetic(inverse_mass).energy(r), expected, rtol=1e-13)


def test_velocity_is_gradient_of_kinetic_energy(inverse_mass):
    r = phase_of(5)[1].requires_grad_()
    (gradient,) = torch.autograd.grad(GaussianKinetic(inverse_mass).energy(r).sum(), r)
    assert torch.allclose(times(r, inverse_mass), gradient, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_of_momenta(dtype):
    assert GaussianKinetic(torch.ones(3, dtype=dtype)).sample(2).dtype == dtype


def test_whitened_momenta(inverse_mass):
    """They are standard normal, and the energy is half their sum of squares."""
    kinetic = GaussianKinetic(inverse_mass)
    r = kinetic.sample(100_000)
    white = times(r, kinetic.root)
    assert torch.allclose(0.5 * white.square().sum(-1), kinetic.energy(r))
    assert (white.mean(0).abs() < LIMIT / math.sqrt(len(r))).all()
    assert torch.allclose(white.mT.cov(), torch.eye(2, dtype=white.dtype), atol=0.02)
