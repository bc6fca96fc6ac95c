"""Checkpoints of a run whose groups of chains move in workers: their draws, and where each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from pyro_hamflow.mcmc.chains import Rows
from pyro_hamflow.mcmc.checkpoint import Progress, placed, said_of_run, write_draws
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.frozen import freeze, thaw
from pyro_hamflow.mcmc.groups import Group, shortest
from pyro_hamflow.mcmc.identity import digest_of
from pyro_hamflow.mcmc.moving import Mover
from pyro_hamflow.mcmc.segment import Saved, Segment
from pyro_hamflow.mcmc.snapshot import Frozen
from pyro_hamflow.mcmc.store import Store
from pyro_hamflow.mcmc.stored_draws import stored_draws
from pyro_hamflow.mcmc.writer import WARM, Writer

_FROZEN = ("source", "found")


@dataclass
class Division:
    """How the chains of a run are divided into groups.

    Attributes:
        seed: What their random numbers are made of.
        together: How many chains a group has at most.
    """

    seed: int
    together: int


class GroupCheckpoints(Writer):
    """Writes the draws of groups, and where each is.

    Arguments:
        store: Where to.
        every: How many seconds lie between two times.
        mover: Of all chains.
        settings: What a run that goes on is set up with.
        division: How chains are divided.
    """

    def __init__(
        self,
        store: Store,
        every: float,
        mover: Mover,
        settings: dict[str, Any],
        division: Division,
    ) -> None:
        super().__init__(store, every, mover.num_chains)
        self._mover = mover
        self._division = division
        data = digest_of(mover.kernel.potential, mover.args, mover.kwargs)
        self._said = said_of_run(mover.kernel, data, Progress(settings), mover.num_chains)
        self._place: list[tuple[int, int]] = []

    def save(self, groups: Sequence[Group], *, first: bool = False) -> None:
        """Writes what has come of groups since the last time, and where they are."""
        self.store.refuse_moved()
        place = [(group.iteration, group.made) for group in groups]
        if place == self._place:
            return
        if self.attempt(partial(self._write, groups, is_first=first), first=first, waits=True):
            self._place = place

    def draws(self, groups: Sequence[Group], prefix: str = "") -> Draws:
        """All draws of groups, or with a prefix those of the warm-up, cut to the shortest."""
        if not any(group.parts(prefix) for group in groups):
            chains = [chain for group in groups for chain in group.numbers]
            least = min(group.written[prefix] for group in groups)
            return stored_draws(self.store, prefix, chains, least, _local(groups))
        return Draws.join([self._of_group(group, prefix) for group in groups])

    def end(self, groups: Sequence[Group]) -> None:
        """Gives up room that was not needed, and lets other processes have the store."""
        self.close(max(group.written[""] for group in groups))

    def _of_group(self, group: Group, prefix: str) -> Draws:
        written, parts = group.written[prefix], group.parts(prefix)
        if not written:
            return Draws.follow(parts)
        return Draws.follow(
            [stored_draws(self.store, prefix, group.numbers, written, _local([group])), *parts]
        )

    def _write(self, groups: Sequence[Group], *, is_first: bool) -> None:
        for group in groups:
            for prefix in (WARM, ""):
                self._write_draws(group, prefix)
        said, tables = self._said
        arrays: list[np.ndarray] = []
        furthest = max(groups, key=lambda group: (group.made, group.iteration))
        words = said | {
            "lasting": is_first,
            "run": said["run"] | self._times(groups),
            "iteration": furthest.iteration,
            "kept": [furthest.made, furthest.written[""], 0],
            "warm": [furthest.iteration, furthest.written[WARM], 0],
            "division": asdict(self._division),
            "groups": [self._words(group, arrays) for group in groups],
            "places": placed(freeze([_place(group) for group in groups], {}), arrays),
            **{name: placed(frozen, arrays) for name, frozen in tables.items()},
        }
        self.store.save(words, arrays, lasting=is_first)

    def _write_draws(self, group: Group, prefix: str) -> None:
        """Writes what a group's draws are up to where it is; later ones would be made again."""
        if group.saved is None:
            return
        count = group.counts(prefix) - group.written[prefix]
        if not count:
            return
        rows = Rows(group.first, group.numbers.stop, self.num_chains, self._division.together)
        draws, mover = Draws.follow(group.parts(prefix)), self._mover
        room = 0 if prefix else mover.num_samples // mover.thin
        place = rows, group.written[prefix], room
        potential = mover.kernel.potential
        write_draws(self.store, prefix, potential, draws.between(0, count), *place)
        group.forget(prefix, count)

    def _times(self, groups: Sequence[Group]) -> dict[str, Any]:
        return {
            "warmup_steps": max(group.iteration for group in groups),
            "warmup_time": sum(group.warmup_time for group in groups),
            "sampling_time": sum(group.sampling_time for group in groups),
        }

    def _words(self, group: Group, arrays: list[np.ndarray]) -> dict[str, Any]:
        saved, latest = group.saved, group.latest
        words: dict[str, Any] = {"first": group.first, "written": dict(group.written)}
        if saved is None or latest is None:
            return words
        return words | {
            **{name: placed(getattr(saved, name), arrays) for name in _FROZEN},
            "made": saved.kept.made,
            "left": latest.warmup_left,
            "messages": latest.messages,
            "times": [group.warmup_time, group.sampling_time],
        }


def _place(group: Group) -> list[Any] | None:
    """Where a group is, but for its kernel."""
    saved = group.saved
    if saved is None:
        return None
    at = [saved.random, saved.iteration, saved.warm, saved.kept, saved.findings]
    return [*at, group.findings]


def take_up_places(
    groups: Sequence[Group], words: dict[str, Any], arrays: list[np.ndarray]
) -> None:
    """Puts groups where they were when these words were said of them."""

    def table(place: list[Any]) -> Frozen:
        entries, start, stop = place
        return entries, arrays[start:stop]

    places = thaw(*table(words["places"]), {})
    for group, place, said in zip(groups, places, words["groups"], strict=True):
        if place is None:
            continue
        *at, findings = place
        saved = Saved(table(said["source"]), table(said["found"]), *at)
        group.written.update(said["written"])
        group.warmup_time, group.sampling_time = said["times"]
        counts = saved.iteration, said["made"], said["left"], list(said["messages"])
        group.take(Segment(None, None, saved, *counts, 0.0, 0.0, None))
        group.findings = findings


def written_rows(words: dict[str, Any], prefix: str) -> list[tuple[int, int]]:
    """The first chain of each group, and how many draws of it were written."""
    return [(group["first"], group["written"][prefix]) for group in words["groups"]]


def whole_rows(words: dict[str, Any], num_chains: int) -> tuple[list[int], int, int]:
    """Which chains are shown of a run under way, how many draws of each and of its warm-up."""
    firsts = [group["first"] for group in words["groups"]]
    sizes = [stop - first for first, stop in zip(firsts, [*firsts[1:], num_chains], strict=True)]
    counts = [group["written"][""] for group in words["groups"]]
    least = shortest(list(zip(sizes, counts, strict=True)))
    shown = [i for i, count in enumerate(counts) if count >= least]
    chains = [firsts[i] + k for i in shown for k in range(sizes[i])]
    return chains, least, min(words["groups"][i]["written"][WARM] for i in shown)


def _local(groups: Sequence[Group]) -> list[str]:
    """The names of recovered sites that are kept."""
    return sorted({name for g in groups if g.saved for name in g.saved.kept.keep or ()})
