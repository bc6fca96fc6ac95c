"""Mixed models of the textbooks, by all defaults, against their posteriors by quadrature."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import digamma, polygamma
from scipy.stats import multivariate_normal

import pyro_hamflow as phf
from pyro_hamflow.marginal.marginalize import MarginalModel
from tests.mixed_models import MIXED_MODELS
from tests.mixed_models.importance import find_mode, posterior
from tests.mixed_models.priors import gamma, normal
from tests.mixed_models.quadrature import Marginal, Truth
from tests.mixed_models.verdict import judge

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "mixed_models.json").read_text())
QUICK = ("epilepsy",)


def verdict_of_a_run(name):
    case = MIXED_MODELS[name]
    kernel = phf.PseudoMarginalNUTS(phf.marginalize(case.model, list(case.sites)))
    mcmc = phf.MCMC(kernel, num_samples=500, num_chains=4, seed=0)
    mcmc.run(*case.arguments())
    return judge(case.truth, mcmc.get_samples(group_by_chain=True), REFERENCE[name])


def check(verdict):
    assert verdict.worst < 4.0, verdict
    assert verdict.rhat < 1.02, verdict
    assert verdict.ess >= 400, verdict


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in REFERENCE],
)
def test_defaults_agree_with_quadrature(name):
    check(verdict_of_a_run(name))


@pytest.mark.slow
def test_a_biased_estimate_is_noticed(monkeypatch):
    honest = MarginalModel.estimate

    def dishonest(self, *args, **kwargs):
        """Weighs particles by the square root of their weights."""
        estimate = honest(self, *args, **kwargs)
        return type(estimate)(estimate.group, 0.5 * estimate.log_weights, estimate.values)

    monkeypatch.setattr(MarginalModel, "estimate", dishonest)
    with pytest.raises(AssertionError):
        check(verdict_of_a_run("epilepsy"))


# --- the verdict -------------------------------------------------------------------------------


def test_right_draws_of_a_long_tail_are_found_right():
    """A scale's logarithm has a long tail to the left, which some draws visit and some miss."""
    shape, rng = 0.2, np.random.default_rng(0)
    variance = polygamma(1, shape)
    reference = {
        "names": ["sigma"],
        "mean": [digamma(shape)],
        "sd": [math.sqrt(variance)],
        "kurtosis": [3 + polygamma(3, shape) / variance**2],
        "mean_error": [0.0],
        "sd_error": [0.0],
    }
    truth = Truth({"sigma": gamma(shape, 1.0)}, lambda t, z: z)
    draws = torch.as_tensor(rng.gamma(shape, size=(300, 4, 60)))
    scores = [judge(truth, {"sigma": each}, reference).sd_scores["sigma"] for each in draws]
    assert np.quantile(scores, 0.01) > -3.0
    assert np.std(scores) == pytest.approx(1.0, abs=0.15)
    narrow = judge(truth, {"sigma": draws.flatten(0, 1)[:40] ** 0.8}, reference)
    assert narrow.sd_scores["sigma"] < -4.0


# --- the references themselves ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pumps", pytest.param("seeds", marks=pytest.mark.slow)])
def test_references_are_remade_equal(name):
    case = MIXED_MODELS[name]
    made = asdict(posterior(Marginal(case.truth, case.data())))
    for key, stored in REFERENCE[name].items():
        if key != "names":
            np.testing.assert_allclose(made[key], stored, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", REFERENCE)
def test_references_are_exact_enough(name):
    """Errors are below those of 2,000 independent draws, and of quadrature far below those.

    Of the logarithm of a scale with a long tail towards zero, the standard deviation of 2,000 such
    draws would be off by a twentieth.
    """
    reference = REFERENCE[name]
    assert reference["ess"] >= 20_000
    assert reference["pareto_k"] < 0.5
    assert reference["quadrature_error"] < 1e-3
    assert np.all(np.array(reference["mean_error"]) < 0.01 * np.array(reference["sd"]))
    assert np.all(np.array(reference["sd_error"]) < 0.03 * np.array(reference["sd"]))


def test_quadrature_of_one_normal_effect():
    case = MIXED_MODELS["oats"]
    nitrogen, y = case.data()
    free = torch.tensor([[90.0, 60.0, 2.0, 3.0]])
    alpha, slope, log_tau, log_sigma = free[0].tolist()
    covariance = math.exp(2 * log_tau) + math.exp(2 * log_sigma) * np.eye(12)
    expected = sum(
        multivariate_normal(alpha + slope * x, covariance).logpdf(row)
        for x, row in zip(nitrogen.numpy(), y.numpy(), strict=True)
    )
    found = Marginal(case.truth, (nitrogen, y)).log_likelihood(free)
    assert found.item() == pytest.approx(expected, abs=1e-8)


def test_quadrature_of_two_normal_effects():
    case = MIXED_MODELS["sleep"]
    days, y = case.data()
    free = torch.tensor([[2.4, 0.2, -1.0, -2.0, 0.5, -1.0]])
    mean, trend, *logs, angle, log_sigma = free[0].tolist()
    scale, rho = np.exp(logs), math.tanh(angle)
    among = np.outer(scale, scale) * np.array([[1.0, rho], [rho, 1.0]])
    design = np.stack([np.ones(10), days[0].numpy()], 1)
    covariance = design @ among @ design.T + math.exp(2 * log_sigma) * np.eye(10)
    expected = sum(
        multivariate_normal(design @ [mean, trend], covariance).logpdf(row) for row in y.numpy()
    )
    found = Marginal(case.truth, (days, y)).log_likelihood(free)
    assert found.item() == pytest.approx(expected, abs=1e-8)


def test_importance_sampling_of_a_normal_posterior():
    def likelihood(t, z, y):
        return -0.5 * (y[..., None] - t["mean"]) ** 2

    y = torch.tensor([0.3, -1.2, 2.1, 0.8])
    made = posterior(Marginal(Truth({"mean": normal(2.0)}, likelihood, dimension=0), (y,)))
    sd = (4 + 1 / 4) ** -0.5
    assert abs(made.mean[0] - y.sum().item() * sd**2) < 4 * made.mean_error[0]
    assert abs(made.sd[0] - sd) < 4 * made.sd_error[0]
    assert made.kurtosis[0] == pytest.approx(3.0, abs=0.15)
    assert made.mean_error[0] < 0.01 * sd


def test_mode_is_where_the_gradient_vanishes():
    case = MIXED_MODELS["seeds"]
    marginal = Marginal(case.truth, case.data())
    mode, covariance = find_mode(marginal)
    free = torch.tensor(mode)[None].requires_grad_()
    (gradient,) = torch.autograd.grad(marginal.log_posterior(free).sum(), free)
    assert gradient.abs().max() < 1e-3
    assert np.linalg.eigvalsh(covariance).min() > 0
