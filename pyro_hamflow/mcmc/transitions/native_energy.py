"""True energies in machine code, which judge where a learned energy has led."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.native_estimate import parts_of, split_rows
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.programs.engines.buffers import NotSupported
from pyro_hamflow.programs.engines.native import native_program
from pyro_hamflow.programs.made import Made


class NativeEnergy(Made):
    """True energies in machine code, with the local sites that belong to them.

    Arguments:
        target: The true target.

    Raises:
        NotSupported: If there is no machine code for it.
    """

    def __init__(self, target: Potential) -> None:
        graph = target.programs.base("gradient")
        if graph is None:
            raise NotSupported("a model that is not captured")
        self._parts = parts_of(target) if target.recovery.estimates else None
        self._choices = target.recovery.num_choices
        looks = None if self._parts is None else self._parts.looks
        examples = [part[0] for part in target.vectors(1)]
        # An estimate's gradient is in its library, for trajectories that follow it now and then.
        self._program = native_program(graph, examples, looks, gradient=looks is not None)

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """As a target's, at the same random numbers."""
        uniform = torch.rand(len(position), self._choices, dtype=position.dtype)
        if self._parts is None:
            return Evaluation(self._program.gradient(position, noise)[0], {}, {})
        place = self._program.look(position, noise, uniform)
        factors = split_rows(place.likelihoods, self._parts.factors)
        return Evaluation(place.value, factors, split_rows(place.local, self._parts.local))
