"""What we ask of ArviZ, 0.x or 1.x.

It takes as long to import as Pyro, and nothing needs it before there are draws: it is imported when
it is asked for.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import numpy as np

from pyro_hamflow.process import collecting_later


def rhat(values: np.ndarray) -> np.ndarray:
    """R-hat of draws ``(chains, draws, *)``, of shape ``(*)``."""
    return _of_each("rhat", values)


def ess(values: np.ndarray, method: str = "bulk") -> np.ndarray:
    """The effective sample size of draws ``(chains, draws, *)``, of shape ``(*)``."""
    tail = {"prob": (0.05, 0.95)} if method == "tail" else {}  # 1.x does not know it of arrays
    return _of_each("ess", values, method=method, **tail)


def bfmi(energy: np.ndarray) -> np.ndarray:
    """The fraction of missing information of energies ``(chains, draws)``, of each chain."""
    return np.asarray(_arviz().bfmi(energy))


def psislw(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed log weights, and the shape k of their tail."""
    if has_trees():
        from arviz_stats.base import array_stats  # comes with ArviZ 1.0 only

        try:
            smoothed, k = array_stats.psislw(-log_weights)  # it is written for log-likelihoods
        except ValueError:  # of a tail too short to be fitted: as it is in 0.x, without a bound
            smoothed, k = log_weights - np.logaddexp.reduce(log_weights), np.inf
    else:
        smoothed, k = _arviz().psislw(log_weights.copy())
    return np.asarray(smoothed), float(k)


def summary(samples: dict[str, np.ndarray], prob: float, **keywords: Any) -> Any:
    """ArviZ's table of draws ``(chains, draws, *)``, with intervals of highest density."""
    mass = {"ci_prob": prob, "ci_kind": "hdi"} if has_trees() else {"hdi_prob": prob}
    return _arviz().summary(_dataset(samples), **mass | keywords)


def inference_data(groups: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """Datasets as ``InferenceData``, of ArviZ 0.x."""
    data = _arviz().InferenceData(attrs=attributes)
    with warnings.catch_warnings():  # of old versions, that a group is ours and not of the scheme
        warnings.filterwarnings("ignore", "The group .* is not defined", UserWarning)
        data.add_groups(groups)
    return data


def has_trees() -> bool:
    """Whether ArviZ is 1.0 or later, whose data are xarray's ``DataTree``."""
    return int(_arviz().__version__.split(".")[0]) >= 1


def _of_each(name: str, values: np.ndarray, **settings: Any) -> np.ndarray:
    """A number of each coordinate, by itself: a dataset would cost as much as all else of a run."""
    judge, rows = getattr(_arviz(), name), values.reshape(*values.shape[:2], -1)
    found = [float(judge(rows[..., i], **settings)) for i in range(rows.shape[-1])]
    return np.array(found).reshape(values.shape[2:])


def _dataset(samples: dict[str, np.ndarray]) -> Any:
    with warnings.catch_warnings():  # ArviZ takes more chains than draws for an exchange of them
        warnings.filterwarnings("ignore", "More chains", UserWarning)
        return _arviz().convert_to_dataset(samples)


def _arviz() -> ModuleType:
    with collecting_later():
        import arviz  # takes as long as Pyro

    return arviz
