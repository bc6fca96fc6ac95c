"""The model's potential, and that of its prior, as functions to train through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior


def energy(potential: Potential | Prior, position: Tensor, noise: Tensor) -> Tensor:
    """The potential of positions, its gradient in them known to autograd.

    Arguments:
        potential: The target.
        position: Of shape ``(chains, dimension)``.
        noise: Of shape ``(chains, noise_dimension)``, held.

    Returns:
        The potentials, of shape ``(chains,)``.
    """
    return _Energy.apply(position, noise, potential)


class _Energy(torch.autograd.Function):
    """The captured program gives value and gradient at once."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, noise: Tensor, potential: Potential | Prior) -> Tensor:
        program = potential.programs.program("gradient", len(position))
        value, gradient = program(position.detach(), noise)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return cotangent[:, None] * gradient, None, None
