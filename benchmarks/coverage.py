"""Which of the models that people write are captured and batched, and how fast their gradients are.

The zoo is in `benchmarks/coverage_models`.
"""

from __future__ import annotations

import logging
import statistics

from pyro.ops.integrator import potential_grad

from benchmarks.coverage_models import KINDS
from benchmarks.coverage_models.check import Check, check
from benchmarks.coverage_models.data import Case
from benchmarks.report import Row, Table, met
from benchmarks.timing import side_by_side

ABOUT = "Coverage: gradients of the models that people write"
_CHAINS = (1, 4, 32)
_GOAL, _ERROR = 20.0, 1e-10
_QUICK = 3  # models of each kind


def measure(*, quick: bool) -> list[Table]:
    """Each model of the zoo beside Pyro's own potential."""
    rows = [
        _row(kind, case, quick=quick)
        for kind, collection in KINDS.items()
        for case in list(collection.values())[: _QUICK if quick else None]
    ]
    batched = sum(row["batched"] == "yes" for row in rows)
    wrong = [row["model"] for row in rows if not row["error"] <= _ERROR]
    one, many = (
        [row[f"times faster, {chains} chains"] for row in rows] for chains in (1, _CHAINS[-1])
    )
    slower = [row["model"] for row, times in zip(rows, one, strict=True) if times < 1.0]
    middle = statistics.median(many)
    table = Table(
        "A gradient of every chain, captured, beside Pyro's",
        rows,
        f"{len(rows)} models, {batched} of them captured and batched. The error is the largest "
        "difference from the gradient of Pyro's own potential at three random points, relative to "
        "its largest entry. Pyro's chains run one after the other, so its time is that of one "
        "times their number; each time is the least of several rounds, taken in turn.",
        f"every gradient Pyro's to {_ERROR:g}: {met(not wrong)}{names(wrong)}; the median at "
        f"{_CHAINS[-1]} chains at least {_GOAL:.0f} times as fast: {met(middle >= _GOAL)} "
        f"({middle:.3g}); none slower at one chain: {met(not slower)}{names(slower)}.",
    )
    return [table]


def names(models: list[str]) -> str:
    """Some models in brackets, if there are any."""
    return f" ({', '.join(models)})" if models else ""


def _row(kind: str, case: Case, *, quick: bool) -> Row:
    logging.getLogger("benchmarks").info("%s", case.name)
    found = check(case)
    row: Row = {
        "model": case.name,
        "kind": kind,
        "dimension": found.potential.dimension,
        "captured": "yes" if found.captured else "no",
        "batched": "yes" if found.batched else "no",
        "error": found.error,
    }
    return row | _times(found, quick=quick)


def _times(found: Check, *, quick: bool) -> Row:
    potential = found.potential
    point = potential.unravel(found.positions[0])
    functions = {"Pyro": lambda: potential_grad(found.stock, point)}
    for chains in _CHAINS:
        program = potential.programs.program("gradient", chains)
        positions = found.positions[:1].expand(chains, -1).contiguous()
        noise = potential.draw_noise(chains)
        functions[str(chains)] = lambda p=program, z=positions, u=noise: p(z, u)
    seconds = side_by_side(functions, rounds=2 if quick else 7, share=0.01 if quick else 0.03)
    best = {name: min(times) for name, times in seconds.items()}
    return {"Pyro, ms": 1e3 * best["Pyro"]} | {
        f"times faster, {chains} chains": chains * best["Pyro"] / best[str(chains)]
        for chains in _CHAINS
    }
