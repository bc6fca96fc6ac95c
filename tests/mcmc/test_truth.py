"""Whole runs against posteriors known in closed form or by quadrature."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.reparam import LocScaleReparam

import pyro_hamflow as phf
from pyro_hamflow.mcmc.transitions import trajectory as tree
from tests.helpers.kinds import long_but
from tests.helpers.laws import scores
from tests.helpers.zoo import SCHOOLS_SIGMA, SCHOOLS_Y

Y = torch.tensor([0.3, -1.2, 2.1, 0.8, -0.4, 1.7, 3.0, 0.1, 1.1, -0.6], dtype=torch.float64)
LOCAL, NOISE, PRIOR = 0.8, 0.6, 2.0  # standard deviations
METHODS = ("joint", "conditional")


def gaussian(y):
    mean = pyro.sample("mean", dist.Normal(0.0, PRIOR))
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.Normal(mean, LOCAL))
        pyro.sample("y", dist.Normal(x, NOISE), obs=y)


def truth() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Posterior means and standard deviations of the mean and of the local values."""
    precision = 1 / PRIOR**2 + len(Y) / (LOCAL**2 + NOISE**2)
    mean = float(Y.sum()) / (LOCAL**2 + NOISE**2) / precision
    share = LOCAL**2 / (LOCAL**2 + NOISE**2)
    local = share * Y.numpy() + (1 - share) * mean
    spread = np.sqrt(share * NOISE**2 + (1 - share) ** 2 / precision)
    return {
        "mean": (np.asarray(mean), np.asarray(precision**-0.5)),
        "x": (local, np.full(len(Y), spread)),
    }


CASES = [(1, "prior"), (4, "prior"), (2, "laplace")]
KERNELS = (phf.PseudoMarginalHMC, phf.PseudoMarginalNUTS)
RUNS = [(kernel, *case, method) for kernel in KERNELS for case in CASES for method in METHODS]
# Each kernel, each method and each proposal.
QUICK = [
    (phf.PseudoMarginalNUTS, 2, "laplace", "conditional"),
]


@pytest.mark.parametrize(("kernel", "num_particles", "proposal", "method"), long_but(QUICK, RUNS))
def test_run_agrees_with_closed_form(kernel, num_particles, proposal, method):
    marginal = phf.marginalize(gaussian, ["x"], num_particles=num_particles, proposal=proposal)
    mcmc = phf.MCMC(
        kernel(marginal, method=method), num_samples=200, warmup_steps=150, num_chains=100, seed=1
    )
    mcmc.run(Y)
    posterior = phf.to_inference_data(mcmc).posterior
    for name, (mean, spread) in truth().items():
        for power, expected in ((1, mean), (2, mean**2 + spread**2)):
            score = scores(posterior[name].to_numpy() ** power, expected)
            assert np.abs(score).max() < 4.0, (name, power)


# --- eight schools ------------------------------------------------------------------------------


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SCHOOLS_DATA = (torch.tensor(SCHOOLS_Y).double(), torch.tensor(SCHOOLS_SIGMA).double())


class Schools:
    """The posterior of eight schools: given tau all is Gaussian, and tau is summed over a grid."""

    def __init__(self):
        y, sigma = (part.numpy() for part in SCHOOLS_DATA)
        log_tau = np.linspace(-15.0, 9.0, 40_001)[:, None]
        tau = np.exp(log_tau)
        variance = sigma**2 + tau**2
        precision = 1 / 25 + (1 / variance).sum(1, keepdims=True)
        mu = (y / variance).sum(1, keepdims=True) / precision
        log_density = log_tau - np.log1p((tau / 5) ** 2) - 0.5 * np.log(precision)
        log_density -= 0.5 * (np.log(variance) + y**2 / variance).sum(1, keepdims=True)
        log_density += 0.5 * precision * mu**2
        weight = np.exp(log_density - log_density.max())
        self.weight = weight / weight.sum()
        share = tau**2 / variance
        self.tau, self.mu, self.mu_variance = tau, mu, 1 / precision
        self.theta_mean = lambda mu: share * y + (1 - share) * mu
        self.theta_variance = share * sigma**2
        self.slope = 1 - share  # of theta's mean in mu

    def moments(self):
        """Mean and second moment of every quantity."""
        mean = {"mu": self.mu, "tau": self.tau, "log tau": np.log(self.tau)}
        variance = {"mu": self.mu_variance, "tau": 0.0, "log tau": 0.0}
        mean["theta"] = self.theta_mean(self.mu)
        variance["theta"] = self.theta_variance + self.slope**2 * self.mu_variance
        return {
            (name, power): (self.weight * value).sum(0).squeeze()
            for name in mean
            for power, value in ((1, mean[name]), (2, mean[name] ** 2 + variance[name]))
        }

    def draws(self, num_chains):
        """Exact draws on the real line."""
        rng = np.random.default_rng(5)
        i = rng.choice(len(self.tau), num_chains, p=self.weight[:, 0])
        mu = rng.normal(self.mu[i], np.sqrt(self.mu_variance[i]))
        theta_mean = self.theta_mean(self.mu)[i] + self.slope[i] * (mu - self.mu[i])
        theta = rng.normal(theta_mean, np.sqrt(self.theta_variance[i]))
        values = {"mu": mu[:, 0], "tau": np.log(self.tau[i, 0]), "theta": theta}
        return {name: torch.tensor(value) for name, value in values.items()}


