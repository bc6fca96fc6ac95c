"""Leapfrog trajectories to train through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_hamflow.dynamics.integrators import leapfrog
from pyro_hamflow.dynamics.kinetic import VectorField
from pyro_hamflow.networks.fields import Field


def follow(
    gradient: VectorField,
    velocity: VectorField,
    q: Tensor,
    p: Tensor,
    step_size: float,
    num_steps: int,
) -> tuple[Tensor, Tensor]:
    """A leapfrog trajectory, known to autograd as one operation where both are fields.

    Arguments:
        gradient: The gradient of the potential energy.
        velocity: The gradient of the kinetic energy.
        q: Positions, of shape ``(*, dimension)``.
        p: Their momenta.
        step_size: The time of a step; a negative one goes back.
        num_steps: How many steps.

    Returns:
        Positions and momenta at the end.
    """
    if not (isinstance(gradient, Field) and isinstance(velocity, Field)):
        return leapfrog(gradient, velocity, q, p, step_size, num_steps)
    if not torch.is_grad_enabled():  # else what no one will ask for would be kept
        return leapfrog(gradient, velocity, q, p, step_size, num_steps)
    flat = (x.reshape(-1, x.shape[-1]) for x in (q, p))
    parameters = gradient.parameters + velocity.parameters
    end = _Trajectory.apply(gradient, velocity, *flat, step_size, num_steps, *parameters)
    return end[0].reshape(q.shape), end[1].reshape(p.shape)


class _Trajectory(torch.autograd.Function):
    """A trajectory as one operation: each call of a field keeps what its derivative needs.

    On the way back, all calls add to the same sums of the parameters' gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Field,
        velocity: Field,
        q: Tensor,
        p: Tensor,
        step_size: float,
        num_steps: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.fields, ctx.kept = (gradient, velocity), ([], [])
        ctx.step_size, ctx.num_steps = step_size, num_steps
        ctx.save_for_backward(q, *parameters)

        def recording(field: Field, kept: list[Any], own: Sequence[Tensor]) -> VectorField:
            def evaluate(x: Tensor) -> Tensor:
                value, needed = field.evaluate(x, own)
                kept.append(needed)
                return value

            return evaluate

        kick, drift = map(recording, ctx.fields, ctx.kept, _shares(gradient, parameters))
        return leapfrog(kick, drift, q, p, step_size, num_steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_q: Tensor, by_p: Tensor) -> tuple[Tensor | None, ...]:
        (gradient, velocity), (kicks, drifts) = ctx.fields, ctx.kept
        _, *parameters = ctx.saved_tensors  # asked for, so that changes in place are told of
        own, other = _shares(gradient, parameters)
        by_own, by_other = gradient.new_sums(), velocity.new_sums()
        size, half = ctx.step_size, 0.5 * ctx.step_size
        for step in range(ctx.num_steps, 0, -1):
            share = -half if step == ctx.num_steps else -size
            by_q = by_q + gradient.derive(kicks[step], share * by_p, own, by_own)
            by_p = by_p + velocity.derive(drifts[step - 1], size * by_q, other, by_other)
        by_q = by_q + gradient.derive(kicks[0], -half * by_p, own, by_own)
        return None, None, by_q, by_p, None, None, *by_own, *by_other


def _shares(gradient: Field, parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """The parameters of the first field, and those of the second."""
    count = len(gradient.parameters)
    return parameters[:count], parameters[count:]
