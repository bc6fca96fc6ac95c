r"""Gaussian sites of a path's likelihood, which follow the parameters to first order.

At the parameters :math:`\hat\theta` where they are fitted they have a precision :math:`\Lambda`,
and there are the path's mode x and the gradient g of the likelihood in it; their linear term is
:math:`\Lambda x + g`. At other parameters, :math:`\delta` away, the mode is moved by its slopes, the
precision of each variable by its own exponential, :math:`\Lambda_{ij} s_i s_j` with
:math:`s = \exp(\tfrac12 B \delta)`, which keeps it positive, and the gradient to
:math:`s^2 (g + J \delta)`. Prior times sites have their mean at the moved mode then whatever the
precision is, up to errors of second order. Normal observations whose standard deviation is a
parameter have such sites exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.programs.banded import multiply

_FARTHEST = 6.0  # of the logarithm of a square: beyond, scales stay
_LEAST = 1e-9  # of the largest precision, below which one is taken for none


class Held(NamedTuple):
    """Sites at one value of the parameters.

    Attributes:
        precision: Their precision by its lower bands, of shape ``(n, q)``.
        mode: The path's mode, of shape ``(n,)``.
        gradient: The likelihood's gradient there, of shape ``(n,)``.
    """

    precision: Tensor
    mode: Tensor
    gradient: Tensor


class PathSites(NamedTuple):
    """Sites that follow ``k`` coordinates of parameters.

    Attributes:
        held: The sites where they were fitted.
        growth: The slopes of the precision's logarithm, of shape ``(n, k)``.
        mode_slopes: Those of the mode.
        gradient_slopes: Those of the gradient, over and above.
    """

    held: Held
    growth: Tensor
    mode_slopes: Tensor
    gradient_slopes: Tensor

    @classmethod
    def following(cls, held: Held, pairs: Sequence[tuple[Held, Held]], step: float) -> PathSites:
        """From sites fitted a step ahead and behind in each coordinate.

        Arguments:
            held: Sites in the middle.
            pairs: Those ahead and behind.
            step: How far.
        """
        least, slopes = _LEAST * held.precision[:, 0].max(), []
        for ahead, behind in pairs:
            diagonals = torch.stack([ahead.precision[:, 0], behind.precision[:, 0]])
            known = (diagonals > least).all(0)
            ratio = torch.where(known, diagonals[0] / diagonals[1], torch.ones_like(held.mode))
            rate = ratio.log() / (2.0 * step)
            ease = (step * rate).exp()
            mode = (ahead.mode - behind.mode) / (2.0 * step)
            gradient = (ahead.gradient / ease - behind.gradient * ease) / (2.0 * step)
            slopes.append(torch.stack([rate, mode, gradient]))
        none = held.mode.new_zeros(3, len(held.mode), 0)
        return cls(held, *(torch.stack(slopes, -1) if slopes else none))

    def at(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Precision and linear terms where parameters are shifted by ``(k,)``."""
        log_square = (self.growth @ shift).clamp(-_FARTHEST, _FARTHEST)
        precision = scaled(self.held.precision, (0.5 * log_square).exp())
        mode = self.held.mode + self.mode_slopes @ shift
        gradient = self.held.gradient + self.gradient_slopes @ shift
        return precision, multiply(precision, mode) + log_square.exp() * gradient


def scaled(bands: Tensor, scale: Tensor) -> Tensor:
    """A symmetric matrix with rows and columns scaled, by its lower bands ``(n, q)``."""
    n, width = bands.shape
    row = torch.arange(n, device=bands.device)[:, None]
    columns = (row - torch.arange(width, device=bands.device)).clamp(min=0)
    return bands * scale[:, None] * scale[columns]
