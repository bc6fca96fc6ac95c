"""What users get of a population: weighted draws, evidence, what is said of them, InferenceData."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value

from pyro_hamflow import AnnealedSampler, AutoNeuralHamiltonianFlow, marginalize, to_inference_data
from pyro_hamflow.smc.resampling import effective_size
from tests.helpers.densities import two_modes
from tests.helpers.evidence import assert_evidence
from tests.helpers.targets import effects

Y = torch.tensor([1.2, -0.3, 2.0, 0.4, 0.9], dtype=torch.float64)


def scale_model(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def by_quadrature(y):
    """The log evidence and the posterior mean of the scale."""
    z = torch.linspace(-8.0, 8.0, 4001)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z)
    log_joint = log_joint + dist.Normal(0.0, z.exp()[:, None]).log_prob(y).sum(-1)
    weights = log_joint.softmax(0)
    return float(log_joint.logsumexp(0) + math.log(16.0 / 4000)), float((weights * z.exp()).sum())


@pytest.fixture(scope="module")
def sampler():
    torch.set_default_dtype(torch.float64)
    sampler = AnnealedSampler(scale_model, seed=0)
    sampler.run(Y)
    return sampler


def test_draws_and_evidence_against_quadrature(sampler):
    log_evidence, mean = by_quadrature(Y)
    assert_evidence(sampler, log_evidence, 0.05)
    scale = sampler.samples["scale"]
    found = float(sampler.mean(scale))
    assert found == pytest.approx(float((sampler.weights * scale).sum()))
    error = float(scale.std()) / math.sqrt(sampler.ess)
    assert abs(found - mean) < 4.0 * error
    equal = sampler.resample(20_000)["scale"]
    assert abs(float(equal.mean()) - found) < 4.0 * float(equal.std()) / math.sqrt(20_000)


def test_says_that_parts_agree(sampler):
    assert sampler.message.startswith("The parts of the population agree: the error")
    assert sampler.message.endswith("independent ones.") and sampler.message.count(".") < 4
    assert repr(sampler).startswith("AnnealedSampler(2000 particles, log_evidence=-")


def test_a_seed_makes_a_run_repeat_itself(sampler):
    again = AnnealedSampler(scale_model, seed=0)
    again.run(Y)
    assert torch.equal(again.position, sampler.position)
    assert torch.equal(again.log_weights, sampler.log_weights)


def test_inference_data(sampler, tmp_path):
    data = to_inference_data(sampler)
    parts = sampler.num_replicates
    draws = int(effective_size(sampler.log_weights)) // parts
    assert data.posterior["scale"].shape == (parts, draws)
    assert data.sample_stats["log_weight"].shape == (parts, draws)
    assert data.log_likelihood["y"].shape == (parts, draws, len(Y))
    attributes = data.posterior.attrs
    assert attributes["log_evidence"] == pytest.approx(sampler.log_evidence)
    assert attributes["log_evidence_error"] == pytest.approx(sampler.log_evidence_error)
    assert attributes["seed"] == 0 and attributes["sampling_time"] > 0.0
    settings = json.loads(attributes["kernel_settings"])
    assert settings["method"] == "annealed sampling" and settings["start"] == "prior"
    assert json.loads(attributes["messages"]) == [sampler.message]
    values = torch.as_tensor(data.posterior["scale"].values)
    error = float(values.std()) / math.sqrt(parts * draws)
    assert abs(float(values.mean() - sampler.mean(sampler.samples["scale"]))) < 4.0 * error
    data.to_netcdf(str(tmp_path / "data.nc"))
    assert arviz.from_netcdf(str(tmp_path / "data.nc")).posterior["scale"].shape == (parts, draws)


@pytest.mark.slow
def test_local_sites_are_recovered():
    marginal = marginalize(effects, ["x"], num_particles=4)
    sampler = AnnealedSampler(marginal, seed=1)
    sampler.run(Y)
    covariance = torch.eye(len(Y)) + 4.0
    expected = dist.MultivariateNormal(torch.zeros(len(Y)), covariance)
    assert_evidence(sampler, float(expected.log_prob(Y)), 0.05)
    precision = 0.25 + len(Y)
    mean = float(Y.sum()) / precision
    local = (Y / 0.36 + mean / 0.64) / (1.0 / 0.36 + 1.0 / 0.64)
    found = sampler.mean(sampler.samples["x"])
    error = sampler.samples["x"].std(0) / math.sqrt(sampler.ess)
    assert bool(((found - local).abs() < 4.0 * error).all())


def test_says_that_few_particles_cannot_be_relied_on():
    sampler = AnnealedSampler(
        two_modes(256), num_particles=16, num_replicates=2, conditional_ess=0.8, seed=0
    )
    sampler.run()
    assert abs(sampler.log_evidence) > 10.0
    assert sampler.message.startswith("The evidence cannot be relied on, nor the weights of modes")
    assert "num_particles" in sampler.message


def test_nothing_is_there_before_a_run():
    sampler = AnnealedSampler(scale_model)
    assert "not run" in repr(sampler)
    with pytest.raises(RuntimeError, match="call `run` first"):
        sampler.log_evidence  # noqa: B018
    with pytest.raises(ValueError, match="call `run` first"):
        to_inference_data(sampler)


def test_an_improper_prior_asks_for_a_guide():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("f", -0.5 * x.square())

    with pytest.raises(ValueError, match="site 'x' is improper: .* or a guide to start from"):
        AnnealedSampler(model).run()


def test_a_guide_that_draws_momenta_is_refused():
    guide = AutoNeuralHamiltonianFlow(scale_model, hidden=(4,))
    with pytest.raises(ValueError, match="draws momenta beside"):
        AnnealedSampler(scale_model, guide).run(Y)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_particles", 3, ValueError),
        ("num_particles", 1e3, TypeError),
        ("num_replicates", 1, ValueError),
        ("conditional_ess", 1.0, ValueError),
        ("conditional_ess", "0.9", TypeError),
        ("num_moves", 0, ValueError),
        ("disable_progbar", 1, TypeError),
    ],
)
def test_arguments(name, value, error):
    with pytest.raises(error, match=f"`{name}` is .*: expected"):
        AnnealedSampler(scale_model, **{name: value})


def test_a_flow_has_to_be_a_guide():
    with pytest.raises(TypeError, match="`flow` is a str: expected a DensityGuide"):
        AnnealedSampler(scale_model, "flow")


def test_from_a_guide_of_pyros():
    """That has a place and a width of its own, which the weights have to undo."""
    guide = AutoNormal(scale_model, init_loc_fn=init_to_value(values={"scale": torch.tensor(2.5)}))
    sampler = AnnealedSampler(scale_model, guide, num_particles=1000, seed=0)
    sampler.run(Y)
    log_evidence, mean = by_quadrature(Y)
    assert_evidence(sampler, log_evidence, 0.1)
    assert sampler.importance is not None
    assert float(sampler.mean(sampler.samples["scale"])) == pytest.approx(mean, rel=0.05)
    with pytest.raises(TypeError, match="`flow` is an AutoDelta, whose density"):
        AnnealedSampler(scale_model, AutoDelta(scale_model))


class Narrow:
    """A guide that is a normal density."""

    def __init__(self, loc, scale):
        self.fn = dist.Normal(torch.tensor(loc), scale)

    def __repr__(self):
        return "Narrow()"

    def prepare(self, *args, **kwargs):
        pass

    def draw(self, num_samples):
        position = self.fn.sample((num_samples, 1))
        return position, self.log_ratio(position)

    def log_ratio(self, position):
        return self.fn.log_prob(position)[:, 0]


def test_from_a_guide_with_its_importance_weights_beside():
    sampler = AnnealedSampler(scale_model, Narrow(0.0, 1.0), seed=0)
    sampler.run(Y)
    log_evidence, _ = by_quadrature(Y)
    assert_evidence(sampler, log_evidence, 0.05)
    assert_evidence(sampler.importance, log_evidence, 0.05)
    assert sampler.message.startswith("The parts of the population agree")
    assert sampler.settings["start"] == "Narrow()"


def test_says_where_guide_and_population_disagree():
    sampler = AnnealedSampler(scale_model, Narrow(0.0, 1.0), seed=0)
    sampler.run(Y)
    assert sampler.importance is not None
    lower = sampler.importance.log_weights - 1.0
    sampler.importance = replace(sampler.importance, log_weights=lower)
    assert "one of them misses part of the posterior" in sampler.message
