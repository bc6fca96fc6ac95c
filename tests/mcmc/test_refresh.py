"""Refreshing noise block by block: what is merged is what the model says at the merged noise."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    CorrelatedRefresh,
    EllipticalSliceRefresh,
    StretchRefresh,
    marginalize,
    noise,
)
from pyro_hamflow.mcmc.transitions.base import select
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks
from pyro_hamflow.model.potential import Potential

CHAINS = 3


def _data(*shape):
    return torch.sin(1.3 * torch.arange(1.0, 1 + torch.Size(shape).numel())).reshape(shape)


def one_plate():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 4):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(x.exp(), 1.0), obs=_data(4))


def left_plate():
    """A plate at dimension -3, another one inside it."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 4, dim=-3):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        with pyro.plate("visit", 2, dim=-1):
            pyro.sample("y", dist.Normal(x.exp(), 1.0), obs=_data(4, 1, 2))


def two_plates():
    """Local sites in two plates, a single one with an event dimension."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 2, dim=-3), pyro.plate("column", 3, dim=-1):
        x = pyro.sample("x", dist.Normal(mean, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(x.prod(-1), 1.0), obs=_data(2, 1, 3))


def inner_plate():
    """A local site in an inner plate, estimated together with that of the outer one."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 4, dim=-2):
        w = pyro.sample("w", dist.Normal(mean, 1.0).expand([2]).to_event(1))
        with pyro.plate("visit", 3, dim=-1):
            x = pyro.sample("x", dist.Normal(w.sum(-1), 0.5))
            pyro.sample("y", dist.Normal(x.exp(), 1.0), obs=_data(4, 3))


def inner_plate_on_the_left():
    """The same, the inner plate left of the outer one."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 4, dim=-1):
        w = pyro.sample("w", dist.Normal(mean, 1.0))
        with pyro.plate("visit", 3, dim=-2):
            x = pyro.sample("x", dist.Normal(w[..., None], 0.5).expand([3, 4, 2]).to_event(1))
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=_data(3, 4))


def two_groups():
    """Two estimates with plates of their own."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("first", 4, dim=-2):
        w = pyro.sample("w", dist.Normal(mean, 1.0))
        pyro.sample("v", dist.Normal(w, 1.0), obs=_data(4, 1))
    with pyro.plate("second", 3, dim=-1):
        x = pyro.sample("x", dist.LogNormal(mean, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=_data(3))


def mixture():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    parts = dist.Normal(torch.stack([mean, mean + 2.0]), torch.tensor([1.0, 0.5]))
    with pyro.plate("group", 4):
        label = dist.Categorical(torch.tensor([0.4, 0.6]))
        x = pyro.sample("x", dist.MixtureSameFamily(label, parts))
        pyro.sample("y", dist.Normal(x.exp(), 1.0), obs=_data(4))


def no_plate():
    """One element: a single block."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(mean, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x.prod(-1), 1.0), obs=torch.tensor(0.7))


def by_hand():
    """An estimate by hand: a single block."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    u = noise("u", (5,))
    pyro.factor("estimate", dist.Normal((mean + u).exp(), 1.0).log_prob(0.7).logsumexp(0))


MODELS = {
    "one_plate": (one_plate, ["x"]),
    "left_plate": (left_plate, ["x"]),
    "two_plates": (two_plates, ["x"]),
    "inner_plate": (inner_plate, ["w", "x"]),
    "inner_plate_on_the_left": (inner_plate_on_the_left, ["w", "x"]),
    "two_groups": (two_groups, ["w", "x"]),
    "mixture": (mixture, ["x"]),
    "no_plate": (no_plate, ["x"]),
    "by_hand": (by_hand, None),
}


@pytest.fixture(params=MODELS, scope="module")
def potential(request):
    torch.set_default_dtype(torch.float64)
    model, sites = MODELS[request.param]
    if sites is not None:
        model = marginalize(model, sites, num_particles=3)
    yield Potential(model, separate_noise=True)
    torch.set_default_dtype(torch.float32)


def _fixed(potential, position, u):
    """The evaluation with the same particle picked whenever noise is the same."""
    torch.manual_seed(7)
    return potential.evaluate(position, u)


def _points(potential):
    position = torch.randn(CHAINS, potential.dimension)
    return position, potential.draw_noise(CHAINS), potential.draw_noise(CHAINS)


def _assert_same(first, second):
    assert torch.allclose(first.value, second.value, rtol=1e-10, atol=1e-10)
    assert first.log_likelihoods.keys() == second.log_likelihoods.keys()
    for name, part in first.log_likelihoods.items():
        assert torch.allclose(part, second.log_likelihoods[name], rtol=1e-10, atol=1e-10)
    for name, part in first.local.items():
        assert torch.allclose(part, second.local[name], rtol=1e-10, atol=1e-10)


def _accept_some(blocks, new, old):
    ratios = blocks.log_ratios(new, old)
    return {name: torch.rand_like(ratio) < 0.5 for name, ratio in ratios.items()}


def test_merging_commutes_with_evaluation(potential):
    blocks = Blocks(potential)
    position, old_noise, new_noise = _points(potential)
    old = _fixed(potential, position, old_noise)
    new = _fixed(potential, position, new_noise)
    for _ in range(3):
        accepted = _accept_some(blocks, new, old)
        merged = blocks.merge_evaluations(accepted, new, old)
        _assert_same(
            merged, _fixed(potential, position, blocks.merge(accepted, new_noise, old_noise))
        )


def test_ratios_add_up_to_potential(potential):
    """The log estimates' gains of all blocks are the potential's loss."""
    blocks = Blocks(potential)
    position, old_noise, new_noise = _points(potential)
    old, new = potential.evaluate(position, old_noise), potential.evaluate(position, new_noise)
    gain = sum(part.reshape(CHAINS, -1).sum(1) for part in blocks.log_ratios(new, old).values())
    assert torch.allclose(gain, old.value - new.value, rtol=1e-10, atol=1e-10)


def test_all_or_nothing_merges(potential):
    blocks = Blocks(potential)
    position, old_noise, new_noise = _points(potential)
    old, new = potential.evaluate(position, old_noise), potential.evaluate(position, new_noise)
    for flag, noise_there, there in ((True, new_noise, new), (False, old_noise, old)):
        ratios = blocks.log_ratios(new, old)
        accepted = {n: torch.full_like(r, flag, dtype=torch.bool) for n, r in ratios.items()}
        assert torch.equal(blocks.merge(accepted, new_noise, old_noise), noise_there)
        _assert_same(blocks.merge_evaluations(accepted, new, old), there)


def test_turn_by_block(potential):
    """A block at angle zero stays, one at a right angle becomes fresh."""
    blocks = Blocks(potential)
    position, old_noise, fresh = _points(potential)
    old, new = potential.evaluate(position, old_noise), potential.evaluate(position, fresh)
    accepted = _accept_some(blocks, new, old)
    angle = {name: part.double() * torch.pi / 2 for name, part in accepted.items()}
    turned = blocks.turn(angle, old_noise, fresh)
    assert torch.allclose(turned, blocks.merge(accepted, fresh, old_noise), atol=1e-14)


REFRESHES = {
    "fresh": CorrelatedRefresh(0.0),
    "correlated": CorrelatedRefresh(0.9),
    "slice": EllipticalSliceRefresh(),
    "stretches": StretchRefresh(3),
}


@pytest.mark.parametrize("refresh", REFRESHES.values(), ids=REFRESHES)
def test_evaluation_belongs_to_refreshed_noise(potential, refresh):
    blocks = Blocks(potential)
    position, u, _ = _points(potential)
    current = potential.evaluate(position, u)
    moved, evaluation, share, count = refresh(
        blocks, u, current, lambda proposed: potential.evaluate(position, proposed)
    )
    again = potential.evaluate(position, moved)
    _assert_same(evaluation._replace(local={}), again._replace(local={}))
    assert share.shape == (CHAINS,)
    assert bool(((share >= 0) & (share <= 1)).all())
    assert count >= 1
    if refresh is REFRESHES["slice"]:
        assert bool((moved != u).all())
        assert bool((share == 1).all())
    else:
        assert count == (3 if refresh is REFRESHES["stretches"] else 1)
    for name, values in evaluation.local.items():
        assert values.shape == again.local[name].shape


def test_share_of_refreshed_noise():
    """The share told is the share of blocks that moved."""
    potential = Potential(marginalize(one_plate, ["x"], num_particles=3), separate_noise=True)
    position, u, _ = _points(potential)
    current = potential.evaluate(position, u)
    moved, _, share, _ = CorrelatedRefresh()(
        Blocks(potential), u, current, lambda proposed: potential.evaluate(position, proposed)
    )
    changed = (moved != u).reshape(CHAINS, 3, 4)
    assert torch.equal(changed.any(1), changed.all(1))
    assert torch.allclose(share, changed.all(1).double().mean(1))


def test_impossible_noise_is_refused():
    """Noise at which the estimate vanishes, or is no number, is never accepted."""
    potential = Potential(marginalize(one_plate, ["x"], num_particles=3), separate_noise=True)
    position, u, _ = _points(potential)
    current = potential.evaluate(position, u)
    for bad in (-torch.inf, torch.nan):
        parts = {name: part * 0 + bad for name, part in current.log_likelihoods.items()}
        spoilt = current._replace(value=current.value * 0 + torch.inf, log_likelihoods=parts)
        moved, evaluation, share, _ = CorrelatedRefresh()(
            Blocks(potential), u, current, lambda proposed, spoilt=spoilt: spoilt
        )
        assert torch.equal(moved, u)
        assert torch.equal(evaluation.value, current.value)
        assert bool((share == 0).all())


@pytest.mark.parametrize(
    ("correlation", "expected"),
    [(value, "0 <= correlation < 1") for value in (-0.1, 1.0, 1.5)] + [(math.nan, "a number")],
)
def test_bad_correlation_is_refused(correlation, expected):
    with pytest.raises(ValueError, match=f"`correlation` is .*: expected {expected}"):
        CorrelatedRefresh(correlation)


def test_select_keeps_trailing_shapes():
    accepted = torch.tensor([True, False])
    new, old = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    assert torch.equal(select(accepted, new, old).sum((1, 2)), torch.tensor([12.0, 0.0]))


def test_stretches_lie_along_the_path():
    """Each is one piece of the coordinates, of all noise vectors alike; together they are all."""

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(12), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(scale * x, 1.0).to_event(1), obs=torch.ones(12))

    marginal = marginalize(model, ["x"], num_particles=2, proposal="prior")
    potential = Potential(marginal, separate_noise=True)
    noise = torch.zeros(1, potential.noise_dimension)
    found = Blocks(potential).stretches(3, 0.5, noise).reshape(2, 12)
    assert torch.equal(found[0], found[1])
    assert set(found[0].tolist()) == {0, 1, 2}
    assert int((found[0].diff() != 0).sum()) == 3  # the first lies at both ends
