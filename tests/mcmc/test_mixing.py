"""R-hat and effective sample sizes are ArviZ's."""

from __future__ import annotations

import subprocess
import sys
import warnings

import arviz
import numpy as np
import pytest

from pyro_hamflow import arviz_bridge
from pyro_hamflow.mcmc import mixing


def walks(chains, length, correlation):
    generator = np.random.default_rng(chains * length)
    noise = generator.standard_normal((chains, length))
    made = np.zeros_like(noise)
    for t in range(length):
        made[:, t] = correlation * made[:, t - 1] + noise[:, t]
    return made


CASES = {
    "independent": walks(4, 1000, 0.0),
    "alternating": walks(4, 500, -0.8),
    "lasting": walks(4, 777, 0.98),
    "many short": walks(40, 9, 0.3),
    "two of four": walks(2, 4, 0.0),
    "one chain": walks(1, 300, 0.5),
    "apart": walks(4, 200, 0.5) + 5.0 * np.arange(4)[:, None],
    "equal numbers": np.round(walks(4, 400, 0.7)),
    "one that stays": walks(3, 100, 0.2) * np.array([[1.0], [0.0], [1.0]]),
    "all stay": np.zeros((4, 50)),
    "each stays": np.arange(4.0)[:, None] + np.zeros((4, 50)),
    "heavy tails": np.exp(4.0 * walks(4, 600, 0.6)),
    "not a number": np.where(walks(4, 60, 0.0) > 2.0, np.nan, 1.0 * walks(4, 60, 0.0)),
    "too short": walks(4, 3, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_mixing_is_told_as_by_arviz(name):
    rows = CASES[name][..., None]
    found = mixing.rhat(rows), mixing.ess_bulk(rows), mixing.ess_tail(rows)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        known = [arviz_bridge.rhat(rows), arviz_bridge.ess(rows), arviz_bridge.ess(rows, "tail")]
    np.testing.assert_allclose(np.array(found), np.array(known), rtol=1e-8)


def test_missing_information_is_told_as_by_arviz():
    energy = walks(4, 200, 0.9)
    np.testing.assert_allclose(mixing.bfmi(energy), arviz.bfmi(energy), rtol=1e-12)


def test_a_run_does_not_import_arviz():
    script = """
import pyro, pyro.distributions as dist, sys
from pyro_hamflow import MCMC, NUTS
model = lambda: pyro.sample("x", dist.Normal(0.0, 1.0))
MCMC(NUTS(model), 40, 40, num_chains=2, seed=0, disable_progbar=True).run()
assert "arviz" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
