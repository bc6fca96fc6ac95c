"""The groups that the chains of a run are spread in, and what has come of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.segment import Saved, Segment


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
        losses: How many workers they have lost while they were alone.
        fault: Why they ended early, in words.
    """

    first: int
    num_chains: int
    task: bytes
    planned: int
    draws: list[Draws] = field(default_factory=list)
    warm: list[Draws] = field(default_factory=list)
    saved: Saved | None = None
    latest: Segment | None = None
    losses: int = 0
    fault: str | None = None
    warmup_time: float = 0.0
    sampling_time: float = 0.0

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
        self.latest, self.saved = segment, segment.saved
        self.warmup_time += segment.warmup_time
        self.sampling_time += segment.sampling_time


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

    def kept(length: int) -> int:
        return length * sum(group.num_chains for group in groups if group.made >= length)

    length = max({group.made for group in groups}, key=kept)
    return [group for group in groups if group.made >= max(1, length)]


def joined(groups: list[Group], part: Callable[[Group], list[Draws]]) -> Draws:
    """The draws of all chains of some groups."""
    return Draws.join([Draws.follow(part(group)) for group in groups])