def schools_draws(mcmc):
    """Every quantity's draws, ``(chains, draws, *)``, in either parametrisation."""
    draws = {name: v.numpy() for name, v in mcmc.get_samples(group_by_chain=True).items()}
    mu, tau = draws["mu"], draws["tau"]
    if "theta" in draws:
        theta = draws["theta"]
    else:
        theta = mu[..., None] + tau[..., None] * draws["theta_decentered"]
    return {"mu": mu, "tau": tau, "log tau": np.log(tau), "theta": theta}


def test_quadrature_of_schools():
    """Against published values, and against its own draws."""
    schools = Schools()
    moments = schools.moments()
    assert abs(moments["mu", 1] - 4.3968) < 1e-4
    assert abs(moments["tau", 1] - 3.5977) < 1e-4
    assert abs(np.sqrt(moments["mu", 2] - moments["mu", 1] ** 2) - 3.3177) < 1e-4
    assert abs(np.sqrt(moments["tau", 2] - moments["tau", 1] ** 2) - 3.2200) < 1e-4
    assert abs(moments["theta", 1][0] - 6.2119) < 1e-4
    draws = schools.draws(1_000_000)
    draws = {"mu": draws["mu"], "log tau": draws["tau"], "theta": draws["theta"]}
    for name, values in draws.items():
        for power in (1, 2):
            moved = values.numpy() ** power - moments[name, power]
            error = moved.std(0) / np.sqrt(len(moved))
            assert np.abs(moved.mean(0) / error).max() < 4.0, (name, power)


def run_schools_noncentred(num_samples=200, engine="auto"):
    model = poutine.reparam(schools, {"theta": LocScaleReparam(0.0)})
    kernel = phf.NUTS(model, engine=engine)
    mcmc = phf.MCMC(kernel, num_samples, 200, num_chains=100, seed=1)
    mcmc.run(*SCHOOLS_DATA)
    return mcmc


def check_schools(mcmc):
    draws = schools_draws(mcmc)
    for (name, power), expected in Schools().moments().items():
        score = scores(draws[name] ** power, expected)
        assert np.abs(score).max() < 4.0, f"{name} to the power {power} is off"


def test_schools_noncentred():
    check_schools(run_schools_noncentred())


def test_a_biased_sampler_is_noticed(monkeypatch):
    """Subtrees may turn back: a trajectory's points no longer lead to it equally often."""
    honest = tree._turned

    def turned(*marks):
        result = honest(*marks)
        result[1:] = False
        return result

    monkeypatch.setattr(tree, "_turned", turned)
    with pytest.raises(AssertionError, match="is off"):
        check_schools(run_schools_noncentred(engine="torch"))  # whose parts are spoilt


@pytest.mark.slow
def test_schools_centred():
    """In the funnel of the centred parametrisation, where chains mix slowly.

    Monte Carlo errors of so slow chains are not to be trusted. So the chains start from exact
    draws, and their means, one of each chain, are the sample: exact chains cannot be off the truth
    by more than these means vary, however slowly they mix.
    """
    kernel = phf.NUTS(schools, target_accept_prob=0.9)
    mcmc = phf.MCMC(kernel, 100, 50, Schools().draws(200), 200, seed=1)
    mcmc.run(*SCHOOLS_DATA)
    draws = schools_draws(mcmc)
    for (name, power), expected in Schools().moments().items():
        means = (draws[name] ** power).mean(1)
        error = means.std(0, ddof=1) / np.sqrt(len(means))
        assert np.abs((means.mean(0) - expected) / error).max() < 4.0, (name, power)


# --- the funnel ---------------------------------------------------------------------------------


def funnel(spread):
    v = pyro.sample("v", dist.Normal(0.0, spread))
    with pyro.plate("width", 9):
        pyro.sample("x", dist.Normal(0.0, (0.5 * v).exp()))


def check_funnel(mcmc, spread):
    """The neck's law, and the width's, of whose logarithm the moments are taken.

    The widths are alike, so that a bias shows best in their average.
    """
    draws = {name: value.numpy() for name, value in mcmc.get_samples(group_by_chain=True).items()}
    v = draws["v"]
    x = draws["x"] if "x" in draws else np.exp(0.5 * v)[..., None] * draws["x_decentered"]
    log_x = np.log(np.abs(x))
    log_normal = -0.5 * (np.euler_gamma + np.log(2.0))  # E log |z| under N(0, 1)
    expected = [
        (v, 0.0),
        (v**2, spread**2),
        (v < -spread, 0.15865525393145707),
        (v < -2 * spread, 0.02275013194817921),
        (np.sign(x).mean(-1), 0.0),
        (log_x.mean(-1), log_normal),
        ((log_x**2).mean(-1), log_normal**2 + np.pi**2 / 8 + spread**2 / 4),
    ]
    for i, (values, value) in enumerate(expected):
        assert abs(scores(values.astype(float), value)) < 4.0, i


def test_funnel_noncentred():
    model = poutine.reparam(funnel, {"x": LocScaleReparam(0.0)})
    mcmc = phf.MCMC(phf.NUTS(model), 200, 150, num_chains=100, seed=1)
    mcmc.run(3.0)
    check_funnel(mcmc, 3.0)


@pytest.mark.slow
def test_funnel_centred():
    """A milder funnel, into whose neck a small step size leads."""
    mcmc = phf.MCMC(phf.NUTS(funnel, target_accept_prob=0.95), 400, 200, num_chains=100, seed=1)
    mcmc.run(1.0)
    check_funnel(mcmc, 1.0)
