"""Posteriors of several modes for libraries that take densities: `numpy` or `jax.numpy`.

Those of :mod:`benchmarks.mode_targets` again, with the same priors; of those in 1 to `d` dimensions
positions are standard normal before the prior's scale, of the exoplanet as its model has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_TIMES = [14.55, 31.42, 67.77, 85.89, 92.04, 97.91, 109.32, 144.34, 156.89, 162.40, 169.75, 175.72]
_VELOCITIES = [-1.71, 6.12, -1.66, 8.27, -5.65, 0.26, 0.98, -4.00, 3.01, 3.77, 3.67, -0.98]
_LOW, _HIGH = math.log(3.0), math.log(300.0)
_HALF_LOG = 0.5 * math.log(2.0 * math.pi)


class Density(NamedTuple):
    """A posterior.

    Attributes:
        prior: Of each coordinate: its family, ``"normal"`` or ``"uniform"``, and mean and deviation
            or both ends.
        log_likelihood: Of the library and positions ``(..., dimension)``.
        periodic: Coordinates on a circle.
        sites: The model's sites, from positions.
    """

    prior: list[tuple[str, float, float]]
    log_likelihood: Callable[[Any, Any], Any]
    sites: Callable[[np.ndarray], dict[str, np.ndarray]]
    periodic: tuple[int, ...] = ()

    def log_prior(self, numbers: Any, x: Any) -> Any:
        """Of the library and positions."""
        parts = []
        for place, (family, first, second) in enumerate(self.prior):
            z = x[..., place]
            if family == "normal":
                value = -0.5 * ((z - first) / second) ** 2 - math.log(second) - _HALF_LOG
            else:
                inside = (z >= first) & (z <= second)
                value = numbers.where(inside, -math.log(second - first), -numbers.inf)
            parts.append(value)
        return sum(parts)

    def draw(self, count: int) -> np.ndarray:
        """From the prior."""
        generator = np.random.default_rng(0)
        columns = [
            (generator.normal if family == "normal" else generator.uniform)(first, second, count)
            for family, first, second in self.prior
        ]
        return np.stack(columns, -1)


def density(name: str) -> Density:
    """By the target's name, its size after a space."""
    kind, _, size = name.partition(" ")
    return {"mixture": _mixture, "exoplanet": _exoplanet, "phi4": _phi_four, "wells": _many_well}[
        kind
    ](int(size or 0))


def _normal(size: int, scale: float) -> list[tuple[str, float, float]]:
    return [("normal", 0.0, scale)] * size


def _log_normal(x: Any, scale: float) -> Any:
    return (-0.5 * (x / scale) ** 2 - math.log(scale) - _HALF_LOG).sum(-1)


def _whole(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": x}


def _mixture(size: int) -> Density:
    def log_likelihood(numbers: Any, x: Any) -> Any:
        below = _log_normal(x + 2.5, 0.5**0.5) + math.log(0.25)
        above = _log_normal(x - 2.5, 0.5**0.5) + math.log(0.75)
        return numbers.logaddexp(below, above) - _log_normal(x, 5.0)

    return Density(_normal(size, 5.0), log_likelihood, _whole)


def _exoplanet(_: int) -> Density:
    def log_likelihood(numbers: Any, x: Any) -> Any:
        times, velocities = numbers.array(_TIMES), numbers.array(_VELOCITIES)
        v0, amplitude, phase, log_period = (x[..., i, None] for i in range(4))
        angle = 2.0 * math.pi * times / numbers.exp(log_period) + phase
        return _log_normal(velocities - v0 - amplitude * numbers.cos(angle), 2.5)

    def sites(x: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(("v0", "amplitude", "phase", "log_period"), x.T, strict=True))

    prior = [("normal", 0.0, 5.0), ("normal", 5.0, 3.0)]
    prior += [("uniform", 0.0, 2.0 * math.pi), ("uniform", _LOW, _HIGH)]
    return Density(prior, log_likelihood, sites, (2,))


def _phi_four(size: int) -> Density:
    a, beta = 0.1, 20.0
    links = 2.0 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)
    precision = beta * (a * size * links + np.eye(size) / (a * size))
    root = np.linalg.inv(np.linalg.cholesky(precision))  # covariance root.T @ root
    log_root = np.log(np.diagonal(root)).sum()

    def log_likelihood(numbers: Any, z: Any) -> Any:
        x = z @ numbers.array(root)
        inner = ((x[..., 1:] - x[..., :-1]) ** 2).sum(-1) + x[..., 0] ** 2 + x[..., -1] ** 2
        energy = 0.5 * a * size * inner + ((1.0 - x**2) ** 2).sum(-1) / (4.0 * a * size)
        return -beta * energy - _log_normal(z, 1.0) + log_root

    return Density(_normal(size, 1.0), log_likelihood, lambda z: {"x": z @ root})


def _many_well(size: int) -> Density:
    half = size // 2

    def log_likelihood(numbers: Any, x: Any) -> Any:
        a, b = x[..., :half], x[..., half:]
        energy = (a**4 - 6.0 * a**2 - 0.5 * a + 0.5 * b**2).sum(-1)
        return -energy - _log_normal(x, 2.0)

    return Density(_normal(size, 2.0), log_likelihood, _whole)
