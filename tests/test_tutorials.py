"""The tutorials run from top to bottom, made small by SMOKE=1, and leave the files they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"
PROMISED = {
    "neural_nuts": {"neural_nuts.png", "neural_nuts.pt"},
    "pseudo_marginal": {"pseudo_marginal.png"},
    "hamiltonian_flow_guide": {"hamiltonian_flow_guide.png"},
}
# Reproductions of figures of a paper: `make paper`.
PAPER = {
    "nine_modes": {f"nine_modes_{part}.png" for part in ("samples", "potentials", "momenta")},
    "robustness": {"robustness.md"},
    "supernova": {"supernova.png"},
}
# The quickstart has no small version: its last cell demands good diagnostics of a run on real data,
# which few draws cannot give. `test_documents.py` runs it as it is, among the slow tests.
WHOLE = {"quickstart"}


def test_every_tutorial_is_tested():
    assert {path.stem for path in TUTORIALS.glob("*.py")} == PROMISED.keys() | WHOLE
    assert {path.stem for path in (TUTORIALS / "paper").glob("*.py")} == PAPER.keys()


def run_small(path, tmp_path):
    return subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=os.environ | {"SMOKE": "1", "CI": "true", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", PROMISED)
def test_tutorial_runs(name, tmp_path):
    done = run_small(TUTORIALS / f"{name}.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == PROMISED[name]
    assert "r_hat" in done.stdout  # the summary at the end


@pytest.mark.parametrize("name", PAPER)
def test_reproduction_of_the_paper_runs(name, tmp_path):
    done = run_small(TUTORIALS / "paper" / f"{name}.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == PAPER[name]
