"""Models that guides are tried on, and the bounds that they are trained by."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)

Y = torch.tensor([1.2, -0.3, 2.0, 0.4, 0.9], dtype=torch.float64)


def conjugate(y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def evidence(y):
    covariance = torch.eye(len(y)) + 4.0
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


def mixed(y):
    """Sites of several supports and shapes, in a plate and outside."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(share[..., 0], scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def subsampled(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


def posterior(y):
    precision = len(y) + 0.25
    return dist.Normal(y.sum() / precision, precision**-0.5)


ELBOS = {
    "trace": Trace_ELBO,
    "several particles": lambda: Trace_ELBO(num_particles=3),
    "vectorised particles": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "graph": TraceGraph_ELBO,
    "mean field": TraceMeanField_ELBO,
    "Renyi": lambda: RenyiELBO(num_particles=3, vectorize_particles=True),
    "tail-adaptive": lambda: TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True),
    "enumeration": lambda: TraceEnum_ELBO(max_plate_nesting=1),
}
JIT = {
    "trace, jit": JitTrace_ELBO,
    "graph, jit": JitTraceGraph_ELBO,
    "mean field, jit": JitTraceMeanField_ELBO,
}
