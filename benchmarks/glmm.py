"""Effective draws of the GLMM's posterior, by proposal, points, particles and method."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.diagnostics import largest_rhat, largest_score, smallest_ess
from benchmarks.models import glmm_arguments, glmm_kernel, glmm_reference, glmm_starts
from benchmarks.report import Row, Table, met
from benchmarks.timing import nothing_compiled
from pyro_hamflow import MCMC

ABOUT = "The GLMM: effective draws per second and per gradient"
_CHAINS = 4
_GOAL = 200.0
_ESS = "smallest ESS"
_PER_SECOND = "per second"
_WITH_ALL = "per second, with all before"
_SETTINGS = (
    ("laplace", "iid", 8, "conditional"),
    ("laplace", "iid", 8, "joint"),
    ("laplace", "rqmc", 8, "conditional"),
    ("laplace", "iid", 2, "conditional"),
    ("laplace", "iid", 32, "conditional"),
    ("prior", "iid", 32, "conditional"),
    ("N(0, 9)", "iid", 128, "joint"),
)
_PAPER = ("N(0, 9)", "iid", 128, "joint")


@dataclass
class Limit:
    """Ends a run that takes too long, as a user would from the keyboard; keeps its times.

    Attributes:
        warmup: The most seconds for all that comes before the draws.
        sampling: The most seconds for the draws.
        warmed: When the last iteration of the warm-up ended.
        latest: When the latest iteration ended.
        reached: Whether it ended the run.
    """

    warmup: float
    sampling: float
    began: float = field(default_factory=time.perf_counter)
    warmed: float = 0.0
    latest: float = 0.0
    reached: bool = False

    def __call__(self, kernel: Any, params: Any, stage: str, step: int) -> None:
        self.latest = time.perf_counter()
        if stage == "Warmup":
            self.warmed = self.latest
        over_warmup = stage == "Warmup" and self.latest - self.began > self.warmup
        if over_warmup or self.latest - self.warmed > self.sampling:
            self.reached = True
            raise KeyboardInterrupt


def measure(*, quick: bool) -> list[Table]:
    """Our settings, and those of the paper in the same code."""
    rows = []
    settings = (_SETTINGS[0],) if quick else _SETTINGS
    for setting in settings:
        kernel = glmm_kernel(*setting)
        rows.append(_sample(kernel, setting, "tuned", Limit(240, 90), quick=quick))
    paper = glmm_kernel(
        *_PAPER,
        full_mass=False,
        inverse_mass_matrix=torch.full((13,), 0.1),
        step_size=0.025,
        trajectory_length=0.5,
        jitter=0.0,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    limit = Limit(300, 10 if quick else 180)
    rows.append(_sample(paper, _PAPER, "the paper's", limit, quick=quick, num_samples=10_000))
    best = max(rows[:-1], key=lambda row: row[_PER_SECOND])
    gain = best[_PER_SECOND] / (rows[-1][_PER_SECOND] or np.nan)
    gain_all = best[_WITH_ALL] / (rows[-1][_WITH_ALL] or np.nan)
    name = f"{best['proposal']}, {best['points']}, N = {best['N']}, {best['method']}"
    table = Table(
        "Smallest bulk ESS over the 13 parameters, 4 chains",
        rows,
        f"The best is {name}: {gain:,.0f} times as many effective draws per second as the paper's "
        f"settings ({gain_all:,.0f} times with pilot, capture, compilation and warm-up counted). "
        f"The paper's have a smallest ESS of {rows[-1][_ESS]:.0f}: below a hundred or so that is "
        "itself a rough estimate, and mostly too high. Gradients are those of single chains; every "
        "setting starts from the same four draws of the reference posterior; max |z| is of the 13 "
        "means against it, in combined standard errors. Where draws are fewer than 1,000 per "
        "chain, a limit on the time ended the run.",
        f"at least {_GOAL:.0f} times the paper's settings per second: "
        f"{met(gain >= _GOAL)} ({gain:.3g}).",
    )
    return [table]


def _sample(
    kernel: Any,
    setting: tuple[str, str, int, str],
    tuning: str,
    limit: Limit,
    *,
    quick: bool,
    num_samples: int = 1000,
) -> Row:
    own = tuning != "tuned"  # nothing to tune, and it starts where it should
    mcmc = MCMC(
        kernel,
        num_samples=num_samples if not quick or own else 60,
        warmup_steps=20 if quick or own else 300,
        num_chains=_CHAINS,
        initial_params=glmm_starts(_CHAINS),
        seed=1,
        hook_fn=limit,
        disable_progbar=True,
    )
    labels = dict(zip(("proposal", "points", "N", "method"), setting, strict=True))
    labels["settings"] = tuning
    with nothing_compiled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="interrupted: .* draws were made")
        limit.began = time.perf_counter()
        try:
            mcmc.run(*glmm_arguments())
        except KeyboardInterrupt:
            if not limit.reached:
                raise
            return labels | _NOTHING | {"before, s": limit.latest - limit.began}
    before, sampling = limit.warmed - limit.began, limit.latest - limit.warmed
    draws = mcmc.draws
    gradients = int(draws.stats["n_gradients"].sum())
    return (
        labels
        | _quality(draws.position.numpy(), sampling, before, gradients)
        | {
            "accepted": float(draws.stats["acceptance_rate"].mean()),
            "steps": float(draws.stats["n_steps"].double().mean()),
            "sampling, s": sampling,
            "before, s": before,
        }
    )


def _quality(position: Any, sampling: float, before: float, gradients: int) -> Row:
    """Effective draws and errors of draws of shape ``(chains, draws, 13)``."""
    ess = smallest_ess(position)
    return {
        "draws": position.shape[1],
        _ESS: ess,
        _PER_SECOND: ess / sampling,
        _WITH_ALL: ess / (sampling + before),
        "per 1,000 gradients": 1000 * ess / gradients,
        "R-hat": largest_rhat(position),
        "max abs z": largest_score(position, glmm_reference()),
    }


_NOTHING: Row = {
    "draws": 0,
    _ESS: 0.0,
    _PER_SECOND: 0.0,
    _WITH_ALL: 0.0,
    "per 1,000 gradients": 0.0,
    "R-hat": float("nan"),
    "max abs z": float("nan"),
    "accepted": float("nan"),
    "steps": float("nan"),
    "sampling, s": 0.0,
}
