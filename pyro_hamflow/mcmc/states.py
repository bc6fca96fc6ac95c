"""States of a run in the group ``checkpoints`` of its store, by their numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pyro_hamflow.mcmc.files import flush, state_numbers
from pyro_hamflow.mcmc.packing import DamagedCheckpoint, OtherVersion, Saved, unpacked


def write_state(root: Any, path: Path, number: int, state: bytes) -> None:
    """Writes a state, and waits until the disk has it.

    Arguments:
        root: Zarr's group of the store.
        path: Where that is.
        number: The state's number.
        state: Its bytes.
    """
    data = np.frombuffer(state, np.uint8)
    group = root.require_group("checkpoints")
    group.create_array(f"{number:06d}", data=data, chunks=data.shape, overwrite=True)
    place = _place(path, number)
    for file in (place / "c" / "0", place / "zarr.json", place / "c", place, place.parent):
        flush(file)


def read_states(root: Any, path: Path) -> Iterator[tuple[int, Saved | DamagedCheckpoint]]:
    """All states that were written whole, the latest first; of damaged ones, the error.

    Raises:
        OtherVersion: If one is of another version.
    """
    for number in sorted(state_numbers(path), reverse=True):
        try:
            data = root[f"checkpoints/{number:06d}"][:].tobytes()
            yield number, Saved(number, *unpacked(data))
        except OtherVersion as error:
            raise OtherVersion(f"{path}: state {number}: {error}") from error
        except Exception as error:  # a codec's own, of any kind
            yield number, DamagedCheckpoint(str(error))


def forget_state(path: Path, number: int) -> None:
    """Removes a state."""
    shutil.rmtree(_place(path, number), ignore_errors=True)


def _place(path: Path, number: int) -> Path:
    return path / "checkpoints" / f"{number:06d}"
