r"""Whether a guide has lost a mode.

Descents of the potential begin at draws of the guide, at draws of the prior, and far from the
guide's draws. Each mode m that they end in has about the mass

.. math:: e^{-U(m)} \det(H(m) / 2 \pi)^{-1/2}

of the posterior by Laplace's approximation, H being the potential's Hessian there; and about as
much of the guide as its density in place of :math:`e^{-U}` makes it. What is wrong with either is
much the same at all modes, so that their shares can be compared where the masses cannot.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.flows.descent import Descent
from pyro_hamflow.flows.modes import find_modes
from pyro_hamflow.model.guides import Guide
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.process import random_state_kept

_DRAWS, _PROBES = 24, 36  # descents from the guide, and from each of two other places
_WIDTH = 3.0  # of probes, in standard deviations of the guide: Cauchy variables
_MOST_MODES = 12  # that are looked at, the highest first
_MOMENTA = 16  # draws of what a guide's density may draw beside
_MOST_DIMENSIONS = 200  # of which descents keep a Hessian each
_FEW = 0.2  # of its share, below which a guide has lost a mode
_LARGEST_LOSS = 0.05  # of the posterior, that is not worth a word


def describe_lost_modes(
    guide: Guide, potential: Potential, draws: tuple[Tensor, Tensor] | None = None
) -> str | None:
    """What a guide has lost, in a sentence with the remedy; nothing if nothing is seen.

    Beyond 200 dimensions it does not look.

    Arguments:
        guide: The guide, trained.
        potential: The model.
        draws: Of the guide, ``(draws, dimension)``, with weights that add up to one: what they have
            of a mode is not lost.
    """
    if potential.dimension > _MOST_DIMENSIONS:
        return None
    with random_state_kept(), torch.no_grad():
        torch.manual_seed(0)
        share, where = _lost(guide, potential, draws)
    if share < _LARGEST_LOSS or where is None:
        return None
    return (
        f"The guide has lost modes with about {100 * share:.0f} % of the posterior, the largest at "
        f"{place_of(potential, where)}: neither its draws nor weights, evidence or chains made of "
        "them are right. Train it by `ForwardKL` on draws of an `AnnealedSampler`, or sample with "
        "`FlowNUTS`: both look for all modes."
    )


def _lost(
    guide: Guide, potential: Potential, weighted: tuple[Tensor, Tensor] | None
) -> tuple[float, Tensor | None]:
    """How much of the posterior lies in modes that the guide lacks, and where the largest is."""
    own = guide.draw(_DRAWS + _PROBES)[0].detach()
    draws = own.to(potential.example)  # whose type may be another
    descent = Descent(potential, draws.std(0), potential.draw_noise(1))
    modes = find_modes(descent, _starts(potential, draws), _MOST_MODES)
    if len(modes) < 2:
        return 0.0, None
    position = torch.stack([mode.position for mode in modes])
    log_density = _log_density(guide, position.to(own))
    if log_density is None:
        return 0.0, None
    log_mass = log_density.new_tensor([mode.log_mass for mode in modes])
    value = log_density.new_tensor([mode.value for mode in modes])
    share, guides_share = log_mass.softmax(0), (log_mass + value + log_density).softmax(0)
    if weighted is not None:
        nearest = torch.stack([mode.log_density(weighted[0].to(draws)) for mode in modes]).argmax(0)
        by_weight = torch.zeros_like(share).index_add(0, nearest, weighted[1].to(share))
        guides_share = guides_share.maximum(by_weight)
    lost = torch.where(guides_share < _FEW * share, share, 0.0)
    return float(lost.sum()), position[lost.argmax()]


def _starts(potential: Potential, draws: Tensor) -> Tensor:
    """Draws of the guide, points about them as Cauchy variables are, and draws of the prior."""
    spread = torch.distributions.StudentT(1.0).sample(draws[_DRAWS:].shape).to(draws)
    starts = [draws[:_DRAWS], draws[_DRAWS:] + _WIDTH * spread * draws.std(0)]
    try:
        starts.append(Prior(potential).draw(_PROBES)[0].to(draws))
    except ValueError:  # there are no draws of the prior
        starts.append(draws[_DRAWS:] + 10.0 * _WIDTH * spread * draws.std(0))
    return torch.cat(starts)


def _log_density(guide: Any, position: Tensor) -> Tensor | None:
    """The guide's log density of positions, or nothing where only its draws have one."""
    if not callable(getattr(guide, "log_ratio", None)):
        return None
    repeated = position.repeat(_MOMENTA, 1)
    try:
        ratios = guide.log_ratio(repeated).reshape(_MOMENTA, -1)
    except ValueError:  # it has no inverse
        return None
    return (ratios.logsumexp(0) - math.log(_MOMENTA)).double()


def place_of(potential: Potential, position: Tensor) -> str:
    """A position's values, in short."""
    values = potential.constrain(position)
    rounded = {name: torch.round(value, decimals=2).tolist() for name, value in values.items()}
    return ", ".join(f"{name} = {value}" for name, value in rounded.items())[:200]
