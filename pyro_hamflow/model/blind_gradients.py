"""Gradients that do not see all that a density depends on, for the model reads a value in Python.

By ``x.item()``, ``x.tolist()`` or NumPy a model may take a latent value out of torch, and compute
on with a plain number. Of what follows torch knows no gradient. Trajectories along what is left
keep the posterior, but are no trajectories of it: chains hardly move.

Reading a value alone is no fault, as a branch does so too. So only differences of the density tell.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyro_hamflow.model.potential import Potential

# Lengths of steps: a difference that curvature, a kink, a jump or rounding makes changes with them.
_STEPS = (1e-3, 4e-3, 1.6e-2)
_DIRECTIONS = 3  # in some of which each chain must differ
_ASIDE = 0.05  # from a start, where gradients are asked for: it may be chosen, and lie on a kink
_CLEAR = 0.2  # of the larger slope, what both must differ by
_SAME = 0.1  # of that difference, by how much it may change with the length of steps
_ROUNDING = 1e-5  # relative to the potential, a difference that rounding in float32 may make


def warn_of_blind_gradient(potential: Potential, position: Tensor, noise: Tensor) -> None:
    """Warns if gradients are not the slopes of a potential, beside any of its chains' starts.

    A model that was captured as a graph reads no values, and is not asked. Of another one the
    potential is computed seven times; up to 19 times where the gradient seems to be at fault.

    Arguments:
        potential: The target.
        position: Where chains start, ``(chains, dimension)``.
        noise: Their noise, ``(chains, noise_dimension)``.
    """
    gradient = potential.graph("gradient", len(position))
    if potential.programs.fallback_reason is None:
        return
    generator = torch.Generator().manual_seed(0)  # random, but always the same

    def draw() -> Tensor:
        return torch.randn(position.shape, generator=generator, device="cpu").to(position)

    position = position + _ASIDE * draw()
    value, slopes = gradient(position, noise)
    seen, true = torch.zeros_like(value), torch.zeros_like(value)
    blind = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(_DIRECTIONS):
        direction = draw()
        direction = direction / direction.norm(dim=-1, keepdim=True)
        told = (slopes * direction).sum(-1)
        clear, gaps = torch.ones_like(blind), []
        for step in _STEPS:
            ahead, _ = gradient(position + step * direction, noise)
            behind, _ = gradient(position - step * direction, noise)
            found = (ahead - behind) / (2.0 * step)
            gaps.append(found - told)
            clear &= gaps[-1].abs() > _CLEAR * torch.maximum(found.abs(), told.abs())
            clear &= gaps[-1].abs() * max(_STEPS) > _ROUNDING * (1.0 + value.abs())
            clear &= found.isfinite() & ((gaps[-1] - gaps[0]).abs() < _SAME * gaps[0].abs())
            if not bool(clear.any()):
                break
        seen, true = torch.where(clear, told, seen), torch.where(clear, found, true)
        blind |= clear
    if not bool(blind.all()):
        return
    warnings.warn(
        "The gradient of the log density is not its slope: near the start of the first chain it is "
        f"{-seen[0].item():.3g} in a direction in which the density's logarithm rises by "
        f"{-true[0].item():.3g}, and so it is for all others. The model "
        "computes with a latent value outside torch, as by `.item()`, `.tolist()` or NumPy, where "
        "gradients are lost: expected operations of torch alone, or the kernel `RandomWalk`, which "
        "needs no gradient. Draws are exact, but chains may hardly move",
        RuntimeWarning,
        stacklevel=2,
    )
