"""The groups that the chains of a run are spread in, and what has come of them all."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pyro_hamflow.mcmc.adaptation.window import Findings
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.segment import Saved, Segment
from pyro_hamflow.mcmc.writer import WARM


@dataclass
class Group:
    """Some chains that move together.

    Arguments:
        first: The number of the first one.
        num_chains: How many there are.
        task: Their packed :class:`~pyro_hamflow.mcmc.segment.Task`.
        planned: How many iterations of warm-up they are to make, as far as is known.

    Attributes:
        draws: Of each segment.
        warm: The same of the warm-up.
        saved: Where they are; none at the beginning.
        latest: Their latest segment.
        findings: What the warm-up of all groups has found, which the next segment goes on with.
        losses: How many workers they have lost while they were alone.
        fault: Why they ended early, in words.
        written: How many draws of each are in a store, and no more here: of the run, and of the
            warm-up, by the prefix of their groups there.
    """

    first: int
    num_chains: int
    task: bytes
    planned: int
    draws: list[Draws] = field(default_factory=list)
    warm: list[Draws] = field(default_factory=list)
    saved: Saved | None = None
    latest: Segment | None = None
    findings: Findings | None = None
    losses: int = 0
    fault: str | None = None
    warmup_time: float = 0.0
    sampling_time: float = 0.0
    written: dict[str, int] = field(default_factory=lambda: {"": 0, WARM: 0})

    @property
    def numbers(self) -> range:
        """The numbers of the chains."""
        return range(self.first, self.first + self.num_chains)

    @property
    def waits(self) -> bool:
        """Whether they wait for what the warm-up of all groups has found."""
        awaits = self.saved is not None and self.saved.findings is not None
        return awaits and self.findings is None

    @property
    def made(self) -> int:
        """How many draws they have made."""
        return 0 if self.latest is None else self.latest.made

    @property
    def iteration(self) -> int:
        """How many iterations of warm-up they have made."""
        return 0 if self.latest is None else self.latest.iteration

    @property
    def warmup_steps(self) -> int:
        """How many there are, as far as is known."""
        left = self.planned if self.latest is None else self.latest.warmup_left
        return self.iteration + left

    @property
    def name(self) -> str:
        last = self.first + self.num_chains - 1
        return f"Chain {last}" if self.num_chains == 1 else f"Chains {self.first} to {last}"

    def take(self, segment: Segment) -> None:
        """Takes in what a segment has led to."""
        self.draws += [] if segment.draws is None else [segment.draws]
        self.warm += [] if segment.warm is None else [segment.warm]
        self.latest = segment
        if segment.saved is not None:
            self.saved, self.findings = segment.saved, None
        self.warmup_time += segment.warmup_time
        self.sampling_time += segment.sampling_time

    def parts(self, prefix: str) -> list[Draws]:
        """The draws of the run, or with a prefix those of the warm-up, that are in no store."""
        return self.warm if prefix else self.draws

    def counts(self, prefix: str) -> int:
        """How many draws of each are kept, up to where the group is."""
        if self.saved is None:
            return 0
        return (self.saved.warm if prefix else self.saved.kept).count

    def forget(self, prefix: str, count: int) -> None:
        """Forgets so many draws that have been written."""
        self.written[prefix] += count
        parts = self.parts(prefix)
        rest = Draws.follow(parts).between(count, None)
        parts[:] = [rest] if rest.extent[1] else []


def split(num_chains: int, most: int) -> list[range]:
    """The numbers of the chains of each group, so many at most.

    Example:
        >>> split(5, 2)
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(first, min(first + most, num_chains)) for first in range(0, num_chains, most)]


def seeds(seed: int, count: int) -> list[int]:
    """What the random numbers of each group begin with."""
    return [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(count)]


def complete(groups: list[Group]) -> list[Group]:
    """The groups whose draws are kept: cut to the shortest of them, they have the most draws."""
    length = shortest([(group.num_chains, group.made) for group in groups])
    return [group for group in groups if group.made >= max(1, length)]


def shortest(groups: list[tuple[int, int]]) -> int:
    """The length to which groups are cut, of so many chains and draws, so that most are kept.

    Example:
        >>> shortest([(2, 10), (1, 8), (4, 1)])
        8
    """

    def kept(length: int) -> int:
        return length * sum(chains for chains, made in groups if made >= length)

    return max({made for _, made in groups}, key=kept)
