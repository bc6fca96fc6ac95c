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

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from pyro_hamflow.mcmc.chains import Rows
from pyro_hamflow.mcmc.chunks import WHOLE, Chunks, new_array
from pyro_hamflow.mcmc.files import (
    is_at,
    is_unbegun,
    locked,
    put_in_place,
    refuse_read_only,
    state_numbers,
    told,
)
from pyro_hamflow.mcmc.packing import (
    FORMAT,
    VERSION,
    CheckpointError,
    DamagedCheckpoint,
    Saved,
    StoreGone,
    packed,
    refuse_others,
)
from pyro_hamflow.mcmc.states import forget_state, read_states, write_state

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
        PermissionError: If it is to be opened, and cannot be written.
        CheckpointError: If another process writes to it.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, new: bool = False, writes: bool = True
    ) -> None:
        import zarr  # slow to import

        self.path = Path(path).absolute()  # the process may change its directory
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
            if writes:
                refuse_read_only(self.path)
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
        self._is_gone = False
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

    def refuse_moved(self) -> None:
        """Refuses to write where it is no longer.

        Raises:
            StoreGone: If what it has is elsewhere, or nowhere.
        """
        if self._lock is not None and not is_at(self._lock, self.path):
            self.close()
            self._is_gone = True
        if self._is_gone:
            raise StoreGone(
                f"{self.path} was moved or removed while a run wrote to it: `MCMC.resume` goes on "
                "from where it is now, to the same draws"
            )

    def group(self, name: str) -> dict[str, Chunks]:
        """The arrays of a group, by the names of their variables.

        Raises:
            DamagedCheckpoint: If what is said of them is not as it was written.
        """
        import zarr  # slow to import

        if name not in self._arrays:
            there = (self.path / name / "zarr.json").exists()
            try:
                with zarr.config.set({f"array.{key}": value for key, value in WHOLE.items()}):
                    found = [array for _, array in self._root[name].arrays()] if there else []
                self._arrays[name] = {a.attrs["name"]: self._chunks(name, a) for a in found}
            except Exception as error:  # of JSON, or of Zarr, of any kind
                raise DamagedCheckpoint(f"{self.path}: the group {name} is damaged") from error
        return self._arrays[name]

    def variable(self, group: str, name: str) -> Chunks:
        """One of them.

        Raises:
            DamagedCheckpoint: If it is not there.
        """
        arrays = self.group(group)
        if name not in arrays:
            raise DamagedCheckpoint(f"{self.path}: there is no '{name}' in the group {group}")
        return arrays[name]

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
                sizes = room, _CHUNK_BYTES, _LONGEST_CHUNK
                place = self._root.require_group(group)
                array = new_array(place, name, value, rows, sizes, plates.get(name, {}))
                arrays[name] = self._chunks(group, array)
                self._files.append(self.path / group / array.basename / "zarr.json")
        stop = first + max(value.shape[1] for value in values.values())
        if any(stop > arrays[name].array.shape[1] for name in values):
            self.resize(group, room if room >= stop else 2 * stop)
        for name, value in values.items():
            self._files += arrays[name].write(rows, first, value)

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

    def read(self, group: str, name: str, chains: slice, draws: slice) -> np.ndarray:
        """Some draws of some chains, of a variable."""
        lies = self.variable(group, name)
        try:
            return lies.array[chains, draws]
        except Exception as error:
            first = lies.first_damaged(draws.stop, None)
            raise DamagedCheckpoint(
                f"{self.path}: the draws of '{name}' from {first} on are not as they were written"
            ) from error

    def first_damaged(self, group: str, draws: int, chain: int | None, names: Iterable[str]) -> int:
        """The first draw that is not as it was written, of all chains or one; how many if none.

        Arguments:
            group: Of which group.
            draws: How many are looked at.
            chain: Of which chain, where these lie apart.
            names: Variables that there have to be.
        """
        try:
            arrays = self.group(group)
        except DamagedCheckpoint:
            return 0
        if not set(names) <= arrays.keys():
            return 0
        return min((c.first_damaged(draws, chain) for c in arrays.values()), default=draws)

    def save(self, words: Mapping[str, Any], arrays: list[np.ndarray], *, lasting: bool) -> None:
        """Writes a state, after the draws that it counts; forgets older ones but for lasting ones.

        The disk takes its time meanwhile; whether all went well is known by :meth:`settle`.

        Arguments:
            words: What is said of it.
            arrays: What these refer to.
            lasting: Whether it is kept, as that at the end of warm-up is.
        """
        self.settle()
        there = {group: list(variables) for group, variables in self._arrays.items()}
        state = packed({**words, "variables": there}, arrays)
        thread = ThreadPoolExecutor(1)
        self._pending = thread.submit(self._finish, state, lasting)
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
        number = self._kept[-1][0] + 1 if self._kept else 1
        write_state(self._root, self.path, number, state)
        self._kept.append((number, lasting))
        plain = [number for number, lasts in self._kept if not lasts]
        for old in plain[:-_KEPT_STATES]:
            forget_state(self.path, old)
            self._kept.remove((old, False))

    def states(self) -> Iterator[tuple[int, Saved | DamagedCheckpoint]]:
        """All states that were written whole, the latest first; of damaged ones, the error."""
        return read_states(self._root, self.path)

    def forget_draws(self, group: str, chain: int, draws: int) -> None:
        """Removes what is beyond so many draws of a chain (and of those with it), whole or not."""
        try:
            for chunks in self.group(group).values():
                chunks.forget(chain, draws)
        except DamagedCheckpoint:
            if draws:
                raise
            shutil.rmtree(self.path / group, ignore_errors=True)

    def go_on_from(self, state: Saved, lasting: Mapping[int, bool]) -> None:
        """Takes a state for the latest: what came after it will be made again."""
        for number in list(lasting):
            if number > state.number:
                forget_state(self.path, number)
        self._kept = sorted((n, lasts) for n, lasts in lasting.items() if n <= state.number)
        for left in self.path.rglob("*.partial"):  # of a write that was cut off
            left.unlink(missing_ok=True)
