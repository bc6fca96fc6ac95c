"""How many coordinates and particles the groups of a model have, with a given proposal."""

from __future__ import annotations

from functools import reduce
from itertools import product

import pyro.poutine as poutine
import torch

from pyro_hamflow.marginal.noise_layout import PRIOR_SHARE, Block, Components, Layout, Stratum
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.proposals.base import Proposal, component_count
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.trace import is_latent, log_density, run_with, vectorized_frames
from pyro_hamflow.process import random_state_kept

_PER_PRIOR_PARTICLE = 8  # of which one comes from the prior


def look_at(plan: Plan) -> poutine.Trace:
    """A run of the model that leaves the random state alone."""
    with random_state_kept():
        torch.manual_seed(0)
        return run_with(plan.model, lambda msg: None, *plan.args, **plan.kwargs)


def split_mixtures(group: Group, trace: poutine.Trace) -> dict[str, int | None]:
    """For each local site, how many components of a mixture prior can have their own particles.

    A mixture inside the plates of its group is not split.

    Arguments:
        group: The group.
        trace: A run of the model.
    """
    sites = {name: trace.nodes[name] for name in group.sites}
    return {
        name: component_count(site["fn"]) if vectorized_frames(site) == group.frames else None
        for name, site in sites.items()
    }


def lay_out(
    plan: Plan,
    group: Group,
    trace: poutine.Trace,
    proposal: Proposal,
    num_particles: int | None,
    points: str,
) -> Layout:
    """Counts the coordinates of a group's sites and shares its particles among mixture components.

    Without a number of particles, there are as many as the proposal needs to serve well, and one
    for each component of the mixture priors; with several modes one for each of these, too.

    Arguments:
        plan: The model; its layouts are not looked at.
        group: The group.
        trace: A run of the model.
        proposal: Where particles come from.
        num_particles: How many there are, if that is known.
        points: ``"iid"``, ``"antithetic"`` or ``"rqmc"``.

    Raises:
        ValueError: If there are fewer particles than components.
    """
    splits, modes = split_mixtures(group, trace), proposal.modes(group)
    shapes = proposal.noise_shapes(plan, group, trace, splits)
    blocks: dict[str, Block] = {}
    start = 0
    choices: list[list[tuple[str, int]]] = []
    for name, split in splits.items():
        frames, event = vectorized_frames(trace.nodes[name]), shapes[name]
        inner = [frame.size for frame in frames if frame not in group.frames]
        stop = start + torch.Size(inner).numel() * event.numel()
        blocks[name] = Block(start, stop, frames, event)
        start = stop
        if split is not None and proposal.stratified:
            choices.append([(name, component) for component in range(split)])
    combinations = list(product(*choices))
    fewest = sum(modes.get(tuple(components), 1) for components in combinations)
    if num_particles is None:
        num_particles = max(proposal.enough_particles, len(combinations) + sum(modes.values()))
    if num_particles < fewest:
        raise ValueError(
            f"`num_particles` is {num_particles}: expected at least {fewest}, one for "
            f"each component of the mixture priors of {list(group.sites)}"
        )
    share, rest = divmod(num_particles, len(combinations))
    strata: list[Stratum] = []
    for i, components in enumerate(combinations):
        strata += _from_both(components, share + (i < rest), proposal, modes.get(components, 1))
    sites = [site for site in trace.nodes.values() if is_latent(site)]
    tensors = [site["value"] for site in sites if site["value"].is_floating_point()]
    tensors += [log_density(trace.nodes[name]) for name in group.sites]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    example = torch.zeros((), dtype=dtype, device=tensors[0].device)
    return Layout(blocks, start, tuple(strata), points, example)


def _from_both(components: Components, count: int, proposal: Proposal, modes: int) -> list[Stratum]:
    """Particles from a proposal, and some from the prior where the proposal needs defence."""
    few, share = 0, 1.0
    if proposal.is_defended and count > modes:
        few, share = max(1, count // _PER_PRIOR_PARTICLE), 1.0 - PRIOR_SHARE
    each, rest = divmod(count - few, modes)
    strata = [Stratum(components, each + (k < rest), share, mode=k) for k in range(modes)]
    if few:
        strata.append(Stratum(components, few, PRIOR_SHARE, from_prior=True))
    return strata
