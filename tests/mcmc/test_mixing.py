"""R-hat, effective sample sizes and BFMI are ArviZ's, which no run imports."""

from __future__ import annotations

import sys
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest

from pyro_hamflow import MCMC, NUTS
from pyro_hamflow.mcmc import mixing


def draws_of(kind, chains, draws):
    """Draws, of shape ``(chains, draws)``."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(chains, draws))
    if kind == "independent":
        return rows
    if kind == "alternating":
        return 0.3 * rows + (-1.0) ** np.arange(draws)
    for time in range(1, draws):
        rows[:, time] += 0.9 * rows[:, time - 1]
    if kind == "repeated":  # as where proposals are rejected
        return np.round(rows)
    if kind == "apart":
        return rows + 10.0 * np.arange(chains)[:, None]
    if kind == "still":
        rows[0] = 1.0
    if kind == "gap":
        rows[0, 1] = np.nan
    if kind == "infinite":
        rows[0, 1] = np.inf
    return np.ones_like(rows) if kind == "constant" else rows


KINDS = ["independent", "alternating", "correlated", "repeated", "apart", "still"]
BROKEN = ["gap", "infinite", "constant"]


def by_arviz(name, rows, **settings):
    return getattr(arviz, name)(arviz.convert_to_dataset({"x": rows}), **settings)["x"].values


@pytest.mark.parametrize("kind", KINDS + BROKEN)
def test_they_are_those_of_arviz(kind):
    for chains in (1, 2, 7):
        for draws in (4, 5, 6, 7, 8, 9, 51, 300):
            rows = draws_of(kind, chains, draws)
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                pairs = [
                    (mixing.ess_bulk(rows), by_arviz("ess", rows, method="bulk")),
                    (mixing.ess_tail(rows), by_arviz("ess", rows, method="tail")),
                    (mixing.bfmi(rows), np.asarray(arviz.bfmi(rows))),
                ]
                if chains > 1:
                    pairs.append((mixing.rhat(rows), by_arviz("rhat", rows)))
            for found, expected in pairs:
                assert np.allclose(found, expected, rtol=1e-9, equal_nan=True), (chains, draws)


def test_each_quantity_is_judged_by_itself():
    rows = np.stack([draws_of(kind, 3, 60) for kind in KINDS], -1).reshape(3, 60, 2, 3)
    for judge in (mixing.rhat, mixing.ess_bulk, mixing.ess_tail):
        found = judge(rows)
        assert found.shape == (2, 3)
        assert found[1, 0] == judge(rows[..., 1, 0])
    assert np.isnan(mixing.rhat(rows[:, :3])).all()


def test_no_run_imports_arviz(monkeypatch):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    for name in [name for name in sys.modules if name.split(".")[0].startswith("arviz")]:
        monkeypatch.delitem(sys.modules, name)
    mcmc = MCMC(NUTS(model), 100, 50, num_chains=2, disable_progbar=True)
    mcmc.run()
    assert mcmc.diagnostics()["x"]["r_hat"] < 1.2
    assert not any(name.startswith("arviz") for name in sys.modules)
