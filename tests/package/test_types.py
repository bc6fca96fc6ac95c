"""A user's file has the types that the package promises, for mypy and for pyright."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_hamflow

USER = Path(__file__).with_name("typed_user.py")
WRONG = {
    "num_samples=100, warmup_steps": 'num_samples="100", warmup_steps',
    "assert_type(found.log_evidence, float)": "assert_type(found.log_evidence, str)",
}


def mypy(path):
    run = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(path)]
    return subprocess.run(run, capture_output=True, text=True).stdout.count("error:")


def pyright(path):
    settings = {"typeCheckingMode": "standard", "include": [str(path)]}
    settings["extraPaths"] = [str(USER.parents[2])]
    (path.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    run = [Path(sys.executable).with_name("basedpyright"), "--pythonpath", sys.executable]
    run += ["--outputjson", "-p", str(path.parent)]
    found = json.loads(subprocess.run(run, capture_output=True, text=True).stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    return found["summary"]["errorCount"]


def test_the_package_says_that_it_is_typed():
    assert (Path(pyro_hamflow.__file__).parent / "py.typed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("check", [mypy, pyright])
def test_types_are_right_and_wrong_ones_are_noticed(check, tmp_path):
    text = USER.read_text()
    path = tmp_path / "user.py"
    path.write_text(text)
    assert check(path) == 0
    for right, wrong in WRONG.items():
        assert right in text
        text = text.replace(right, wrong)
    path.write_text(text)
    assert check(path) == len(WRONG)
