"""Runs of a model with particles in place of its local sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_hamflow.marginal.noise_layout import PRIOR_SHARE, Layout, Stratum
from pyro_hamflow.marginal.proposals.base import Proposal, component_log_weight
from pyro_hamflow.marginal.proposals.gaussian_form import gaussian_form, reference_of
from pyro_hamflow.marginal.proposals.laplace import log_gaussian
from pyro_hamflow.marginal.proposals.mixture import MixtureProposal
from pyro_hamflow.marginal.proposals.user import ProgramProposal, program_transform
from pyro_hamflow.marginal.scores import Reference
from pyro_hamflow.marginal.structure import Group, Structure
from pyro_hamflow.model.float_type import float_type
from pyro_hamflow.model.trace import (
    SetValues,
    log_density,
    plate_shape,
    run_with,
    sum_rows,
    sum_to_elements,
    vectorized_frames,
)
from pyro_hamflow.programs.validation import no_validation


@dataclass(frozen=True)
class Estimate:
    """The particles of one group and their weights, as one run of the model made them.

    Attributes:
        group: The group.
        log_weights: Of shape ``(particles, *plates)``; their log-sum-exp is the log estimate.
        values: The particles of each local site.
        origins: The noise from which the prior would have made the particles of each local site,
            plates at their own dimensions, where the proposal tells.
    """

    group: Group
    log_weights: Tensor
    values: dict[str, Tensor]
    origins: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A model bound to its arguments, and what is known of it.

    Attributes:
        model: The original model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        structure: Its local sites and what depends on them.
        layouts: The noise of each group of local sites.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Structure
    layouts: dict[str, Layout]

    def run(
        self,
        group: Group,
        parameters: dict[str, Tensor],
        choose_local: Callable[[Message], Tensor],
    ) -> list[Tensor]:
        """Runs the model and returns its terms in a group's estimate, summed to elements."""

        def choose(msg: Message) -> Tensor | None:
            if msg["name"] in group.sites:
                return choose_local(msg)
            return parameters.get(msg["name"], self.structure.placeholders.get(msg["name"]))

        trace = run_with(self.model, choose, *self.args, **self.kwargs)
        return [
            self.sum(log_density(trace.nodes[name]), trace.nodes[name], group)
            for name in group.terms
        ]

    def sum(self, density: Tensor, site: Any, group: Group) -> Tensor:
        """Sums a site's log densities to the elements of a group."""
        rows = group.rows.get(site["name"])
        if rows is not None:
            return sum_rows(density, rows, group.frames, self.structure.nesting)
        frames = vectorized_frames(site)
        return sum_to_elements(density, frames, group.frames, self.structure.nesting)


