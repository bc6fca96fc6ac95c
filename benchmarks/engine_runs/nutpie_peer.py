"""nutpie's NUTS of PyMC's models, where Python has them, as :mod:`.told` has it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import nutpie
import pymc

from benchmarks.engine_runs.told import Asked, Run, asked, tell


def _schools(sigma: np.ndarray, y: np.ndarray) -> None:
    mu = pymc.Normal("mu", 0.0, 5.0)
    tau = pymc.HalfCauchy("tau", 5.0)
    z = pymc.Normal("z", 0.0, 1.0, shape=8)
    pymc.Normal("y", mu + tau * z, sigma, observed=y)


def _logistic(x: np.ndarray, y: np.ndarray) -> None:
    intercept = pymc.Normal("intercept", 0.0, 5.0)
    slope = pymc.Normal("slope", 0.0, 1.0, shape=x.shape[1])
    pymc.Bernoulli("y", logit_p=intercept + x @ slope, observed=y)


def _correlated(root: np.ndarray) -> None:
    pymc.MvNormal("x", np.zeros(len(root)), chol=root)


_MODELS: dict[str, Callable[..., None]] = {
    "eight schools": _schools,
    "breast cancer": _logistic,
    "normal, 100 dimensions": _correlated,
}


def _run(told: Asked, compiled: nutpie.CompiledModel, names: list[str], seed: int) -> Run:
    settings = {"chains": told.chains, "cores": 1, "seed": 1 + seed, "progress_bar": False}

    def seconds(draws: int) -> tuple[float, Any]:
        began = time.perf_counter()
        trace = nutpie.sample(compiled, draws=draws, tune=told.iterations, **settings)
        return time.perf_counter() - began, trace

    whole, trace = seconds(told.iterations)
    parts = [np.asarray(trace.posterior[name]) for name in names]
    draws = np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], -1)
    steps = float(np.asarray(trace.sample_stats["n_steps"]).mean())
    return Run(draws, whole - seconds(1)[0], steps)  # the same seed makes the same warm-up


if __name__ == "__main__":
    told = asked()
    with pymc.Model() as model:
        _MODELS[told.posterior](**told.data)
    names = [variable.name for variable in model.free_RVs]
    tell(told, partial(_run, told, nutpie.compile_pymc_model(model), names))
