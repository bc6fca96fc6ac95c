"""Posteriors that several libraries draw from, each written once for all of them.

Those named after posteriordb are its models, as its authors describe them, on data simulated here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Data = dict[str, np.ndarray]
SCHOOLS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
_SCHOOLS_ERRORS = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


class Library(NamedTuple):
    """What models are written in.

    Attributes:
        sample: Its statement of a site.
        plate: Its plate.
        dist: Its distributions.
        numbers: ``torch`` or ``jax.numpy``.
    """

    sample: Callable[..., Any]
    plate: Callable[..., Any]
    dist: Any
    numbers: Any

    def normals(self, name: str, scale: float, size: int) -> Any:
        """A vector of independent normals."""
        return self.sample(name, self.dist.Normal(0.0, scale).expand([size]).to_event(1))


class Posterior(NamedTuple):
    """A model and its data.

    Attributes:
        model: A function of a library and the data.
        data: Makes the data.
    """

    model: Callable[..., None]
    data: Callable[[], Data]


def _schools(lib: Library, sigma: Any, y: Any) -> None:
    mu = lib.sample("mu", lib.dist.Normal(0.0, 5.0))
    tau = lib.sample("tau", lib.dist.HalfCauchy(5.0))
    with lib.plate("school", 8):
        z = lib.sample("z", lib.dist.Normal(0.0, 1.0))
        lib.sample("y", lib.dist.Normal(mu + tau * z, sigma), obs=y)


def _schools_data() -> Data:
    return {"sigma": np.array(_SCHOOLS_ERRORS), "y": np.array(SCHOOLS)}


def _logistic(lib: Library, x: Any, y: Any) -> None:
    intercept = lib.sample("intercept", lib.dist.Normal(0.0, 5.0))
    slope = lib.normals("slope", 1.0, x.shape[1])
    with lib.plate("case", len(y)):
        lib.sample("y", lib.dist.Bernoulli(logits=intercept + x @ slope), obs=y)


def _cancer_data() -> Data:
    from sklearn.datasets import load_breast_cancer  # here, for it takes a second to import

    data = load_breast_cancer()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return {"x": x, "y": data.target.astype(float)}


def _correlated(lib: Library, root: Any) -> None:
    zero = lib.numbers.zeros(len(root))
    lib.sample("x", lib.dist.MultivariateNormal(zero, scale_tril=root))


def _correlated_data() -> Data:
    factor = np.random.default_rng(0).standard_normal((100, 100)) / 10
    return {"root": np.linalg.cholesky(factor @ factor.T + 0.1 * np.eye(100))}


def _kilpisjarvi(lib: Library, x: Any, y: Any) -> None:
    alpha = lib.sample("alpha", lib.dist.Normal(9.3, 100.0))
    beta = lib.sample("beta", lib.dist.Normal(0.0, 0.0333))
    sigma = lib.sample("sigma", lib.dist.HalfNormal(100.0))
    with lib.plate("year", len(y)):
        lib.sample("y", lib.dist.Normal(alpha + beta * x, sigma), obs=y)


def _kilpisjarvi_data() -> Data:
    x = np.arange(1952.0, 2014.0)
    noise = np.random.default_rng(1).standard_normal(len(x))
    return {"x": x, "y": 9.3 + 0.02 * (x - x.mean()) + 1.1 * noise}


def _gp_regr(lib: Library, distances: Any, y: Any) -> None:
    rho = lib.sample("rho", lib.dist.Gamma(25.0, 4.0))
    alpha = lib.sample("alpha", lib.dist.HalfNormal(2.0))
    sigma = lib.sample("sigma", lib.dist.HalfNormal(1.0))
    covariance = alpha**2 * lib.numbers.exp(-0.5 * (distances / rho) ** 2)
    covariance = covariance + sigma * lib.numbers.eye(len(y))
    zero = lib.numbers.zeros(len(y))
    lib.sample("y", lib.dist.MultivariateNormal(zero, covariance), obs=y)


def _gp_regr_data() -> Data:
    x = np.arange(-10.0, 11.0, 2.0)
    distances = x[:, None] - x
    covariance = 9.0 * np.exp(-0.5 * (distances / 5.5) ** 2) + 0.2 * np.eye(len(x))
    y = np.linalg.cholesky(covariance) @ np.random.default_rng(2).standard_normal(len(x))
    return {"distances": distances, "y": y}


def _autoregression(lib: Library, lags: Any, y: Any) -> None:
    alpha = lib.sample("alpha", lib.dist.Normal(0.0, 10.0))
    beta = lib.normals("beta", 10.0, lags.shape[1])
    sigma = lib.sample("sigma", lib.dist.HalfCauchy(2.5))
    with lib.plate("time", len(y)):
        lib.sample("y", lib.dist.Normal(alpha + lags @ beta, sigma), obs=y)


def _autoregression_data() -> Data:
    rng, order = np.random.default_rng(3), 5
    y = rng.standard_normal(200)
    for t in range(order, len(y)):
        y[t] += y[t - order : t] @ [0.1, -0.1, 0.2, 0.1, 0.4]
    lags = np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    return {"lags": lags, "y": y[order:]}


def _radon(lib: Library, county: Any, floor: Any, y: Any) -> None:
    mu = lib.sample("mu", lib.dist.Normal(0.0, 10.0))
    slope = lib.sample("slope", lib.dist.Normal(0.0, 10.0))
    spread = lib.sample("spread", lib.dist.HalfNormal(1.0))
    sigma = lib.sample("sigma", lib.dist.HalfNormal(1.0))
    effect = mu + spread * lib.normals("effect", 1.0, 85)
    with lib.plate("house", len(y)):
        lib.sample("y", lib.dist.Normal(effect[county] + slope * floor, sigma), obs=y)


def _radon_data() -> Data:
    rng = np.random.default_rng(4)
    county = np.sort(rng.integers(0, 85, 919))
    floor = (rng.random(919) < 0.17).astype(float)
    level = 1.4 + 0.3 * rng.standard_normal(85)
    y = level[county] - 0.7 * floor + 0.75 * rng.standard_normal(919)
    return {"county": county, "floor": floor, "y": y}


def _gauss_mix(lib: Library, y: Any) -> None:
    dist = lib.dist
    scales = lib.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    start = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
    ordered = dist.TransformedDistribution(start, dist.transforms.OrderedTransform())
    means = lib.sample("mu", ordered)
    share = lib.sample("theta", dist.Beta(5.0, 5.0))
    shares = dist.Categorical(probs=lib.numbers.stack([share, 1.0 - share]))
    with lib.plate("case", len(y)):
        lib.sample("y", dist.MixtureSameFamily(shares, dist.Normal(means, scales)), obs=y)


def _gauss_mix_data() -> Data:
    rng = np.random.default_rng(5)
    first = rng.random(1000) < 0.4
    return {"y": np.where(first, -2.75 + rng.standard_normal(1000), rng.normal(2.75, 0.8, 1000))}


def _diamonds(lib: Library, x: Any, y: Any) -> None:
    slope = lib.normals("slope", 1.0, x.shape[1])
    intercept = lib.sample("intercept", lib.dist.StudentT(3.0, 8.0, 10.0))
    sigma = lib.sample("sigma", lib.dist.HalfCauchy(10.0))
    with lib.plate("stone", len(y)):
        lib.sample("y", lib.dist.Normal(intercept + x @ slope, sigma), obs=y)


def _diamonds_data() -> Data:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((5000, 24)) @ (np.eye(24) + 0.3 * rng.standard_normal((24, 24)))
    x = x - x.mean(0)
    return {"x": x, "y": 7.8 + x @ (0.2 * rng.standard_normal(24)) + rng.standard_normal(5000)}


def _poisson_glmm(lib: Library, powers: Any, y: Any) -> None:
    alpha = lib.sample("alpha", lib.dist.Uniform(-20.0, 20.0))
    beta = lib.sample("beta", lib.dist.Uniform(-10.0, 10.0).expand([3]).to_event(1))
    sigma = lib.sample("sigma", lib.dist.Uniform(0.0, 5.0))
    with lib.plate("year", len(y)):
        effect = lib.sample("effect", lib.dist.Normal(0.0, sigma))
        rate = lib.numbers.exp(alpha + powers @ beta + effect)
        lib.sample("y", lib.dist.Poisson(rate), obs=y)


def _poisson_glmm_data() -> Data:
    rng, year = np.random.default_rng(7), np.linspace(-1.0, 1.0, 40)
    powers = np.stack([year, year**2, year**3], -1)
    rate = np.exp(3.6 + powers @ [0.6, 0.1, -0.3] + 0.1 * rng.standard_normal(40))
    return {"powers": powers, "y": rng.poisson(rate).astype(float)}


POSTERIORS = {
    "eight schools": Posterior(_schools, _schools_data),
    "breast cancer": Posterior(_logistic, _cancer_data),
    "normal, 100 dimensions": Posterior(_correlated, _correlated_data),
    "kilpisjarvi": Posterior(_kilpisjarvi, _kilpisjarvi_data),
    "gp_regr": Posterior(_gp_regr, _gp_regr_data),
    "arK": Posterior(_autoregression, _autoregression_data),
    "radon": Posterior(_radon, _radon_data),
    "low_dim_gauss_mix": Posterior(_gauss_mix, _gauss_mix_data),
    "diamonds": Posterior(_diamonds, _diamonds_data),
    "GLMM_Poisson": Posterior(_poisson_glmm, _poisson_glmm_data),
}
