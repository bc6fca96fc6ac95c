"""Simulation-based calibration of the kernels that learn; see `tests/helpers/calibration.py`."""

from __future__ import annotations

import pytest

from pyro_hamflow import HNNHMC, HNNNUTS, marginalize
from tests.helpers.calibration import check_uniform, counts, ranks_of

SETTINGS = {"fallback": False, "training_steps": 150, "rounds": 2}


def learner(kind, correction):
    def make():
        marginal = marginalize(counts, ["x"], num_particles=4, proposal="prior")
        return kind(marginal, correction=correction, **SETTINGS)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("correction", ["endpoint", "per leaf"])
@pytest.mark.parametrize("kind", [HNNHMC, HNNNUTS])
def test_prior_draws_rank_anywhere(kind, correction):
    """One data set in each run: proposals of parameters and noise are accepted as a whole."""
    check_uniform(ranks_of(learner(kind, correction), runs=128, together=1))


@pytest.mark.slow
def test_tempered_likelihood_is_found_out():
    with pytest.raises(AssertionError, match="are not uniform"):
        check_uniform(ranks_of(learner(HNNHMC, "endpoint"), runs=128, together=1, power=0.25))
