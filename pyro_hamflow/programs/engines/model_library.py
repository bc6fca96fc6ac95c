"""Shared libraries of a model's graphs, made once and kept from one process to the next.

Inductor writes kernels for the graph of one chain's gradient, and for that of its evaluation where
noise moves; these, a plan of their scratch memory and this package's trajectories become one
library. It depends on the graphs and the shapes of the data alone.
"""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.programs.engines.buffers import NotSupported, kind_of
from pyro_hamflow.programs.engines.lowering import source_of
from pyro_hamflow.programs.engines.translation import Function
from pyro_hamflow.programs.engines.unrolled import Unrolled
from pyro_hamflow.programs.machine_code import compiler
from pyro_hamflow.programs.machine_code.libraries import library
from pyro_hamflow.programs.machine_code.store import Store, key_of

_HERE = Path(__file__).parent
_NAMES = (
    *("kernels", "matrices", "banded", "call", "team", "lanes", "tree"),
    *("trajectories", "noise", "draws", "sides", "side_by_side"),
)
HEADERS = {name: (_HERE / f"{name}.hpp").read_text() for name in _NAMES}

# Operations from which on a graph is written number by number, if it has no more lines for each of
# them. Inductor takes a hundredth of a second for an operation, and g++ .0003 seconds for a line:
# twelve steps of an equation of two species took minutes, and take five seconds.
_MANY, _EACH = 300, 20
# Operations beyond which Inductor is not asked: thousands that follow each other take minutes.
_MOST = 2500
TOO_LONG = f"graphs of more than {_MOST} operations"

# Lines up to which chains move side by side: of few operations, for each of many, and at most. Of
# 16 gradients of up to 3,400 lines most took a quarter to seven tenths of the time that those of
# each chain take, none took longer, and they were made in about as long.
_SIDE_LINES, _SIDE_EACH, _SIDE_MOST = 2500, 2, 5000

_PLATFORMS = [("Linux", "x86_64"), ("Linux", "aarch64")]  # where its trajectories were tried


class Part(NamedTuple):
    """A graph, without constants of its own, and its arguments.

    Attributes:
        graph: The graph.
        inputs: Arguments: position, noise, further numbers, and its constants.
        results: Of an evaluation, how many numbers each result behind the potential has, and
            whether it is a local site's.
    """

    graph: GraphModule
    inputs: list[Tensor]
    results: tuple[tuple[int, bool], ...] = ()


def library_of(gradient: Part, evaluation: Part | None, store: Store) -> ctypes.CDLL:
    """The library of a gradient, and of an evaluation: from the store, or newly made.

    Raises:
        NotSupported: If there is no code for one of their operations, or no compiler.
    """
    parts = [gradient] if evaluation is None else [gradient, evaluation]
    kinds = repr([[(tuple(i.shape), str(i.dtype)) for i in part.inputs] for part in parts])
    limits = repr((_SIDE_LINES, _SIDE_EACH, _SIDE_MOST))
    made_with = compiler.description(), torch.__version__, _own_code(), limits, *HEADERS.values()
    graphs = [f"{part.graph.code}{part.results}" for part in parts]
    key = key_of(*graphs, kinds, *made_with)
    declined = store.find(key, ".txt")
    if declined is not None:
        raise NotSupported(declined.read_text())
    try:
        return library(key, partial(_made, gradient, evaluation), store)
    except NotSupported as error:
        with suppress(OSError):
            store.keep(key, ".txt", str(error).encode())
        raise
    except compiler.NotCompiled as error:
        raise NotSupported(f"any operation, for {error}") from error


def moves_noise(graph: GraphModule) -> bool:
    """Whether a graph has a gradient in the noise as well."""
    return len(results_of(graph)) == 3


def results_of(graph: GraphModule) -> Any:
    """What a graph gives: a potential, and its gradients if it has them."""
    return graph.graph.output_node().args[0]


def _made(gradient: Part, evaluation: Part | None) -> bytes:
    """A library, made for this processor."""
    if (platform.system(), platform.machine()) not in _PLATFORMS:
        raise compiler.NotCompiled("it knows neither this system nor this processor")
    compiler.check_compiler()
    sides = side_by_side(gradient) if evaluation is None else None
    if sides is not None:
        with suppress(compiler.NotCompiled):  # vectors are an extension, which compilers differ in
            return compiler.compiled(sides, "-march=native")
    source, with_torch_headers = _source(gradient, evaluation)
    headers = [f"-I{folder}" for folder in _torch_headers()] if with_torch_headers else []
    return compiler.compiled(source, "-march=native", *headers)


