"""What a process is told to draw, and what it tells of it."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Asked(NamedTuple):
    """What is to be drawn.

    Attributes:
        posterior: By its name.
        engine: Of ours.
        chains: How many.
        iterations: Of warm-up, and as many draws.
        seeds: How many runs.
        data: By their names.
        folder: Where draws go.
    """

    posterior: str
    engine: str
    chains: int
    iterations: int
    seeds: int
    data: dict[str, np.ndarray]
    folder: str


def asked() -> Asked:
    """By the command's arguments: a folder with the data, the posterior, an engine, numbers."""
    folder, posterior, engine, *numbers = sys.argv[1:]
    chains, iterations, seeds = map(int, numbers)
    with np.load(os.path.join(folder, "data.npz")) as data:
        return Asked(posterior, engine, chains, iterations, seeds, dict(data), folder)


class Run(NamedTuple):
    """What one run has made.

    Attributes:
        draws: Of shape ``(chains, draws, dimension)``.
        sampling: Seconds of sampling alone.
        steps: Steps of the integrator, on average over draws.
    """

    draws: np.ndarray
    sampling: float
    steps: float


def spent() -> float:
    """Seconds of the processor from the start of Python on, compilers' with them."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime


def tell(asked: Asked, run: Callable[[int], Run]) -> None:
    """Makes the runs, writes their draws, and tells what they took: in all, the first alone.

    Arguments:
        asked: What was to be drawn.
        run: A run by its seed.
    """
    runs = [run(0)]
    whole = spent()
    runs += [run(seed) for seed in range(1, asked.seeds)]
    np.save(os.path.join(asked.folder, "draws.npy"), np.stack([one.draws for one in runs]))
    numbers = {
        "sampling": float(np.mean([one.sampling for one in runs])),
        "steps": float(np.mean([one.steps for one in runs])),
        "whole": whole,
    }
    sys.stdout.write(json.dumps(numbers) + "\n")
