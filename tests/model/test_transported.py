"""A potential in the coordinates of a map: the same posterior, whatever the map."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, CorrelatedRefresh
from pyro_hamflow.mcmc.transitions.nuts import JointNUTSTransition, NUTSTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition, JointTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.transported import TransportedPart, TransportedTarget
from tests.helpers.exact_draws import CHAINS, DEPTH, MOST_POINTS, make_target, setting
from tests.helpers.kinds import long_but
from tests.helpers.laws import assert_invariant
from tests.helpers.transports import SHAPES, random_flow, trained_flow

MOVES = {
    "hmc": (lambda target: HMCTransition(target, CHAINS), 4),
    "nuts": (lambda target: NUTSTransition(target, CHAINS, DEPTH), MOST_POINTS),
}


@cache
def flow_for(shape, kind):
    model, draw, sizes = SHAPES[shape]
    if kind == "random":
        return random_flow(sizes)
    torch.manual_seed(4)
    return trained_flow(model, sizes, draw(2000))


def check(shape, transport, moves, *, count=2):
    """Moves exact draws in a map's coordinates a few times, and compares positions."""
    model, draw, _ = SHAPES[shape]
    target = TransportedTarget(Potential(model), transport)
    make, num_steps = MOVES[moves]
    torch.manual_seed(5)
    position, transition = draw(CHAINS), make(target)
    state = transition.state_at(target.coordinates(position), position[:, :0])
    tuning = Tuning(0.25, GaussianKinetic(torch.ones(position.shape[1])))
    for _ in range(count):
        state, info = transition.step(state, tuning, num_steps)
    moved, log_volume = target.positions(state.position)
    assert_invariant({"theta": position}, {"theta": moved})
    assert 0.3 < info.acceptance_rate.mean() < 0.995
    value = target.potential.value(moved, state.noise)
    assert torch.allclose(value - log_volume, state.evaluation.value, rtol=1e-4, atol=1e-4)
    return moved


@pytest.mark.parametrize(
    ("shape", "kind", "moves"),
    long_but(
        [("banana", "random", "nuts"), ("banana", "random", "hmc"), ("funnel", "trained", "hmc")],
        itertools.product(SHAPES, ["random", "trained"], MOVES),
    ),
)
def test_invariance(shape, kind, moves):
    check(shape, flow_for(shape, kind), moves)


@pytest.mark.parametrize("shape", long_but(["banana"], SHAPES))
def test_invariance_in_single_precision(shape):
    flow = flow_for(shape, "random").to(torch.float32)
    try:
        torch.set_default_dtype(torch.float32)
        assert check(shape, flow, "nuts").dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float64)
        flow.to(torch.float64)


class WithoutVolume:
    """A map that does not tell its log determinant."""

    def __init__(self, transport):
        self.transport = transport

    def forward(self, z):
        x, log_volume = self.transport.forward(z)
        return x, 0.0 * log_volume

    def inverse(self, x):
        z, log_volume = self.transport.inverse(x)
        return z, 0.0 * log_volume


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_log_determinant_left_out(kind):
    with pytest.raises(AssertionError, match="moved by"):
        check("funnel", WithoutVolume(flow_for("funnel", kind)), "hmc", count=8)


class WrongVolume(WithoutVolume):
    """A map whose log determinant lacks one layer's share."""

    def forward(self, z):
        x, log_volume = self.transport.forward(z)
        return x, log_volume - self.transport.layers[0](z)[1]


@pytest.mark.slow
def test_log_determinant_of_a_layer_left_out():
    with pytest.raises(AssertionError, match="moved by"):
        check("funnel", WrongVolume(flow_for("funnel", "random")), "nuts")


# --- noise ----------------------------------------------------------------------------------------

ON_NOISE = {
    "joint": lambda target, _: JointTransition(target, CHAINS),
    "joint nuts": lambda target, _: JointNUTSTransition(target, CHAINS, DEPTH),
    "conditional": lambda target, blocks: ConditionalTransition(
        HMCTransition(target, CHAINS), CorrelatedRefresh(), blocks
    ),
    "conditional nuts": lambda target, blocks: ConditionalTransition(
        NUTSTransition(target, CHAINS, DEPTH), CorrelatedRefresh(), blocks
    ),
}


def check_with_noise(transport, kind, *, count=2):
    """The same on a model with an estimated likelihood: parameters alone are transported."""
    known = make_target("prior-8")
    position, noise, x = known.draws()
    target = TransportedTarget(known.potential, transport)
    torch.manual_seed(6)
    transition = ON_NOISE[kind](target, Blocks(known.potential))
    state = transition.state_at(target.coordinates(position), noise)
    tuning, num_steps = setting(known, transition)
    tuning = tuning._replace(step_size=0.5 * tuning.step_size)
    for _ in range(count):
        state, info = transition.step(state, tuning, num_steps)
    moved, _ = target.positions(state.position)
    local = state.evaluation.local["x"]
    before, after = (position, noise, x), (moved, state.noise, local)
    assert_invariant(known.quantities(*before), known.quantities(*after))
    assert 0.2 < info.acceptance_rate.mean() < 0.98


@pytest.mark.parametrize("kind", long_but(ON_NOISE.keys() - {"conditional nuts"}, ON_NOISE))
def test_invariance_with_noise(kind):
    check_with_noise(random_flow([1, 1], spread=0.05), kind)


@pytest.mark.slow
def test_log_determinant_left_out_with_noise():
    with pytest.raises(AssertionError, match="moved by"):
        check_with_noise(WithoutVolume(random_flow([1, 1], spread=0.05)), "joint nuts", count=8)


def test_part_of_the_coordinates():
    """The others stay, and the determinant is that of the whole map."""
    flow = random_flow([1, 2])
    part = TransportedPart(flow, torch.tensor([4, 0, 2]), 5)
    z = torch.randn(3, 5)
    x, log_volume = part.forward(z)
    assert torch.equal(x[:, [1, 3]], z[:, [1, 3]])
    assert torch.equal(x[:, [4, 0, 2]], flow(z[:, [4, 0, 2]])[0])
    jacobian = torch.autograd.functional.jacobian(lambda row: part.forward(row[None])[0][0], z[0])
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, log_volume[0])
    again, back = part.inverse(x)
    assert torch.allclose(again, z)
    assert torch.allclose(back, -log_volume)
