"""From the stored rows of each topic to RESULTS.md."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """What one measurement found.

    Attributes:
        title: What was measured.
        rows: One dictionary per line, all with the same keys; numbers or words.
        says: What the rows say, in a sentence or two.
        reach: What the project set out to reach, and whether it does; empty if nothing.
    """

    title: str
    rows: list[Row]
    says: str
    reach: str = ""


def machine() -> str:
    """The machine, in words."""
    threads = torch.get_num_threads()
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)} used{card}, "
        f"torch {torch.__version__.split('+')[0]}, float64"
    )


def store(
    folder: Path,
    topic: str,
    about: str,
    tables: list[Table],
    minutes: float,
    *,
    finished: bool = True,
) -> None:
    """Keeps a topic's tables, in place of those of its last run.

    Until a run has finished, tables that it has not come to stay, and say which run they are of.
    """
    folder = folder / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{topic}.json"
    earlier = [] if finished else _earlier(path, {table.title for table in tables})
    content = {
        "about": about,
        "machine": machine(),
        "minutes": round(minutes, 1),
        "finished": finished,
        "tables": [*(asdict(table) for table in tables), *earlier],
    }
    written = path.with_suffix(".part")  # a run that is cut while it writes leaves the file whole
    written.write_text(json.dumps(content, indent=1) + "\n")
    written.replace(path)


def _earlier(path: Path, titles: set[str]) -> list[dict[str, Any]]:
    """Stored tables of other titles, with the run that each is of."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    run = {"earlier": _run(content)}
    return [run | table for table in content["tables"] if table["title"] not in titles]


def _run(content: dict[str, Any]) -> str:
    cut = "" if content.get("finished", True) else ", cut before the end"
    return f"{content['machine']}; {content['minutes']} minutes{cut}."


def render(folder: Path, topics: list[str], *, quick: bool) -> Path:
    """Writes RESULTS.md from whatever topics are stored."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.run`; do not edit. Times are medians, and each ratio is "
        "of times measured in turn within one run.",
        "",
    ]
    if quick:
        lines += ["**A quick look (`--quick`): the numbers show that the code runs, no more.**", ""]
    for topic in topics:
        path = folder / "results" / f"{topic}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        lines += [f"## {content['about']}", ""]
        lines += [_run(content), ""]
        for table in content["tables"]:
            lines += [f"### {table['title']}", "", *_grid(table["rows"]), "", table["says"], ""]
            if "earlier" in table:
                lines += [f"Of an earlier run: {table['earlier']}", ""]
            if table["reach"]:
                lines += [f"*Reach:* {table['reach']}", ""]
    path = folder / "RESULTS.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def met(reached: bool) -> str:
    """Whether a goal is reached, in words."""
    return "reached" if reached else "not reached"


def number(value: Any) -> str:
    """Three digits, thousands separated; words as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0 or value != value:
        return "0" if value == 0 else "-"
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _grid(rows: list[Row]) -> list[str]:
    names = list(rows[0])
    words = [all(isinstance(row[name], str) for row in rows) for name in names]
    lines = [
        "| " + " | ".join(names) + " |",
        "|" + "|".join(":--" if word else "--:" for word in words) + "|",
    ]
    lines += ["| " + " | ".join(number(row[name]) for name in names) + " |" for row in rows]
    return lines
