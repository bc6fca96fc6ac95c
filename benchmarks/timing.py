"""Measuring seconds so that what is compared ran side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.compilation import SelfCompiling, compile_graph


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long one call takes, and what it returns."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def side_by_side(
    functions: dict[str, Callable[[], Any]], *, rounds: int, share: float
) -> dict[str, list[float]]:
    """Seconds per call of several functions, measured in turn, round after round.

    Arguments:
        functions: What to call, by name.
        rounds: How often each is measured.
        share: The seconds that each measurement is to last; a function is called in it at least
            once, and as often as fits.
    """
    calls = {}
    for name, function in functions.items():
        function()
        once = min(seconds(function)[0] for _ in range(3))
        calls[name] = max(1, round(share / once))
    results: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            for _ in range(calls[name]):
                function()
            results[name].append((time.perf_counter() - began) / calls[name])
    return results


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios of two functions' seconds, each ratio within one round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def until_compiled(program: Program, *inputs: Any) -> float:
    """Calls a program until it has compiled itself, if it does; the seconds of that call."""
    last = 0.0
    while isinstance(program, SelfCompiling) and not program.is_compiled:
        last = seconds(lambda: program(*inputs))[0]
    return last


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """A compiler that remembers no program, so that its seconds are those of a first run.

    Its precompiled headers, made once on a machine, are kept: see :func:`prepare_compiler`.
    """
    with fresh_cache():
        yield


def prepare_compiler() -> None:
    """Lets the compiler load, and make the headers that serve all programs."""
    with nothing_compiled():
        compile_graph(torch.fx.symbolic_trace(lambda x: (x.sin(),)), torch.ones(2))
