"""Phases: stretches of a run, each a transition and what adapts it.

A run goes from phase to phase: one that finds step size and mass, then one that draws; or one that
gathers true gradients, one that explores along a network, one that tries it, one that draws. Each
phase makes the one that follows it, and passes on what it has found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pyro_hamflow.mcmc.transitions.base import (
    Block,
    Info,
    ManyAtOnce,
    State,
    Transition,
    Tuning,
)
from pyro_hamflow.mcmc.transitions.trajectories import Trajectories


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
        before: How many iterations of warm-up were made before those that are counted here.
        hidden: Whether what precedes iterations shows nothing of how far it has come.
        pools: Whether warm-up waits, where it can, for what that of other chains has found.
        trajectory_steps: How many steps trajectories take, where that is known.
    """

    kernel: str
    num_chains: int
    warmup_steps: int
    most_warmup_steps: int | None = None
    num_draws: int | None = None
    messages: list[str] = field(default_factory=list)
    before: int = 0
    hidden: bool = True
    pools: bool = False
    trajectory_steps: float = 0.0

    def say(self, sentence: str, *, first: bool = False) -> None:
        """Adds a message, or puts it before all others; one that was said before is moved."""
        message = f"{self.kernel}: {sentence}"
        if message in self.messages:
            self.messages.remove(message)
        self.messages.insert(0 if first else len(self.messages), message)


class Phase(Protocol):
    """A stretch of a run.

    Attributes:
        transition: The move that it makes.
    """

    transition: Transition

    @property
    def tuning(self) -> Tuning | None:
        """The step size and the mass found so far; none if the move takes no steps."""

    @property
    def adapting(self) -> bool:
        """Whether something still changes, so that its states are not kept as draws."""

    @property
    def remaining(self) -> int:
        """How many iterations of warm-up are still to come, as far as is known."""

    def advance(self, state: State) -> tuple[State, Info]:
        """Moves all chains once; tunes what is tuned."""

    def successor(self, state: State) -> tuple[Phase, State] | None:
        """The next phase and its first state, once this one is over; none before."""


@dataclass(frozen=True)
class Moves:
    """Moves that have been tuned.

    Arguments:
        transition: The move.
        tuning: What it is tuned to.
        trajectories: How its trajectories end.
    """

    transition: Transition
    tuning: Tuning
    trajectories: Trajectories

    def __call__(self, state: State) -> tuple[State, Info]:
        """Moves all chains once."""
        steps = self.trajectories.draw_num_steps(self.tuning.step_size)
        return self.transition.step(state, self.tuning, steps)

    def many(self, state: State, most: int) -> tuple[State, Block] | None:
        """Moves all chains up to so many times in one call; none if the move cannot do that."""
        if not isinstance(self.transition, ManyAtOnce):
            return None
        count = min(most, self.transition.draws_at_once())
        steps = [self.trajectories.draw_num_steps(self.tuning.step_size) for _ in range(count)]
        return self.transition.block(state, self.tuning, steps)


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
