"""Which engine makes the draws of a run, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.programs.agreement import coarsest_of, is_near, rounding_of
from pyro_hamflow.programs.capture import sizes_made
from pyro_hamflow.programs.compilation import seconds_of
from pyro_hamflow.programs.engines.buffers import NotSupported
from pyro_hamflow.programs.engines.model_library import TOO_LONG, is_written_out
from pyro_hamflow.programs.engines.native import Looks, NativeProgram, native_program
from pyro_hamflow.programs.rounding import moves_by_rounding, same_but_for_rounding

ENGINES = ("auto", "torch", "native")

# Seconds to compile a program of trajectories by Inductor, its import with them, and for each
# operation of its graph: of 17 models of 63 to 381 operations within a fifth of what is told, in
# units in which a step of torch's takes what is told below.
_COMPILER, _COMPILED_EACH = 1.7, 0.0065
# The same where a graph is written number by number: for each operation, and for each number. Of
# recurrences and equations of 1,300 to 6,300 operations, and of sums of 109 slices, it took from
# eight tenths to eleven tenths of that, and down to a thirtieth of what is told of Inductor.
_WRITTEN, _WRITTEN_EACH, _WRITTEN_NUMBER = 0.15, 1.5e-4, 1e-4
_IN_A_LOOP = 16  # numbers, as which more are counted that a loop works out
# Seconds that the torch engine takes for a step of its own, besides the gradient: on five models,
# of 2 to 202 dimensions, with 1 to 64 chains, within a quarter of it but in one case.
_BOOKKEEPING = 5e-4
# Numbers in a matrix that no cache holds, and chains from which on torch, which reads it once for
# all, makes up for chains that wait for each other: of a logistic regression on 20,000 rows of 200
# numbers a gradient took 2.4 ms of each of 64 chains, and 1.0 ms all at once; on 10,000 rows of 50
# numbers, .17 and .35.
_OUT_OF_CACHE, _MANY_CHAINS = 2**21, 16
# How many chains' starts machine code is compared with the graph at, and by how much it is compared
# on either side of them.
_CHECKED, _SHIFTS = 4, (-0.5, 0.7)

_TOO_LONG = (
    "the model's graph has too many operations to be compiled in a minute; write what a loop works "
    "out step by step as sample sites of its own, or as operations on whole tensors"
)


class Choice(NamedTuple):
    """An engine, and why it was chosen.

    Attributes:
        name: ``"torch"`` or ``"native"``.
        reason: In words.
        declined: Whether the native engine was asked for and cannot do it.
    """

    name: str
    reason: str
    declined: bool = False


def check_engine(engine: str) -> str:
    """Raises a ValueError if there is no such engine."""
    if engine not in ENGINES:
        raise ValueError(f"`engine` is {engine!r}: expected one of {ENGINES}")
    return engine


def choose_engine(
    wanted: str,
    graph: GraphModule | None,
    position: Tensor,
    noise: Tensor,
    iterations: float | None,
    looks: Callable[[], Looks] | None = None,
    *,
    gradient: bool = True,
    steps: float = 1,
) -> Choice:
    """Chooses the engine of a run.

    By the graph and by what is known before the run, and not by a clock or by what was compiled
    before, so that a run repeats itself. Machine code is taken only where it agrees with the graph
    about the first chains' starts.

    Arguments:
        wanted: ``"auto"``, ``"torch"`` or ``"native"``.
        graph: One chain's potential and gradient, if they are captured.
        position: Where chains start, of shape ``(chains, dimension)``.
        noise: The noise of one chain.
        iterations: How many there will be, warm-up included, if that is known.
        looks: What the model says beside its potential, where its noise moves; raises NotSupported
            where that has no code.
        gradient: Whether chains follow the gradient.
        steps: How many gradients each takes, roughly, as far as is known.
    """
    asked, num_chains = wanted == "native", len(position)
    if wanted == "torch":
        return Choice("torch", "asked for")
    if graph is None:
        return Choice("torch", "the model is not captured as a graph", declined=asked)
    if not asked and not _pays(graph, num_chains, iterations, steps):
        return Choice("torch", "the run is too short for compilation to pay")
    if not asked and num_chains >= _MANY_CHAINS and _largest_constant(graph) > _OUT_OF_CACHE:
        return Choice("torch", "many chains share the reading of large data")
    try:
        found = looks() if looks else None
        program = native_program(graph, (position[0], noise), found, gradient=gradient)
    except NotSupported as error:
        if str(error) == TOO_LONG:
            return Choice("torch", _TOO_LONG, declined=True)
        return Choice("torch", f"the native engine has no code for {error}", declined=asked)
    if not _agree(program, graph, position[:_CHECKED], noise, gradient=gradient):
        return Choice("torch", "machine code and graph do not agree", declined=True)
    return Choice("native", "asked for" if asked else "the run is long enough")


def _agree(
    program: NativeProgram, graph: GraphModule, position: Tensor, noise: Tensor, *, gradient: bool
) -> bool:
    """Whether machine code gives the graphs' results at positions and about them."""
    position = torch.cat([position + shift for shift in (0.0, *_SHIFTS)])
    rows = noise.expand(len(position), -1)
    kind = coarsest_of(graph, position.dtype)

    def right(row: Tensor) -> list[Tensor]:
        value, *gradients = graph(row, noise)[: 3 if program.moves_noise else 2]
        return [value, torch.cat(gradients)] if gradient else [value]

    for row, *found in zip(position, *program.gradient(position, rows), strict=True):
        if not _same(found if gradient else found[:1], right, row, kind):
            return False
    if (looks := program.looks) is None:
        return True
    seen = program.look(position, rows, looks.uniform.expand(len(position), -1))

    def seen_rightly(row: Tensor) -> list[Tensor]:
        value, *results = looks.graph(row, noise, looks.uniform)
        return [value, *looks.rows(results)]

    for row, *found in zip(position, seen.value, seen.likelihoods, seen.local, strict=True):
        if not _same(found, seen_rightly, row, kind):
            return False
    return True


