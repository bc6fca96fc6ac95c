"""The moves of a sampler, apart from how they are tuned and run.

A *transition* takes the state of all chains to their next, leaving the target exactly invariant.
What the next move needs is in the :class:`State`; what only diagnostics need, in the :class:`Info`;
what warm-up adapts, in the :class:`Tuning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target

DIVERGENCE = 1000.0  # the error of the energy beyond which Stan and Pyro speak of one


class State(NamedTuple):
    """The state of all chains.

    Attributes:
        position: Parameters on the real line, of shape ``(chains, dimension)``.
        noise: Noise of the likelihood estimate, of shape ``(chains, noise_dimension)``.
        gradient: The potential's gradient in the position, and in the noise behind it for joint
            moves that need both; zeros for moves that keep none.
        evaluation: The potential, and the local sites recovered there.
    """

    position: Tensor
    noise: Tensor
    gradient: Tensor
    evaluation: Evaluation


class Info(NamedTuple):
    """What happened in one transition: to each chain, of shape ``(chains,)``, or to all alike.

    Attributes:
        accepted: Whether the proposal was accepted.
        acceptance_rate: Probability of acceptance.
        energy_error: By how much the Hamiltonian grew along the trajectory.
        diverging: Whether it grew without bound, or lost its number.
        energy: The Hamiltonian at the state that was kept; of parameters alone, without the noise.
        n_steps: Steps of the integrator.
        n_gradients: Gradients evaluated.
        n_densities: Densities evaluated without gradient.
        further: Statistics that not all moves have, by the names under which they come out:
            ``refresh_rate``, the share of the noise that was renewed after the parameters' move;
            ``tree_depth``, how often the trajectory doubled, and ``reached_max_treedepth``, whether
            it ended because it might not double again; ``surrogate_accepted``, whether a draw was
            taken that a surrogate led to, and ``surrogate_error``, by how much the surrogate
            misjudged the energy gained on the way there; of moves made of several,
            ``global_accepted`` and ``local_acceptance_rate`` and their like, by the parts' names.
    """

    accepted: Tensor
    acceptance_rate: Tensor
    energy_error: Tensor
    diverging: Tensor
    energy: Tensor
    n_steps: int | Tensor
    n_gradients: int | Tensor
    n_densities: int | Tensor
    further: Mapping[str, Tensor] = {}

    def adding(self, **further: Tensor) -> Info:
        """The same info with further statistics added."""
        return self._replace(further={**self.further, **further})


class Block(NamedTuple):
    """Many draws of all chains.

    Attributes:
        position: Of shape ``(chains, draws, dimension)``.
        value: The potential there, of shape ``(chains, draws)``.
        info: What happened in each transition, likewise.
        local: Recovered local sites, of shape ``(chains, draws, *)``.
        estimate: The log estimate of the likelihood, where there is one.
    """

    position: Tensor
    value: Tensor
    info: Info
    local: Mapping[str, Tensor] = {}
    estimate: Tensor | None = None


def padded(info: Info) -> Info:
    """The same with every statistic of shape ``(chains,)``, those of a surrogate filled in.

    Where no surrogate was followed, none was accepted and its error is NaN.
    """
    count = torch.zeros_like(info.accepted, dtype=torch.long)
    nothing = {
        "surrogate_accepted": torch.zeros_like(info.accepted),
        "surrogate_error": torch.full_like(info.energy, torch.nan),
    }
    return info._replace(
        n_steps=info.n_steps + count,
        n_gradients=info.n_gradients + count,
        n_densities=info.n_densities + count,
        further={**nothing, **info.further},
    )


class Tuning(NamedTuple):
    """What warm-up adapts.

    Attributes:
        step_size: The integrator's step.
        kinetic: The kinetic energy of the parameters' momenta.
        step_scale: What each chain's step size is multiplied by, of shape ``(chains,)``, at most
            one, while chains are on their way to the typical set; all ones if not given.
    """

    step_size: float
    kinetic: GaussianKinetic
    step_scale: Tensor | None = None

    def step_sizes(self, position: Tensor) -> Tensor:
        """The step of each chain, of shape ``(chains,)``, at positions ``(chains, dimension)``."""
        sizes = position.new_full((len(position),), self.step_size)
        return sizes if self.step_scale is None else sizes * self.step_scale.to(sizes)


class Transition(Protocol):
    """A move of all chains that leaves its target exactly invariant.

    Attributes:
        target: What it leaves invariant.
    """

    target: Target

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        """The state at positions ``(chains, dimension)`` and their noise."""

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        """Moves every chain once, by trajectories of ``num_steps`` steps, or of so many at most."""


class ParameterTransition(Transition, Protocol):
    """One move of all chains' parameters, with the noise held."""

    def refreshed(self, state: State, tuning: Tuning) -> State:
        """The state with potential and gradient computed anew, after its noise has changed."""


