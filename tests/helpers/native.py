"""Transitions in machine code."""

from __future__ import annotations

from weakref import WeakKeyDictionary

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


def spoil_line(header, right, wrong, monkeypatch):
    """Machine code that is made from here on has a line spoilt."""
    text = model_library.HEADERS[header]
    assert text.count(right) == 1
    monkeypatch.setitem(model_library.HEADERS, header, text.replace(right, wrong))
    monkeypatch.setattr(native, "_programs", WeakKeyDictionary())  # other tests have made the same
