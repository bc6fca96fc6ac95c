"""Runs in Zarr stores: draws along chunks, and states from which a run goes on.

A store is laid out as ArviZ lays out its groups (``posterior``, ``sample_stats`` and
``unconstrained_posterior``; the same of the warm-up if it is kept), so that xarray opens it, lazily
too. Room is made for draws ahead; how many there are says the latest *state*, an array of bytes in
the group ``checkpoints`` with a digest of its own, which is written after the draws that it counts.
Each file is written beside its place, and renamed into it when the disk has it, so that a write
that was cut off is as none: what is there is the state before, whose draws no later one changes. A
thread waits for the disk (:meth:`Store.settle`).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from pyro_hamflow.mcmc.chains import Rows
from pyro_hamflow.mcmc.chunks import Chunks, layout
from pyro_hamflow.mcmc.files import (
    flush,
    is_unbegun,
    locked,
    put_in_place,
    state_numbers,
    told,
)
from pyro_hamflow.mcmc.identity import dimension_names
from pyro_hamflow.mcmc.packing import (
    FORMAT,
    VERSION,
    CheckpointError,
    DamagedCheckpoint,
    OtherVersion,
    Saved,
    packed,
    refuse_others,
    unpacked,
)

_WHOLE = {"write_empty_chunks": True}  # so that a chunk that is missing is noticed
_CHUNK_BYTES = 2**21  # of an array's chunk: small enough to be written again with each checkpoint
_LONGEST_CHUNK = 10_000  # draws
_KEPT_STATES = 2  # the latest, beside the one at the end of warm-up


class Store:
    """The store of one run; held by one process at a time.

    Arguments:
        path: Where it is.
        new: Whether it is made.
        writes: Whether anything is written.

    Raises:
        FileExistsError: If it is to be made, and something is there.
        FileNotFoundError: If it is to be opened, and nothing is.
        OtherVersion: If what is there is no run, or of another version.
        CheckpointError: If another process writes to it.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, new: bool = False, writes: bool = True
    ) -> None:
        import zarr  # slow to import

        self.path = Path(path)
        if new:
            if os.path.lexists(self.path) and not is_unbegun(self.path):
                raise FileExistsError(
                    f"{self.path} exists already: go on with `MCMC.resume`, or name another place"
                )
            with told(self.path):
                self.path.mkdir(parents=True)
        elif not self.path.exists():
            raise FileNotFoundError(f"there is no {self.path}: expected the checkpoint of a run")
        else:
            refuse_others(self.path)
        self._lock = locked(self.path) if writes else None
        if new:
            attributes = {"format": FORMAT, "version": VERSION}
            with told(self.path):
                zarr.create_group(self.path, attributes=attributes)
        self._root: Any = zarr.open_group(
            self.path, mode="r+" if writes else "r", use_consolidated=False
        )
        self._arrays: dict[str, dict[str, Chunks]] = {}
        self._files: list[Path] = []  # that are not yet where they belong
        self._pending: Future[None] | None = None
        self._kept: list[tuple[int, bool]] = []

    def hold(self) -> None:
        """Has it again after :meth:`close`.

        Raises:
            CheckpointError: If another run has it, or has gone on in it.
        """
        if self._lock is None:
            self._lock = locked(self.path)
        if self._kept and max(state_numbers(self.path)) > self._kept[-1][0]:
            raise CheckpointError(f"another run has gone on in {self.path}: resume that one")

    def close(self) -> None:
        """Lets other processes have it, once the disk has all."""
        wait([self._pending] if self._pending else [])
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def group(self, name: str) -> dict[str, Chunks]:
        """The arrays of a group, by the names of their variables."""
        import zarr  # slow to import

        if name not in self._arrays:
            there = (self.path / name / "zarr.json").exists()
            found = self._root[name].arrays() if there else ()
            with zarr.config.set({f"array.{key}": value for key, value in _WHOLE.items()}):
                self._arrays[name] = {a.attrs["name"]: self._chunks(name, a) for _, a in found}
        return self._arrays[name]

    def append(
        self,
        group: str,
        values: Mapping[str, np.ndarray],
        rows: Rows,
        first: int,
        room: int,
        plates: Mapping[str, Mapping[int, tuple[str, int]]],
    ) -> None:
        """Writes draws from a place on.

        Arguments:
            group: Of which group.
            values: By the names of variables, of shape ``(chains, draws, *)``.
            rows: Which of the chains they are of.
            first: How many draws of each there are already.
            room: How many there may be in the end, as far as is known.
            plates: Of each variable, the names and sizes of plates by their dimensions, which are
                counted from the left.
        """
        self.settle()
        arrays = self.group(group)
        for name, value in values.items():
            if name not in arrays:
                arrays[name] = self._new_array(group, name, value, rows, room, plates.get(name, {}))
        stop = first + max(value.shape[1] for value in values.values())
        if any(stop > arrays[name].array.shape[1] for name in values):
            self.resize(group, room if room >= stop else 2 * stop)
        for name, value in values.items():
            self._files += arrays[name].write(rows, first, value)

    def _new_array(
        self,
        group: str,
        name: str,
        value: np.ndarray,
        rows: Rows,
        room: int,
        plates: Mapping[int, tuple[str, int]],
    ) -> Chunks:
        label = name.replace("/", ".")
        while label in self._root.require_group(group):
            label += "_"
        inner = value.shape[2:]
        array: Any = self._root[group].create_array(
            label,
            shape=(rows.number, max(room, value.shape[1]), *inner),
            dtype=value.dtype,
            fill_value=math.nan if value.dtype.kind == "f" else 0,
            dimension_names=["chain", "draw", *dimension_names(label, inner, plates)],
            attributes={"name": name},
            config=_WHOLE,
            **layout(value, rows, room, _CHUNK_BYTES, _LONGEST_CHUNK),
        )
        self._files.append(self.path / group / array.basename / "zarr.json")
        return self._chunks(group, array)

    def _chunks(self, group: str, array: Any) -> Chunks:
        return Chunks(self.path / group / array.basename, array)

    def resize(self, group: str, draws: int) -> None:
        """Makes room for so many draws of each chain, or gives up what is beyond them."""
        from zarr.core.sync import sync  # slow to import

        for array in (chunks.array for chunks in self.group(group).values()):
            if array.shape[1] != draws:  # there is no file beyond, and room for many to look for
                shape = (array.shape[0], draws, *array.shape[2:])
                sync(array._async_array.resize(shape, delete_outside_chunks=False))
                self._files.append(self.path / group / array.basename / "zarr.json")

    def stretches(self, group: str, name: str, draws: int) -> Iterator[tuple[int, int]]:
        """The first draws of a variable, as they lie in chunks: from which number to which."""
        length = self.group(group)[name].array.chunks[1]
        for first in range(0, draws, length):
            yield first, min(first + length, draws)

    def read(self, group: str, name: str, chains: slice, draws: slice) -> np.ndarray:
        """Some draws of some chains, of a variable."""
        lies = self.group(group)[name]
        try:
            return lies.array[chains, draws]
        except Exception as error:
            first = lies.first_damaged(draws.stop, None)
            raise DamagedCheckpoint(
                f"{self.path}: the draws of '{name}' from {first} on are not as they were written"
            ) from error

    def first_damaged(self, group: str, draws: int, chain: int | None) -> int:
        """The first draw that is not as it was written, of all chains or one; how many if none."""
        found = [chunks.first_damaged(draws, chain) for chunks in self.group(group).values()]
        return min(found, default=0 if group.endswith("sample_stats") else draws)

    def save(self, words: Mapping[str, Any], arrays: list[np.ndarray], *, lasting: bool) -> None:
        """Writes a state, after the draws that it counts; forgets older ones but for lasting ones.

        The disk takes its time meanwhile; whether all went well is known by :meth:`settle`.

        Arguments:
            words: What is said of it.
            arrays: What these refer to.
            lasting: Whether it is kept, as that at the end of warm-up is.
        """
        self.settle()
        thread = ThreadPoolExecutor(1)
        self._pending = thread.submit(self._finish, packed(words, arrays), lasting)
        thread.shutdown(wait=False)

    def settle(self) -> bool:
        """Waits until the last state is on the disk; says whether one was on its way.

        Raises:
            OSError: If it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        return pending is not None

    def _finish(self, state: bytes, lasting: bool) -> None:  # noqa: FBT001
        put_in_place(self._files)
        self._files.clear()
        data = np.frombuffer(state, np.uint8)
        number = self._kept[-1][0] + 1 if self._kept else 1
        name = f"{number:06d}"
        group = self._root.require_group("checkpoints")
        group.create_array(name, data=data, chunks=data.shape, overwrite=True)
        place = self.path / "checkpoints" / name
        for file in (place / "c" / "0", place / "zarr.json", place / "c", place, place.parent):
            flush(file)
        self._kept.append((number, lasting))
        plain = [number for number, lasts in self._kept if not lasts]
        for old in plain[:-_KEPT_STATES]:
            shutil.rmtree(self.path / "checkpoints" / f"{old:06d}", ignore_errors=True)
            self._kept.remove((old, False))

    @property
    def has_states(self) -> bool:
        """Whether any state has been written."""
        return bool(self._kept)

    def states(self) -> Iterator[tuple[int, Saved | DamagedCheckpoint]]:
        """All states that were written whole, the latest first; of damaged ones, the error."""
        for number in sorted(state_numbers(self.path), reverse=True):
            try:
                data = self._root[f"checkpoints/{number:06d}"][:].tobytes()
                yield number, Saved(number, *unpacked(data))
            except OtherVersion as error:
                raise OtherVersion(f"{self.path}: state {number}: {error}") from error
            except Exception as error:  # a codec's own, of any kind
                yield number, DamagedCheckpoint(str(error))

    def forget_draws(self, group: str, chain: int, draws: int) -> None:
        """Removes what is beyond so many draws of a chain (and of those with it), whole or not."""
        for chunks in self.group(group).values():
            chunks.forget(chain, draws)

    def go_on_from(self, state: Saved, lasting: Mapping[int, bool]) -> None:
        """Takes a state for the latest: what came after it will be made again."""
        for number in list(lasting):
            if number > state.number:
                shutil.rmtree(self.path / "checkpoints" / f"{number:06d}")
        self._kept = sorted((n, lasts) for n, lasts in lasting.items() if n <= state.number)
        for left in self.path.rglob("*.partial"):  # of a write that was cut off
            left.unlink(missing_ok=True)
