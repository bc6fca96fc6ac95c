r"""Gaussian sites of a path's likelihood, which follow the parameters to first order.

Held at :math:`\hat\theta` they are a precision :math:`\Lambda` and a linear term :math:`\eta`. At
other parameters each variable's scale moves by its own exponential, :math:`\Lambda_{ij} s_i s_j`
with :math:`s = \exp(\tfrac12 B (\theta - \hat\theta))`, which keeps the precision positive, and
:math:`\eta` to :math:`s^2 (\eta + J (\theta - \hat\theta))`. Normal observations whose standard
deviation is a parameter have such sites exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Held = tuple[Tensor, Tensor]  # precision and linear terms

_FARTHEST = 6.0  # of the logarithm of a square: beyond, scales stay


class PathSites(NamedTuple):
    """Sites, and how they follow ``k`` coordinates of parameters.

    Attributes:
        precision: Their precision by its lower bands, of shape ``(n, q)``.
        linear: Their linear terms, of shape ``(n,)``.
        growth: The slopes of the precision's logarithm, of shape ``(n, k)``.
        slopes: Those of the linear terms, over and above, of shape ``(n, k)``.
    """

    precision: Tensor
    linear: Tensor
    growth: Tensor
    slopes: Tensor

    @classmethod
    def held(cls, precision: Tensor, linear: Tensor) -> PathSites:
        """Sites that follow nothing."""
        none = linear.new_zeros(len(linear), 0)
        return cls(precision, linear, none, none)

    def at(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Precision and linear terms where parameters are shifted by ``(k,)``."""
        if not len(shift):
            return self.precision, self.linear
        log_square = (self.growth @ shift).clamp(-_FARTHEST, _FARTHEST)
        square, scale = log_square.exp(), (0.5 * log_square).exp()
        linear = square * (self.linear + self.slopes @ shift)
        return scaled(self.precision, scale), linear


def scaled(bands: Tensor, scale: Tensor) -> Tensor:
    """A symmetric matrix with rows and columns scaled, by its lower bands ``(n, q)``."""
    n, width = bands.shape
    row = torch.arange(n, device=bands.device)[:, None]
    columns = (row - torch.arange(width, device=bands.device)).clamp(min=0)
    return bands * scale[:, None] * scale[columns]


def following(held: Held, pairs: list[tuple[Held, Held]], step: float) -> PathSites:
    """Sites that follow parameters, from those fitted a step ahead and behind in each.

    Arguments:
        held: Sites in the middle.
        pairs: Those ahead and behind, for each coordinate.
        step: How far.
    """
    precision, linear = held
    growth, slopes = [], []
    for ahead, behind in pairs:
        diagonals = behind[0][:, 0], ahead[0][:, 0]
        least = 1e-6 * precision[:, 0].max()
        known = (diagonals[0] > least) & (diagonals[1] > least)
        ratio = torch.where(known, diagonals[1] / diagonals[0], torch.ones_like(linear))
        rate = ratio.log() / (2.0 * step)
        undone = (-step * rate).exp()
        growth.append(rate)
        slopes.append((ahead[1] * undone - behind[1] / undone) / (2.0 * step))
    return PathSites(precision, linear, torch.stack(growth, -1), torch.stack(slopes, -1))
