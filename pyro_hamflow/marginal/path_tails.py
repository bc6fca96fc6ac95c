r"""Where a path's Gaussian proposal is too narrow, which estimates from fresh noise do not show.

A weight that is large where the proposal hardly ever goes varies little in any number of estimates.
But the posterior goes there as often as it has to, and a chain that does stays for as long as its
weight is larger than others'. So weights are looked at along straight lines, far beyond where noise
reaches: through the proposal's centre, for each state the line on which that state moves the
furthest. On a line the moments of the weight are sums over a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.marginal.path_density import Parts
from pyro_hamflow.marginal.path_fit import PathFit
from pyro_hamflow.marginal.path_looks import PathMap
from pyro_hamflow.marginal.proposals.base import stretched

_END, _POINTS = 10.0, 41  # of a line, in standard deviations of the noise
_MOST_LINES = 24  # of one path, evenly spread over its states
_RAREST = 1e-4  # of the posterior's paths on a line: those of the largest weights, left out
# Numbers of paths: more do not stay in a cache, and took 2,000 states twice as long.
_AT_ONCE = 2**18


def tail_variance(fit: PathFit, found: PathMap, parts: Parts) -> float:
    r"""The variance of a log-normal weight with as large a ratio of moments as the worst line's.

    That ratio, :math:`E[w^2] / E[w]^2` under the noise, is about how long the posterior's paths
    stay when fresh noise is proposed to them.

    Arguments:
        fit: The proposal.
        found: What it is for some values of the parameters.
        parts: The path's log densities there.
    """
    if fit.is_exact:
        return 0.0
    n, shape = fit.mode.shape[-1], fit.mode.shape
    states = torch.linspace(0, n - 1, min(n, _MOST_LINES), device=fit.mode.device).long().unique()
    places = torch.linspace(-_END, _END, _POINTS).to(fit.mode)
    log_noise = -0.5 * places.square().reshape(-1, *[1] * (len(shape) - 1))
    at_once = max(1, _AT_ONCE // (_POINTS * shape.numel()))
    worst = [
        _log_moments(line, found, parts, places, log_noise)
        for part in states.split(at_once)
        for line in [_lines(part, found, fit.mode)]
    ]
    return float(torch.stack(worst).max())


def _lines(states: Tensor, found: PathMap, like: Tensor) -> Tensor:
    """The directions of the noise that move some states the furthest, ``(states, *shape, n)``."""
    n = like.shape[-1]
    one = torch.nn.functional.one_hot(states, n).to(like)
    one = one.reshape(len(states), *[1] * (like.dim() - 1), n)
    one = one.expand(len(states), *like.shape)
    lines: Tensor = torch.func.vmap(found.pulled)(one)
    return lines / lines.norm(dim=-1, keepdim=True)


def _log_moments(
    lines: Tensor, found: PathMap, parts: Parts, places: Tensor, log_noise: Tensor
) -> Tensor:
    """The largest log ratio of moments on some lines."""

    def log_weight(noise: Tensor) -> Tensor:
        moved, log_stretch = stretched(noise)
        path = found.draw(moved)
        log_density = parts.prior(path) + parts.likelihood(path)
        return log_density + 0.5 * noise.square().sum(-1) + log_stretch

    def on_line(line: Tensor) -> Tensor:
        log_weights = torch.func.vmap(log_weight)(places.reshape(-1, *[1] * line.dim()) * line)
        log_weights = log_weights.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        mean = (log_weights + log_noise).logsumexp(0) - log_noise.logsumexp(0)
        share = (log_weights + log_noise).softmax(0)  # of the posterior's paths on the line
        by_weight = log_weights.sort(0, descending=True)
        share = share.gather(0, by_weight.indices)
        counts = share.cumsum(0) > _RAREST
        log_share = torch.where(counts, share.log(), -torch.inf)
        return (by_weight.values + log_share).logsumexp(0) - mean

    ratios: Tensor = torch.func.vmap(on_line)(lines)
    return ratios.nan_to_num(nan=0.0).max()
