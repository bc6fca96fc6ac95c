"""Moves made of several: one after the other, or one of them at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import Info, State, Transition, Tuning


class _Parts:
    """Several transitions of one target, by name.

    Arguments:
        parts: The first may follow gradients, and is the one that is tuned, if any is. The others
            look at position, noise and potential alone, and need keep no gradient.
    """

    def __init__(self, parts: Mapping[str, Transition]) -> None:
        self.parts = dict(parts)
        self.first = next(iter(self.parts.values()))
        self.target = self.first.target

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        return self.first.state_at(position, noise)

    def _step(self, name: str, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        """Makes one part's move; the state that it ends in suits the first part."""
        part = self.parts[name]
        moved, info = part.step(state, tuning, num_steps)
        if part is self.first or not bool(info.accepted.any()):
            return moved, info
        moved = self.first.state_at(moved.position, moved.noise)
        return moved, info._replace(n_gradients=info.n_gradients + 1)


class CycleTransition(_Parts):
    """Makes the moves of several transitions, one after the other.

    Acceptance rate, energy error and divergence are those of the first; ``{name}_acceptance_rate``
    of each part comes out by its name, and ``{name}_accepted`` of all but the first.

    Arguments:
        parts: The transitions by name; the first may follow gradients and be tuned, the others look
            at position, noise and potential alone.

    Invariant:
        What every part leaves invariant, exactly.

    References:
        | Markov chains for exploring posterior distributions (Tierney, 1994)
        | https://doi.org/10.1214/aos/1176325750

    Example:
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> from pyro_hamflow.dynamics.kinetic import GaussianKinetic
        >>> from pyro_hamflow.mcmc.transitions.base import Tuning
        >>> from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
        >>> from pyro_hamflow.mcmc.transitions.random_walk import RandomWalkTransition
        >>> target = Potential(model)
        >>> parts = {"local": HMCTransition(target, 4), "walk": RandomWalkTransition(target)}
        >>> cycle = CycleTransition(parts)
        >>> state = cycle.state_at(torch.zeros(4, 1), torch.zeros(4, 0))
        >>> tuning = Tuning(0.5, GaussianKinetic(torch.ones(1)))
        >>> state, info = cycle.step(state, tuning, num_steps=3)
        >>> list(info.further)
        ['local_acceptance_rate', 'walk_acceptance_rate', 'walk_accepted']
    """

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        first, *others = self.parts
        state, info = self._step(first, state, tuning, num_steps)
        whole = beginning(first, info)
        for name in others:
            before = state.evaluation.value
            state, info = self._step(name, state, tuning, num_steps)
            whole = followed_by(whole, name, info, state.evaluation.value.double() - before)
        return state, whole


class MixtureTransition(_Parts):
    """Makes the move of one of several transitions, picked at random for all chains alike.

    Its statistics are those of the move that was made; ``{name}_acceptance_rate`` and
    ``{name}_accepted`` of each part come out by its name, and are NaN and false where another was
    made.

    Arguments:
        parts: As in :class:`CycleTransition`.
        probabilities: Of each part; they sum to one.

    Invariant:
        What every part leaves invariant, exactly: which is picked does not depend on the state.

    References:
        | Markov chains for exploring posterior distributions (Tierney, 1994)
        | https://doi.org/10.1214/aos/1176325750
    """

    def __init__(self, parts: Mapping[str, Transition], probabilities: Sequence[float]) -> None:
        super().__init__(parts)
        self.probabilities = torch.tensor(probabilities, dtype=torch.float64)

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        picked = list(self.parts)[int(torch.multinomial(self.probabilities, 1))]
        state, info = self._step(picked, state, tuning, num_steps)
        further = {}
        for name in self.parts:
            made = name == picked
            rate, accepted = info.acceptance_rate, info.accepted
            further[f"{name}_acceptance_rate"] = rate if made else torch.full_like(rate, torch.nan)
            further[f"{name}_accepted"] = accepted & made
        return state, info._replace(further=further)


def beginning(name: str, info: Info) -> Info:
    """What happened in the first move of a cycle, with its acceptance rate by its name."""
    return info.adding(**{f"{name}_acceptance_rate": info.acceptance_rate})


def followed_by(whole: Info, name: str, info: Info, gained: Tensor) -> Info:
    """What happened in a cycle so far, and in the next of its moves.

    Arguments:
        whole: The moves before.
        name: The next move's.
        info: What happened in it.
        gained: By how much it raised the potential of each chain, in float64.
    """
    return whole._replace(
        accepted=whole.accepted | info.accepted,
        energy=whole.energy + gained,
        n_steps=whole.n_steps + info.n_steps,
        n_gradients=whole.n_gradients + info.n_gradients,
        n_densities=whole.n_densities + info.n_densities,
    ).adding(
        **{
            f"{name}_acceptance_rate": info.acceptance_rate,
            f"{name}_accepted": info.accepted,
        }
    )
