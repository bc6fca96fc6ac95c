"""Chains that move together: where they are, how far they have come, what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from pyro_hamflow.mcmc.adaptation.base import Phase
from pyro_hamflow.mcmc.draws import Record
from pyro_hamflow.mcmc.transitions.base import State


class Rows(NamedTuple):
    """Chains of a store.

    Attributes:
        start: The number of the first one.
        stop: That of the one after the last.
        number: How many there are in all.
        together: How many of them lie in a chunk.
    """

    start: int
    stop: int
    number: int
    together: int


@dataclass
class Chains:
    """Chains that move together, or one that moves alone.

    Attributes:
        label: What is added to the names of stages.
        num_chains: How many there are.
        phase: The phase that their next iteration is of.
        state: Where they are; none before they have begun.
        warm: What is kept of their warm-up.
        kept: Their draws.
        iteration: How many iterations of warm-up they have made.
        is_whole: Whether their latest iteration was made to its end, so that they can go on.
    """

    label: str
    num_chains: int
    phase: Phase | None = None
    state: State | None = None
    warm: Record = field(default_factory=Record)
    kept: Record = field(default_factory=Record)
    iteration: int = 0
    is_whole: bool = True

    def begun(self) -> tuple[Phase, State]:
        """The phase and the state of chains that have begun."""
        if self.phase is None or self.state is None:
            raise RuntimeError("the chains have not begun: begin them first")
        return self.phase, self.state
