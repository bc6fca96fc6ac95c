r"""Maps that follow Hamiltonian motion: reversible, and preserving volume, exactly.

Each is built from shears (a position moved by a function of the momentum, or the reverse) and
rotations, so whatever vector field stands in for the gradient, undoing the steps with the momenta
turned round leads back to the start, and no volume is gained or lost. How well energy is conserved
is the only approximation, and the samplers correct for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import times

# From positions, and noise if there is any, to the potential and its gradient in each of them.
ValueAndGradients = Callable[..., tuple[Tensor, ...]]


class PhasePoint(NamedTuple):
    """A point of the extended phase space.

    Attributes:
        z: Position, of shape ``(chains, dimension)``.
        r: Its momentum.
        u: Noise, of shape ``(chains, noise_dimension)``.
        p: Its momentum.
    """

    z: Tensor
    r: Tensor
    u: Tensor
    p: Tensor


def leapfrog_step(
    value_and_gradient: ValueAndGradients,
    z: Tensor,
    r: Tensor,
    gradient: Tensor,
    noise: Tensor,
    inverse_mass: Tensor,
    step_size: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""One leapfrog step, half a kick, a drift and half a kick, with the noise held.

    Arguments:
        value_and_gradient: From position and noise to the potential and its gradient in the
            position.
        z: Positions, of shape ``(chains, dimension)``.
        r: Momenta.
        gradient: The gradient at ``z``.
        noise: The noise of each chain, of shape ``(chains, noise_dimension)``.
        inverse_mass: As in :class:`~pyro_hamflow.dynamics.kinetic.GaussianKinetic`.
        step_size: A scalar, or one for each chain, of shape ``(chains, 1)``.

    Returns:
        Position, momentum, potential and gradient after the step.

    Invariant:
        Volume; the step undoes itself when the momentum is turned round. The energy error of a
        trajectory is of order ``step_size ** 2``.
    """
    r = r - 0.5 * step_size * gradient
    z = z + step_size * times(r, inverse_mass)
    value, gradient = value_and_gradient(z, noise)
    return z, r - 0.5 * step_size * gradient, value, gradient


def leapfrog(
    gradient_of: Callable[[Tensor], Tensor],
    velocity_of: Callable[[Tensor], Tensor],
    z: Tensor,
    r: Tensor,
    step_size: float,
    num_steps: int,
) -> tuple[Tensor, Tensor]:
    r"""A whole leapfrog trajectory: half a kick, then drifts and kicks in turn, the last one half.

    Kicks that meet are joined, so that L steps take L + 1 gradients.

    Arguments:
        gradient_of: The gradient of the potential energy, or any field of the position alone.
        velocity_of: The gradient of the kinetic energy, or any field of the momentum alone.
        z: Positions, of shape ``(*, dimension)``.
        r: Momenta.
        step_size: The time of a step; a negative one goes back.
        num_steps: L.

    Returns:
        Positions and momenta at the end.

    Invariant:
        Volume; the trajectory with a step size of the other sign leads back to the start.
    """
    r = torch.add(r, gradient_of(z), alpha=-0.5 * step_size)
    for step in range(num_steps):
        z = torch.add(z, velocity_of(r), alpha=step_size)
        share = 1.0 if step < num_steps - 1 else 0.5
        r = torch.add(r, gradient_of(z), alpha=-share * step_size)
    return z, r


def rotate(u: Tensor, p: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    r"""Follows the Gaussian part of the noise's Hamiltonian exactly.

    Under :math:`\frac12 (\lVert u \rVert^2 + \lVert p \rVert^2)` the pair turns about the origin,
    :math:`(u, p) \mapsto (u \cos t + p \sin t,\; p \cos t - u \sin t)`.

    Arguments:
        u: Noise, of shape ``(*, noise_dimension)``.
        p: Its momentum.
        angle: The time t, in radians.

    Returns:
        The turned pair.

    Invariant:
        Volume and the sum of squares, exactly; a turn by ``-angle`` undoes it.

    References:
        | Pseudo-Marginal Hamiltonian Monte Carlo (Alenlöv et al., 2021)
        | https://arxiv.org/abs/1607.02516

    Example:
        >>> u, p = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
        >>> u, p = rotate(u, p, torch.tensor(math.pi / 2))
        >>> u.round(decimals=3).abs(), p.round(decimals=3)
        (tensor([0., 2.]), tensor([-1., -0.]))
    """
    cosine, sine = torch.cos(angle), torch.sin(angle)
    return u * cosine + p * sine, p * cosine - u * sine


def drift(phase: PhasePoint, inverse_mass: Tensor, time: Tensor) -> PhasePoint:
    """Moves positions with their momenta and rotates the noise; the potential has no part in it.

    Arguments:
        phase: Where to start.
        inverse_mass: As in :class:`~pyro_hamflow.dynamics.kinetic.GaussianKinetic`.
        time: For how long: a scalar, or one for each chain, of shape ``(chains, 1)``.
    """
    u, p = rotate(phase.u, phase.p, time)
    return PhasePoint(phase.z + time * times(phase.r, inverse_mass), phase.r, u, p)


def kick_and_drift(
    value_and_gradients: ValueAndGradients,
    phase: PhasePoint,
    inverse_mass: Tensor,
    step_size: Tensor,
    time: Tensor,
) -> PhasePoint:
    """Changes all momenta by a full kick, then drifts.

    Arguments:
        value_and_gradients: From position and noise to the potential and its gradients in both.
        phase: Where to start.
        inverse_mass: As in :class:`~pyro_hamflow.dynamics.kinetic.GaussianKinetic`.
        step_size: How long the kick acts: a scalar, or one for each chain, ``(chains, 1)``.
        time: How long the drift lasts, likewise.
    """
    _, gradient, noise_gradient = value_and_gradients(phase.z, phase.u)
    kicked = phase._replace(
        r=phase.r - step_size * gradient, p=phase.p - step_size * noise_gradient
    )
    return drift(kicked, inverse_mass, time)


def rotating_leapfrog_step(
    value_and_gradients: ValueAndGradients,
    phase: PhasePoint,
    gradient: Tensor,
    noise_gradient: Tensor,
    inverse_mass: Tensor,
    step_size: Tensor,
) -> tuple[PhasePoint, Tensor, Tensor, Tensor]:
    """One step of parameters and noise: half a kick, a drift with its rotation, half a kick.

    The kicks lie at the step's ends, as a No-U-Turn trajectory wants them: one gradient tells both
    the energy of a point and the way on.

    Arguments:
        value_and_gradients: From position and noise to the potential and its gradients in both.
        phase: Where to start.
        gradient: The potential's gradient there in the position.
        noise_gradient: The same in the noise.
        inverse_mass: As in :class:`~pyro_hamflow.dynamics.kinetic.GaussianKinetic`.
        step_size: A scalar, or one for each chain, of shape ``(chains, 1)``.

    Returns:
        The next point, the potential there and both its gradients.

    Invariant:
        Volume; the step undoes itself when both momenta are turned round. The energy error of a
        trajectory is of order ``step_size ** 2``.
    """
    half = 0.5 * step_size
    kicked = phase._replace(r=phase.r - half * gradient, p=phase.p - half * noise_gradient)
    moved = drift(kicked, inverse_mass, step_size)
    value, gradient, noise_gradient = value_and_gradients(moved.z, moved.u)
    end = moved._replace(r=moved.r - half * gradient, p=moved.p - half * noise_gradient)
    return end, value, gradient, noise_gradient
