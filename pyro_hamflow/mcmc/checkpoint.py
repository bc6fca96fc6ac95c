"""Checkpoints: what is written of a run now and then.

A state holds all that the next iteration depends on (:mod:`~pyro_hamflow.mcmc.snapshot`, and random
states), so that a run that is taken up (:mod:`~pyro_hamflow.mcmc.resume`) makes the draws that it
would have made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_hamflow.mcmc.chains import Chains, Rows
from pyro_hamflow.mcmc.draws import Draws, Record
from pyro_hamflow.mcmc.frozen import freeze
from pyro_hamflow.mcmc.identity import digest_of, plates_of, random_states, structure_of
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.snapshot import Frozen, found_words, kernel_words, source_words
from pyro_hamflow.mcmc.storable import Unstorable
from pyro_hamflow.mcmc.store import Store
from pyro_hamflow.mcmc.stored_draws import stored_draws
from pyro_hamflow.mcmc.writer import GROUPS, WARM, Writer
from pyro_hamflow.model.kinds import Kwargs
from pyro_hamflow.model.potential import Potential


@dataclass
class Progress:
    """How far a run has come, beside its chains.

    Attributes:
        settings: What the run was set up with, as plain values and tensors.
        chain: Which chain moves, where one moves after the other.
        ended: How many draws of each chain that has ended are kept, and of its warm-up.
        heard: What the kernel has said so far.
        warmup_steps: How many iterations of warm-up were made.
        warmup_time: Seconds of warm-up.
        sampling_time: Seconds of drawing.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    chain: int | None = None
    ended: list[list[int]] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    warmup_steps: int = 0
    warmup_time: float = 0.0
    sampling_time: float = 0.0


class Checkpoints(Writer):
    """Writes a run's draws and states.

    Arguments:
        store: Where to.
        every: How many seconds lie between two.
        num_chains: How many chains the run has in all.
    """

    def __init__(self, store: Store, every: float, num_chains: int) -> None:
        super().__init__(store, every, num_chains)
        self._was_warming: bool | None = None
        self._place: tuple[int | None, int, int] | None = None
        self._data: str | None = None  # a digest, which takes time where they are many

    def is_due(self, kernel: Kernel) -> bool:
        """Whether it is time, or warm-up has just ended."""
        over = self._was_warming is True and not kernel.warming
        self._was_warming = kernel.warming
        return over or self.is_time

    def save(
        self,
        kernel: Kernel,
        chains: Chains,
        run: Progress,
        args: Sequence[Any],
        kwargs: Kwargs,
        *,
        first: bool = False,
        waits: bool = False,
    ) -> None:
        """Writes all draws since the last time, and the state; says it if that failed.

        Arguments:
            kernel: Where it stands.
            chains: Likewise.
            run: Likewise.
            args: The model's arguments.
            kwargs: Its keyword arguments.
            first: Whether the run has just begun: then it ends where nothing can be written.
            waits: Whether to wait for the disk; what is known of it the next time, if not.
        """
        self.store.refuse_moved()
        if not self.is_settled():
            self._place = None
        place = (run.chain, chains.iteration, chains.kept.made)
        if place == self._place:
            return
        write = partial(self._write, kernel, chains, run, args, kwargs)
        if self.attempt(write, first=first, waits=waits):
            self._place = place

    def _write(
        self,
        kernel: Kernel,
        chains: Chains,
        run: Progress,
        args: Sequence[Any],
        kwargs: Kwargs,
    ) -> None:
        if chains.state is None:
            raise RuntimeError("the chains have not begun")
        rows = self.rows(run.chain)
        for prefix, record in ((WARM, chains.warm), ("", chains.kept)):
            if len(record):
                place = rows, record.stored, record.room
                write_draws(self.store, prefix, kernel.potential, record.stacked(), *place)
                record.forget()
        if self._data is None:
            self._data = digest_of(kernel.potential, args, kwargs)
        words, tables = said_of_run(kernel, self._data, run, self.num_chains)
        tables |= {
            "source": source_words(kernel),
            "found": found_words(kernel, chains.state),
            "random": freeze(random_states(), {}),
        }
        lasting = not kernel.warming and chains.kept.made == 0
        words |= {
            "lasting": lasting,
            "iteration": chains.iteration,
            "kept": [chains.kept.made, chains.kept.stored, chains.kept.divergences],
            "warm": [chains.warm.made, chains.warm.stored, chains.warm.divergences],
            "local": None if chains.kept.keep is None else sorted(chains.kept.keep),
        }
        arrays: list[np.ndarray] = []
        words |= {name: placed(frozen, arrays) for name, frozen in tables.items()}
        self.store.save(words, arrays, lasting=lasting)

    def rows(self, chain: int | None) -> Rows:
        """The rows of the store that chains have: all at once, or one, which lies apart."""
        if chain is None:
            return Rows(0, self.num_chains, self.num_chains, self.num_chains)
        return Rows(chain, chain + 1, self.num_chains, 1)


