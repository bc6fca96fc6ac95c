"""Runs whose moves are made in the coordinates of a map of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.flows.transports import as_transport
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.mcmc.adaptation.base import Phase, RunPlan
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.transport_learning import TransportLearning, parameters_of
from pyro_hamflow.mcmc.transitions.base import State
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start
from pyro_hamflow.model.transported import Transport, TransportedPart, TransportedTarget

_LEARNED = "flow"


class Transporting:
    """How the moves of a kernel are transported.

    A map that is given is frozen, and step size and mass are found in its coordinates. Otherwise
    one is learned in warm-up.

    Arguments:
        given: A map, a trained guide that has one, or ``"flow"``: one is learned.
    """

    def __init__(self, given: Any) -> None:
        if isinstance(given, str) and given != _LEARNED:
            raise ValueError(
                f'`transport` is {given!r}: expected "{_LEARNED}", a trained guide or a map'
            )
        self.given = given
        self._transport: Transport | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, in plain values."""
        given = self.given
        return {"transport": given if isinstance(given, str) else type(given).__name__}

    def start(
        self, source: ModelTarget, num_chains: int, initial_params: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Where chains start: at draws of a given map's own density, unless told where."""
        potential = source.potential
        self.take_given(potential)
        if self._transport is None or initial_params or source.init_strategy is not None:
            return source.start(num_chains, initial_params)
        like = torch.randn_like(potential.vectors(num_chains)[0])
        centre, _ = TransportedTarget(potential, self._transport).positions(like)
        try:
            return find_start(potential, num_chains, centre, 0.0)
        except ValueError:  # a map that leads where there is no density
            return source.start(num_chains, None)

    def take_given(self, potential: Potential) -> None:
        """Takes the map that was given, if one was, for this target."""
        self._transport = self._given_for(potential)

    def _given_for(self, potential: Potential) -> Transport | None:
        """The map that was given, as one of all coordinates; none if it is to be learned."""
        if self.given == _LEARNED:
            return None
        parameters = parameters_of(potential)
        example = potential.example.expand(len(parameters))
        given = as_transport(self.given, example, potential.args, potential.kwargs)
        if len(parameters) == potential.dimension:
            return given
        return TransportedPart(given, parameters, potential.dimension)

    def first_phase(
        self,
        potential: Potential,
        hamiltonian: Hamiltonian,
        plan: RunPlan,
        position: Tensor,
        noise: Tensor,
    ) -> tuple[Phase, State]:
        """The phase that a run begins with, and its first state."""
        if self._transport is None:
            learning = TransportLearning(potential, hamiltonian, plan)
            return learning.first_phase(position, noise)
        target = TransportedTarget(potential, self._transport)
        moves = hamiltonian.trajectories.parameter_transition(target, len(position))
        return hamiltonian.first_phase(potential, moves, plan, target.coordinates(position), noise)
