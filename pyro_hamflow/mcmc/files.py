"""Files that several processes may want, and that outlive the machine's faults."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pyro_hamflow.mcmc.packing import CheckpointError, refuse_others

try:  # zarr comes with one of them
    from google_crc32c import value as crc32c
except ImportError:
    from crc32c import crc32c

try:
    import fcntl
except ImportError:  # there is none on Windows, where stores are not locked
    fcntl = None  # type: ignore[assignment]

_AT_ONCE = 16  # files that are flushed


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Says of errors of the file system where they happened."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"the checkpoint cannot be written: {reason}", str(path)
        ) from error


def locked(path: Path) -> int | None:
    """A lock on a directory, that ends with the process; none where there are none."""
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise CheckpointError(f"another run is writing to {path}: let it end first") from error
    except OSError:  # a file system without locks
        pass
    return handle


def is_at(handle: int, path: Path) -> bool:
    """Whether an open directory is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def refuse_read_only(path: Path) -> None:
    """Refuses a directory that nothing can be written to."""
    effective = os.access in os.supports_effective_ids
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=effective):
        reason = "the checkpoint cannot be written: Permission denied"
        raise PermissionError(errno.EACCES, reason, str(path))


def flush(path: Path) -> None:
    """Has the file system write a file or a directory to the disk."""
    if not path.exists():
        return  # an array without elements
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_beside(path: Path, data: np.ndarray) -> None:
    """Writes bytes and their sum beside their place, until :func:`put_in_place`."""
    beside = _beside(path)
    try:
        file = beside.open("wb")
    except FileNotFoundError:  # the first one in its directory
        beside.parent.mkdir(parents=True, exist_ok=True)
        file = beside.open("wb")
    with file:
        file.write(data.data)
        file.write(crc32c(data).to_bytes(4, "little"))


def put_in_place(paths: Sequence[Path]) -> None:
    """Has the disk take files, and puts those that were written beside in their places then.

    They are put there even where the disk fails, so that they can be read.
    """
    directories = {parent for path in paths for parent in _up_to_chunks(path)}
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # the disk takes them together
        list(pool.map(_put, paths))
        list(pool.map(flush, directories))


def _put(path: Path) -> None:
    beside = _beside(path)
    if not beside.exists():
        flush(path)
        return
    try:
        flush(beside)
    finally:
        os.replace(beside, path)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _up_to_chunks(path: Path) -> Iterator[Path]:
    """The directories of a file: up to that of all of an array's chunks, if it is of one."""
    for parent in path.parents:
        yield parent
        if parent.name == "c" or path.name == "zarr.json":
            break


def is_as_written(path: Path) -> bool:
    """Whether a file of an array is there, and its last four bytes are the sum of the others."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) >= 4 and crc32c(data[:-4]) == int.from_bytes(data[-4:], "little")


def state_numbers(path: Path) -> list[int]:
    """The numbers of the states of a store."""
    states = (path / "checkpoints").glob("[0-9]*/c/0")
    return [int(state.parts[-3]) for state in states if state.parts[-3].isdigit()]


def is_unbegun(path: Path) -> bool:
    """Whether a place is empty, or a run has ended there before its first state; it is removed."""
    try:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
            return True
        refuse_others(path)
        lock = locked(path)
    except CheckpointError:
        return False
    empty = not state_numbers(path)
    if empty:
        shutil.rmtree(path)
    if lock is not None:
        os.close(lock)
    return empty
