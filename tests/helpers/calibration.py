"""Simulation-based calibration: a prior draw ranks anywhere among the draws of its posterior.

Parameters are drawn from the prior, data from the parameters, and draws from the posterior given
the data. The four are exchangeable if the sampler is exact, so that the true value's rank among the
draws is uniform, whatever the model. Several data sets are posed in each run, as replicates under
one plate. Each chain gives its last draw, so that the draws are independent of each other.

References:
    | Validating Bayesian inference algorithms with simulation-based calibration (Talts et al.)
    | https://arxiv.org/abs/1804.06788
    | Simulation-based calibration checking for Bayesian computation (Modrák et al., 2023)
    | https://arxiv.org/abs/2211.02383
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import scipy.stats
import torch

import pyro_hamflow as phf

GROUPS = 5
TOGETHER = 20  # data sets in one run
RUNS = 10
CHAINS = 63  # a rank is one of 64
BINS = 8
WARMUP, SAMPLES = 100, 40


MEAN = dist.Normal(1.0, 0.7)
SCALE = dist.LogNormal(-0.5, 0.4)


def counts(y, power=1.0):
    """Counts in groups; two parameters of each data set, and a local effect of each group.

    Arguments:
        y: Of shape ``(data sets, groups)``.
        power: To which the likelihood is raised; the model is another if it is not one.
    """
    with pyro.plate("replicate", len(y), dim=-2):
        mean = pyro.sample("mean", MEAN)
        scale = pyro.sample("scale", SCALE)
        with pyro.plate("group", GROUPS, dim=-1):
            x = pyro.sample("x", dist.Normal(mean, scale))
            with poutine.scale(scale=power):
                pyro.sample("y", dist.Poisson(x.exp()), obs=y)


def quantities(mean, scale, x, y):
    """What is ranked, each of shape ``(*, data sets)``."""
    fit = dist.Poisson(x.exp(), validate_args=False).log_prob(y).sum(-1)
    return {"mean": mean[..., 0], "scale": scale[..., 0], "x": x[..., 0], "fit": fit}


def draw_prior(num_sets):
    mean, scale = MEAN.sample((num_sets, 1)), SCALE.sample((num_sets, 1))
    x = mean + scale * torch.randn(num_sets, GROUPS)
    return mean, scale, x, torch.poisson(x.exp())


def rank(true, draws):
    """How many draws of each quantity lie below its true value."""
    return {name: (draws[name] < true[name]).sum(0) for name in true}


def check_uniform(ranks):
    """By chi-square tests of the ranks in bins."""
    for name, values in ranks.items():
        found = torch.bincount(values * BINS // (CHAINS + 1), minlength=BINS)
        p = scipy.stats.chisquare(found.numpy()).pvalue
        assert p > 1e-3, f"the ranks of {name} are not uniform, p = {p:.1e}: {found.tolist()}"


def ranks_of(make_kernel, *, runs=RUNS, together=TOGETHER, **settings):
    """The ranks of prior draws among a kernel's draws; settings are passed to its model."""
    collected = []
    for seed in range(runs):
        pyro.set_rng_seed(1000 + seed)
        mean, scale, x, y = draw_prior(together)
        mcmc = phf.MCMC(make_kernel(), SAMPLES, WARMUP, num_chains=CHAINS, seed=seed)
        mcmc.run(y, **settings)
        draws = mcmc.get_samples(group_by_chain=True) | mcmc.draws.local
        last = {name: value[:, -1] for name, value in draws.items()}
        found = quantities(last["mean"], last["scale"], last["x"], y)
        collected.append(rank(quantities(mean, scale, x, y), found))
    return {name: torch.cat([ranks[name] for ranks in collected]) for name in collected[0]}
