# SPDX-License-Identifier: Apache-2.0
"""Remake ``glmm.json``: the posterior of a logistic mixture GLMM with its effects integrated out.

The model has 500 subjects with 6 binary answers each. The answers of subject t are Bernoulli with
logit X_t + Z_tj . beta, where the random effect X_t is w N(mu0, 1/lam0) + (1 - w) N(mu1, 1/lam1).
The parameters, in order: beta[0..7], mu[0], mu[1], log_precision[0], log_precision[1] and
logit_weight, with w = sigmoid(logit_weight). The priors: beta and mu are N(0, 10^2); both log
precisions and logit_weight are N(0, s^2), for s = 3 and s = 1. The reference is the mode with
mu[0] < mu[1] (exchanging the labels gives the other one); no draw may leave it.

The random effect of a subject is one-dimensional, so NUTS runs on the 13 parameters with every
effect integrated out by quadrature, one integral per subject and component:

* The likelihood of a subject is L(x) = exp(S x + sum_j y_j eta_j) / prod_j (1 + exp(x + eta_j)),
  S being the number of ones. The product is a polynomial in exp(x) with positive coefficients
  (the elementary symmetric polynomials of exp(eta_j)), so L at nodes shared by all subjects
  takes one matrix product.
* A component with standard deviation up to ``SWITCH`` is integrated by Gauss-Hermite: the
  integrand is then a Gaussian times a function that is smooth at that scale.
* A wider component is integrated by the trapezoid rule on a fixed grid, which converges
  exponentially as L is analytic in a strip of half-width pi. Where all answers agree L tends to
  one in one tail, beyond any grid; so Phi(+-x / STEP_WIDTH), whose Gaussian integral is known in
  closed form, is taken off L and its integral added back.

Measured against a very fine trapezoid rule in log space (``--check``): the total log-likelihood is
off by at most 1.2e-8 over twelve points with log precisions from -8 to 15, means out to 40 and
both sides of ``SWITCH``, and by 4e-9 at the twelve stored draws.

The stored draws of each prior are a sample stratified by log_precision[0]. ``loglik_at_mean`` and
``loglik_at_draws`` are the log marginal likelihood, without the prior, at the stored (rounded)
``mean`` and ``draws``. ``effect_mean`` and ``effect_sd`` are those of X_t given all the answers.

Run ``pip install numpyro arviz`` before this script: the package itself requires neither.
``python make_glmm.py`` writes the file beside the script; ``--check`` measures the quadrature.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.scipy.special import ndtr
from jax.scipy.stats import norm
from numpyro.infer import NUTS
from scipy.special import expit, log_expit, roots_hermitenorm

numpyro.enable_x64()

SUBJECTS, ANSWERS, COVARIATES = 500, 6, 8
NAMES = [f"beta[{i}]" for i in range(COVARIATES)] + [
    "mu[0]",
    "mu[1]",
    "log_precision[0]",
    "log_precision[1]",
    "logit_weight",
]
PRIOR_SD_LOCATION = 10.0
SWITCH = 1.0  # standard deviation of a component at which the quadrature changes
HERMITE_NODES = 24
GRID_LIMIT, GRID_STEP = 28.0, 0.56
STEP_WIDTH = 2.0
BLOCK = 500  # draws between two returns from the compiled loop


class Data(NamedTuple):
    """A simulated data set and the parameters it was drawn from."""

    covariates: np.ndarray  # (subjects, answers, covariates)
    answers: np.ndarray  # (subjects, answers), of 0 and 1
    beta: np.ndarray
    effects: np.ndarray


class Rule(NamedTuple):
    """Nodes of the two quadratures; the defaults are those that sampling uses."""

    switch: float = SWITCH
    hermite_nodes: int = HERMITE_NODES
    grid_limit: float = GRID_LIMIT
    grid_step: float = GRID_STEP


FINER = Rule(switch=0.8, hermite_nodes=40, grid_limit=40.0, grid_step=0.4)


def make_data(seed: int = 20) -> Data:
    """Draw the data set; the order of the draws matters."""
    rng = np.random.default_rng(seed)
    beta = rng.standard_normal(COVARIATES)
    covariates = rng.standard_normal((SUBJECTS, ANSWERS, COVARIATES))
    first = rng.random(SUBJECTS) < 0.8
    narrow = rng.normal(0.0, np.sqrt(1 / 10), SUBJECTS)
    wide = rng.normal(3.0, np.sqrt(1 / 3), SUBJECTS)
    effects = np.where(first, narrow, wide)
    probability = expit(effects[:, None] + covariates @ beta)
    answers = (rng.random((SUBJECTS, ANSWERS)) < probability).astype(np.float64)
    return Data(covariates, answers, beta, effects)


def unpack(theta: Any) -> tuple[Any, Any, Any, Any]:
    """Split a parameter vector into beta, mu, log_precision and logit_weight."""
    return theta[:8], theta[8:10], theta[10:12], theta[12]


class Marginal:
    """Log-likelihood with the random effects integrated out, and their conditional moments."""

    def __init__(self, data: Data, rule: Rule | None = None) -> None:
        rule = Rule() if rule is None else rule
        self.switch = rule.switch
        self.covariates = jnp.asarray(data.covariates)
        self.answers = jnp.asarray(data.answers)
        ones = data.answers.sum(1).astype(int)
        self.count = jnp.asarray(np.eye(ANSWERS + 1)[ones])  # one-hot in the number of ones
        nodes, weights = roots_hermitenorm(rule.hermite_nodes)
        self.nodes = jnp.asarray(nodes)
        self.weights = jnp.asarray(weights / weights.sum())
        half = round(rule.grid_limit / rule.grid_step)
        grid = rule.grid_step * np.arange(-half, half + 1)
        self.grid, self.grid_step = jnp.asarray(grid), rule.grid_step
        # The sign of the tail in which the likelihood tends to one, if any.
        sign = np.where(ones == ANSWERS, 1.0, np.where(ones == 0, -1.0, 0.0))
        self.sign = jnp.asarray(sign)
        step = norm.cdf(sign[:, None] * grid / STEP_WIDTH)
        self.step = jnp.asarray(np.abs(sign)[:, None] * step)

    def coefficients(self, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Polynomial coefficients (subjects, 7) and numerators of the likelihoods."""
        eta = (self.covariates @ beta).T
        odds = jnp.exp(eta)
        none = jnp.zeros((1, eta.shape[1]))
        c = none + 1.0
        for j in range(ANSWERS):
            c = jnp.concatenate([c, none]) + odds[j] * jnp.concatenate([none, c])
        return c.T, jnp.exp((self.answers.T * eta).sum(0))

    def moments(self, theta: jax.Array, top: int) -> jax.Array:
        """Integrals of x^k p(x | theta) L(x) for k = 0..top, shape (subjects, top + 1)."""
        beta, mu, log_precision, logit_weight = unpack(theta)
        sd = jnp.exp(-0.5 * log_precision)
        w = jax.nn.sigmoid(jnp.stack([logit_weight, -logit_weight]))
        coefficients, numerator = self.coefficients(beta)
        orders = jnp.arange(top + 1)

        def likelihood(coefficients: jax.Array, numerator: jax.Array, x: jax.Array) -> jax.Array:
            powers = jnp.exp((jnp.arange(ANSWERS + 1.0)[:, None] - ANSWERS / 2) * x)
            return numerator[:, None] * (self.count @ powers) / (coefficients @ powers)

        def hermite(*args: jax.Array) -> list[jax.Array]:
            coefficients, numerator, mu, sd = args
            x = mu[:, None] + jnp.minimum(sd, self.switch)[:, None] * self.nodes
            values = jnp.split(likelihood(coefficients, numerator, x.ravel()), 2, axis=1)
            return [values[c] @ (self.weights * x[c] ** orders[:, None]).T for c in range(2)]

        def trapezoid(*args: jax.Array) -> list[jax.Array]:
            coefficients, numerator, mu, sd = args
            sd = jnp.maximum(sd, self.switch)
            rest = likelihood(coefficients, numerator, self.grid) - self.step
            density = self.grid_step * norm.pdf(self.grid, mu[:, None], sd[:, None])
            nodes = density[:, None] * self.grid ** orders[:, None]
            sums = (rest @ nodes.reshape(-1, self.grid.size).T).reshape(-1, 2, top + 1)
            return [sums[:, c] + self.step_moments(mu[c], sd[c], top) for c in range(2)]

        def narrow(*args: jax.Array) -> jax.Array:
            parts = hermite(*args[:-1])
            return args[-1][0] * parts[0] + args[-1][1] * parts[1]

        def mixed(*args: jax.Array) -> jax.Array:
            both = zip(hermite(*args[:-1]), trapezoid(*args[:-1]), strict=True)
            parts = [jnp.where(args[3][c] <= self.switch, a, b) for c, (a, b) in enumerate(both)]
            return args[-1][0] * parts[0] + args[-1][1] * parts[1]

        args = (coefficients, numerator, mu, sd, w)
        return jax.lax.cond(jnp.all(sd <= self.switch), narrow, mixed, *args)

    def step_moments(self, mu: jax.Array, sd: jax.Array, top: int) -> jax.Array:
        """E[x^k Phi(+-x / STEP_WIDTH)], x ~ N(mu, sd^2), where a step was taken off, else 0."""
        width = jnp.hypot(sd, STEP_WIDTH)
        a = self.sign * mu / width
        # By E[x f(x)] = mu E[f(x)] + sd^2 (d / d mu) E[f(x)], twice.
        g0, g1 = ndtr(a), self.sign * norm.pdf(a) / width
        g2 = -a * norm.pdf(a) / width**2
        h0, h1 = mu * g0 + sd**2 * g1, g0 + mu * g1 + sd**2 * g2
        known = jnp.stack([g0, h0, mu * h0 + sd**2 * h1][: top + 1], 1)
        return jnp.abs(self.sign)[:, None] * known

    def loglik(self, theta: jax.Array) -> jax.Array:
        """Log p(y | theta)."""
        return jnp.log(self.moments(theta, 0)).sum()

    def effects(self, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First two moments of every random effect given theta and the answers."""
        m = self.moments(theta, 2)
        return m[:, 1] / m[:, 0], m[:, 2] / m[:, 0]


def prior_sd(scale: float) -> np.ndarray:
    """Prior standard deviations of the 13 parameters, all of prior mean zero."""
    return np.r_[np.full(10, PRIOR_SD_LOCATION), np.full(3, scale)]


def loglik_fine(data: Data, theta: np.ndarray) -> float:
    """Log p(y | theta) by a very fine trapezoid rule per component, with plain NumPy."""
    beta, mu, log_precision, logit_weight = unpack(np.asarray(theta))
    eta = data.covariates @ beta
    sign = 2 * data.answers - 1
    total = np.full((2, SUBJECTS), -np.inf)
    for c in range(2):
        sd = np.exp(-0.5 * log_precision[c])
        step = min(sd / 40, 0.02)
        half = int(np.ceil(14 * sd / step))
        log_weight = log_expit(logit_weight if c == 0 else -logit_weight)
        for block in np.array_split(np.arange(-half, half + 1), 1 + half // 1000):
            x = mu[c] + step * block
            logs = -0.5 * ((x - mu[c]) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi) / step)
            logs = np.broadcast_to(logs, (SUBJECTS, x.size)).copy()
            for j in range(ANSWERS):
                logs += log_expit(sign[:, j, None] * (x + eta[:, j, None]))
            block_sum = np.logaddexp.reduce(logs, axis=1)
            total[c] = np.logaddexp(total[c], block_sum + log_weight)
    return float(np.logaddexp(total[0], total[1]).sum())


def check_points(data: Data) -> dict[str, np.ndarray]:
    """Parameter vectors that cover narrow, wide, common and remote components."""

    def point(mu: tuple, log_precision: tuple, logit_weight: float, scale: float = 1.0) -> Any:
        return np.r_[scale * data.beta, mu, log_precision, logit_weight]

    edge = -2 * np.log(SWITCH)
    return {
        "truth": point((0.0, 3.0), (np.log(10), np.log(3)), np.log(4)),
        "just narrow": point((0.1, 3.2), (edge + 1e-9, edge + 1e-9), 1.0),
        "just wide": point((0.1, 3.2), (edge - 1e-9, edge - 1e-9), 1.0),
        "very narrow": point((0.1, 2.8), (15.0, 15.0), 1.5),
        "narrow and wide": point((0.0, 4.0), (15.0, -8.0), 1.0),
        "wide and narrow": point((-3.0, 3.0), (-8.0, 15.0), -1.0),
        "very wide": point((-10.0, 25.0), (-8.0, -8.0), 0.0),
        "wide, far": point((0.0, 40.0), (4.0, -4.0), 2.0),
        "moderate": point((-0.5, 5.0), (2.0, -2.0), 3.0),
        "light component": point((0.2, 3.0), (0.5, 6.0), 6.0),
        "steep": point((0.0, 3.0), (1.0, -1.0), 1.0, 1.5),
        "flat": point((0.0, 3.0), (6.0, 0.0), 1.0, 0.5),
    }


def check_quadrature(data: Data, points: dict[str, np.ndarray], verbose: bool = True) -> float:
    """Largest error of the log-likelihood against the fine rule over some points."""
    loglik = jax.jit(Marginal(data).loglik)
    worst = 0.0
    for name, theta in points.items():
        fine = loglik_fine(data, theta)
        error = float(loglik(jnp.asarray(theta))) - fine
        worst = max(worst, abs(error))
        if verbose:
            print(f"{name:>18s}: log-likelihood {fine:14.6f}, error {error:9.1e}", flush=True)
    return worst


def sample(
    marginal: Marginal,
    scale: float,
    seed: int,
    chains: int,
    warmup: int,
    draws: int,
    target: float,
) -> tuple[np.ndarray, tuple[float, float], int]:
    """NUTS draws (chains, draws, 13), seconds of warm-up and after it, and divergences.

    The chains run one after the other; the seconds leave out the compilation.
    """
    sd = jnp.asarray(prior_sd(scale))

    def potential(theta: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((theta / sd) ** 2) - marginal.loglik(theta)

    kernel = NUTS(potential_fn=potential, dense_mass=True, target_accept_prob=target)

    def step(state: Any, _: None) -> tuple[Any, Any]:
        state = kernel.sample(state, (), {})
        return state, (state.z, state.num_steps, state.diverging)

    rng = np.random.default_rng(seed)
    start = np.r_[np.zeros(8), 0.0, 3.0, 1.0, 1.0, 1.0]
    advance: Any = None
    kept, seconds, divergences = [], [0.0, 0.0], 0
    for chain in range(chains):
        theta = jnp.asarray(start + 0.3 * rng.standard_normal(start.size))
        state = kernel.init(jax.random.PRNGKey(1000 * seed + chain), warmup, theta, (), {})
        if advance is None:
            scan = jax.jit(lambda s: jax.lax.scan(step, s, None, length=BLOCK))
            advance = scan.lower(state).compile()
        blocks, steps = [], 0
        for block in range((warmup + draws) // BLOCK):
            tick = time.perf_counter()
            state, (z, num_steps, diverging) = jax.block_until_ready(advance(state))
            sampling = (block + 1) * BLOCK > warmup
            seconds[sampling] += time.perf_counter() - tick
            if sampling:
                blocks.append(np.asarray(z))
                steps += int(num_steps.sum())
                divergences += int(diverging.sum())
        kept.append(np.concatenate(blocks))
        print(
            f"  chain {chain}: {seconds[0]:.0f} + {seconds[1]:.0f} s in all, {steps / draws:.1f} "
            f"steps per draw, divergences so far {divergences}",
            flush=True,
        )
    return np.stack(kept), (seconds[0], seconds[1]), divergences


def effect_moments(
    marginal: Marginal, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posterior mean, sd and error of the mean of every effect from (chains, draws, 13)."""
    flat = jnp.asarray(draws.reshape(-1, draws.shape[-1]))
    first, second = jax.jit(lambda t: jax.lax.map(marginal.effects, t))(flat)
    first, second = np.asarray(first), np.asarray(second)
    mean = first.mean(0)
    sd = np.sqrt(second.mean(0) - mean**2)
    by_chain = first.reshape(*draws.shape[:2], SUBJECTS)
    error = [float(az.mcse(by_chain[:, :, t])) for t in range(SUBJECTS)]
    return mean, sd, np.array(error)


def spread_draws(draws: np.ndarray, number: int = 12) -> np.ndarray:
    """Draws at evenly spaced ranks of log_precision[0], the parameter with the longest tail."""
    flat = draws.reshape(-1, draws.shape[-1])
    order = np.argsort(flat[:, NAMES.index("log_precision[0]")])
    ranks = ((np.arange(number) + 0.5) / number * len(flat)).astype(int)
    return flat[order[ranks]]


def rounded(values: Any, digits: int = 7) -> Any:
    """Nested lists of floats with a limited number of significant digits."""
    values = np.asarray(values, dtype=float)
    if values.ndim == 0:
        return float(f"{float(values):.{digits}g}")
    return [rounded(v, digits) for v in values]


def summarise(data: Data, draws: np.ndarray, thin: int) -> dict[str, Any]:
    """Everything the reference file holds for one prior."""
    marginal = Marginal(data)
    loglik = jax.jit(marginal.loglik)
    columns = [draws[:, :, i] for i in range(draws.shape[-1])]
    mean = draws.mean((0, 1))
    effect_mean, effect_sd, effect_error = effect_moments(marginal, draws[:, ::thin])
    points = np.array(rounded(spread_draws(draws)))
    return {
        "names": NAMES,
        "mean": rounded(mean),
        "sd": rounded(draws.std((0, 1), ddof=1)),
        "mcse": rounded([az.mcse(c) for c in columns]),
        "ess_bulk": rounded([az.ess(c, method="bulk") for c in columns]),
        "ess_tail": rounded([az.ess(c, method="tail") for c in columns]),
        "rhat": rounded([az.rhat(c, method="rank") for c in columns]),
        "quantiles": {
            str(q): rounded(np.quantile(draws, q, axis=(0, 1))) for q in (0.05, 0.5, 0.95)
        },
        "loglik_at_mean": rounded(loglik(jnp.asarray(rounded(mean))), 12),
        "draws": rounded(points),
        "loglik_at_draws": rounded([loglik(jnp.asarray(p)) for p in points], 12),
        "effect_mean": rounded(effect_mean),
        "effect_sd": rounded(effect_sd),
        "effect_mean_mcse": rounded(effect_error, 3),
    }


def report(result: dict[str, Any]) -> None:
    """Print the table of the parameters."""
    keys = ("mean", "sd", "mcse", "ess_bulk", "ess_tail", "rhat")
    print(" " * 18 + "".join(f"{k:>11s}" for k in keys))
    for i, name in enumerate(NAMES):
        print(f"{name:>18s}" + "".join(f"{result[k][i]:11.5g}" for k in keys), flush=True)


def main() -> None:
    """Sample both posteriors and write the file."""
    parser = argparse.ArgumentParser(description="Remake the reference posterior of the GLMM.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("glmm.json"))
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=10_000, help="of a chain")
    parser.add_argument("--finer", action="store_true", help="a finer quadrature, as a check")
    parser.add_argument("--thin", type=int, default=10, help="of the draws used for the effects")
    parser.add_argument("--target", type=float, default=0.95, help="target acceptance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scales", type=float, nargs="+", default=[3.0, 1.0])
    parser.add_argument("--save-draws", type=Path, help="folder for all the draws, as .npy")
    parser.add_argument("--check", action="store_true", help="measure the quadrature and stop")
    args = parser.parse_args()
    if args.warmup % BLOCK or args.draws % BLOCK:
        parser.error(f"--warmup and --draws take multiples of {BLOCK}")
    data = make_data()
    if args.check:
        print(f"largest error {check_quadrature(data, check_points(data)):.1e}")
        return
    results = {}
    for scale in args.scales:
        print(f"prior sd {scale:g} of the log precisions and the logit weight", flush=True)
        draws, seconds, divergences = sample(
            Marginal(data, FINER if args.finer else None),
            scale,
            args.seed,
            args.chains,
            args.warmup,
            args.draws,
            args.target,
        )
        if args.save_draws is not None:
            np.save(args.save_draws / f"draws_{scale:g}_{args.seed}.npy", draws)
        gap = (draws[:, :, 9] - draws[:, :, 8]).min()
        if gap <= 0:
            raise RuntimeError("a chain left the mode with mu[0] < mu[1]")
        result = summarise(data, draws, args.thin)
        report(result)
        speed = min(result["ess_bulk"]) / seconds[1]
        print(f"  {args.chains} x {args.draws} draws, smallest ESS {speed:.3g} per second,")
        print(f"  {divergences} divergences, smallest mu[1] - mu[0] {gap:.3f}", flush=True)
        points = {f"draw {i}": np.array(p) for i, p in enumerate(result["draws"])}
        points["mean"] = np.array(result["mean"])
        error = check_quadrature(data, points, verbose=False)
        print(f"  largest quadrature error at these draws and the mean {error:.1e}")
        results[f"{scale:g}"] = result
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
