"""The tutorials run from top to bottom, made small by SMOKE=1, and leave the files they promise."""

from __future__ import annotations

import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from tests.helpers.kinds import long_but

matplotlib.use("Agg")

pytestmark = pytest.mark.filterwarnings("default")  # scripts may warn

TUTORIALS = Path(__file__).parents[2] / "tutorials"
PROMISED = {
    "comparing_models": {"comparing_models.png"},
    "item_response": {"item_response.png"},
    "many_patients": {"many_patients.png"},
    "neural_nuts": {"neural_nuts.png", "neural_nuts.pt"},
    "pseudo_marginal": {"pseudo_marginal.png"},
    "hamiltonian_flow_guide": {"hamiltonian_flow_guide.png"},
    "neutra": {"neutra.png"},
    "stochastic_volatility": {"stochastic_volatility.png"},
}
LONG = {
    *("comparing_models", "item_response", "many_patients", "nine_modes"),
    *("neutra", "pseudo_marginal", "stochastic_volatility", "supernova"),
}
# Reproductions of figures of a paper: `make paper`.
PAPER = {
    "nine_modes": {f"nine_modes_{part}.png" for part in ("samples", "potentials", "momenta")},
    "robustness": {"robustness.md"},
    "supernova": {"supernova.png"},
}
# Systems of a lecture on sampling with generative models, `make lecture`; and larger models.
LONGER = [
    path for part in ("lecture", "gallery") for path in sorted((TUTORIALS / part).glob("*.py"))
]
# The quickstart has no small version: its last cell demands good diagnostics of a run on real data,
# which few draws cannot give. `test_documents.py` runs it as it is, among the slow tests.
WHOLE = {"quickstart"}


def test_every_tutorial_is_tested():
    assert {path.stem for path in TUTORIALS.glob("*.py")} == PROMISED.keys() | WHOLE
    assert {path.stem for path in (TUTORIALS / "paper").glob("*.py")} == PAPER.keys()


@pytest.fixture
def run_small(tmp_path, monkeypatch):
    """Runs a script in this process, which has imported what they all import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOKE", "1")
    torch.set_default_dtype(torch.float32)  # as in a fresh one
    yield lambda path: runpy.run_path(str(path), run_name="__main__")
    plt.close("all")


@pytest.mark.parametrize("name", long_but(PROMISED.keys() - LONG, PROMISED))
def test_tutorial_runs(name, tmp_path, run_small, capsys):
    run_small(TUTORIALS / f"{name}.py")
    assert {path.name for path in tmp_path.iterdir()} == PROMISED[name]
    assert "r_hat" in capsys.readouterr().out  # the summary at the end


@pytest.mark.parametrize("name", long_but(PAPER.keys() - LONG, PAPER))
def test_reproduction_of_the_paper_runs(name, tmp_path, run_small):
    run_small(TUTORIALS / "paper" / f"{name}.py")
    assert {path.name for path in tmp_path.iterdir()} == PAPER[name]


@pytest.mark.slow
@pytest.mark.parametrize("path", LONGER, ids=lambda path: path.stem)
def test_longer_tutorial_runs(path, tmp_path, run_small):
    run_small(path)
    assert {file.name for file in tmp_path.iterdir()} == {f"{path.stem}.png"}
