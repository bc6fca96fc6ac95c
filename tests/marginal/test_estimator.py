"""Particles of all components of mixture priors are made together, by one run of the model."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf
from pyro_hamflow.marginal import likelihood_site
from pyro_hamflow.marginal.proposals import laplace
from pyro_hamflow.marginal.proposals.laplace import LaplaceProposal
from pyro_hamflow.marginal.proposals.prior import PriorProposal
from tests.helpers.kinds import long_but

Y = torch.tensor([[0.3, 1.0], [2.0, 0.4], [5.0, 3.1]], dtype=torch.float64)
AT = {"mean": torch.tensor(0.4, dtype=torch.float64)}
WEIGHTS = torch.tensor([0.2, 0.8], dtype=torch.float64)
SHIFT = torch.tensor([-1.0, 1.0], dtype=torch.float64)
SCALE = torch.tensor([0.5, 2.0], dtype=torch.float64)


def mixture(parts):
    return dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts)


def of_normals(mean):
    return mixture(dist.Normal(mean[..., None] + SHIFT, SCALE))


def of_vectors(mean):
    roots = torch.diag_embed(torch.stack([SCALE, SCALE.flip(0)]))
    return mixture(dist.MultivariateNormal((mean + SHIFT)[:, None].expand(2, 2), scale_tril=roots))


def of_gammas(mean):
    return mixture(dist.Gamma(SCALE + 1.0, mean.exp()))


class Model:
    """Two effects of each element, the second after the first, that counts how often it is run."""

    def __init__(self, prior):
        self.prior = prior
        self.runs = 0

    def __call__(self, y):
        self.runs += 1
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("element", len(y)):
            x = pyro.sample("x", self.prior(mean))
            total = x.sum(-1) if self.prior is of_vectors else x
            w = pyro.sample("w", of_normals(0.5 * total))
            data = dist.StudentT(3.0, torch.stack([total, w], -1), 0.5)
            pyro.sample("y", data.to_event(1), obs=y)


def estimate(model, proposal, num_particles, at, points="iid"):
    """One estimate and its gradient, and how often the model was run for it."""
    marginal = phf.marginalize(
        model, ["x", "w"], num_particles=num_particles, proposal=proposal, points=points
    )
    marginal.fit(Y, pilot=AT)
    plan = marginal.plan(Y)
    (group,) = plan.structure.groups
    noise = torch.randn(plan.layouts[group.name].noise_shape(group), dtype=torch.float64)
    mean = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    with marginal.hold(plan.structure):
        model.runs = 0
        found = marginal.estimate(group, noise, {"mean": mean}, Y)
    total = found.log_weights.logsumexp(0)
    (slope,) = torch.autograd.grad(total.sum(), mean)
    return found.log_weights.detach(), total.detach(), slope, model.runs


FITTED = ((of_normals, 4, "iid"), (of_vectors, 8, "rqmc"), (of_gammas, 8, "iid"))
PRIORS, COUNTS, POINTS = (of_normals, of_vectors, of_gammas), (4, 7, 8, 20), ("iid", "rqmc")


def is_quick(case):
    """Nothing is fitted; or three of the ways to fit, one for each prior."""
    return case[3] == "prior" or case[:3] in FITTED


@pytest.mark.parametrize(
    ("prior", "num_particles", "points", "proposal"),
    long_but(is_quick, itertools.product(PRIORS, COUNTS, POINTS, ["prior", "laplace"])),
)
def test_joined_components_make_the_particles_that_they_make_apart(
    prior, num_particles, points, proposal, monkeypatch
):
    torch.manual_seed(0)
    *joined, runs = estimate(Model(prior), proposal, num_particles, 0.7, points)
    # With seven particles of four choices some have one from the prior, the last has none.
    assert runs == (2 if num_particles == 7 and proposal == "laplace" else 1)
    for kind in (LaplaceProposal, PriorProposal):
        monkeypatch.setattr(kind, "joins_components", False)
    torch.manual_seed(0)
    *apart, runs = estimate(Model(prior), proposal, num_particles, 0.7, points)
    assert runs == 4
    for one, other in zip(joined, apart, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_a_sabotaged_choice_is_noticed(monkeypatch):
    torch.manual_seed(0)
    right = estimate(Model(of_normals), "laplace", 8, 0.7)[0]

    def first(options, number):
        return likelihood_site.chosen(options, torch.zeros_like(number))

    monkeypatch.setattr(laplace, "chosen", first)
    torch.manual_seed(0)
    assert (estimate(Model(of_normals), "laplace", 8, 0.7)[0] - right).abs().max() > 0.1
