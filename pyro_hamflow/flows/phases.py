"""Positions and momenta of a flow, as one distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow


class PhaseDistribution(TorchDistribution):
    """Positions and momenta of a flow, side by side, whose density is known exactly.

    Arguments:
        flow: The flow; events are of shape ``(2 D,)``.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: NeuralHamiltonianFlow, batch_shape: Sequence[int] = ()) -> None:
        self.flow = flow
        self._drawn: tuple[Tensor, Tensor] | None = None  # the last draw and its log density
        super().__init__(
            torch.Size(batch_shape), torch.Size([2 * flow.dimension]), validate_args=False
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> PhaseDistribution:
        return PhaseDistribution(self.flow, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        q, p, log_density = self.flow.draw_phase(torch.Size(sample_shape) + self.batch_shape)
        phase = torch.cat([q, p], -1)
        self._drawn = phase, log_density
        return phase

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        return self.flow.log_phase(*value.chunk(2, -1))
