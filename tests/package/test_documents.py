"""What the documents show works as they show it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(name):
    """The Python of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def run(code):
    return subprocess.run(
        [sys.executable, "-c", f"import warnings; warnings.simplefilter('ignore')\n{code}"],
        env=os.environ | {"CI": "true"},
        capture_output=True,
        text=True,
    )


def test_readme_example_runs():
    (block,) = blocks("README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    shorter = block.replace("num_samples=500", "num_samples=40, warmup_steps=40")
    assert shorter != block
    done = run(shorter)
    assert done.returncode == 0, done.stderr
    assert "elpd_loo" in done.stdout and "spread" in done.stdout


def test_contributions_run_as_they_are_shown():
    done = run("import pyro\npyro.set_rng_seed(0)\n" + "\n".join(blocks("CONTRIBUTING.md")))
    assert done.returncode == 0, done.stderr


def test_documents_name_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([a-z_/]+(?:/|\.py))`", text)
    places = [ROOT, ROOT / "pyro_hamflow", ROOT / "pyro_hamflow/mcmc"]
    places += [ROOT / "pyro_hamflow/marginal/proposals", ROOT / "pyro_hamflow/marginal"]
    places += [ROOT / "pyro_hamflow/surrogates"]
    assert len(named) > 20
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


@pytest.mark.slow
def test_quickstart_ends_with_good_diagnostics(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tutorials" / "quickstart.py")],
        cwd=tmp_path,
        env=os.environ | {"CI": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"quickstart.nc", "quickstart.png"}
