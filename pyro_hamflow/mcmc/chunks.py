"""Files of an array's chunks, as Zarr lays them out; whole ones are written without reading."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyro_hamflow.mcmc.chains import Rows
from pyro_hamflow.mcmc.files import is_as_written, write_beside
from pyro_hamflow.mcmc.identity import dimension_names

WHOLE = {"write_empty_chunks": True}  # so that a chunk that is missing is noticed
_LONGEST_LABEL = 150  # bytes; file systems take 255


class Chunks:
    """Chunks of an array of draws, ``(chains, draws, *)``, in files.

    Zarr reads them, and would write the same; but it takes a millisecond for each. The last chunk
    of each row stays in memory until it is full, so that it is not read to be written again.

    Arguments:
        folder: Where the array is.
        array: Zarr's array, whose codecs are the bytes as they are, or compressed where they are
            none of real numbers, and their sum.
    """

    def __init__(self, folder: Path, array: Any) -> None:
        from numcodecs.zstd import Zstd  # slow to import

        self._folder, self.array = folder, array
        self._smaller = None if array.dtype.kind == "f" else Zstd(level=1)
        self._latest: dict[int, tuple[int, np.ndarray]] = {}  # by rows: number and content

    def write(self, rows: Rows, first: int, value: np.ndarray) -> list[Path]:
        """Writes draws of chains from a place on, beside their files; returns these.

        Arguments:
            rows: The chains, which lie together.
            first: How many draws of each there are already.
            value: Of shape ``(chains, draws, *)``.
        """
        if not value.size:
            return []
        row, length = rows.start // rows.together, self.array.chunks[1]
        stop, files = first + value.shape[1], []
        for column in range(first // length, -(-stop // length)):
            begin, end = max(first, column * length), min(stop, (column + 1) * length)
            part = value[:, begin - first : end - first]
            if part.shape[:2] == self.array.chunks[:2]:
                chunk = np.ascontiguousarray(part)
            else:
                chunk = self._begun(row, column, begin)
                chunk[: len(value), begin - column * length : end - column * length] = part
            files.append(self.file(row, column))
            data = chunk.reshape(-1).view(np.uint8)
            if self._smaller is not None:
                data = np.frombuffer(self._smaller.encode(data), np.uint8)
            write_beside(files[-1], data)
            self._latest[row] = column, chunk
        if stop % length == 0:
            del self._latest[row]
        return files

    def _begun(self, row: int, column: int, first: int) -> np.ndarray:
        """A chunk with so many draws of the array before it as there are already."""
        latest = self._latest.get(row)
        if latest is not None and latest[0] == column:
            return latest[1]
        chunk = np.full(self.array.chunks, self.array.fill_value, self.array.dtype)
        together, length = self.array.chunks[:2]
        if first > column * length:
            there = self.array[row * together : (row + 1) * together, column * length : first]
            chunk[: len(there), : there.shape[1]] = there
        return chunk

    def stretches(self, draws: int) -> Iterator[tuple[int, int]]:
        """Its first draws, as they lie in chunks: from which number to which."""
        length = self.array.chunks[1]
        for first in range(0, draws, length):
            yield first, min(first + length, draws)

    def first_damaged(self, draws: int, chain: int | None) -> int:
        """The first draw that is not as it was written, of all chains or one; how many if none."""
        rows, length = self.array.chunks[:2]
        if 0 in self.array.shape[2:]:
            return draws
        if self.array.shape[1] < draws:
            return int(self.array.shape[1])
        for first in range(0, draws, length):
            for row in range(0, self.array.shape[0], rows) if chain is None else (chain,):
                if not is_as_written(self.file(row // rows, first // length)):
                    return first
        return draws

    def forget(self, chain: int, draws: int) -> None:
        """Removes what is beyond so many draws of a chain (and of those with it), whole or not."""
        row, length = chain // self.array.chunks[0], self.array.chunks[1]
        self._latest.pop(row, None)
        for column in self._folder.joinpath("c", str(row)).glob("*"):
            if column.name.isdigit() and int(column.name) >= -(-draws // length):
                self.file(row, int(column.name)).unlink(missing_ok=True)

    def file(self, row: int, column: int) -> Path:
        """The file of a chunk."""
        inner = ["0"] * (self.array.ndim - 2)
        return self._folder.joinpath("c", str(row), str(column), *inner)


def layout(
    value: np.ndarray, rows: Rows, room: int, chunk_bytes: int, longest: int
) -> Mapping[str, Any]:
    """How an array lies in chunks that are written here, for Zarr to make it.

    Arguments:
        value: Some of its draws.
        rows: The chains, which lie together.
        room: How many draws there may be.
        chunk_bytes: How large a chunk is at most, if it is of more than a draw.
        longest: How many draws it is of at most.
    """
    from zarr.codecs import Crc32cCodec, ZstdCodec  # slow to import

    each = max(1, rows.together * value[:1, :1].nbytes)
    length = max(1, min(chunk_bytes // each, longest, max(room, 1)))
    smaller = [] if value.dtype.kind == "f" else [ZstdCodec(level=1)]  # their digits are noise
    return {
        "chunks": (rows.together, length, *(max(1, size) for size in value.shape[2:])),
        "compressors": [*smaller, Crc32cCodec()],
    }


def new_array(
    group: Any,
    name: str,
    value: np.ndarray,
    rows: Rows,
    sizes: tuple[int, int, int],
    plates: Mapping[int, tuple[str, int]],
) -> Any:
    """An array of a group of Zarr's, for a variable's draws.

    Arguments:
        group: The group.
        name: The variable.
        value: Some of its draws.
        rows: The chains, which lie together.
        sizes: How many draws there may be; and how many bytes and draws a chunk has at most.
        plates: Names and sizes of plates by the dimensions that they take.
    """
    room, inner = sizes[0], value.shape[2:]
    label = _label(name)
    while label in group:
        label += "_"
    return group.create_array(
        label,
        shape=(rows.number, max(room, value.shape[1]), *inner),
        dtype=value.dtype,
        fill_value=math.nan if value.dtype.kind == "f" else 0,
        dimension_names=["chain", "draw", *dimension_names(label, inner, plates)],
        attributes={"name": name},
        config=WHOLE,
        **layout(value, rows, *sizes),
    )


def _label(name: str) -> str:
    """A name for a directory, short, without others in it."""
    label = (
        name.replace("/", ".").replace("\\", ".").encode()[:_LONGEST_LABEL].decode(errors="ignore")
    )
    return f"{label}_" if not label.strip(".") or label == "zarr.json" else label
