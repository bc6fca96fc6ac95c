"""The GLMM of the PM-HMC paper against its posterior by quadrature.

Chains start from draws of the reference posterior (``reference/make_glmm.py``), so that whatever
moves their means away from the truth is the sampler's fault.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

import pyro_hamflow as phf
from tests.helpers.laws import scores
from tests.helpers.targets import glmm, glmm_data

# The largest of 500 scores is beyond this in two runs of a thousand, as if one number were.
LARGEST_OF_EFFECTS = NormalDist().inv_cdf(1.0 - 0.002 / 500 / 2)
REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "glmm.json").read_text())["3"]


def initial_params(num_chains: int) -> dict[str, torch.Tensor]:
    draws = torch.tensor(REFERENCE["draws"])[:num_chains]
    return {
        "beta": draws[:, :8],
        "mu": draws[:, 8:10],
        "log_precision": draws[:, 10:12],
        "logit_weight": draws[:, 12],
    }


def run(num_particles, method, *, num_samples, warmup=50, kernel=phf.PseudoMarginalHMC, **settings):
    marginal = phf.marginalize(
        glmm, ["x"], num_particles=num_particles, proposal="laplace", points="iid"
    )
    moves = kernel(
        marginal,
        method=method,
        step_size=0.2,
        inverse_mass_matrix=torch.tensor(REFERENCE["sd"]).square(),
        adapt_mass_matrix=False,
        **settings,
    )
    mcmc = phf.MCMC(moves, num_samples, warmup, initial_params(12), 12, seed=2)
    mcmc.run(*glmm_data())
    return mcmc


def parameter_scores(mcmc) -> np.ndarray:
    draws = mcmc.draws.position.numpy()  # chains, draws, the 13 in the reference's order
    return scores(draws, REFERENCE["mean"], REFERENCE["mcse"])


def effect_scores(mcmc) -> np.ndarray:
    effects = mcmc.draws.local["x"].squeeze(-1).numpy()
    return scores(effects, REFERENCE["effect_mean"], REFERENCE["effect_mean_mcse"])


def effect_bias_p_value(mcmc) -> float:
    """How often chance alone would put the 500 effects as far from the truth as they are.

    Short runs do not know each effect's Monte Carlo error well, and the effects' errors go
    together, through the parameters that they share. The chains are independent, though: their
    distances from the truth would as well have the opposite signs, chain by chain, and all choices
    of signs show how far off their mean may be.
    """
    effects = mcmc.draws.local["x"].squeeze(-1).numpy().mean(1)
    distance = effects - np.asarray(REFERENCE["effect_mean"])
    distance = distance / np.sqrt((distance**2).mean(0))  # the same whatever the signs
    signs = np.array([(1, *rest) for rest in product((1, -1), repeat=len(distance) - 1)])
    square = ((signs @ distance) ** 2).sum(1)
    return float(np.mean(square >= square[0]))


def check(mcmc) -> None:
    """Every parameter within four standard errors, and the effects no further than by chance."""
    assert np.abs(parameter_scores(mcmc)).max() < 4.0
    assert effect_bias_p_value(mcmc) > 0.002


@pytest.mark.slow
@pytest.mark.parametrize("method", ["joint", "conditional"])
def test_posterior_agrees_with_quadrature(method):
    check(run(8, method, num_samples=30, warmup=20))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["joint", "conditional"])
def test_posterior_of_nuts_agrees_with_quadrature(method):
    check(run(8, method, num_samples=100, kernel=phf.PseudoMarginalNUTS))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["joint", "conditional"])
@pytest.mark.parametrize(
    ("kernel", "num_particles", "num_samples"),
    [
        (phf.PseudoMarginalHMC, 8, 1600),
        (phf.PseudoMarginalHMC, 32, 1200),
        (phf.PseudoMarginalHMC, 128, 400),
        (phf.PseudoMarginalNUTS, 8, 1600),
        (phf.PseudoMarginalNUTS, 32, 1200),
    ],
)
def test_long_runs_agree_with_quadrature(kernel, num_particles, num_samples, method):
    """Every parameter within four standard errors, and the effects as far as 500 may be."""
    mcmc = run(num_particles, method, num_samples=num_samples, kernel=kernel, jit_compile=True)
    assert np.abs(parameter_scores(mcmc)).max() < 4.0
    assert np.abs(effect_scores(mcmc)).max() < LARGEST_OF_EFFECTS


@pytest.mark.slow
def test_a_biased_sampler_is_noticed(monkeypatch):
    from pyro_hamflow.marginal.marginalize import MarginalModel

    honest = MarginalModel.estimate

    def dishonest(self, *args, **kwargs):
        """Weighs particles by the square root of their weights."""
        estimate = honest(self, *args, **kwargs)
        return type(estimate)(estimate.group, 0.5 * estimate.log_weights, estimate.values)

    monkeypatch.setattr(MarginalModel, "estimate", dishonest)
    mcmc = run(8, "conditional", num_samples=30, warmup=20)
    with pytest.raises(AssertionError):
        check(mcmc)
