"""Particles from a program that the user wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_hamflow.marginal.gaussian_form import Component
from pyro_hamflow.marginal.noise_layout import Stratum
from pyro_hamflow.marginal.normal_transform import NormalTransform, normal_transform, support
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.proposals.base import Draw, Proposal
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.float_type import float_type
from pyro_hamflow.model.trace import SetValues
from pyro_hamflow.programs.validation import no_validation

_SUPPORT_CHECKS = 100  # draws of the prior that the proposal has to reach


@dataclass(frozen=True)
class ProgramParticle:
    """A particle that a run of the program has drawn.

    Attributes:
        distributions: What the program samples each site from.
        values: What it has drawn.
    """

    distributions: dict[str, Any]
    values: dict[str, Tensor]

    def draw(
        self, name: str, fn: TorchDistribution, noise: Tensor, component: Component | None
    ) -> Draw:
        source, value = self.distributions[name], self.values[name]
        return Draw(value, (fn.log_prob(value) - source.log_prob(value),))

    def mix(self, log_ratios: list[Tensor]) -> tuple[Tensor, None]:
        return log_ratios[0], None


@dataclass(frozen=True)
class ProgramProposal(Proposal):
    """Particles from a user's Pyro program, which samples the local sites.

    Attributes:
        program: A function of the parameters and the model's arguments.
    """

    program: Callable[..., Any]
    stratified = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return getattr(self.program, "__name__", repr(self.program))

    def noise_shapes(
        self, plan: Plan, group: Group, trace: poutine.Trace, splits: Mapping[str, int | None]
    ) -> dict[str, torch.Size]:
        parameters = {n: trace.nodes[n]["value"] for n in plan.structure.parameters}
        sources = self._run(plan, group, None, parameters).distributions
        return {n: _noise_shape(n, trace.nodes[n]["fn"], sources[n]) for n in splits}

    def particle(
        self,
        plan: Plan,
        group: Group,
        stratum: Stratum,
        coordinates: Tensor,
        parameters: dict[str, Tensor],
        source: Tensor | None,
    ) -> ProgramParticle:
        return self._run(plan, group, coordinates, parameters)

    def _run(
        self, plan: Plan, group: Group, coordinates: Tensor | None, parameters: dict[str, Tensor]
    ) -> ProgramParticle:
        """Runs the program; without coordinates, for its distributions alone.

        Raises:
            ValueError: If it does not sample a local site of the group, or samples another site.
        """

        def choose(msg: Any) -> Tensor:
            name = msg["name"]
            if name in group.sites and coordinates is not None:
                transform = _transform(name, msg["fn"])
                own = coordinates.to(float_type(msg["fn"], coordinates.dtype))
                return transform.draw(plan.layouts[group.name].blocks[name].spread(own, group))
            if name not in plan.structure.placeholders:
                raise ValueError(
                    f"the proposal samples site '{name}', which is not integrated out: expected "
                    f"sites among {list(plan.structure.placeholders)}"
                )
            return plan.structure.placeholders[name]

        with poutine.block(), no_validation(), SetValues(choose):
            trace = poutine.trace(self.program).get_trace(parameters, *plan.args, **plan.kwargs)
        for name in group.sites:
            if name not in trace.nodes:
                raise ValueError(
                    f"the proposal does not sample local site '{name}': it samples "
                    f"{list(trace.stochastic_nodes)}"
                )
        return ProgramParticle(
            {name: trace.nodes[name]["fn"] for name in group.sites},
            {name: trace.nodes[name]["value"] for name in group.sites},
        )


def _noise_shape(name: str, fn: TorchDistribution, source: Any) -> torch.Size:
    """That of a site with a prior, from what the program samples it from."""
    if source.batch_shape != fn.batch_shape or source.event_shape != fn.event_shape:
        raise ValueError(
            f"the proposal samples site '{name}' with batch shape "
            f"{tuple(source.batch_shape)} and event shape {tuple(source.event_shape)}: "
            f"expected {tuple(fn.batch_shape)} and {tuple(fn.event_shape)}, as in the model"
        )
    if not bool(support(source).check(fn.sample((_SUPPORT_CHECKS,))).all()):
        raise ValueError(
            f"the proposal of local site '{name}', {type(source).__name__}, has support "
            f"{support(source)}: expected one that holds every value of its prior, "
            f"{type(fn).__name__}, or the estimate would be too small"
        )
    return _transform(name, source).noise_shape


def _transform(name: str, fn: TorchDistribution) -> NormalTransform:
    """The transform of a site of the program; raises a ValueError if none is known."""
    try:
        return normal_transform(fn)
    except ValueError as error:
        raise ValueError(f"the proposal of local site '{name}': {error}") from error
