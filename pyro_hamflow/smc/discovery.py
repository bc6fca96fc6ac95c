"""Modes that a population from the prior has missed, as descents find them.

Along a path of temperatures a mode much narrower than others holds next to nothing until the end,
so that a population of any size one can pay may have no particle there. Descents find what they
begin above. They begin at draws of the prior and where the population was on its way: at some
picked at random, which find what many of them lie above, and at some where the potential is steep
for how high it is, as it is above narrow modes; and, in few dimensions, above modes that are narrow
in all of them, at the likeliest of very many draws of the prior. In many dimensions all draws lie
at about the same distance from the middle, and above one mode: so descents begin nearer to it and
farther, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.flows.descent import Descent
from pyro_hamflow.flows.modes import Mode, find_modes
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.model.tempered import PriorAndModes
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.smc.resampling import log_mean_exp, next_step, resample_systematically

_MOST_DIMENSIONS = 200  # of which descents keep a Hessian each
_PRIOR = 4  # draws of the prior for each particle, whose steepness is looked at
_COST = 0.07  # of what the population took, that descents may take, and draws of the prior as well
_LENGTH = 40  # gradients of a descent, about
_FEWEST, _STARTS = 16, 256  # descents
_STRETCHED = 2  # of them, for each beside that begins nearer to the prior's middle, or farther
_NEAREST, _FARTHEST = 0.2, 3.0  # times the distance of a draw
_OWN = 4  # of them, for each beside that begins where the population is
_LIKELY = 2  # of them, for each beside that begins where the prior's draws are likely
_MOST_MODES = 32
_MISSED = 0.2  # of what a mode holds, less of which a population has missed
_WRONG = 0.1  # of the posterior, by which a mode's share may be too small
_ERRORS = 2.0  # of the share, beyond that: they are those of a population in haste, too
# By how many times the error of independent particles a share differs between parts where luck has
# found it: 20 times where one part of sixteen has a mode, 2 to 4 times where all parts know it.
_LUCK = 5.0
_COUNT = 10.0  # particles that it should have there, fewer of which may be missing by chance
# Of the posterior, what modes hold together if a path may begin at them for luck's sake
_WHOLE = 0.5
_LEAST = 0.005  # of the posterior, less of which is of no interest
# Of it, as what a mode of more may seem to hold; a path begins there, too, if at all
_SMALL = 0.001


class Discovery(NamedTuple):
    """What descents have found.

    Attributes:
        modes: Where a path should begin as well; none if a population has them all.
        num_missed: How many of them the population has next to nothing of, but for luck.
        large: All modes that matter, as far as is seen.
    """

    modes: list[Mode]
    num_missed: int
    large: list[Mode]


@torch.no_grad()
def look_for_modes(
    potential: Potential,
    position: Tensor,
    log_weights: Tensor,
    visited: Tensor,
    num_gradients: int,
    machine: Program | None = None,
    *,
    of_few: bool = False,
) -> Discovery:
    """Modes, if the shares of a population are wrong at any of them, or if it descends from few.

    Beyond 200 dimensions none are looked for. What a mode holds is told by importance sampling
    within the ellipsoid that holds nearly all of its Gaussian, and compared with what of the
    population lies there: whatever the posterior's shape, both estimate the same.

    Arguments:
        potential: The posterior.
        position: The population, of shape ``(particles, dimension)``.
        log_weights: Its weights, whose exponentials have the evidence as mean, in parts that follow
            each other, ``(parts, particles of a part)``.
        visited: Where it was on its way, of shape ``(positions, dimension)``.
        num_gradients: How many gradients each particle has taken.
        machine: Value and gradient by machine code, where there is any.
        of_few: Whether the population descends from so few that its weights are left to luck.
    """
    nothing = Discovery([], 0, [])
    if potential.dimension > _MOST_DIMENSIONS:
        return nothing
    with random_state_kept():
        torch.manual_seed(0)
        weights = log_weights.flatten().softmax(0)
        mean = weights.to(position) @ position
        scale = (weights.to(position) @ (position - mean).square()).sqrt()
        descent = Descent(potential, scale, potential.draw_noise(1), machine)
        budget = int(_COST * num_gradients * len(position) / _LENGTH)
        count = min(max(budget, _FEWEST), _STARTS)
        prior = Prior(potential)
        drawn = prior.draw(_PRIOR * len(position))[0]
        starts = _starts(descent, torch.cat([visited, drawn]), count, len(position))
        picked = weights.multinomial(max(count // _OWN, _FEWEST), replacement=True)
        stretched = _stretched(drawn, max(count // _STRETCHED, _FEWEST))
        blocks = max(int(_COST * num_gradients), 1)
        likely = _likely(descent, prior, max(count // _LIKELY, _FEWEST), blocks, len(position))
        starts = torch.cat([starts, position[picked], stretched, likely])
        modes = find_modes(descent, starts, _MOST_MODES)
        if not modes:
            return nothing
        held = _log_masses(descent, modes, len(position))
    level = log_weights.max()
    masses = (log_weights - level).exp() / len(position)
    in_parts = (_belongs(modes, position).reshape(-1, *masses.shape) * masses).sum(-1)
    found, wholes = in_parts.sum(1), masses.sum(-1)
    outside = (masses.sum() - found.sum()).clamp(min=0.0)
    shares = torch.stack([part / (part.sum() + outside) for part in ((held - level).exp(), found)])
    matters = shares.amax(0) > max(_LEAST, _COUNT / len(position))
    large = [mode for mode, share in zip(modes, shares[0], strict=True) if share > _SMALL]
    missed = matters & (shares[1] < _MISSED * shares[0])
    chance = (in_parts - shares[1, :, None] * wholes).std(-1) / wholes.mean() / len(wholes) ** 0.5
    wrong = shares[0] - shares[1] > _WRONG + _ERRORS * chance
    # Where a few particles have found a mode, a second population may well find it no more.
    independent = (shares[0] * (1.0 - shares[0])).clamp(min=0.0).sqrt() / len(position) ** 0.5
    lucky = (shares[0] > _WRONG) & (chance > (_LUCK * independent).clamp(min=0.5 * _WRONG))
    # Of very many modes a population lacks some by chance, and a path from few would lack more.
    lacking = ((shares[0] - shares[1]) * missed).sum()
    is_whole = lacking <= _WRONG + _ERRORS * chance.norm()
    is_whole &= not (of_few and float(shares[0].sum()) > _WHOLE)
    if is_whole and not bool((matters & (wrong | lucky)).any()):
        return nothing._replace(large=large)
    typical = (in_parts / wholes).nanmedian(-1).values
    missed |= matters & lucky & (typical < _MISSED * shares[0])
    return Discovery(large, int(missed.sum()), large)


def beginning_at(modes: Sequence[Mode], prior: Prior) -> Prior | PriorAndModes:
    """Where a path begins that misses none of these modes: at the prior, if there are none."""
    if not modes:
        return prior
    mean, precision = (
        torch.stack([getattr(mode, part) for mode in modes]) for part in ("position", "hessian")
    )
    return PriorAndModes(prior, mean, precision)


def _starts(descent: Descent, pool: Tensor, count: int, rows: int) -> Tensor:
    """So many of a pool of positions: half at random, half steep ones.

    A parabola of standard deviation s has the slope sqrt(2 h) / s at the height h above its top.
    Ranks by steepness are spread evenly in their logarithms, for the steepest may all be above one
    mode.
    """
    parts = [descent.value_and_gradient(part) for part in _padded(pool, rows).split(rows)]
    value, gradient = (torch.cat(part)[: len(pool)] for part in zip(*parts, strict=True))
    height = (value - value.min()).clamp(min=0.0)
    steepness = (gradient * descent.scale).norm(dim=-1) / (1.0 + height).sqrt()
    order = steepness.nan_to_num(0.0).argsort(descending=True)
    steep = count // 2
    ranks = torch.logspace(0.0, math.log10(len(pool)), steep).long().clamp(max=len(pool)) - 1
    ranks = torch.maximum(ranks, torch.arange(steep))  # no rank twice
    return torch.cat([pool[order[ranks]], pool[torch.randperm(len(pool))[: count - steep]]])


def _stretched(drawn: Tensor, count: int) -> Tensor:
    """So many draws, nearer to their middle or farther, evenly in the logarithm of how much."""
    middle = drawn.median(0).values
    factor = torch.logspace(math.log10(_NEAREST), math.log10(_FARTHEST), count).to(drawn)
    picked = drawn[torch.randint(len(drawn), (count,), device=drawn.device)]
    return middle + factor[:, None] * (picked - middle)


def _likely(descent: Descent, prior: Prior, count: int, blocks: int, rows: int) -> Tensor:
    """So many draws of the prior, picked by their likelihood from so many blocks of rows.

    The likelihood counts by the power by which the weights are worth as many as are picked.
    """
    positions, log_ratios = [], []
    for _ in range(blocks):
        position, noise = prior.draw(rows)
        log_ratio = prior.value(position, noise) - descent.value(position, noise)
        positions.append(position)
        log_ratios.append(log_ratio.double())
    log_ratio = torch.cat(log_ratios).nan_to_num(-torch.inf, posinf=-torch.inf)[None]
    power = next_step(torch.zeros_like(log_ratio), log_ratio, 1.0, count / log_ratio.numel())
    return torch.cat(positions)[resample_systematically(power * log_ratio, count)[0]]


def _padded(rows: Tensor, count: int) -> Tensor:
    """Rows, some of them twice, so many that blocks of this length divide them."""
    return torch.cat([rows, rows[: -len(rows) % count]])


def _belongs(modes: list[Mode], position: Tensor) -> Tensor:
    """Which positions count for which modes, ``(modes, positions)``."""
    dimension = position.shape[-1]
    squares = torch.stack([mode.squared_distance(position) for mode in modes])
    heights = torch.stack([mode.log_density(position) for mode in modes])
    nearest = heights.argmax(0) == torch.arange(len(modes), device=heights.device)[:, None]
    return nearest & (squares < dimension + 3.0 * math.sqrt(2.0 * dimension))


def _log_masses(descent: Descent, modes: list[Mode], count: int) -> Tensor:
    """The logarithms of what modes hold, by importance sampling, ``(modes,)``."""
    each = max(1, count // len(modes))
    log_masses = []
    positions, log_densities = [], []
    for mode in modes:
        root = torch.linalg.cholesky(mode.hessian)
        standard = torch.randn(each, len(mode.position)).to(mode.position)
        offset = torch.linalg.solve_triangular(root.mT, standard.mT, upper=True).mT
        positions.append(mode.position + offset)
        norm = root.diagonal().log().sum() - 0.5 * len(mode.position) * math.log(2.0 * math.pi)
        log_densities.append(norm - 0.5 * standard.square().sum(-1))
    position = _padded(torch.cat(positions), count)
    noise = descent.potential.draw_noise(count)
    value = descent.value(position[:count], noise).double()
    value = value[: each * len(modes)].reshape(len(modes), each)
    belongs = _belongs(modes, torch.cat(positions)).reshape(len(modes), len(modes), each)
    for index, log_density in enumerate(log_densities):
        log_ratio = -value[index] - log_density.double()
        inside = belongs[index, index] & log_ratio.isfinite()
        log_masses.append(log_mean_exp(torch.where(inside, log_ratio, -torch.inf)))
    return torch.stack(log_masses)
