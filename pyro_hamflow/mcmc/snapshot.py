"""What a kernel is in the middle of a run, as one value that can be stored and taken up elsewhere.

A kernel is made again by its class and its arguments; the model is the user's own, and is captured
anew. What warm-up has found so far, the phase with all that it knows, and where chains are, is one
value (:mod:`~pyro_hamflow.mcmc.frozen`). Learned parts, as networks, flows and the proposals of a
marginal model, are in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.mcmc.frozen import Arrays, Table, freeze, thaw
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.storable import Unstorable, found
from pyro_hamflow.mcmc.transitions.base import State
from pyro_hamflow.model.kinds import Args, Kwargs
from pyro_hamflow.process import random_state_kept

# What a kernel finds in a run, beside what it was made of.
_FOUND = ("_phase", "_engine", "plan", "_surrogate_run", "_found")
_PLANNED = ("planned_draws", "most_warmup_steps", "pools_warmup")
_GIVEN = ("method", "refresh", "trajectories", "required")  # of an estimator, by the user
_GUIDES = ("_guide", "_flow_choices.flow")  # that were given, and may be trained in a run
_OWN = "pyro_hamflow."

Frozen = tuple[Table, Arrays]


def kernel_words(kernel: Kernel) -> Frozen:
    """What a kernel was made of, but for its model.

    Raises:
        Unstorable: If it was made of something that no file can hold, as a function.
    """
    cls = type(kernel)
    args, kwargs = kernel.made_of
    bound = inspect.signature(cls.__init__).bind(kernel, *args, **kwargs).arguments
    given = {name: part for name, part in list(bound.items())[1:] if part is not None}
    _refuse_later_changes(kernel)
    return freeze([f"{cls.__module__}:{cls.__qualname__}", given], _parts_given(kernel), "kernel")


def kernel_of(words: Frozen, model: Any) -> Kernel:
    """A kernel of a model, made of what :func:`kernel_words` has said.

    Raises:
        ValueError: If its class is not one of the package's.
    """
    name, given = thaw(*words, _parts_of(model, model))
    return found(name, Kernel)(**given)


def _refuse_later_changes(kernel: Kernel) -> None:
    """Refuses what users may set after a kernel has been made, and no argument tells."""
    moves = kernel._hamiltonian
    if moves is not None and moves.step_and_mass.adapter is not None:
        raise Unstorable(moves.step_and_mass.adapter, "kernel.mass_matrix_adapter")
    if kernel.source.given_transforms:
        raise Unstorable(kernel.source.given_transforms, "kernel.transforms")


def found_words(kernel: Kernel, state: State) -> Frozen:
    """All that a kernel has found in a run so far, and where its chains are."""
    guides = {name: guide.state_dict() for name, guide in _guides(kernel).items()}
    estimator = None if kernel._hamiltonian is None else kernel._hamiltonian.estimator
    whole = {
        "state": state,
        "kernel": {n: vars(kernel)[n] for n in _FOUND + _PLANNED if n in vars(kernel)},
        "estimator": _without(_GIVEN, {} if estimator is None else vars(estimator)),
        "guides": guides,
    }
    return freeze(whole, _parts_captured(kernel))


def take_up(kernel: Kernel, words: Frozen) -> State:
    """Puts a kernel where another was when its words were taken; returns where chains are.

    Its model has been captured (:func:`capture`).
    """
    whole = thaw(*words, _parts_captured(kernel))
    for name, weights in whole["guides"].items():
        _guides(kernel)[name].load_state_dict(weights)
    if kernel._hamiltonian is not None and kernel._hamiltonian.estimator is not None:
        kernel._hamiltonian.estimator.__dict__.update(whole["estimator"])
    kernel.__dict__.update(whole["kernel"])
    return whole["state"]


def source_words(kernel: Kernel) -> Frozen:
    """What a run has found out about its model: an estimator's fit, a function's parameters."""
    source, model = kernel.source, kernel.source.model
    fitted = model.fitted if isinstance(model, MarginalModel) else None
    return freeze([source._example, fitted], _parts_given(kernel), "model")


def capture(kernel: Kernel, args: Args, kwargs: Kwargs, words: Frozen) -> None:
    """Captures a kernel's model as it was in the run that the words are of."""
    source, model = kernel.source, kernel.source.model
    with random_state_kept():
        source._example, fitted = thaw(*words, _parts_given(kernel))
        if isinstance(model, MarginalModel):
            model.take_fitted(fitted, model.plan(*args, **kwargs).structure)
        kernel.prepare(args, dict(kwargs))
        if kernel._transporting is not None:
            kernel._transporting.take_given(source.potential)


def _without(names: tuple[str, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _guides(kernel: Kernel) -> dict[str, Any]:
    """Guides that were given to a kernel, and have weights that can be stored."""
    guides = {}
    for path in _GUIDES:
        guide = _at(kernel, path)
        if guide is not None and hasattr(guide, "load_state_dict"):
            guides[path] = guide
    return guides


def _at(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _parts_given(kernel: Kernel) -> dict[str, Any]:
    """What a user gives again where a run is taken up."""
    return _parts_of(kernel.source.model, kernel.source.potential_fn)


def _parts_of(model: Any, potential_fn: Any) -> dict[str, Any]:
    parts = {"model": model, "potential_fn": potential_fn}
    if isinstance(model, MarginalModel):
        given = model._given
        parts["proposal"] = given
        attributes = {} if given is None else vars(given)
        parts |= {f"proposal.{n}": part for n, part in attributes.items() if callable(part)}
        parts["original"] = model.model
    return parts


def _parts_captured(kernel: Kernel) -> dict[str, Any]:
    """What a kernel has when its model is captured, before it has found anything."""
    potential, moves = kernel.source.potential, kernel._hamiltonian
    paths = ["source", "choices", "choices.training", "local", "_flow_choices", "_transporting"]
    paths += ["_transporting._transport", *_GUIDES]
    parts = _parts_given(kernel) | {path: _at(kernel, path) for path in paths}
    parts |= {"potential": potential, "example": potential.example, "hamiltonian": moves}
    if moves is not None:
        parts |= {name: part for name, part in vars(moves).items()}
        for name in _GIVEN[1:3]:
            parts[f"estimator.{name}"] = _at(moves.estimator, name)
    for kind in ("sites", "noise_sites"):
        parts |= {f"{kind}[{i}]": site for i, site in enumerate(getattr(potential, kind))}
    for i, estimate in enumerate(potential.recovery.estimates):
        parts |= {f"estimates[{i}]": estimate, f"estimates[{i}].group": estimate.group}
    return parts
