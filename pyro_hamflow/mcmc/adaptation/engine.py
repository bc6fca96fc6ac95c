"""What makes the draws of a run, and why."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyro_hamflow.mcmc.adaptation.base import RunPlan
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.engines.choice import Choice, check_engine, choose_engine
from pyro_hamflow.programs.engines.native import Looks


class Engine:
    """What makes the draws of a run: chosen for each target that the run comes to.

    Arguments:
        wanted: ``"torch"``, ``"native"`` or ``"auto"``.

    Attributes:
        wanted: The same.
        chosen: Which it is, and why.

    Raises:
        ValueError: If there is no such engine.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = check_engine(wanted)
        self.chosen = Choice("torch", "asked for")

    def is_native(
        self,
        potential: Potential,
        position: Tensor,
        plan: RunPlan,
        steps: int,
        kind: str = "gradient",
        looks: Callable[[], Looks] | None = None,
    ) -> bool:
        """Whether machine code is to move chains; tells the user where it was asked for in vain.

        Arguments:
            potential: The target.
            position: Where chains start.
            plan: What the run is to be.
            steps: How many steps a trajectory takes, roughly, as far as is known.
            kind: Of the gradient that trajectories follow; ``"value"`` if they follow none.
            looks: What the target says beside its potential, where its noise moves.
        """
        draws = plan.num_draws
        iterations = None if draws is None else plan.warmup_steps + draws
        noise = potential.vectors(1)[1][0]
        gradient = kind != "value"
        graph = None
        if self.wanted != "torch":
            graph = potential.programs.base(kind if gradient else "gradient")
        choice = choose_engine(
            self.wanted,
            graph,
            position,
            noise,
            iterations,
            looks,
            gradient=gradient,
            steps=max(steps, round(plan.trajectory_steps)),
        )
        self.take(choice, plan)
        return self.chosen.name == "native"

    def take(self, choice: Choice, plan: RunPlan) -> None:
        """Takes an engine; says so where it is not the one that was asked for."""
        if choice.declined and choice != self.chosen:
            plan.say(f"draws are made by torch, for {choice.reason}.")
        self.chosen = choice
