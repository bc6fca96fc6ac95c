"""Simulation-based calibration of the kernels that learn; see `test_calibration.py`."""

from __future__ import annotations

import pytest

from pyro_hamflow import HNNHMC, HNNNUTS, marginalize
from tests.mcmc import test_calibration
from tests.mcmc.test_calibration import check_uniform, counts, ranks_of

SETTINGS = {"fallback": False, "training_steps": 150, "rounds": 2}


def learner(kind, correction):
    def make():
        marginal = marginalize(counts, ["x"], num_particles=4, proposal="prior")
        return kind(marginal, correction=correction, **SETTINGS)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("correction", ["endpoint", "per leaf"])
@pytest.mark.parametrize("kind", [HNNHMC, HNNNUTS])
def test_prior_draws_rank_anywhere(kind, correction, monkeypatch):
    """One data set in each run: proposals of parameters and noise are accepted as a whole."""
    monkeypatch.setattr(test_calibration, "TOGETHER", 1)
    check_uniform(ranks_of(learner(kind, correction), runs=128))


@pytest.mark.slow
def test_tempered_likelihood_is_found_out(monkeypatch):
    monkeypatch.setattr(test_calibration, "TOGETHER", 1)
    with pytest.raises(AssertionError, match="are not uniform"):
        check_uniform(ranks_of(learner(HNNHMC, "endpoint"), runs=128, power=0.25))
