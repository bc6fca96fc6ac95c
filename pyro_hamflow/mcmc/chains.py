"""Chains that move together: where they are, how far they have come, what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyro_hamflow.mcmc.adaptation.base import Phase
from pyro_hamflow.mcmc.draws import Record
from pyro_hamflow.mcmc.transitions.base import State


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
