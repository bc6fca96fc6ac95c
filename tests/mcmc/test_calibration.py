"""Simulation-based calibration of the kernels; see `tests/helpers/calibration.py`."""

from __future__ import annotations

import pyro
import pytest
import torch

import pyro_hamflow as phf
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks
from tests.helpers.calibration import CHAINS, RUNS, TOGETHER, check_uniform, counts, rank, ranks_of


def pseudo_marginal(kernel, method):
    def make():
        marginal = phf.marginalize(counts, ["x"], num_particles=4, proposal="prior")
        return kernel(marginal, method=method)

    return make


KERNELS = {
    "hmc": lambda: phf.HMC(counts),
    "nuts": lambda: phf.NUTS(counts),
    **{
        f"{kernel.__name__}-{method}": pseudo_marginal(kernel, method)
        for kernel in (phf.PseudoMarginalHMC, phf.PseudoMarginalNUTS)
        for method in ("joint", "conditional")
    },
}


@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_ranks_of_known_draws(spread):
    """A normal mean, whose posterior is known, and the same too wide."""
    pyro.set_rng_seed(0)
    true = torch.randn(RUNS * TOGETHER)
    y = true + torch.randn(RUNS * TOGETHER)
    draws = 0.5 * y + spread * 0.5**0.5 * torch.randn(CHAINS, RUNS * TOGETHER)
    ranks = rank({"mean": true}, {"mean": draws})
    if spread == 1.0:
        check_uniform(ranks)
    else:
        with pytest.raises(AssertionError, match="the ranks of mean are not uniform"):
            check_uniform(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_prior_draws_rank_anywhere(name):
    check_uniform(ranks_of(KERNELS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hmc", "nuts"])
def test_tempered_likelihood_is_found_out(name):
    with pytest.raises(AssertionError, match="are not uniform"):
        check_uniform(ranks_of(KERNELS[name], power=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("Pseudo")])
def test_tempered_weights_are_found_out(name, monkeypatch):
    honest = MarginalModel.estimate

    def dishonest(self, *args, **kwargs):
        estimate = honest(self, *args, **kwargs)
        return type(estimate)(estimate.group, 0.5 * estimate.log_weights, estimate.values)

    monkeypatch.setattr(MarginalModel, "estimate", dishonest)
    with pytest.raises(AssertionError, match="are not uniform"):
        check_uniform(ranks_of(KERNELS[name]))


@pytest.mark.slow
def test_noise_refreshed_without_a_test_is_found_out(monkeypatch):
    honest = Blocks.log_ratios

    def zero(self, new, old):
        return {name: torch.zeros_like(ratio) for name, ratio in honest(self, new, old).items()}

    monkeypatch.setattr(Blocks, "log_ratios", zero)
    with pytest.raises(AssertionError, match="are not uniform"):
        check_uniform(ranks_of(KERNELS["PseudoMarginalHMC-conditional"]))
