"""A user's file, whose types `make types` has mypy and pyright check: no error, and no `Any`."""

from __future__ import annotations

from typing import assert_type

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_hamflow as phf


def model(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def main() -> None:
    y = torch.zeros(3)
    marginal = phf.marginalize(model, ["x"], num_particles=4, proposal="laplace")
    quality = phf.estimator_quality(marginal, {"mean": torch.tensor(0.0)}, y)
    assert_type(quality, phf.EstimatorQuality)
    assert_type(quality.standard_deviation, float)

    kernel = phf.PseudoMarginalNUTS(marginal, target_accept_prob=0.9)
    assert_type(kernel, phf.PseudoMarginalNUTS)
    mcmc = phf.MCMC(kernel, num_samples=100, warmup_steps=None, num_chains=4, seed=0)
    mcmc.run(y)
    assert_type(mcmc.get_samples(), dict[str, Tensor])
    assert_type(mcmc.messages, list[str])
    assert_type(mcmc.draws.stats["diverging"], Tensor)
    phf.to_inference_data(mcmc, coords={"row": ["a", "b", "c"]})

    guide = phf.AutoNeuralHamiltonianFlow(model, hidden=(8,))
    phf.fit_guide(model, guide, y, num_steps=10)
    found = phf.importance_sample(model, guide, y, num_samples=100)
    assert_type(found, phf.ImportanceSamples)
    assert_type(found.log_evidence, float)
    assert_type(found.weights, Tensor)

    sampler = phf.AnnealedSampler(model, num_particles=100)
    sampler.run(y)
    assert_type(sampler.log_evidence, float)
