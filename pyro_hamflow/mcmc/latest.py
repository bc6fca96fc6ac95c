"""The latest state of a run that is whole, with all draws that it counts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pyro_hamflow.mcmc.checkpoint import Progress
from pyro_hamflow.mcmc.frozen import thaw
from pyro_hamflow.mcmc.group_checkpoints import written_rows
from pyro_hamflow.mcmc.packing import CheckpointError, DamagedCheckpoint
from pyro_hamflow.mcmc.resume import Found
from pyro_hamflow.mcmc.store import Store
from pyro_hamflow.mcmc.writer import GROUPS, WARM


@contextmanager
def latest(path: str | os.PathLike[str], at: int | None) -> Iterator[Found]:
    """The latest state of a run, or the one of a number, if it and its draws are whole.

    No other process may write to it meanwhile.

    Raises:
        DamagedCheckpoint: If it is not; says which one is.
    """
    store = Store(path)
    try:
        yield _latest(store, at)
    finally:
        store.close()


def _latest(store: Store, at: int | None) -> Found:
    lasting: dict[int, bool] = {}
    whole: list[Found] = []
    fault: str | None = None
    for number, saved in store.states():
        if isinstance(saved, DamagedCheckpoint):
            fault = fault or (f"state {number} is damaged" if not whole else None)
            lasting[number] = False
            continue
        lasting[number] = bool(saved.words.get("lasting"))
        run = saved.words["run"]
        settings, start, stop = saved.words["settings"]
        settings = thaw(settings, saved.arrays[start:stop], {})
        found = Found(store, saved, Progress(settings, **run), lasting)
        damaged = _damaged(found)
        if damaged is None:
            whole.append(found)
        elif not whole:
            fault = fault or damaged
    wanted = [found for found in whole if at in (None, found.saved.number)]
    if not wanted and at is not None:
        numbers = [found.saved.number for found in whole]
        raise CheckpointError(f"{store.path} has no whole state {at}: expected one of {numbers}")
    if fault is not None and at is None:
        raise DamagedCheckpoint(f"{store.path}: {fault}; {_offer(whole)}")
    if not wanted:
        raise CheckpointError(
            f"{store.path} has no state yet: the run ended before its first checkpoint; start anew"
        )
    return wanted[0]


def _damaged(found: Found) -> str | None:
    """What of a state's draws is not as it was written, if something is."""
    for prefix in ("", WARM):
        for group in GROUPS:
            for row, count in _written(found, prefix):
                names = found.saved.words.get("variables", {}).get(prefix + group, ())
                whole = found.store.first_damaged(prefix + group, count, row, names)
                if whole < count:
                    return f"draws from {whole} on are damaged in the group {prefix + group}"
    return None


def _written(found: Found, prefix: str) -> list[tuple[int | None, int]]:
    """How many draws a state counts of each chain that lies apart; of none in particular if all."""
    words, run = found.saved.words, found.progress
    if found.division is not None:
        return list(written_rows(words, prefix))
    stored = words["warm" if prefix else "kept"][1]
    if run.chain is None:
        return [(None, stored)]
    ended = [counts[bool(prefix)] for counts in run.ended[: run.chain]]
    return list(enumerate([*ended, stored]))


def _offer(whole: Sequence[Found]) -> str:
    if not whole:
        return "no earlier state is whole; draws before those can be read with xarray"
    number, words = whole[0].saved.number, whole[0].saved.words
    return (
        f"`at={number}` goes on from the last whole one, after {words['iteration']} iterations of "
        f"warm-up and {words['kept'][0]} draws"
    )