def _same(
    found: list[Tensor], right: Callable[[Tensor], list[Tensor]], row: Tensor, kind: torch.dtype
) -> bool:
    """Whether results are the same but for rounding: a potential, and what belongs to it.

    Rounding is what the graph's own results show where its operations round worse: that of the
    inverse of a nearly singular matrix is far larger than that of a sum.

    Arguments:
        found: What machine code gives.
        right: What the graph gives at a place.
        row: The place.
        kind: The coarsest type of the numbers on the way.
    """
    kinds = [result.dtype for result in found]

    def known(row: Tensor) -> list[Tensor]:
        # Data may be of another type than the parameters, and the graph's results with them.
        return [result.to(kind) for result, kind in zip(right(row), kinds, strict=True)]

    expected = known(row)
    if not expected[0].isfinite():
        return not found[0].isfinite()  # all else means nothing
    eps = torch.finfo(kind).eps
    if expected[0].abs() * eps > 1.0:  # nor where rounding decides on moves
        return bool(found[0].abs() * eps > 1.0)
    tolerance = rounding_of([*expected, row.to(kind)])
    pairs = list(zip(found, expected, strict=True))
    if all(is_near(*pair, tolerance) for pair in pairs):
        return True
    return any(
        all(
            is_near(one, other, tolerance) or same_but_for_rounding([one], [other], [move], 0.0)
            for (one, other), move in zip(pairs, moves, strict=True)
        )
        for moves in moves_by_rounding(lambda: known(row))
    )


def _largest_constant(graph: GraphModule) -> int:
    """How many numbers the largest of the model's data has."""
    return max((value.numel() for value in graph.buffers()), default=0)


def _pays(graph: GraphModule, num_chains: int, iterations: float | None, steps: float) -> bool:
    """Whether the torch engine would take longer than it takes to compile trajectories."""
    if iterations is None:
        return False
    step = _BOOKKEEPING + seconds_of(graph, num_chains)
    return iterations * steps * step > _seconds_to_compile(graph)


def _seconds_to_compile(graph: GraphModule) -> float:
    """Of the two ways that there are, the one that is quicker: many operations have few numbers."""
    sizes = sizes_made(graph)
    seconds = _COMPILER + _COMPILED_EACH * len(sizes)
    if not is_written_out(graph):
        return seconds
    single = sum(min(size, _IN_A_LOOP) for size in sizes)
    written = _WRITTEN + _WRITTEN_EACH * len(sizes) + _WRITTEN_NUMBER * single
    return min(seconds, written)


def native_seconds_of(graph: GraphModule, num_chains: int, calls: float) -> float:
    """How long a gradient takes in machine code, roughly, with its share of the compilation.

    Arguments:
        graph: One chain's potential and gradient.
        num_chains: How many chains.
        calls: How many gradients share the compilation.
    """
    arithmetic = seconds_of(graph, num_chains) - seconds_of(graph, 0)
    return arithmetic + _seconds_to_compile(graph) / calls
