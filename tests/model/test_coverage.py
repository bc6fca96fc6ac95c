"""Models that people write are captured and batched, and their gradients are Pyro's own."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from benchmarks.coverage_models import ZOO
from benchmarks.coverage_models.check import check
from benchmarks.coverage_models.data import Case, normal
from pyro_hamflow.model import potential
from tests.helpers.kinds import long_but

# Their control flow follows latent variables, within Pyro's own code.
FOLLOW_LATENTS = {"stable", "skewed_stable", "OverdispersedEpidemic"}


@pytest.mark.parametrize("name", long_but([*list(ZOO)[::2], *FOLLOW_LATENTS], ZOO))
def test_gradient_is_captured_batched_and_right(name):
    found = check(ZOO[name])
    assert found.error <= 1e-10
    assert found.captured == found.batched == (name not in FOLLOW_LATENTS)


def test_zoo_is_large():
    assert len(ZOO) >= 100


def line(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, scale).expand(y.shape).to_event(1), obs=y)


def branches(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    loc = scale if scale > 1.0 else -scale
    pyro.sample("y", dist.Normal(loc, scale).expand(y.shape).to_event(1), obs=y)


def test_a_gradient_that_is_wrong_is_told(monkeypatch):
    case = Case(line, {"y": normal(3)})
    assert check(case).error <= 1e-10
    monkeypatch.setattr(potential, "add_jacobians", lambda log_joint, sites, free: log_joint)
    assert check(case).error > 1e-3


def test_control_flow_that_follows_latents_is_told():
    found = check(Case(branches, {"y": normal(3)}))
    assert not found.captured and not found.batched
    assert found.error <= 1e-10


def test_data_are_the_same_each_time_and_of_the_default_type():
    case = ZOO["radon"]
    first, second = case.make()[1], case.make()[1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["log_radon"].dtype == torch.get_default_dtype()