def draw_particle(
    plan: Plan,
    group: Group,
    stratum: Stratum,
    coordinates: Tensor,
    proposal: Proposal,
    parameters: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """One particle of every element of a group.

    Arguments:
        plan: The model.
        group: The group of local sites.
        stratum: Which components of mixture priors the particle belongs to.
        coordinates: Its noise, of shape ``(*group.shape, dimension)``.
        proposal: Where it comes from.
        parameters: The values of all sites that are not integrated out.

    Returns:
        Its log weight for each element, the values of the local sites, and their origins, where
        the proposal tells them.
    """
    blocks, components = plan.layouts[group.name].blocks, dict(stratum.components)
    log_ratios: list[list[Tensor]] = []
    others: list[Tensor] = []
    values: dict[str, Tensor] = {}
    origins: dict[str, Tensor] = {}

    def choose(msg: Any) -> Tensor:
        name, fn, scale = msg["name"], msg["fn"], msg["scale"]
        component = components.get(name)
        draw = proposal.draw(name, fn, blocks[name].spread(coordinates, group), component)
        parts = []
        if draw.log_ratios:
            log_ratios.append([plan.sum(ratio, msg, group) for ratio in draw.log_ratios])
        if component is not None:
            parts.append(component_log_weight(fn, component))
        if not isinstance(scale, float | int) or scale != 1.0:
            # The model counts this prior otherwise than once. A mask changes nothing: the prior of
            # a masked element integrates to one, and so does its estimate.
            parts.append((scale - 1.0) * fn.log_prob(draw.value))
        others.extend(plan.sum(part, msg, group) for part in parts)
        values[name] = draw.value
        if draw.origin is not None:
            origins[name] = draw.origin
        return draw.value

    terms = plan.run(group, parameters, choose)
    zeros = coordinates.new_zeros(plate_shape(group.frames, plan.structure.nesting))
    ratios = [sum(parts[1:], start=parts[0]) for parts in zip(*log_ratios, strict=True)]
    if isinstance(proposal, MixtureProposal):
        ratio, share = proposal.mix(ratios)
        ratios = [ratio]
        others.append(share)
    if stratum.is_shared:
        ratios = [defended(ratios[0])]
    return sum(ratios + others + terms, start=zeros), values, origins


def defended(log_ratio: Tensor) -> Tensor:
    """The log ratio of a prior density to that of the prior's mixture with a proposal.

    Arguments:
        log_ratio: The log ratio to the proposal's density alone.
    """
    share = log_ratio.new_tensor(PRIOR_SHARE)
    return -torch.logaddexp(torch.log1p(-share) - log_ratio, share.log())


def joint_density(
    plan: Plan,
    group: Group,
    stratum: Stratum,
    near: dict[str, Reference],
    parameters: dict[str, Tensor],
    times: float,
) -> Callable[[dict[str, Tensor] | None], Any]:
    """The log joint density of a group's elements, as a function of Gaussian coordinates.

    Arguments:
        plan: The model.
        group: The group of local sites.
        stratum: Which components of mixture priors are meant.
        near: Where the coordinates of priors that are no Gaussians are held.
        parameters: The values of all sites that are not integrated out.
        times: By how much the priors' variance is multiplied.

    Returns:
        What :func:`~pyro_hamflow.marginal.site_fit.fit_sites` maximises.
    """
    components, example = dict(stratum.components), plan.layouts[group.name].example
    parameters = {name: value.detach() for name, value in parameters.items()}

    def evaluate(coordinates: dict[str, Tensor] | None) -> Any:
        parts: list[Tensor] = []
        priors: dict[str, tuple[Tensor, Tensor]] = {}

        def choose(msg: Any) -> Tensor:
            name = msg["name"]
            form = gaussian_form(name, msg["fn"], components.get(name), near.get(name))
            form = form.to(example.dtype)
            form = form._replace(precision=form.precision / times)
            v = form.loc if coordinates is None else coordinates[name]
            parts.append(plan.sum(log_gaussian(v, form), msg, group))
            priors[name] = (form.loc, form.precision)
            return form.value(v)

        terms = plan.run(group, parameters, choose)
        return sum(parts[1:] + terms, start=parts[0]).reshape(group.shape), priors

    return evaluate


def references(
    plan: Plan, group: Group, stratum: Stratum, parameters: dict[str, Tensor], mode: Tensor | None
) -> dict[str, Reference]:
    """Holds the coordinates of priors that are no Gaussians at a mode in normal scores.

    Arguments:
        plan: The model.
        group: The group of local sites.
        stratum: Which components of mixture priors are meant.
        parameters: The values of all sites that are not integrated out.
        mode: The coordinates of each element, ``(*group.shape, dimension)``; the priors' means if
            not given.
    """
    components, blocks = dict(stratum.components), plan.layouts[group.name].blocks
    found: dict[str, Reference] = {}

    def choose(msg: Any) -> Tensor:
        name, fn = msg["name"], msg["fn"]
        form = gaussian_form(name, fn, components.get(name))
        value = form.value(form.loc if mode is None else blocks[name].spread(mode, group))
        held = reference_of(fn, value, components.get(name))
        if held is not None:
            found[name] = held
        return value

    with torch.no_grad():
        plan.run(group, parameters, choose)
    return found


def run_program(
    program: Callable[..., Any],
    plan: Plan,
    group: Group,
    coordinates: Tensor | None,
    parameters: dict[str, Tensor],
) -> ProgramProposal:
    """Runs a user's proposal; without coordinates, for its distributions alone.

    Raises:
        ValueError: If it does not sample a local site of the group, or samples another site.
    """

    def choose(msg: Any) -> Tensor:
        name = msg["name"]
        if name in group.sites and coordinates is not None:
            transform = program_transform(name, msg["fn"])
            own = coordinates.to(float_type(msg["fn"], coordinates.dtype))
            return transform.draw(plan.layouts[group.name].blocks[name].spread(own, group))
        if name not in plan.structure.placeholders:
            raise ValueError(
                f"the proposal samples site '{name}', which is not integrated out: expected "
                f"sites among {list(plan.structure.placeholders)}"
            )
        return plan.structure.placeholders[name]

    with poutine.block(), no_validation(), SetValues(choose):
        trace = poutine.trace(program).get_trace(parameters, *plan.args, **plan.kwargs)
    for name in group.sites:
        if name not in trace.nodes:
            raise ValueError(
                f"the proposal does not sample local site '{name}': it samples "
                f"{list(trace.stochastic_nodes)}"
            )
    return ProgramProposal(
        {name: trace.nodes[name]["fn"] for name in group.sites},
        {name: trace.nodes[name]["value"] for name in group.sites},
    )
