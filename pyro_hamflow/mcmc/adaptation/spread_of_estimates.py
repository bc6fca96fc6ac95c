"""How much log estimates vary where chains are, and beyond."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import rows_at_once

_REPLICATES = 32  # estimates: their variance is then known to a quarter
_OUT = 1.5  # times as far as chains are from their middle, where estimates are looked at, too
# By how much lower the log density may be there: by .6 r^2 for chains r deviations from the middle.
_REACH = 5.0


def variance_at(potential: Potential, position: Tensor) -> float:
    """That of the log estimate, the median over chains, at their positions."""
    return float(_estimates(potential, position).var(0).median())


def _estimates(potential: Potential, position: Tensor) -> Tensor:
    """Log estimates of the posterior density, of shape ``(replicates, chains)``."""
    count = len(position)
    is_one = potential.programs.rows_at_once("evaluate", count) == count
    program = potential.graph("evaluate", count) if is_one else None
    at_once = rows_at_once(program) if isinstance(program, GraphModule) else 1
    if program is None or at_once == 1:  # each of them is work enough
        noises = (potential.draw_noise(count) for _ in range(_REPLICATES))
        return -torch.stack([potential.value(position, noise) for noise in noises]).double()
    *_, like = potential.examples("evaluate", count)
    draws = [(potential.draw_noise(count), torch.rand_like(like)) for _ in range(_REPLICATES)]
    noise, uniform = (torch.stack(parts) for parts in zip(*draws, strict=True))
    values = torch.func.vmap(
        lambda *draw: program(position, *draw)[0], chunk_size=min(at_once, _REPLICATES)
    )(noise, uniform)
    return -values.double()


def places_beyond(potential: Potential, position: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Places further from a centre than chains, and the variances of log estimates there.

    They are so many times as far, on the chains' own and the other side; but for those that the
    posterior hardly reaches by the mean of the estimates, which are about log-normal. The noisiest
    come first.
    """
    sides = [centre + side * (position - centre) for side in (_OUT, -_OUT)]
    found = [_estimates(potential, places) for places in (position, *sides)]
    here, *levels = (log.mean(0) + 0.5 * log.var(0) for log in found)
    count = torch.cat([level - here > -_REACH for level in levels])
    places, variances = torch.cat(sides)[count], torch.cat([log.var(0) for log in found[1:]])[count]
    order = variances.argsort(descending=True)
    return places[order], variances[order]