def _torch_headers() -> list[str]:
    root = Path(torch.__file__).parent / "include"
    return [str(root), str(root / "torch" / "csrc" / "api" / "include")]


@cache
def _own_code() -> str:
    """What writes libraries: with other code of ours, what is kept is another."""
    return "".join(path.read_text() for path in sorted(_HERE.glob("*.py")))


def _source(gradient: Part, evaluation: Part | None) -> tuple[str, bool]:
    """A library's source, and whether it includes headers of torch's."""
    parts = [gradient] if evaluation is None else [gradient, evaluation]
    functions = list(map(_function, parts))
    names = ("gradient_program", "evaluation_program")
    bodies = [function.text(name) for function, name in zip(functions, names, strict=False)]
    special = any(function.needs_torch_headers for function in functions)
    first = ["#define WITH_TORCH_HEADERS", "#include <ATen/native/Math.h>"] if special else []
    memory = ["#include <memory>"] if any("std::unique_ptr" in body for body in bodies) else []
    sizes = _sizes(gradient, max(function.scratch for function in functions))
    headers = [HEADERS[name] for name in ("lanes", "team", "tree", "trajectories", "draws")]
    if evaluation is not None:
        sizes |= {"NUM_EVALUATION_INPUTS": len(evaluation.inputs)}
        sizes |= {"CHOICES": len(evaluation.inputs[2]), **_room(evaluation)}
        first.append("#define EVALUATED")
        headers[4:4] = [_table(evaluation), HEADERS["noise"]]
    source = [
        *first,
        HEADERS["kernels"],
        HEADERS["matrices"],
        HEADERS["banded"],
        *memory,
        _constants(gradient, sizes),
        HEADERS["call"],
        *bodies,
        *headers,
    ]
    return "\n".join(source), special


def side_by_side(gradient: Part) -> str | None:
    """A source by which several chains move side by side; none where they move one by one.

    So they do where a gradient works out few numbers, most of them one after the other: each
    operation of the processor is then one of as many chains as its vectors have numbers.
    """
    graph, inputs = gradient.graph, gradient.inputs
    if len(results_of(graph)) != 2 or len(inputs[1]):
        return None
    most = min(max(_SIDE_LINES, _SIDE_EACH * _count(graph)), _SIDE_MOST)
    try:
        body = Unrolled(graph, inputs, most, sides=True).text("gradient_program")
    except NotSupported:
        return None
    names = ("kernels", "lanes", "call", "team", "sides", "tree", "side_by_side")
    parts = [HEADERS[name] for name in names]
    parts.insert(1, _constants(gradient, _sizes(gradient, 0)))
    parts.insert(-2, body)
    return "\n".join(parts)


def _sizes(gradient: Part, scratch: int) -> dict[str, int]:
    return {
        "SCRATCH": scratch,
        "NUM_INPUTS": len(gradient.inputs),
        "DIMENSION": len(gradient.inputs[0]),
        "NOISE": len(gradient.inputs[1]),
        "MOVING": len(gradient.inputs[1]) if moves_noise(gradient.graph) else 0,
    }


def _constants(gradient: Part, sizes: dict[str, int]) -> str:
    constants = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    return f"using Real = {kind_of(gradient.inputs[0].dtype)};\nstatic const long {constants};"


def _function(part: Part) -> Function | Unrolled:
    """A graph in C++: of many operations on few numbers each by number, else by Inductor."""
    count = _count(part.graph)
    if is_written_out(part.graph):
        with suppress(NotSupported):
            return Unrolled(part.graph, part.inputs, _EACH * count)
    if count > _MOST:
        raise NotSupported(TOO_LONG)
    return Function(source_of(part.graph, part.inputs), part.inputs)


def is_written_out(graph: GraphModule) -> bool:
    """Whether it is tried to write a graph number by number."""
    return _count(graph) >= _MANY


def _count(graph: GraphModule) -> int:
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def _room(evaluation: Part) -> dict[str, int]:
    """How many numbers an evaluation's factors and local sites have."""
    return {
        name: sum(size for size, is_local in evaluation.results if is_local == wanted)
        for name, wanted in (("LIKELIHOODS", False), ("LOCALS", True))
    } | {"NUM_RESULTS": len(evaluation.results)}


def _table(evaluation: Part) -> str:
    """Where each result of an evaluation goes."""
    places, rows = {False: 0, True: 0}, []
    for size, is_local in evaluation.results:
        rows.append(f"{{{str(is_local).lower()}, {places[is_local]}}}")
        places[is_local] += size
    entries = ", ".join([*rows, "{false, 0}"])
    return f"static const struct {{ bool is_local; long first; }} RESULTS[] = {{{entries}}};"
