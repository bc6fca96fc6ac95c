"""How trajectories end: after a length of time, where they turn back, or after a random step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from pyro_hamflow.checks import between, positive, whole
from pyro_hamflow.mcmc.transitions.base import Observe, ParameterTransition, Transition
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.native import NativeTransition, Stream
from pyro_hamflow.mcmc.transitions.native_estimate import NativeEstimateTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Refresh
from pyro_hamflow.mcmc.transitions.nuts import JointNUTSTransition, NUTSTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import JointTransition
from pyro_hamflow.mcmc.transitions.random_walk import RandomWalkTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.target import Target

_DEEPEST = 20  # doublings: a million points
# Steps of a trajectory before anything is known of it: so many times the root of the number of
# parameters, their mean over models, and not more than so many. Where four chains wait for the
# longest, 120 iterations of 24 models took 4 to 7 in two to four dimensions but once, where it was
# 603; 4 to 77 in up to 40, and 94 in 202; a thousand iterations took 3 to 31, and 17.
_STEPS_EACH, _MOST_STEPS = 6.0, 64


def _steps_in(dimension: int) -> int:
    return min(_MOST_STEPS, math.ceil(_STEPS_EACH * math.sqrt(dimension)))


class Trajectories(Protocol):
    """Transitions by trajectories that end in one way."""

    @property
    def kind(self) -> str:
        """What they follow: ``"gradient"``; or ``"value"``, where they follow none."""

    def parameter_transition(
        self, target: Target, num_chains: int, observe: Observe | None = None
    ) -> ParameterTransition:
        """The move of the parameters, noise held.

        Arguments:
            target: The target.
            num_chains: How many chains.
            observe: Is told of all steps.
        """

    def native_transition(self, target: Potential) -> NativeTransition:
        """The move of the parameters in machine code, noise held."""

    def native_estimate_transition(
        self, target: Potential, refresh: Refresh | None
    ) -> NativeEstimateTransition:
        """That of parameters and noise in machine code, one after the other or together.

        Arguments:
            target: The target.
            refresh: The move of the noise after that of the parameters; none if they move together.
        """

    def joint_transition(self, target: Target, num_chains: int) -> Transition:
        """The move of parameters and noise together."""

    def expected_steps(self, dimension: int) -> int:
        """How many steps a trajectory takes, roughly, before anything is known of it."""

    def draw_num_steps(self, step_size: float) -> int:
        """How many steps the next trajectories take, or may take at most."""

    def shortened(self, most: int) -> Trajectories:
        """The same, of so many steps at most; a number of steps that was asked for stays."""

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, in plain values."""


@dataclass(frozen=True)
class HMCTrajectories:
    """Trajectories that end after a length of time, or a number of steps.

    Arguments are those of :class:`~pyro_hamflow.HMC`.
    """

    trajectory_length: float | None
    num_steps: int | None
    jitter: float
    max_num_steps: int
    kind = "gradient"

    def __post_init__(self) -> None:
        if self.trajectory_length is not None:
            positive("trajectory_length", self.trajectory_length)
        between("jitter", self.jitter, 0.0, 1.0, ends="low")
        if self.num_steps is not None:
            whole("num_steps", self.num_steps, 1)
        whole("max_num_steps", self.max_num_steps, 1)

    @property
    def fixed_num_steps(self) -> int | None:
        """The number of steps of each trajectory, if that is what was given."""
        return self.num_steps if self.trajectory_length is None else None

    @property
    def length(self) -> float:
        """The mean time of a trajectory: a quarter of a turn, if it was not given."""
        return math.pi / 2 if self.trajectory_length is None else self.trajectory_length

    def parameter_transition(
        self, target: Target, num_chains: int, observe: Observe | None = None
    ) -> ParameterTransition:
        return HMCTransition(target, num_chains, observe)

    def native_transition(self, target: Potential) -> NativeTransition:
        return NativeTransition(target, None, Stream())

    def native_estimate_transition(
        self, target: Potential, refresh: Refresh | None
    ) -> NativeEstimateTransition:
        return NativeEstimateTransition(target, None, refresh, Stream())

    def joint_transition(self, target: Target, num_chains: int) -> Transition:
        return JointTransition(target, num_chains)

    def expected_steps(self, dimension: int) -> int:
        return self.fixed_num_steps or _steps_in(dimension)

    def draw_num_steps(self, step_size: float) -> int:
        if self.fixed_num_steps is not None:
            return self.fixed_num_steps
        factor = 1.0 + self.jitter * (2.0 * torch.rand(()).item() - 1.0)
        steps = round(self.length * factor / step_size)
        return max(1, min(steps, self.max_num_steps))

    def shortened(self, most: int) -> HMCTrajectories:
        return replace(self, max_num_steps=min(self.max_num_steps, most))

    @property
    def settings(self) -> dict[str, Any]:
        if self.fixed_num_steps is not None:
            return {"num_steps": self.fixed_num_steps}
        return {"trajectory_length": self.length, "jitter": self.jitter}


@dataclass(frozen=True)
class NUTSTrajectories:
    """Trajectories that end where they turn back, after so many doublings at most."""

    max_tree_depth: int
    kind = "gradient"

    def __post_init__(self) -> None:
        whole("max_tree_depth", self.max_tree_depth, 1, _DEEPEST)

    def parameter_transition(
        self, target: Target, num_chains: int, observe: Observe | None = None
    ) -> ParameterTransition:
        return NUTSTransition(target, num_chains, self.max_tree_depth, observe)

    def native_transition(self, target: Potential) -> NativeTransition:
        return NativeTransition(target, self.max_tree_depth, Stream())

    def native_estimate_transition(
        self, target: Potential, refresh: Refresh | None
    ) -> NativeEstimateTransition:
        return NativeEstimateTransition(target, self.max_tree_depth, refresh, Stream())

    def joint_transition(self, target: Target, num_chains: int) -> Transition:
        return JointNUTSTransition(target, num_chains, self.max_tree_depth)

    def expected_steps(self, dimension: int) -> int:
        return min(_steps_in(dimension), 2**self.max_tree_depth - 1)

    def draw_num_steps(self, step_size: float) -> int:
        return 2**self.max_tree_depth - 1

    def shortened(self, most: int) -> NUTSTrajectories:
        return NUTSTrajectories(min(self.max_tree_depth, (most + 1).bit_length() - 1))

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_tree_depth": self.max_tree_depth}


@dataclass(frozen=True)
class RandomSteps:
    """Single steps of a random walk."""

    kind = "value"

    def expected_steps(self, dimension: int) -> int:
        return 1

    def parameter_transition(
        self, target: Target, num_chains: int, observe: Observe | None = None
    ) -> ParameterTransition:
        return RandomWalkTransition(target)

    def native_transition(self, target: Potential) -> NativeTransition:
        return NativeTransition(target, None, Stream(), self.kind)

    def native_estimate_transition(
        self, target: Potential, refresh: Refresh | None
    ) -> NativeEstimateTransition:
        return NativeEstimateTransition(target, None, refresh, Stream(), walks=True)

    def joint_transition(self, target: Target, num_chains: int) -> Transition:
        raise NotImplementedError("a random walk has no joint move of parameters and noise")

    def draw_num_steps(self, step_size: float) -> int:
        return 1

    def shortened(self, most: int) -> RandomSteps:
        return self

    @property
    def settings(self) -> dict[str, Any]:
        return {}
