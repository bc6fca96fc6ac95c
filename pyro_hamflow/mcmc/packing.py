"""States of a run as bytes with a digest, and what may be wrong with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = "pyro_hamflow run"
VERSION = 1  # of all that checkpoints hold
_MAGIC = b"pyro_hamflow state\n"
_ALIGNED = 64  # bytes, at which arrays begin


class CheckpointError(ValueError):
    """A checkpoint from which a run cannot go on."""


class OtherVersion(CheckpointError):
    """A store that is none of a run, or was written by another version of the format."""


class DamagedCheckpoint(CheckpointError):
    """A store whose latest state or whose draws are not as they were written."""


class StoreGone(CheckpointError):
    """A store that was moved or removed while a run wrote to it."""


class Saved(NamedTuple):
    """A state of a run.

    Attributes:
        number: Its number; later ones are higher.
        words: What is said of it in plain words and numbers, which JSON has.
        arrays: What these refer to.
    """

    number: int
    words: dict[str, Any]
    arrays: list[np.ndarray]


def packed(words: Mapping[str, Any], arrays: list[np.ndarray]) -> bytes:
    """Words and arrays as bytes, with a digest of all."""
    lengths, parts, place = [], [], 0
    for array in arrays:
        data = array.tobytes()
        lengths.append([array.dtype.str, list(array.shape), place, len(data)])
        padding = -len(data) % _ALIGNED
        parts += [data, bytes(padding)]
        place += len(data) + padding
    head = json.dumps({"version": VERSION, "words": words, "arrays": lengths}).encode()
    body = b"".join([len(head).to_bytes(8, "little"), head, *parts])
    return _MAGIC + hashlib.sha256(body).digest() + body


def unpacked(data: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Words and arrays of :func:`packed`.

    Raises:
        DamagedCheckpoint: If any byte is another one.
    """
    start = len(_MAGIC) + hashlib.sha256().digest_size
    body = data[start:]
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        raise DamagedCheckpoint("it is not as it was written")
    size = int.from_bytes(body[:8], "little")
    head, data = json.loads(body[8 : 8 + size]), body[8 + size :]
    if head["version"] != VERSION:
        raise OtherVersion(f"it is of version {head['version']}: expected {VERSION}")
    arrays = [
        np.frombuffer(data[place : place + length], dtype).reshape(shape)
        for dtype, shape, place, length in head["arrays"]
    ]
    return head["words"], arrays


def refuse_others(path: Path) -> None:
    """Refuses a place that is no store of a run, or one of another version."""
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        found, version = attributes["format"], attributes["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OtherVersion(
            f"{path} is no checkpoint of a run: expected a directory that `MCMC(..., "
            "checkpoint=...)` has written"
        ) from error
    if found != FORMAT or version != VERSION:
        raise OtherVersion(
            f"{path} is of format {found!r}, version {version}: expected {FORMAT!r}, version "
            f"{VERSION}"
        )
