"""Weighted draws of a guide: the evidence, moments against quadrature, and what they say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    AutoNeuralHamiltonianFlow,
    fit_guide,
    importance_sample,
    marginalize,
    to_inference_data,
)
from pyro_hamflow.programs import capture
from pyro_hamflow.smc.weights import mean_error, smooth_weights
from tests.helpers.targets import effects
from tests.helpers.zoo import SCHOOLS_SIGMA, SCHOOLS_Y

Y = torch.tensor([1.2, -0.3, 2.0, 0.4, 0.9], dtype=torch.float64)
SCHOOLS_EVIDENCE = -31.3114
SCHOOLS_MEANS = {"mu": (4.3968, 3.3177), "tau": (3.5977, 3.2200)}
FIRST_EFFECT = 6.2119


def conjugate(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def evidence(y):
    covariance = torch.eye(len(y)) + 4.0
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("effect", mu + tau * z)
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def nine_modes():
    """A normalised mixture of nine normals; the flat site only holds the position."""
    grid = torch.tensor([-2.5, 0.0, 2.5])
    means = torch.cartesian_prod(grid, grid)
    flat = dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False)  # noqa: FBT003
    x = pyro.sample("x", flat)
    parts = dist.Normal(means, 0.5).to_event(1).log_prob(x)
    pyro.factor("mixture", parts.logsumexp(-1) - math.log(9))


class Gaussian:
    """A guide by hand: a normal distribution of one parameter, a spurious momentum beside it."""

    def __init__(self, loc=0.5, scale=1.0, *, forget=False):
        self.position = dist.Normal(loc, scale)
        self.momentum = dist.Normal(0.0, 1.5)
        self.reverse = dist.Normal(0.3, 1.2)
        self.forget = forget

    def prepare(self, *args):
        pass

    def draw(self, count):
        position, p = self.position.sample((count, 1)), self.momentum.sample((count,))
        log_density = self.position.log_prob(position)[:, 0] + self.momentum.log_prob(p)
        if not self.forget:
            log_density = log_density - self.reverse.log_prob(p)
        return position, log_density


def scores_of_evidence(guide):
    found = importance_sample(conjugate, guide, Y, num_samples=10_000, seed=0)
    ratios = (found.log_weights - evidence(Y)).exp()
    return (ratios.mean() - 1.0) / (ratios.std() / math.sqrt(ratios.numel()))


def test_weights_have_the_evidence_as_mean():
    assert abs(scores_of_evidence(Gaussian())) < 4


def test_evidence_fails_where_momenta_are_forgotten():
    assert abs(scores_of_evidence(Gaussian(forget=True))) > 10


def test_errors_told_are_errors_made():
    whole = importance_sample(conjugate, Gaussian(scale=0.8), Y, num_samples=40_000, seed=0)
    parts = zip(whole.position.split(1000), whole.log_weights.split(1000), strict=True)
    found = [replace(whole, position=x, log_weights=weights) for x, weights in parts]
    scores = [(f.log_evidence - evidence(Y)) / f.log_evidence_error for f in found]
    assert abs(np.mean(scores)) < 4 / math.sqrt(40)
    assert 0.7 < np.std(scores) < 1.3


def shares_of_low_evidence(k):
    """How often the evidence is two errors too low, and how often two standard errors."""
    narrow = dist.Normal(torch.zeros(500, 4000), math.sqrt(1.0 - k))  # their ratio has the shape k
    x = narrow.sample()
    log_weights = dist.Normal(0.0, 1.0).log_prob(x) - narrow.log_prob(x)
    log_means = log_weights.logsumexp(1) - math.log(4000)
    standard = (log_weights - log_means[:, None]).exp().std(1) / math.sqrt(4000)
    errors = [mean_error(row, *smooth_weights(row)) for row in log_weights]
    return [
        float((log_means < -2.0 * error).double().mean())
        for error in (torch.tensor(errors), standard)
    ]


@pytest.mark.parametrize("k", [0.3, 0.7])
def test_errors_told_hold_for_heavy_tails(k):
    told, standard = shares_of_low_evidence(k)
    assert told < 0.1
    assert standard > 0.13 or k < 0.5  # what the standard error of the mean would do


@pytest.fixture(scope="module")
def trained_on_schools():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    args = torch.tensor(SCHOOLS_SIGMA), torch.tensor(SCHOOLS_Y)
    guide = AutoNeuralHamiltonianFlow(schools, reverse_encoder=True)
    fit_guide(schools, guide, *args, num_steps=800, seed=0, disable_progbar=True)
    found = importance_sample(schools, guide, *args, num_samples=20_000, seed=1)
    torch.set_default_dtype(before)
    return found


@pytest.mark.slow
def test_evidence_of_eight_schools(trained_on_schools):
    found = trained_on_schools
    assert found.pareto_k < 0.7 and found.num_invalid == 0
    assert abs(found.log_evidence - SCHOOLS_EVIDENCE) < 3 * found.log_evidence_error
    assert found.log_evidence_error < 0.1
    assert "can be relied on" in found.message


def test_corrected_moments_of_eight_schools(trained_on_schools):
    found = trained_on_schools
    samples = found.samples
    for name, (mean, sd) in SCHOOLS_MEANS.items():
        value = samples[name]
        assert abs(found.mean(value) - mean) < 4 * sd / math.sqrt(found.ess)
        spread = (found.mean(value.square()) - found.mean(value).square()).sqrt()
        assert abs(spread - sd) < 0.15
    effect = samples["mu"] + samples["tau"] * samples["z"][:, 0]
    assert abs(found.mean(effect) - FIRST_EFFECT) < 4 * effect.std() / math.sqrt(found.ess)


@pytest.mark.slow
def test_nine_modes_from_one():
    torch.manual_seed(0)
    base = dist.Normal(torch.zeros(2), 2.5).to_event(1)
    guide = AutoNeuralHamiltonianFlow(nine_modes, start=base, hidden=(32, 32))
    fit_guide(nine_modes, guide, num_steps=600, num_particles=128, learning_rate=1e-2, seed=0)
    found = importance_sample(nine_modes, guide, num_samples=10_000, seed=0)
    assert abs(found.log_evidence) < 3 * found.log_evidence_error < 0.3
    assert found.log_evidence_error < 0.1 and found.pareto_k < 0.7
    drawn = guide.draw(5000)[0].detach()  # not corrected
    grid = torch.tensor([-2.5, 0.0, 2.5])
    nearest = torch.cdist(drawn, torch.cartesian_prod(grid, grid)).argmin(1)
    shares = torch.bincount(nearest, minlength=9) / 5000
    assert shares.min() > 0.05 and shares.max() < 0.2


# --- what else it gives -------------------------------------------------------------------------


def test_resampled_draws_follow_the_weights():
    found = importance_sample(conjugate, Gaussian(scale=0.7), Y, num_samples=5000, seed=0)
    drawn = found.resample(4000)["mean"]
    precision = 0.25 + len(Y)
    assert drawn.shape == (4000,)
    assert abs(drawn.mean() - Y.sum() / precision) < 0.05
    assert abs(drawn.std() - precision**-0.5) < 0.05
    assert 1 < found.ess < 5000


def test_thin_guides_are_told():
    found = importance_sample(conjugate, Gaussian(loc=-2.0, scale=0.1), Y, num_samples=5000, seed=0)
    assert found.pareto_k > 0.7
    assert "misses part of the posterior" in found.message


def test_few_effective_draws_are_not_relied_on():
    found = importance_sample(conjugate, Gaussian(), Y, num_samples=150, seed=0)
    assert found.pareto_k < 0.7 and found.ess < 100
    assert "too few to rely on" in found.message


def test_densities_that_are_no_numbers_are_counted():
    def broken():
        x = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.where(x > 0.0, 0.0, math.nan))

    found = importance_sample(broken, Gaussian(loc=0.0, scale=1.5), num_samples=4000, seed=0)
    assert 1500 < found.num_invalid < 2500
    assert abs(found.log_evidence - math.log(0.5)) < 4 * found.log_evidence_error
    assert (found.resample(100)["mean"] > 0).all()


def test_weights_without_any_mass_do_not_crash():
    def nowhere():
        x = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.factor("gone", torch.full_like(x, -math.inf))

    found = importance_sample(nowhere, Gaussian(), num_samples=10, seed=0)
    assert found.log_evidence == -math.inf
    assert found.pareto_k == math.inf and found.ess == 0.0
    assert "misses part of the posterior" in repr(found.message)
    assert found.resample(3)["mean"].shape == (3,)


def test_smoothing_agrees_between_the_versions_of_arviz(monkeypatch):
    pytest.importorskip("arviz_stats")
    log_weights = torch.randn(2000)
    weights, k = smooth_weights(log_weights)
    monkeypatch.setattr(arviz, "__version__", "1.0.0")
    others, other = smooth_weights(log_weights)
    assert abs(k - other) < 0.02
    torch.testing.assert_close(weights, others, rtol=0.02, atol=1e-5)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_inference_data_of_weighted_draws(tmp_path, trained_on_schools):
    idata = to_inference_data(trained_on_schools)
    draws = int(trained_on_schools.ess)
    assert dict(idata.posterior.sizes) == {"chain": 1, "draw": draws, "school": 8}
    assert set(idata.posterior) == {"mu", "tau", "z", "effect"}
    assert idata.sample_stats["log_weight"].shape == (1, draws)
    assert idata.log_likelihood["y"].shape == (1, draws, 8)
    attributes = idata.posterior.attrs
    assert attributes["pareto_k"] < 0.7
    assert abs(attributes["log_evidence"] - SCHOOLS_EVIDENCE) < 0.1
    assert "importance" in json.loads(attributes["kernel_settings"])["method"]
    idata.to_netcdf(tmp_path / "guide.nc")
    again = arviz.from_netcdf(tmp_path / "guide.nc")
    mean, sd = SCHOOLS_MEANS["mu"]
    assert abs(float(again.posterior["mu"].mean()) - mean) < 5 * sd / math.sqrt(draws)


def test_inference_data_of_a_marginal_model():
    marginal = marginalize(effects, ["x"], num_particles=4)
    guide = AutoNeuralHamiltonianFlow(marginal, hidden=(8, 8))
    found = importance_sample(marginal, guide, Y, num_samples=2000, seed=0)
    idata = to_inference_data(found)
    assert set(idata.posterior) == {"mean", "x"}
    assert idata.log_likelihood["y"].sizes["data"] == 5
    assert "estimator_quality" in replace(found, log_weights=10.0 * torch.randn(2000)).message


def test_a_seed_repeats_the_draws():
    first, second = (
        importance_sample(conjugate, Gaussian(), Y, num_samples=2500, seed=3) for _ in range(2)
    )
    assert torch.equal(first.log_weights, second.log_weights)


def test_draws_do_not_depend_on_how_many_are_evaluated_at_once(monkeypatch):
    whole = importance_sample(conjugate, Gaussian(), Y, num_samples=1100, seed=3)
    monkeypatch.setattr(capture, "ELEMENTS", 7 * len(Y))
    pieces = importance_sample(conjugate, Gaussian(), Y, num_samples=1100, seed=3)
    assert {size for _, size in pieces.potential.programs._graphs} == {1, 7, 96}  # 96: descents
    torch.testing.assert_close(pieces.position, whole.position)
    torch.testing.assert_close(pieces.log_weights, whole.log_weights)


def test_compiled_densities_are_the_same():
    plain, compiled = (
        importance_sample(conjugate, Gaussian(), Y, num_samples=50, seed=3, jit_compile=compile)
        for compile in (False, True)
    )
    torch.testing.assert_close(compiled.log_weights, plain.log_weights)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="`guide` is a str: expected"):
        importance_sample(conjugate, "normal", Y)
    with pytest.raises(ValueError, match="`num_samples` is 1: expected 2"):
        importance_sample(conjugate, Gaussian(), Y, num_samples=1)

    def two(y):
        pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"positions of shape \(10, 1\): expected \(10, 2\).*'a'"):
        importance_sample(two, Gaussian(), Y, num_samples=10)


def test_a_tail_too_short_to_be_fitted_stays_as_it_is():
    log_weights = torch.arange(6.0)
    weights, k = smooth_weights(log_weights)
    assert k == math.inf
    torch.testing.assert_close(weights, log_weights.softmax(0))
