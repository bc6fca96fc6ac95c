"""A value and its gradients, where it may not depend on all that it is derived by."""

from __future__ import annotations

import torch
from torch import Tensor


def value_and_gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """A value and its gradients; zeros in what it does not depend on."""
    if not value.requires_grad:
        return value, *(torch.zeros_like(tensor) for tensor in inputs)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return value.detach(), *gradients
