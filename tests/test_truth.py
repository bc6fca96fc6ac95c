"""Whole runs against posteriors known in closed form."""

from __future__ import annotations

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf

Y = torch.tensor([0.3, -1.2, 2.1, 0.8, -0.4, 1.7, 3.0, 0.1, 1.1, -0.6], dtype=torch.float64)
LOCAL, NOISE, PRIOR = 0.8, 0.6, 2.0  # standard deviations


def gaussian(y):
    mean = pyro.sample("mean", dist.Normal(0.0, PRIOR))
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.Normal(mean, LOCAL))
        pyro.sample("y", dist.Normal(x, NOISE), obs=y)


def truth() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Posterior means and standard deviations of the mean and of the local values."""
    precision = 1 / PRIOR**2 + len(Y) / (LOCAL**2 + NOISE**2)
    mean = float(Y.sum()) / (LOCAL**2 + NOISE**2) / precision
    share = LOCAL**2 / (LOCAL**2 + NOISE**2)
    local = share * Y.numpy() + (1 - share) * mean
    spread = np.sqrt(share * NOISE**2 + (1 - share) ** 2 / precision)
    return {
        "mean": (np.asarray(mean), np.asarray(precision**-0.5)),
        "x": (local, np.full(len(Y), spread)),
    }


@pytest.mark.parametrize("method", ["joint", "conditional"])
@pytest.mark.parametrize(
    ("num_particles", "proposal"), [(1, "prior"), (4, "prior"), (2, "laplace")]
)
def test_run_agrees_with_closed_form(num_particles, proposal, method):
    marginal = phf.marginalize(gaussian, ["x"], num_particles=num_particles, proposal=proposal)
    kernel = phf.PseudoMarginalHMC(marginal, method=method)
    mcmc = phf.MCMC(kernel, num_samples=400, warmup_steps=150, num_chains=100, seed=1)
    mcmc.run(Y)
    posterior = phf.to_inference_data(mcmc).posterior
    for name, (mean, spread) in truth().items():
        for power, expected in ((1, mean), (2, mean**2 + spread**2)):
            values = posterior[name] ** power
            error = arviz.mcse(values.to_dataset(name=name))[name].to_numpy()
            score = (values.mean(("chain", "draw")).to_numpy() - expected) / error
            assert np.abs(score).max() < 4.0, (name, power)
