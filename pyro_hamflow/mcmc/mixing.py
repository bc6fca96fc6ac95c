"""R-hat and effective sample sizes by ranks: Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021).

They are what ArviZ tells, which takes a second to import: a run that is short needs no more than
these at its end.
"""

from __future__ import annotations

import numpy as np
import torch

_FEWEST = 4  # draws of a chain
_TAILS = (0.05, 0.95)  # shares of the draws below their bounds: a twentieth on either side


def rhat(rows: np.ndarray) -> np.ndarray:
    """R-hat of draws ``(chains, draws, coordinates)``: the larger of bulk and folded."""
    with np.errstate(all="ignore"):  # of what never moved
        return np.array([_rhat(rows[..., i]) for i in range(rows.shape[2])])


def ess_bulk(rows: np.ndarray) -> np.ndarray:
    """Effective sample sizes of the ranks of draws ``(chains, draws, coordinates)``."""
    with np.errstate(all="ignore"):
        return np.array([_bulk(rows[..., i]) for i in range(rows.shape[2])])


def ess_tail(rows: np.ndarray) -> np.ndarray:
    """The smaller of the effective sample sizes of being in either tail of a twentieth."""
    with np.errstate(all="ignore"):
        return np.array([_tail(rows[..., i]) for i in range(rows.shape[2])])


def bfmi(energy: np.ndarray) -> np.ndarray:
    """The fraction of missing information of energies ``(chains, draws)``, of each chain."""
    with np.errstate(all="ignore"):  # of a model without parameters
        return np.square(np.diff(energy, axis=1)).mean(1) / energy.var(1, ddof=1)


def _rhat(values: np.ndarray) -> float:
    if not _is_valid(values) or len(values) < 2:
        return np.nan
    halves = _halves(values)
    folded = np.abs(halves - np.median(halves))
    return max(_apart(_normal_ranks(halves)), _apart(_normal_ranks(folded)))


def _bulk(values: np.ndarray) -> float:
    return _ess(_normal_ranks(_halves(values))) if _is_valid(values) else np.nan


def _tail(values: np.ndarray) -> float:
    if not _is_valid(values):
        return np.nan
    bounds = np.quantile(values, _TAILS)
    return min(_ess(_halves(values <= bound).astype(float)) for bound in bounds)


def _is_valid(values: np.ndarray) -> bool:
    return values.shape[1] >= _FEWEST and not np.isnan(values).any()


def _halves(values: np.ndarray) -> np.ndarray:
    half = values.shape[1] // 2
    return np.concatenate([values[:, :half], values[:, -half:]])


def _normal_ranks(values: np.ndarray) -> np.ndarray:
    """Quantiles of a normal distribution at the ranks of all values; equal ones share theirs."""
    _, place, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - 0.5 * (counts - 1))[place.ravel()]
    share = (rank - 0.375) / (values.size + 0.25)
    return torch.special.ndtri(torch.from_numpy(share)).numpy().reshape(values.shape)


def _apart(values: np.ndarray) -> float:
    length = values.shape[1]
    within = values.var(1, ddof=1).mean()
    between = length * values.mean(1).var(ddof=1)
    return float(np.sqrt((between / within + length - 1) / length))


def _ess(values: np.ndarray) -> float:
    """By Geyer's initial monotone sequence of autocorrelations."""
    if np.ptp(values) < np.finfo(float).resolution:
        return float(values.size)
    chains, length = values.shape
    covariance = _autocovariance(values)
    within = covariance[0] * length / (length - 1.0)
    whole = covariance[0] + (values.mean(1).var(ddof=1) if chains > 1 else 0.0)
    correlation = 1.0 - (within - covariance) / whole
    correlation[0] = 1.0
    kept = np.zeros(length)
    kept[:2] = even, odd = correlation[:2]
    t = 1
    while t < length - 3 and even + odd > 0.0:
        even, odd = correlation[t + 1], correlation[t + 2]
        if even + odd >= 0.0:
            kept[t + 1], kept[t + 2] = even, odd
        t += 2
    last = t - 2
    if even > 0.0:
        kept[last + 1] = even
    for t in range(1, last - 1, 2):
        if kept[t + 1] + kept[t + 2] > kept[t - 1] + kept[t]:
            kept[t + 1] = kept[t + 2] = (kept[t - 1] + kept[t]) / 2.0
    if np.isnan(kept).any():
        return np.nan
    time = -1.0 + 2.0 * kept[: last + 1].sum() + kept[last + 1 : last + 2].sum()
    return float(values.size / max(time, 1.0 / np.log10(values.size)))


def _autocovariance(values: np.ndarray) -> np.ndarray:
    """At each distance, the mean over chains."""
    length = values.shape[1]
    centred = values - values.mean(1, keepdims=True)
    spectrum = np.abs(np.fft.rfft(centred, 2 << (length - 1).bit_length())) ** 2
    return np.fft.irfft(spectrum)[:, :length].mean(0) / length
