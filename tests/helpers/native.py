"""Transitions in machine code."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from pyro_hamflow.mcmc.transitions.native import NativeTransition, Stream
from pyro_hamflow.mcmc.transitions.native_estimate import NativeEstimateTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.engines import model_library, native
from pyro_hamflow.programs.engines.native import NativeProgram


def native_program(potential: Potential) -> NativeProgram:
    """Trajectories along a potential's gradient."""
    graph = potential.programs.base("gradient")
    assert graph is not None
    return NativeProgram(graph, [part[0] for part in potential.vectors(1)])


def native_transition(potential: Potential, max_tree_depth: int | None) -> NativeTransition:
    """NUTS, or HMC where no depth is given."""
    return NativeTransition(potential, max_tree_depth, Stream())


def native_walk(potential: Potential) -> NativeTransition:
    """Random steps."""
    return NativeTransition(potential, None, Stream(), "value")


def native_estimate_transition(potential, refresh, max_tree_depth, *, walks=False):
    """Moves of parameters and noise: together if no refresh is given."""
    return NativeEstimateTransition(potential, max_tree_depth, refresh, Stream(), walks=walks)


def one_by_one(monkeypatch):
    """Machine code that is made from here on moves one chain after the other."""
    monkeypatch.setattr(model_library, "_SIDE_MOST", 0)
    monkeypatch.setattr(native, "_programs", WeakKeyDictionary())


def side_by_side(monkeypatch):
    """Machine code that is made from here on is to move several chains at once."""

    def one_by_one(*_):
        raise AssertionError("chains move one by one")

    monkeypatch.setattr(model_library, "_source", one_by_one)
    monkeypatch.setattr(native, "_programs", WeakKeyDictionary())


WAYS = {"one by one": one_by_one, "side by side": side_by_side}


def spoil_line(header, right, wrong, monkeypatch):
    """Machine code that is made from here on has a line spoilt."""
    text = model_library.HEADERS[header]
    assert text.count(right) == 1
    monkeypatch.setitem(model_library.HEADERS, header, text.replace(right, wrong))
    monkeypatch.setattr(native, "_programs", WeakKeyDictionary())  # other tests have made the same


def by_both(slow, native, position, tuning, num_steps, monkeypatch, *, tree):
    """A move by torch and by machine code, with the same momenta and uniform numbers."""
    chains = len(position)
    state = slow.state_at(position, position[:, :0])
    torch.manual_seed(3)
    momenta = torch.randn_like(position)
    torch.manual_seed(3)
    uniforms, rand = [], torch.rand
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *a, **k: uniforms.append(rand(*a, **k)) or uniforms[-1])
        slow_moved, slow_info = slow.step(state, tuning, num_steps)
    uniforms = [numbers for numbers in uniforms if numbers.numel()]
    numbers = torch.stack(uniforms, -1).reshape(-1, chains, len(uniforms)).permute(1, 2, 0)
    if not tree:  # the one of the test at the end, where a tree has three of each point
        numbers = numbers.expand(-1, -1, 3)
    moved, made = native.draw(
        native.state_at(position, position[:, :0]),
        tuning,
        [num_steps],
        momenta=momenta,
        uniforms=numbers.contiguous(),
    )
    return (slow_moved, slow_info), (moved, native.info(made.at(0)))


def assert_same(expected, found):
    """The same draw and the same statistics, but for rounding."""
    (state, info), (other, other_info) = expected, found
    assert torch.allclose(state.position, other.position, rtol=1e-6, atol=1e-8)
    assert torch.allclose(state.gradient, other.gradient, rtol=1e-6, atol=1e-6)
    assert torch.allclose(state.evaluation.value, other.evaluation.value, rtol=1e-6)
    for name in ("acceptance_rate", "energy"):
        parts = getattr(info, name), getattr(other_info, name)
        assert torch.allclose(*parts, rtol=1e-5, atol=1e-7), name
    assert torch.allclose(info.energy_error, other_info.energy_error, rtol=1e-4, atol=1e-6)
    for name in ("accepted", "diverging"):
        assert torch.equal(getattr(info, name), getattr(other_info, name)), name
    for name in ("n_steps", "n_gradients", "n_densities"):
        count = getattr(info, name) + torch.zeros(len(state.position)).long()
        assert torch.equal(count, getattr(other_info, name)), name
    assert info.further.keys() == other_info.further.keys()
    for name in info.further:
        assert torch.equal(info.further[name], other_info.further[name]), name
