"""FlowNUTS beside flowMC and pocoMC on posteriors of several modes, each peer's run a process.

Both peers are asked for in the Python that ``PEERS_PYTHON`` names, of an environment made by
`python3.11 -m venv peers` and `peers/bin/pip install flowMC==0.6.* pocomc==1.2.*`; or in this one
where they are installed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks.mode_targets import Target, exoplanet, mixture, phi_four
from benchmarks.modes import by_jumps, row_of, worth_of
from benchmarks.report import Row, Table, met

PEERS = {"flowMC": "flowmc_peer", "pocoMC": "pocomc_peer"}
ABOUT = "Several modes, beside flowMC and pocoMC"
_TIMES_FLOWMC = 20
_LIMITS = (200, 150, 100)  # seconds, for each peer on each target
_logger = logging.getLogger("benchmarks")
_ROOT = Path(__file__).parents[1]


def measure(*, quick: bool) -> list[Table]:
    """All that they can be asked for."""
    targets = (mixture(16), exoplanet(), phi_four(20 if quick else 100))
    python, rows = peers_python(), []
    for target, limit in zip(targets, _LIMITS, strict=True):
        rows.append(by_jumps(target, quick=quick))
        if python is not None:
            rows += [by_peer(target, peer, python, limit, quick=quick) for peer in PEERS]
    says = (
        f"Peers have {' and '.join(map(str, _LIMITS))} seconds, and settings as their "
        "documentation has them: where there are no numbers they had not come to an end, or had "
        "ended in an error. Effective draws are those of the "
        "shares: of chains by how much ten groups of them differ, which does not see that all are "
        "wrong; of weighted draws by their weights."
        if python is not None
        else "flowMC and pocoMC are not beside: no environment has them (`PEERS_PYTHON`)."
    )
    return [Table("Weights of modes and evidence, with peers", rows, says, _reached(rows))]


def _reached(rows: list[Row]) -> str:
    star = {row["method"]: row for row in rows if row["target"] == "exoplanet"}
    if "flowMC" not in star:
        return ""
    ours, theirs = (star[name]["of them per second"] for name in ("FlowNUTS", "flowMC"))
    told = f"({ours / theirs:.0f})" if theirs == theirs else "(it gave none in time)"
    reached = met(not ours / theirs < _TIMES_FLOWMC)
    return f"{_TIMES_FLOWMC} times flowMC's on the exoplanet: {reached} {told}."


def peers_python() -> str | None:
    """A Python that has them."""
    here = sys.executable if find_spec("flowMC") and find_spec("pocomc") else None
    return os.environ.get("PEERS_PYTHON") or here


def by_peer(target: Target, peer: str, python: str, limit: int, *, quick: bool) -> Row:
    """What one finds of one target; no numbers where it has not come to an end in time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", f"benchmarks.mode_runs.{PEERS[peer]}", folder, target.density]
        command.append("quick" if quick else "whole")
        try:
            done = subprocess.run(
                command,
                env=_environment(),
                cwd=_ROOT,
                check=True,
                capture_output=True,
                timeout=limit,
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            _logger.warning("%s on %s: %s", peer, target.name, error.stderr or error)
            return row_of(target, peer, None, limit)
        told = json.loads(done.stdout.splitlines()[-1])
        with np.load(Path(folder) / "draws.npz") as read:
            found = {name: torch.as_tensor(read[name]) for name in read.files}
    chains, weights = found.pop("shape").tolist(), found.pop("weights", None)
    belongs = target.belongs(found)
    if weights is None:
        belongs = belongs.reshape(*chains, -1).transpose(0, 1)  # of many chains ten groups
        groups = belongs.transpose(0, 1).reshape(10, -1, belongs.shape[-1]).mean(1)
        shares, worth = groups.mean(0), worth_of(groups)
    else:
        weights = weights / weights.sum()
        shares, worth = weights @ belongs, float(1.0 / weights.square().sum())
    evidence = told.get("log_evidence", math.nan) - target.log_evidence
    return row_of(target, peer, shares, told["seconds"], worth, told.get("jumps", math.nan)) | {
        "log Z, error": evidence,
        "its standard error": told.get("error", math.nan),
    }


def _environment() -> dict[str, str]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    device = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return os.environ | one | device