@runtime_checkable
class ManyAtOnce(Transition, Protocol):
    """A move that makes many draws of all chains in one call."""

    def draws_at_once(self) -> int:
        """How many draws the next call should make; they do not depend on it."""

    def block(self, state: State, tuning: Tuning, num_steps: list[int]) -> tuple[State, Block]:
        """As many draws as numbers of steps, with all that is kept of them."""


class Observe(Protocol):
    """Is told of every step of all chains' trajectories, in order."""

    def __call__(
        self, position: Tensor, value: Tensor, gradient: Tensor, wanted: Tensor, begins: Tensor
    ) -> None:
        """Sees one step.

        Arguments:
            position: Where chains are, of shape ``(chains, dimension)``.
            value: The potential there, of shape ``(chains,)``.
            gradient: Its gradient in the position.
            wanted: Whether the chain's trajectory had not ended before, of shape ``(chains,)``.
            begins: Whether the step does not follow the one before along a trajectory, likewise.
        """


class Decision(NamedTuple):
    """The outcome of a Metropolis test, each of shape ``(chains,)``."""

    accepted: Tensor
    acceptance_rate: Tensor
    energy_error: Tensor
    diverging: Tensor


def draw_uniform(num_chains: int, device: torch.device) -> Tensor:
    """A uniform random number for the Metropolis test of each chain."""
    return torch.rand(num_chains, dtype=torch.float64, device=device)


def judge(energy_error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Acceptance probability min(1, exp(-energy_error)), the error, and whether it is unbounded.

    An energy error that is no number counts as infinite: such a proposal is rejected.
    """
    error = torch.where(energy_error.isnan(), torch.inf, energy_error)
    return torch.exp(-error.clamp(min=0.0)), error, error > DIVERGENCE


def metropolis(energy_error: Tensor, uniform: Tensor) -> Decision:
    """Accepts each chain's proposal with the probability that :func:`judge` gives it.

    Arguments:
        energy_error: Of shape ``(chains,)``, in float64.
        uniform: A uniform random number for each.
    """
    rate, error, diverging = judge(energy_error)
    return Decision(uniform < rate, rate, error, diverging)


def metropolis_of_point(energy_error: Tensor, uniform: Tensor) -> Decision:
    """As :func:`metropolis`, of proposals that no trajectory led to: poor ones do not diverge."""
    decision = metropolis(energy_error, uniform)
    return decision._replace(diverging=torch.zeros_like(decision.diverging))


def select(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new value of each accepted chain, and the old one of the others."""
    return torch.where(accepted.reshape(accepted.shape + (1,) * (new.dim() - 1)), new, old)


def select_evaluation(accepted: Tensor, new: Evaluation, old: Evaluation) -> Evaluation:
    """The new evaluation of each accepted chain, and the old one of the others."""
    return Evaluation(
        select(accepted, new.value, old.value),
        {k: select(accepted, v, old.log_likelihoods[k]) for k, v in new.log_likelihoods.items()},
        {k: select(accepted, v, old.local[k]) for k, v in new.local.items()},
    )


def select_state(accepted: Tensor, new: State, old: State) -> State:
    """The new state of each accepted chain, and the old one of the others."""
    return State(
        select(accepted, new.position, old.position),
        select(accepted, new.noise, old.noise),
        select(accepted, new.gradient, old.gradient),
        select_evaluation(accepted, new.evaluation, old.evaluation),
    )
