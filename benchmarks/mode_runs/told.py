"""What a process is told to sample, and what it tells of it."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import NamedTuple

import numpy as np

from benchmarks.mode_runs.densities import Density, density


class Asked(NamedTuple):
    """What is to be sampled.

    Attributes:
        density: The target.
        quick: Whether any result will do.
        folder: Where draws go.
        began: Seconds of the processor before, which imports took.
    """

    density: Density
    quick: bool
    folder: str
    began: float


def asked() -> Asked:
    """By the command's arguments: a folder, the target, "quick" or "whole"."""
    folder, target, size = sys.argv[1:]
    return Asked(density(target), size == "quick", folder, _seconds())


def tell(
    asked: Asked,
    position: np.ndarray,
    weights: np.ndarray | None = None,
    **numbers: float,
) -> None:
    """Writes draws of shape ``(chains, draws, dimension)``, or weighted ones in one chain."""
    flat = position.reshape(-1, position.shape[-1])
    shape = np.array(position.shape[:2])
    given = {} if weights is None else {"weights": weights}
    path = os.path.join(asked.folder, "draws.npz")
    np.savez(path, shape=shape, **given, **asked.density.sites(flat))
    sys.stdout.write(json.dumps(numbers | {"seconds": _seconds() - asked.began}) + "\n")


def _seconds() -> float:
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime
