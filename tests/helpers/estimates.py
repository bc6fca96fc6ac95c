"""Estimates of likelihoods, many at once, and the check that they are unbiased."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

REPLICATES = 4000


def estimates(marginal, parameters, *args, replicates=REPLICATES):
    """Log estimates of each group's elements at given parameters and many noise draws."""
    conditioned = poutine.condition(marginal, parameters)
    trace = poutine.trace(conditioned).get_trace(*args)
    shapes = {
        n: s["value"].shape for n, s in trace.nodes.items() if s.get("infer", {}).get("noise")
    }

    def one(values):
        run = poutine.trace(poutine.condition(conditioned, values)).get_trace(*args)
        return {
            name.removesuffix("_log_likelihood"): site["fn"].log_prob(site["value"]).flatten()
            for name, site in run.nodes.items()
            if name.endswith("_log_likelihood")
        }

    values = {name: torch.randn(replicates, *shape) for name, shape in shapes.items()}
    with pyro.validation_enabled(False), torch.no_grad():
        return torch.func.vmap(one, chunk_size=1000)(values)


def assert_unbiased(log_estimates, exact, resolution=0.02):
    """The mean estimate of each element, and of all, is the exact likelihood (4 s.e.)."""
    exact = torch.as_tensor(exact).flatten()
    ratio = (log_estimates - exact).exp()
    assert ratio.shape[1:] == exact.shape
    error = ratio.std(0) / math.sqrt(len(ratio))
    pooled = error.square().sum().sqrt() / len(exact)
    assert pooled < resolution, "the test has no power"
    assert abs(ratio.mean() - 1) <= 4 * pooled + 1e-12
    assert bool(((ratio.mean(0) - 1).abs() <= 4 * error + 1e-12).all())


AT = {"mu": torch.tensor(0.4, dtype=torch.float64), "s": torch.tensor(0.8, dtype=torch.float64)}


def parameters():
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    return mu, s
