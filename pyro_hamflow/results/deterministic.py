"""Deterministic sites at all draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pyro.poutine as poutine
from torch import Tensor

from pyro_hamflow.model.kinds import Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.trace import is_computed, is_latent, run_with
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.results.rows import Rows


class Deterministic(NamedTuple):
    """Deterministic sites.

    Attributes:
        values: By site, chains and draws first.
        missing: Sites that cannot be given, since they follow from values that were summed or
            integrated out, and not recovered, or change their shape from draw to draw.
        failures: At how many draws the model has raised an error; they are NaN there.
    """

    values: dict[str, Tensor]
    missing: list[str]
    failures: int


def deterministic_values(
    potential: Potential,
    model: Model,
    trace: poutine.Trace,
    position: Tensor,
    values: Mapping[str, Tensor],
) -> Deterministic:
    """The values of deterministic sites, from those of the sites that they follow from.

    Arguments:
        potential: What was sampled.
        model: The original model, of which sites may have been integrated out.
        trace: A run of it.
        position: The draws, of shape ``(chains, draws, dimension)``.
        values: The values of its latent sites as far as they are known, chains and draws first.
    """
    sites = [n for n, s in trace.nodes.items() if s["type"] == "sample" and is_computed(s)]
    if not sites:
        return Deterministic({}, [], 0)
    latent = [name for name, site in trace.nodes.items() if is_latent(site)]
    with random_state_kept():
        if latent and all(name in values for name in latent):
            known = {name: values[name].flatten(0, 1) for name in latent}
            found, failures = _from_sites(potential, model, sites, known)
        else:
            found, failures = _from_position(potential, trace, sites, position.flatten(0, 1))
    given = {n: v.reshape(position.shape[:2] + v.shape[1:]) for n, v in found.items()}
    return Deterministic(given, [name for name in sites if name not in given], failures)


def _from_sites(
    potential: Potential, model: Model, sites: list[str], known: dict[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """From the values of all latent sites."""

    def once(*parts: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(known, parts, strict=True))
        run = run_with(
            model, lambda msg: given.get(msg["name"]), *potential.args, **potential.kwargs
        )
        return tuple(run.nodes[name]["value"] for name in sites)

    inputs = [value.to(potential.example.device) for value in known.values()]
    program = Rows(once, *inputs, count=len(inputs[0]))
    results = program(*inputs)
    found = {n: v for n, v in zip(sites, results, strict=True) if v is not None}
    return found, program.failures


def _from_position(
    potential: Potential, trace: poutine.Trace, sites: list[str], position: Tensor
) -> tuple[dict[str, Tensor], int]:
    """From the parameters alone, where that is enough: nothing else is read, by the graph."""
    position = position.to(potential.example.device)
    noise = position.new_full((len(position), potential.noise_dimension), 0.1)
    nodes = potential.trace(position[0], noise[0]).nodes
    # What follows from a discrete site that is summed out has a dimension for its values.
    same = [
        name
        for name in sites
        if name in nodes and nodes[name]["value"].shape == trace.nodes[name]["value"].shape
    ]

    def once(*parts: Tensor) -> tuple[Tensor, ...]:
        run = potential.trace(*parts)
        return tuple(run.nodes[name]["value"] for name in same)

    program = Rows(once, position, noise, count=len(position))
    noisy = program.readers(1) if potential.noise_dimension else set()
    if not same or noisy is None:
        return {}, 0
    results = program(position, noise)
    found = {
        name: value
        for i, (name, value) in enumerate(zip(same, results, strict=True))
        if value is not None and i not in noisy
    }
    return found, program.failures
