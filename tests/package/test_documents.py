"""What the documents show works as they show it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_readme_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    shorter = block.replace("num_samples=500", "num_samples=40, warmup_steps=40")
    assert shorter != block
    code = "import warnings; warnings.simplefilter('ignore')\n" + shorter
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CI": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "elpd_loo" in done.stdout and "spread" in done.stdout


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
