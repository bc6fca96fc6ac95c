"""The engines that make NUTS' draws, beside NumPyro and nutpie, on ten posteriors.

Each sampler runs in a process of its own, of which all counts: imports, capture, compilation,
warm-up. Ours begins with an empty cache, and once more with what it has kept there. nutpie is asked
for in the Python that ``NUTPIE_PYTHON`` names, or in this one where it is installed.
"""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.diagnostics import largest_rhat, smallest_ess
from benchmarks.posteriors import POSTERIORS
from benchmarks.report import Row, Table, met

ABOUT = "Engines: NUTS in machine code"
_MANY = ("eight schools", "breast cancer", "normal, 100 dimensions")  # with 64 chains as well
_SAMPLERS = {
    "native": ("ours", "native"),
    "native, kept on disk": ("ours", "native"),
    "torch": ("ours", "torch"),
    "NumPyro": ("numpyro_peer", ""),
    "nutpie": ("nutpie_peer", ""),
}
# By the number of chains: of four the ESS of one run is a seventh off, of 64 a thirtieth.
_SEEDS = {4: 12, 64: 1}
_SAMPLING = {"eight schools": 20.0, "breast cancer": 3.0, "normal, 100 dimensions": 3.0}
_ROOT = Path(__file__).parents[1]


def measure(*, quick: bool) -> list[Table]:
    """Ten posteriors with few chains, three of them with many."""
    compileall.compile_dir(_ROOT / "pyro_hamflow", quiet=1)  # as installers do
    cases = [(name, 4) for name in POSTERIORS] + [(name, 64) for name in _MANY]
    rows = [row for case in (cases[:1] if quick else cases) for row in rows_of(*case, quick=quick)]
    iterations = 50 if quick else 500
    table = Table(
        "NUTS by its engines",
        rows,
        f"{iterations} iterations of warm-up and as many draws of each chain, a dense mass (of "
        "nutpie its own, a diagonal), one thread. A leaf is a step of the integrator with its "
        "share of the tree. In all counts a processor's seconds from the start of Python on, with "
        "the first seed's run in its process. With 4 chains ESS, steps and time of sampling are "
        f"means of {_SEEDS[4]} seeds (of torch's one), and R-hat is the largest of them.",
        "in sampling 20 times NumPyro's effective draws per second on eight schools, three times "
        "on breast cancer and the normal, 1.5 times elsewhere; in all 1.5 times at first use, "
        f"three times from what is kept: {met(all(map(_reached, _groups(rows))))}.",
    )
    return [table]


def rows_of(posterior: str, chains: int, *, quick: bool) -> list[Row]:
    """All samplers on one posterior, one after the other."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "data.npz", **POSTERIORS[posterior].data())
        for sampler, (module, engine) in _SAMPLERS.items():
            python = _python() if sampler == "nutpie" else sys.executable
            if python is None or (sampler in ("nutpie", "torch") and posterior not in _MANY):
                continue
            command = [python, "-m", f"benchmarks.engine_runs.{module}", folder, posterior]
            # torch compiles anew for each run
            seeds = 1 if sampler == "torch" else _SEEDS[chains]
            command += [engine, str(chains), "50" if quick else "500", str(seeds)]
            done = subprocess.run(
                command, env=_environment(folder), cwd=_ROOT, check=True, capture_output=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            row = {"posterior": posterior, "chains": chains, "sampler": sampler}
            rows.append(row | _row(found, np.load(Path(folder) / "draws.npy")))
    return rows


def _environment(folder: str) -> dict[str, str]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    kept = {"PYRO_HAMFLOW_CACHE": folder, "PYTENSOR_FLAGS": f"base_compiledir={folder}"}
    kept |= {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")}
    return os.environ | one | kept | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}


def _python() -> str | None:
    """A Python that has nutpie."""
    return os.environ.get("NUTPIE_PYTHON") or (sys.executable if find_spec("nutpie") else None)


def _row(found: dict[str, float], draws: np.ndarray) -> Row:
    least, count = float(np.mean([smallest_ess(run) for run in draws])), draws[0, ..., 0].size
    return {
        "us per leaf": 1e6 * found["sampling"] / (found["steps"] * count),
        "steps per draw": found["steps"],
        "sampling, s": found["sampling"],
        "in all, s": found["whole"],
        "smallest ESS": least,
        "R-hat": max(map(largest_rhat, draws)),
        "ESS/s": least / found["sampling"],
        "ESS/s in all": least / found["whole"],
    }


def _groups(rows: list[Row]) -> list[dict[str, Row]]:
    """The rows of each posterior by their samplers."""
    groups: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["posterior"], row["chains"]), {})[row["sampler"]] = row
    return list(groups.values())


def _reached(group: dict[str, Row]) -> bool:
    ours, kept, theirs = (group[name] for name in ("native", "native, kept on disk", "NumPyro"))
    goal = _SAMPLING.get(ours["posterior"], 1.5)
    return (
        ours["ESS/s"] >= goal * theirs["ESS/s"]
        and ours["ESS/s in all"] >= 1.5 * theirs["ESS/s in all"]
        and kept["ESS/s in all"] >= 3.0 * theirs["ESS/s in all"]
    )
