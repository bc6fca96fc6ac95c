"""nutpie's NUTS of PyMC's models, where Python has them, as :mod:`.told` has it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import nutpie
import pymc

from benchmarks.engine_runs.told import Asked, asked, tell


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


def _run(told: Asked) -> None:
    with pymc.Model() as model:
        _MODELS[told.posterior](**told.data)
    compiled = nutpie.compile_pymc_model(model)
    settings = {"chains": told.chains, "cores": 1, "seed": 1, "progress_bar": False}

    def seconds(draws: int) -> tuple[float, object]:
        began = time.perf_counter()
        trace = nutpie.sample(compiled, draws=draws, tune=told.iterations, **settings)
        return time.perf_counter() - began, trace

    whole, trace = seconds(told.iterations)
    parts = [np.asarray(trace.posterior[v.name]) for v in model.free_RVs]
    draws = np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], -1)
    steps = float(np.asarray(trace.sample_stats["n_steps"]).mean())
    began = time.process_time()
    less, _ = seconds(1)  # the same seed makes the same warm-up
    tell(told, draws, max(whole - less, 1e-9), steps, uncounted=time.process_time() - began)


if __name__ == "__main__":
    _run(asked())
