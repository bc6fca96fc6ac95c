"""Kernels in the middle of a run, taken up by others: all go on to the same draws, bit for bit."""

from __future__ import annotations

import json

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    HMC,
    HNNHMC,
    HNNNUTS,
    MALA,
    NUTS,
    AutoNeuralHamiltonianFlow,
    FlowMH,
    FlowNUTS,
    PseudoMarginalHMC,
    PseudoMarginalNUTS,
    RandomWalk,
    marginalize,
)
from pyro_hamflow.mcmc.adaptation import transport_learning
from pyro_hamflow.mcmc.frozen import Unstorable
from pyro_hamflow.mcmc.snapshot import capture, found_words, kernel_words, source_words, take_up
from tests.helpers.kinds import long_but

COUNTS = torch.tensor([2.0, 0.0, 1.0])
SQUARES = torch.tensor([4.0, 4.0])


def hierarchical(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.Normal(mean, scale))
        pyro.sample("y", dist.Poisson(x.exp()), obs=y)


def two_signs(y):
    x = pyro.sample("x", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x.square(), 1.0).to_event(1), obs=y)


def marginal(**how):
    return marginalize(hierarchical, ["x"], **how)


def learned(**how):
    return {"fallback": False, "training_steps": 30} | how


def own(y):
    return AutoNeuralHamiltonianFlow(two_signs, hidden=(8, 8))


KERNELS = {  # of each, what makes it, its data, and iterations of warm-up
    "HMC": (lambda: HMC(hierarchical, max_num_steps=15), COUNTS, 30),
    "NUTS": (lambda: NUTS(hierarchical, max_tree_depth=4), COUNTS, 30),
    "NUTS, native": (
        lambda: NUTS(hierarchical, max_tree_depth=4, engine="native"),
        COUNTS,
        30,
    ),
    "NUTS, blocks": (
        lambda: NUTS(hierarchical, full_mass=[("mean", "x")], max_tree_depth=4),
        COUNTS,
        30,
    ),
    "NUTS, transported": (
        lambda: NUTS(hierarchical, transport="flow", max_tree_depth=3),
        COUNTS,
        50,
    ),
    "MALA": (lambda: MALA(hierarchical), COUNTS, 30),
    "RandomWalk": (lambda: RandomWalk(hierarchical), COUNTS, 30),
    "RandomWalk, native": (lambda: RandomWalk(hierarchical, engine="native"), COUNTS, 30),
    "RandomWalk, estimate": (lambda: RandomWalk(marginal(num_particles=4)), COUNTS, 30),
    "PseudoMarginalHMC": (lambda: PseudoMarginalHMC(marginal(proposal="laplace")), COUNTS, 30),
    "PseudoMarginalHMC, native": (
        lambda: PseudoMarginalHMC(marginal(num_particles=4), max_num_steps=8, engine="native"),
        COUNTS,
        30,
    ),
    "PseudoMarginalNUTS, joint": (
        lambda: PseudoMarginalNUTS(marginal(num_particles=4), method="joint"),
        COUNTS,
        30,
    ),
    "HNNHMC": (lambda: HNNHMC(hierarchical, **learned()), COUNTS, 60),
    "HNNHMC, native": (lambda: HNNHMC(hierarchical, **learned(engine="native")), COUNTS, 60),
    "HNNNUTS, native estimate": (
        lambda: HNNNUTS(marginal(num_particles=4), **learned(engine="native")),
        COUNTS,
        60,
    ),
    "HNNNUTS, per leaf": (
        lambda: HNNNUTS(hierarchical, **learned(correction="per leaf")),
        COUNTS,
        60,
    ),
    "HNNNUTS, estimate": (lambda: HNNNUTS(marginal(num_particles=4), **learned()), COUNTS, 60),
    "FlowNUTS, native": (
        lambda: FlowNUTS(two_signs, local=NUTS(two_signs, engine="native"), num_particles=100),
        SQUARES,
        15,
    ),
    "FlowNUTS": (lambda: FlowNUTS(two_signs, num_particles=100), SQUARES, 15),
    "FlowMH": (lambda: FlowMH(two_signs, own(SQUARES)), SQUARES, 0),
    "potential_fn": (lambda: HMC(potential_fn=lambda z: z["x"].square().sum()), None, 30),
}


def moved(kernel, state, count):
    """The state after so many iterations, and where chains were after each."""
    path = []
    for _ in range(count):
        state, _ = kernel.advance(state)
        path.append(kernel.shown(state).position)
    return state, path


def settled(kernel):
    """The settings of a kernel, but for how long its training took; NaN equals NaN."""
    return str(kernel.settings | {"training_seconds": None})


# Those that learn are many: of each kind one stays, and of the flows' that with machine code.
LONG = {
    *("HNNNUTS, native estimate", "HNNNUTS, per leaf", "HNNNUTS, estimate", "FlowNUTS"),
    *("RandomWalk, estimate", "NUTS, transported", "PseudoMarginalHMC, native"),
    *("PseudoMarginalHMC", "HNNHMC, native"),
}


@pytest.mark.parametrize("name", long_but(KERNELS.keys() - LONG, KERNELS))
def test_a_kernel_taken_up_goes_on_bit_for_bit(name, monkeypatch):
    monkeypatch.setattr(transport_learning, "_STEPS", 20)  # of each fit of a map, to take less long
    monkeypatch.setattr(transport_learning, "_LAST_STEPS", 20)
    make, data, warmup = KERNELS[name]
    args = () if data is None else (data,)
    initial = {"x": torch.zeros(4, 2)} if data is None else None
    kernel = make()
    torch.manual_seed(1)
    kernel.planned_draws = 100
    state = kernel.begin(4, warmup, args, {}, initial)
    taken = []
    for count in (2 * warmup // 3, warmup - 2 * warmup // 3 + 3):  # in warm-up and in sampling
        state, path = moved(kernel, state, count)
        for *_, rest in taken:
            rest += path
        words = source_words(kernel), found_words(kernel, state)
        taken.append((words, torch.get_rng_state(), []))
    _, path = moved(kernel, state, 5)
    for (source, found), random_state, rest in taken:
        rest += path
        other = make()
        source, found = ((json.loads(json.dumps(t)), arrays) for t, arrays in (source, found))
        capture(other, args, {}, source)
        state = take_up(other, found)
        torch.set_rng_state(random_state)
        _, again = moved(other, state, len(rest))
        assert torch.equal(torch.stack(again), torch.stack(rest))
        assert other.messages == kernel.messages
        assert settled(other) == settled(kernel)


def test_functions_that_a_kernel_was_given_are_named():
    kernel = NUTS(hierarchical, init_strategy=pyro.infer.autoguide.init_to_median)
    with pytest.raises(Unstorable, match=r"`kernel\[1\]\['init_strategy'\]` is <function"):
        kernel_words(kernel)