def said_of_run(
    kernel: Kernel, data: str, run: Progress, num_chains: int
) -> tuple[dict[str, Any], dict[str, Frozen]]:
    """What a state says of the whole run, as words, and as tables; of data, a digest."""
    tables = {"settings": freeze(run.settings, {})}
    unstorable = None
    try:
        tables["kernel"] = kernel_words(kernel)
    except Unstorable as error:
        unstorable = str(error)
    words = {
        "num chains": num_chains,
        "unstorable": unstorable,
        "kernel class": type(kernel).__name__,
        "structure": structure_of(kernel.potential),
        "data": data,
        "run": {name: part for name, part in vars(run).items() if name != "settings"},
        "process": [str(torch.get_default_dtype()), torch.get_num_threads()],
    }
    return words, tables


def placed(frozen: Frozen, arrays: list[np.ndarray]) -> list[Any]:
    """A table, and where its arrays are: they are put behind those that are there."""
    table, parts = frozen
    arrays += parts
    return [table, len(arrays) - len(parts), len(arrays)]


def write_draws(
    store: Store, prefix: str, potential: Potential, draws: Draws, rows: Rows, first: int, room: int
) -> None:
    """Writes draws of chains from a place on, with their statistics, and in their supports.

    Arguments:
        store: Where to.
        prefix: Before the names of groups.
        potential: Tells the supports.
        draws: The draws.
        rows: The chains.
        first: How many draws of each there are already.
        room: How many there may be in the end, as far as is known.
    """
    sites = potential.constrain(draws.position.to(potential.example.device))
    parts = ({"position": draws.position}, draws.stats, sites | dict(draws.local))
    plates = plates_of(potential)
    for group, values in zip(GROUPS, parts, strict=True):
        arrays = {name: _array(value) for name, value in values.items()}
        if arrays:
            store.append(prefix + group, arrays, rows, first, room, plates)


def _array(value: Tensor) -> np.ndarray:
    plain = value.detach().cpu()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()


def collected(
    checkpoints: Checkpoints, records: Sequence[Record], *, at_once: bool, prefix: str = ""
) -> Draws:
    """All draws of chains: those that were written, and those that are still in memory.

    Arguments:
        checkpoints: Where they were written.
        records: Of all chains, which move at once; or of each.
        at_once: Whether they do.
        prefix: Before the names of groups.
    """
    checkpoints.is_settled()
    store, number, local = checkpoints.store, checkpoints.num_chains, sorted(records[0].keep or ())
    if not any(len(record) for record in records):
        rows = range(number) if at_once else range(len(records))
        shortest = min(record.stored for record in records)
        return stored_draws(store, prefix, rows, shortest, local)

    def of(record: Record, rows: range) -> Draws:
        if not record.stored:
            return record.stacked()
        written = stored_draws(store, prefix, rows, record.stored, local)
        return Draws.follow([written, record.stacked()] if len(record) else [written])

    if at_once:
        return of(records[0], range(number))
    return Draws.join([of(record, range(i, i + 1)) for i, record in enumerate(records)])
