"""What a process is told to draw, and what it tells of it."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import NamedTuple

import numpy as np


class Asked(NamedTuple):
    """What is to be drawn.

    Attributes:
        posterior: By its name.
        engine: Of ours.
        chains: How many.
        iterations: Of warm-up, and as many draws.
        data: By their names.
        folder: Where draws go.
    """

    posterior: str
    engine: str
    chains: int
    iterations: int
    data: dict[str, np.ndarray]
    folder: str


def asked() -> Asked:
    """By the command's arguments: a folder with the data, the posterior, an engine, numbers."""
    folder, posterior, engine, chains, iterations = sys.argv[1:]
    with np.load(os.path.join(folder, "data.npz")) as data:
        return Asked(posterior, engine, int(chains), int(iterations), dict(data), folder)


def tell(
    asked: Asked, draws: np.ndarray, sampling: float, steps: float, uncounted: float = 0.0
) -> None:
    """Writes draws of shape ``(chains, draws, dimension)``, and what they took.

    Arguments:
        asked: What was to be drawn.
        draws: The draws.
        sampling: Seconds of sampling alone.
        steps: Steps of the integrator, on average over draws.
        uncounted: Seconds of the processor that were spent on measuring.
    """
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = time.process_time() + others.ru_utime + others.ru_stime - uncounted
    np.save(os.path.join(asked.folder, "draws.npy"), draws)
    numbers = {"sampling": sampling, "whole": whole, "steps": steps}
    sys.stdout.write(json.dumps(numbers) + "\n")
