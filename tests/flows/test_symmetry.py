"""Symmetrised guides: their density by two routes, their symmetry, and what they find."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value

from pyro_hamflow import (
    MCMC,
    AutoFlow,
    AutoNeuralHamiltonianFlow,
    FlowMH,
    SymmetrisedGuide,
    fit_guide,
    importance_sample,
)
from tests.helpers.kinds import long_but
from tests.helpers.zuko_flows import FLOWS

SIGN = dist.transforms.AffineTransform(0.0, -1.0)
WIDTH = 0.4
UPWARDS = init_to_value(values={"x": torch.ones(2)})
APART = init_to_value(values={"mean": torch.tensor([-3.0, 0.0, 3.0])})


def field():
    """Two coupled coordinates, whose signs change together."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    wells = -4.0 * (x.square() - 1.0).square().sum(-1)
    pyro.factor("action", wells - 2.0 * (x[..., 0] - x[..., 1]).square())


def field_evidence():
    line = torch.linspace(-4.0, 4.0, 801)
    first, second = torch.meshgrid(line, line, indexing="ij")
    x = torch.stack([first, second], -1)
    terms = dist.Normal(0.0, 2.0).log_prob(x).sum(-1) - 4.0 * (x.square() - 1.0).square().sum(-1)
    return float((terms - 2.0 * (first - second).square()).exp().sum().log() + 2 * math.log(0.01))


def three(data):
    """Three means without names: six modes."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0).expand([3]).to_event(1))
    with pyro.plate("data", len(data)):
        kinds = dist.Categorical(torch.ones(3) / 3)
        pyro.sample("y", dist.MixtureSameFamily(kinds, dist.Normal(mean, WIDTH)), obs=data)


DATA = torch.cat([c + torch.linspace(-0.5, 0.5, 8) for c in (-3.0, 0.0, 3.0)])
PERMUTATIONS = [
    dist.transforms.Permute(torch.tensor(order), dim=-1)
    for order in ([0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0])
]


def three_evidence():
    line = torch.linspace(-4.5, 4.5, 91)
    grid = torch.cartesian_prod(line, line, line)
    total = []
    for part in grid.split(200_000):
        terms = dist.Normal(part[:, None, :], WIDTH).log_prob(DATA[:, None])
        likelihood = (terms.logsumexp(-1) - math.log(3)).sum(-1)
        total.append(likelihood + dist.Normal(0.0, 3.0).log_prob(part).sum(-1))
    return float(torch.cat(total).logsumexp(0) + 3 * math.log(0.1))


def shaken(guide, *args):
    guide.prepare(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return guide


@pytest.mark.parametrize("maps", [[SIGN], PERMUTATIONS])
def test_density_is_symmetric_and_the_same_by_two_routes(maps):
    args = () if maps == [SIGN] else (DATA,)
    model = field if maps == [SIGN] else three
    guide = SymmetrisedGuide(shaken(AutoFlow(model, FLOWS["RealNVP"]), *args), maps)
    guide.prepare(*args)
    position, log_density = guide.draw(300)
    torch.testing.assert_close(guide.log_ratio(position), log_density, rtol=1e-10, atol=1e-10)
    for each in maps:
        moved = guide.log_ratio(each(position))
        torch.testing.assert_close(moved, log_density, rtol=1e-10, atol=1e-10)
    inner = guide.guide.log_ratio(position)
    assert (log_density >= inner - math.log(len(maps) + 1) - 1e-10).all()


def test_volumes_count():
    """An exchange of a coordinate with twice the other: it is undone by itself."""
    exchange = dist.transforms.ComposeTransform(
        [
            dist.transforms.AffineTransform(torch.zeros(2), torch.tensor([1.0, 2.0])),
            dist.transforms.Permute(torch.tensor([1, 0]), dim=-1),
            dist.transforms.AffineTransform(torch.zeros(2), torch.tensor([1.0, 0.5])),
        ]
    )
    guide = SymmetrisedGuide(AutoNormal(field, init_scale=0.7), [exchange])
    guide.prepare()
    line = torch.linspace(-12.0, 12.0, 601)
    with torch.no_grad():
        total = guide.log_ratio(torch.cartesian_prod(line, line)).exp().sum() * 0.04**2
    assert abs(total - 1.0) < 1e-3


@pytest.mark.parametrize("kind", long_but(["AutoFlow"], ["AutoFlow", "AutoNeuralHamiltonianFlow"]))
def test_one_mode_found_is_both(kind):
    """Draws with momenta beside them included."""
    if kind == "AutoFlow":
        guide = AutoFlow(field, FLOWS["RealNVP"], degrees_of_freedom=10.0, init_loc_fn=UPWARDS)
    else:
        settings = {"hidden": (16, 16), "num_steps": 3, "init_loc_fn": UPWARDS}
        guide = AutoNeuralHamiltonianFlow(field, **settings)
    guide = SymmetrisedGuide(guide, [SIGN])
    fit_guide(field, guide, num_steps=300, num_particles=32, seed=0)
    found = importance_sample(field, guide, num_samples=5000, seed=0)
    assert found.lost is None and found.ess > 2000
    assert abs(found.log_evidence - field_evidence()) < 3 * found.log_evidence_error < 0.1
    mcmc = MCMC(FlowMH(field, guide), 1000, 0, disable_progbar=True)
    mcmc.run()
    positive = (mcmc.get_samples()["x"].sum(-1) > 0).double().mean()
    assert abs(positive - 0.5) < 4 * 0.5 / math.sqrt(300)


def test_labels_are_exchanged():
    guide = SymmetrisedGuide(AutoFlow(three, FLOWS["RealNVP"], init_loc_fn=APART), PERMUTATIONS)
    fit_guide(three, guide, DATA, num_steps=100, num_particles=32, seed=0)
    found = importance_sample(three, guide, DATA, num_samples=4000, seed=0)
    assert found.lost is None
    assert abs(found.log_evidence - three_evidence()) < 3 * found.log_evidence_error < 0.1


def test_what_is_no_group_is_refused():
    guide = AutoNormal(field)
    with pytest.raises(ValueError, match="`maps` is empty"):
        SymmetrisedGuide(guide, [])
    with pytest.raises(TypeError, match="`maps` has .* in it: expected transforms"):
        SymmetrisedGuide(guide, [torch.neg])
    with pytest.raises(TypeError, match="`guide` is a str"):
        SymmetrisedGuide("guide", [SIGN])
    turn = dist.transforms.AffineTransform(0.0, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="no group: map 0 after map 0 is none of them"):
        importance_sample(field, SymmetrisedGuide(guide, [turn]))
    with pytest.raises(ValueError, match="no group: map 0 after map 0 is none of them"):
        importance_sample(three, SymmetrisedGuide(AutoNormal(three), PERMUTATIONS[2:3]), DATA)
