"""Tables of benchmarks are kept as they come, and an unfinished run leaves those of the last."""

from __future__ import annotations

import json

import pytest

from benchmarks.report import Table, render, store


def table(title, *numbers):
    return Table(title, [{"seconds": number} for number in numbers], "Of two samplers.")


def stored(folder):
    return json.loads((folder / "results" / "paths.json").read_text())["tables"]


@pytest.fixture
def folder(tmp_path):
    """A finished run of two tables."""
    store(tmp_path, "paths", "Paths", [table("Speed", 1.0), table("Memory", 2.0)], 7.0)
    return tmp_path


def test_a_cut_run_keeps_its_own_tables_and_those_it_did_not_come_to(folder):
    for numbers in ((3.0,), (3.0, 4.0)):
        store(folder, "paths", "Paths", [table("Speed", *numbers)], 5.0, finished=False)
    speed, memory = stored(folder)
    assert [row["seconds"] for row in speed["rows"]] == [3.0, 4.0]
    assert "earlier" not in speed
    assert "7.0 minutes" in memory["earlier"]
    text = render(folder, ["paths"], quick=False).read_text()
    assert "5.0 minutes, cut before the end." in text
    assert text.index("### Memory") < text.index("Of an earlier run") < text.index("7.0 minutes")


def test_a_finished_run_takes_the_place_of_the_last(folder):
    store(folder, "paths", "Paths", [table("Speed", 3.0)], 5.0)
    assert [kept["title"] for kept in stored(folder)] == ["Speed"]
    assert "cut" not in render(folder, ["paths"], quick=False).read_text()
