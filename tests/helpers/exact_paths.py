"""A short path whose joint posterior with its parameters is drawn exactly, and its extended target.

Binary answers have a bounded likelihood, so that parameters and path are drawn by rejection from
the prior. One particle, picked uniformly, is given the noise that leads to the path, and all other
noise is standard normal.
"""

from __future__ import annotations

from functools import cache

import pyro
import pyro.distributions as dist
import torch

from pyro_hamflow import marginalize
from pyro_hamflow.marginal.path_covariance import map_at
from pyro_hamflow.marginal.path_fit import gaussian_at
from pyro_hamflow.marginal.proposals.path import PathProposal
from pyro_hamflow.marginal.whitening.affine import CovariancePrior
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs import banded
from tests.helpers.exact_draws import CHAINS

Y = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
SLOPE = 2.0


def walk(y):
    """Answers that follow a random walk; its level and the size of its steps."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.7))
    level, root = mean.expand(len(y)), scale * torch.ones(len(y), len(y)).tril()
    x = pyro.sample("x", dist.MultivariateNormal(level, scale_tril=root))
    pyro.sample("y", dist.Bernoulli(logits=SLOPE * x).to_event(1), obs=y)


def masked_walk(y):
    """The same by its precision: of a prior with a mask, the covariance is not taken."""
    with pyro.poutine.mask(mask=True):
        walk(y)


def posterior_draws(num_chains):
    """Exact draws of position and path, by rejection from the prior."""
    kept, total = [], 0
    while total < num_chains:
        position = torch.randn(10 * num_chains, 2) * torch.tensor([1.0, 0.7])
        steps = position[:, 1:].exp() * torch.randn(len(position), len(Y))
        path = position[:, :1] + steps.cumsum(-1)
        good = torch.rand(len(position)) < torch.sigmoid(SLOPE * path * (2 * Y - 1)).prod(-1)
        kept.append(torch.cat([position, path], -1)[good])
        total += len(kept[-1])
    draws = torch.cat(kept)[:num_chains]
    return draws[:, :2], draws[:, 2:]


class ExtendedPath:
    """The marginal model of the walk, and exact draws of its extended target.

    Arguments:
        num_particles: How many paths an estimate has.
        by_covariance: Whether proposals are made by the covariance that the model gives.
    """

    joint_step = 0.5
    joint_nuts_step = 0.4

    def __init__(self, num_particles, by_covariance=False):
        self.num_particles, self.by_covariance = num_particles, by_covariance
        model = walk if by_covariance else masked_walk
        self.model = marginalize(
            model, ["x"], num_particles=num_particles, proposal=PathProposal(steps=1)
        )
        pilot = {"mean": torch.tensor(0.3), "scale": torch.tensor(0.8)}
        self.model.fit(Y, pilot=pilot)
        self.potential = Potential(self.model, (Y,), separate_noise=True)
        position, path = posterior_draws(CHAINS)
        u = torch.randn(CHAINS, num_particles, len(Y))
        picked = torch.randint(num_particles, (CHAINS,))
        u[torch.arange(CHAINS), picked] = self.noise_of(position, path)
        self._draws = position, u.flatten(1), path

    def noise_of(self, position, path):
        """The noise that leads to a path."""
        (fit,) = self.model.proposal.fitted.values()
        (programs,) = self.model.plan(Y).structure.programs.values()
        assert torch.equal(fit.bands.order.places, torch.arange(len(Y))) and not fit.is_exact
        assert fit.by_covariance == self.by_covariance

        def inverse(position, path):
            parameters = {"mean": position[0], "scale": position[1].exp()}
            parts = programs.parts_at(parameters)
            if self.by_covariance:
                root = parameters["scale"] * torch.ones(len(Y), len(Y)).tril()
                prior = CovariancePrior(parameters["mean"].expand(len(Y)), root)
                return map_at(fit, parts, parameters, prior).inverse(path)
            found = gaussian_at(fit, parts, parameters)
            along = banded.multiply_root(found.root, path - found.place, transposed=True)
            return along - found.forward

        stretched = torch.func.vmap(inverse)(position, path)
        noise = stretched
        for _ in range(60):  # of z + z ** 5 / 10,000
            noise = noise - (noise + 1e-4 * noise**5 - stretched) / (1.0 + 5e-4 * noise**4)
        return noise

    def draws(self):
        return self._draws

    def quantities(self, position, u, x):
        """What is compared: parameters, the path, and its noise."""
        u = u.reshape(len(u), self.num_particles, -1)
        return {"theta": position, "x": x, "first noise": u[:, 0], "norm": u.square().mean(1)}


@cache
def path_target(num_particles, by_covariance=False):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    target = ExtendedPath(num_particles, by_covariance)
    torch.set_default_dtype(before)
    return target
