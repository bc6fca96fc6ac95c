"""Phases: stretches of a run, each a transition and what adapts it.

A run goes from phase to phase: one that finds step size and mass, then one that draws; or one that
gathers true gradients, one that explores along a network, one that tries it, one that draws. Each
is told by its successor: what a phase has found is all that the next one knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pyro_hamflow.mcmc.transitions.base import Info, State, Transition, Tuning


@dataclass
class RunPlan:
    """What a run is to be, as far as is known before it.

    Attributes:
        kernel: The name of the kernel, which its messages begin with.
        num_chains: How many chains move at once.
        warmup_steps: How many iterations to tune for, at least.
        most_warmup_steps: How many there may be; as many as must be if not given.
        num_draws: How many draws of each chain follow, where the runner tells.
        messages: What the user is to be told, in a sentence each.
    """

    kernel: str
    num_chains: int
    warmup_steps: int
    most_warmup_steps: int | None = None
    num_draws: int | None = None
    messages: list[str] = field(default_factory=list)

    def say(self, sentence: str, *, first: bool = False) -> None:
        """Adds a message, or puts it before all others."""
        self.messages.insert(0 if first else len(self.messages), f"{self.kernel}: {sentence}")


class Phase(Protocol):
    """A stretch of a run.

    Attributes:
        transition: The move that it makes.
    """

    transition: Transition

    @property
    def tuning(self) -> Tuning | None:
        """What the move is tuned to, as far as it is found; nothing of a move without steps."""

    @property
    def adapting(self) -> bool:
        """Whether its draws are thrown away, for something still changes."""

    @property
    def remaining(self) -> int:
        """How many iterations of warm-up are to come, as far as is known."""

    def advance(self, state: State) -> tuple[State, Info]:
        """One iteration of all chains."""

    def successor(self, state: State) -> tuple[Phase, State] | None:
        """What follows, and the state that it begins with, once this phase is over."""


class Sample:
    """The last phase: nothing changes any more, and draws are kept.

    Arguments:
        transition: The move.
        advance: One iteration of it.
        tuning: What it is tuned to.
    """

    adapting = False
    remaining = 0

    def __init__(
        self,
        transition: Transition,
        advance: Callable[[State], tuple[State, Info]],
        tuning: Tuning | None = None,
    ) -> None:
        self.transition = transition
        self.advance = advance
        self.tuning = tuning

    def successor(self, state: State) -> None:
        return None
