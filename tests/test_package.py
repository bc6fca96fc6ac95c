"""The package as a whole: its rooms, and what importing it does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_hamflow

ROOT = Path(pyro_hamflow.__file__).parent
ROOMS = ["programs", "dynamics", "networks", "model", "marginal", "surrogates"]
ROOMS += ["mcmc", "flows", "smc", "results"]  # imports run from a later to an earlier one


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "pyro_hamflow" and len(part) > 1}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    known = {"checks", *ROOMS[: ROOMS.index(room) + 1]}
    for path in (ROOT / room).rglob("*.py"):
        assert imported_rooms(path) <= known, path.name


def test_import_leaves_validation_as_it_found_it():
    code = (
        "import torch, pyro; D = torch.distributions.Distribution; before = D._validate_args;"
        "dtype = torch.get_default_dtype(); import pyro_hamflow;"
        "raise SystemExit(D._validate_args != before or torch.get_default_dtype() != dtype)"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0


def test_public_names_are_documented():
    for name in pyro_hamflow.__all__:
        assert (getattr(pyro_hamflow, name).__doc__ or "").strip(), name
