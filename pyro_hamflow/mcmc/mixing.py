"""R-hat, effective sample sizes and the information that is missing, of chains' draws.

They are ArviZ's to rounding. It takes as long to import as Pyro, which no run should wait for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

_FEWEST = 4  # draws of a chain that are judged
_TAILS = (0.05, 0.95)  # ends of the interval whose bounds are to be known, as ArviZ has it
_CONSTANT = 1e-15  # the range of draws that are all the same


def rhat(values: np.ndarray) -> np.ndarray:
    """R-hat of draws ``(chains, draws, *)``, of shape ``(*)``.

    By ranks of the halves of chains, and of their distances from the median: the larger.

    References:
        | Rank-normalization, folding, and localization (Vehtari et al., 2021)
        | https://doi.org/10.1214/20-BA1221
    """

    def judge(chains: np.ndarray) -> float:
        halves = _halves(chains)
        folded = np.abs(halves - np.median(halves))
        return float(max(_spread_of_chains(_normal_scores(rows)) for rows in (halves, folded)))

    return _of_each(judge, values)


def ess_bulk(values: np.ndarray) -> np.ndarray:
    """The effective sample size of the ranks of draws ``(chains, draws, *)``; of shape ``(*)``."""
    return _of_each(lambda chains: _effective(_normal_scores(_halves(chains))), values)


def ess_tail(values: np.ndarray) -> np.ndarray:
    """That of the share below either of two quantiles, the smaller; of shape ``(*)``."""

    def judge(chains: np.ndarray) -> float:
        halves = _halves(chains)
        return min(_effective(halves <= edge) for edge in np.quantile(chains, _TAILS))

    return _of_each(judge, values)


def bfmi(energy: np.ndarray) -> np.ndarray:
    """The fraction of missing information of energies ``(chains, draws)``, of each chain."""
    return np.square(np.diff(energy)).mean(1) / energy.var(1, ddof=1)


def _of_each(judge: Callable[[np.ndarray], float], values: np.ndarray) -> np.ndarray:
    """A judgement of each quantity's draws ``(chains, draws)``; none where some are no numbers."""
    columns = np.asarray(values, dtype=float).reshape(*values.shape[:2], -1)
    found = [
        np.nan if np.isnan(column).any() or column.shape[1] < _FEWEST else judge(column)
        for column in np.moveaxis(columns, 2, 0)
    ]
    return np.array(found).reshape(values.shape[2:])


def _halves(chains: np.ndarray) -> np.ndarray:
    """First and second halves of chains, as chains; the draw in the middle is left out."""
    half = chains.shape[1] // 2
    return np.concatenate([chains[:, :half], chains[:, -half:]])


def _normal_scores(chains: np.ndarray) -> np.ndarray:
    """The normal quantiles of the ranks of draws among all of them."""
    rows = torch.from_numpy(chains.ravel())
    ordered = rows.sort().values
    sides = [torch.searchsorted(ordered, rows, right=right) for right in (False, True)]
    rank = (sides[0] + sides[1] + 1).double() / 2  # of those that are alike, the middle
    share = (rank - 0.375) / (len(rows) + 0.25)
    return torch.special.ndtri(share).numpy().reshape(chains.shape)


def _spread_of_chains(chains: np.ndarray) -> float:
    """The root of the variance of all draws over that within chains."""
    draws = chains.shape[1]
    within, between = chains.var(1, ddof=1).mean(), chains.mean(1).var(ddof=1)
    return np.sqrt(between / within + (draws - 1) / draws)


def _effective(chains: np.ndarray) -> float:
    """The effective sample size of draws ``(chains, draws)`` for their mean.

    Correlations are summed in pairs of lags, which are positive and fall for any reversible chain:
    up to the first pair that is not, each no larger than that before.
    """
    chains = chains.astype(float)
    count, draws = chains.size, chains.shape[1]
    if np.ptp(chains) < _CONSTANT:
        return float(count)
    covariance = _autocovariance(chains)
    within = covariance[0] * draws / (draws - 1)
    total = covariance[0]
    if len(chains) > 1:
        total += chains.mean(1).var(ddof=1)
    correlation = 1.0 - (within - covariance) / total
    correlation[0] = 1.0
    most = max(0, (draws - 3) // 2)
    pairs = correlation[0 : 2 * most + 2 : 2] + correlation[1 : 2 * most + 2 : 2]
    last = min([most, *np.flatnonzero(pairs <= 0.0)[:1]])
    rest = correlation[2 * last]
    if rest < 0.0 and pairs[last] < 0.0:
        rest = 0.0
    time = -1.0 + 2.0 * np.minimum.accumulate(pairs[:last]).sum() + rest
    return count / max(time, 1.0 / np.log10(count))


def _autocovariance(chains: np.ndarray) -> np.ndarray:
    """By lag, the mean of all chains."""
    draws = chains.shape[1]
    size = 2 ** (2 * draws - 1).bit_length()
    power = np.abs(np.fft.rfft(chains - chains.mean(1, keepdims=True), size)) ** 2
    return np.fft.irfft(power.mean(0), size)[:draws] / draws
