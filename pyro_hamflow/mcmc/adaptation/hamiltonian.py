"""The Hamiltonian half of a kernel: how its trajectories end, and what warm-up finds for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.base import RunPlan
from pyro_hamflow.mcmc.adaptation.estimator import EstimatorTuning
from pyro_hamflow.mcmc.adaptation.metric import first_scales
from pyro_hamflow.mcmc.adaptation.step_and_mass import StepAndMass
from pyro_hamflow.mcmc.adaptation.tune import Tune
from pyro_hamflow.mcmc.transitions.base import State, Transition
from pyro_hamflow.mcmc.transitions.trajectories import Trajectories
from pyro_hamflow.model.potential import Potential


class Hamiltonian:
    """How trajectories end, and what warm-up finds for them.

    Arguments:
        trajectories: How they end.
        step_and_mass: What is tuned, and how.
        estimator: What is tuned of a likelihood estimate, if there is one.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        step_and_mass: StepAndMass,
        estimator: EstimatorTuning | None = None,
    ) -> None:
        self.trajectories = trajectories
        self.step_and_mass = step_and_mass
        self.estimator = estimator

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, in plain values."""
        return {
            "target_accept_prob": self.step_and_mass.target_accept_prob,
            "full_mass": self.step_and_mass.full_mass,
            **self.trajectories.settings,
            **({} if self.estimator is None else self.estimator.settings),
        }

    def first_phase(
        self,
        potential: Potential,
        transition: Transition,
        plan: RunPlan,
        position: Tensor,
        noise: Tensor,
        *,
        kinetic: GaussianKinetic | None = None,
        phase: Callable[..., Tune] = Tune,
        may_go_on: bool = True,
        pools: bool = False,
    ) -> tuple[Tune, State]:
        """The phase that tunes, from where chains start, and the first state.

        Arguments:
            potential: The target.
            transition: The move.
            plan: What the run is to be.
            position: Where chains start.
            noise: Their noise.
            kinetic: The first kinetic energy, if it is known; the scales of the first gradients
                where it is the identity.
            phase: The kind of phase.
            may_go_on: Whether warm-up may take longer than is planned.
            pools: Whether it waits for what that of other chains has found.
        """
        step_and_mass = self.step_and_mass
        state = transition.state_at(position, noise)
        kinetic = kinetic or step_and_mass.first_kinetic(potential)
        if plan.warmup_steps and step_and_mass.adapt_mass_matrix and kinetic.is_identity:
            scales = first_scales(transition.target, position, noise)
            kinetic = GaussianKinetic(scales.diag() if kinetic.is_dense else scales)
        most = plan.most_warmup_steps if may_go_on and step_and_mass.adapts else None
        tuning = step_and_mass.first_tuning(kinetic)
        steps = plan.warmup_steps
        warmup = step_and_mass.warm_up(potential, tuning, steps, most_steps=most, pools=pools)
        estimator = self.estimator if potential.noise_sites else None
        begun = phase(transition, self.trajectories, step_and_mass, warmup, plan, estimator)
        if step_and_mass.adapt_step_size and step_and_mass.step_size is None:
            begun.restart(state)
        return begun, state
