"""Which of the models that people write compile, and what it gains: long, so a topic of its own."""

from __future__ import annotations

import logging
import statistics
import warnings

from benchmarks.coverage import names
from benchmarks.coverage_models import KINDS
from benchmarks.coverage_models.check import check
from benchmarks.coverage_models.data import Case
from benchmarks.report import Row, Table, met
from benchmarks.timing import ratio, side_by_side, until_compiled

ABOUT = "Coverage: the same models, compiled"
_CHAINS = 4


def measure(*, quick: bool) -> list[Table]:
    """The gradient of some chains of each model, compiled and not."""
    rows = [
        row
        for kind, collection in KINDS.items()
        for case in list(collection.values())[: 1 if quick else None]
        if (row := _row(kind, case, quick=quick))
    ]
    failed = [row["model"] for row in rows if row["compiled"] == "no"]
    gains = [row["times faster than captured"] for row in rows if row["compiled"] == "yes"]
    table = Table(
        f"A gradient of {_CHAINS} chains, compiled, beside the same graph uncompiled",
        rows,
        f"{len(rows)} models that are captured; the median gain is {statistics.median(gains):.3g}.",
        f"every captured model compiles: {met(not failed)}{names(failed)}.",
    )
    return [table]


def _row(kind: str, case: Case, *, quick: bool) -> Row:
    logging.getLogger("benchmarks").info("%s", case.name)
    found = check(case, compile_graphs=True)
    if not found.batched:
        return {}
    potential = found.potential
    positions = found.positions[:1].expand(_CHAINS, -1).contiguous()
    noise = potential.draw_noise(_CHAINS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = potential.programs.program("gradient", _CHAINS)
        taken = until_compiled(compiled, positions, noise)
    graph = potential.graph("gradient", _CHAINS)
    times = side_by_side(
        {
            "captured": lambda: graph(positions, noise),
            "compiled": lambda: compiled(positions, noise),
        },
        rounds=3 if quick else 7,
        share=0.02,
    )
    failed = any("Compilation failed" in str(warning.message) for warning in caught)
    return {
        "model": case.name,
        "kind": kind,
        "compiled": "no" if failed else "yes",
        "compilation, s": taken,
        "times faster than captured": ratio(times["captured"], times["compiled"]),
    }
