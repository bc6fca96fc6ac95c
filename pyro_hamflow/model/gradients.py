"""A value and its gradients, where it may not depend on all that it is derived by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_hamflow.programs.capture import Program


def value_and_gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """A value and its gradients; zeros in what it does not depend on."""
    if not value.requires_grad:
        return value, *(torch.zeros_like(tensor) for tensor in inputs)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return value.detach(), *gradients


def gradient_functions(value_of_one: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Program]:
    """What a density's gradient programs do for one chain, by kind.

    Arguments:
        value_of_one: From a position and a noise vector to minus the log density.
    """

    def gradients(position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            position = position.detach().requires_grad_()
            noise = noise.detach().requires_grad_()
            return value_and_gradients(value_of_one(position, noise), position, noise)

    def gradient(position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            position = position.detach().requires_grad_()
            return value_and_gradients(value_of_one(position, noise), position)

    return {"gradients": gradients, "gradient": gradient}
