"""Modes of many elements at once, by Newton's method."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 30  # of Newton at most
_SLACK = 1e3  # times rounding, by which the density may fall: sums of many terms are no closer
_DAMPED = 0.5  # of the largest curvature, that is added after a step that has failed
_NEWTON = 0.01  # of the least curvature, up to which a damped step leads where Newton's does
_HOPELESS = 1e8  # the damping at which steps have failed that are too short for anything else


class Top(NamedTuple):
    """Where each element's search for a mode has ended.

    Attributes:
        place: Of shape ``(*elements, dimension)``.
        value: The log joint density there, or one last short step before.
        gradient: Its gradient, likewise.
        curvature: Minus its Hessian, likewise.
    """

    place: Tensor
    value: Tensor
    gradient: Tensor
    curvature: Tensor


def maximise(log_joint: Callable[[Tensor], Tensor], v: Tensor) -> Top:
    """Finds a mode of each element by damped Newton steps.

    Arguments:
        log_joint: From coordinates to the log joint density of each element.
        v: Where to begin, of shape ``(*elements, dimension)``.
    """
    damping = torch.full(v.shape[:-1], 1e-6, dtype=v.dtype, device=v.device)
    value, gradient, hessian = _derivatives(log_joint, v)
    eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    eps = torch.finfo(v.dtype).eps
    for _ in range(_STEPS):
        values, vectors = torch.linalg.eigh(hessian)
        size = values.abs().clamp(min=1e-6)
        added = damping * size.amax(-1)
        curvature = vectors @ (size[..., None] * vectors.mT)
        step = torch.linalg.solve(curvature + added[..., None, None] * eye, gradient)
        # The square of the way to go, in standard deviations: this step squares it once more.
        decrement = (gradient * step).sum(-1)
        rests = (decrement <= eps**0.5) & (added <= _NEWTON * size.amin(-1))
        moved = v + step
        if bool((rests | (damping > _HOPELESS)).all()):
            # What a step this short changes of the curvature is not worth a run of the model.
            return Top(torch.where(rests[..., None], moved, v), value, gradient, hessian)
        new_value, new_gradient, new_hessian = _derivatives(log_joint, moved)
        better = new_value >= value - _SLACK * eps * (1.0 + value.abs())
        better = better & new_gradient.isfinite().all(-1)
        damping = torch.where(better, damping * 0.1, (damping * 10).clamp(min=_DAMPED))
        v = torch.where(better[..., None], moved, v)
        gradient = torch.where(better[..., None], new_gradient, gradient)
        hessian = torch.where(better[..., None, None], new_hessian, hessian)
        value = torch.where(better, new_value, value)
    return Top(v, value, gradient, hessian)


def _derivatives(log_joint: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients and negative Hessians of all elements at once."""
    v = v.detach().requires_grad_()
    value = log_joint(v)
    (gradient,) = torch.autograd.grad(value.sum(), v, create_graph=True)
    hessian = -gradients(gradient, v)
    hessian = 0.5 * (hessian + hessian.mT).detach()
    return value.detach(), gradient.detach(), hessian.nan_to_num()


def gradients(values: Tensor, v: Tensor) -> Tensor:
    """The derivative of each element's values in its coordinates, ``(*, values, coordinates)``."""
    rows = []
    for i in range(values.shape[-1]):
        row = None
        if values.requires_grad:
            (row,) = torch.autograd.grad(
                values[..., i].sum(), v, retain_graph=True, allow_unused=True
            )
        rows.append(torch.zeros_like(v) if row is None else row)
    return torch.stack(rows, -2)
