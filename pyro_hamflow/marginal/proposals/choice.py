"""From what users give for `proposal` to a proposal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution

from pyro_hamflow.marginal.dependence import Run
from pyro_hamflow.marginal.gaussian_form import has_gaussian_form
from pyro_hamflow.marginal.lay_out import look_at, split_mixtures
from pyro_hamflow.marginal.normal_transform import normal_transform
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.proposals.base import Proposal
from pyro_hamflow.marginal.proposals.laplace import LaplaceProposal
from pyro_hamflow.marginal.proposals.path import FOLLOWING, PathProposal
from pyro_hamflow.marginal.proposals.prior import PriorProposal
from pyro_hamflow.marginal.proposals.user import ProgramProposal
from pyro_hamflow.marginal.structure import LONG, chains
from pyro_hamflow.model.supports import transform_of

AUTO = "auto"
# Sites of a loop that depend on each other, from which on it is a path. Forty ragged series of 5 to
# 10 times take 26 CPU seconds in place of 39, of counts 34 in place of 44; of 4 times as long as
# before, and without noise. Of eight effects that a loop draws apart it took twice as long.
_LOOP = 4
_NAMED: dict[str, Callable[[], Proposal]] = {"prior": PriorProposal, "laplace": LaplaceProposal}


def proposal_of(given: str | Proposal | Callable[..., Any], follow: str) -> Proposal | None:
    """What a user's word or program stands for; none for ``"auto"``, which depends on the model.

    Arguments:
        given: The word or program.
        follow: How Gaussian paths are to follow the parameters.

    Raises:
        ValueError: If one of both stands for nothing, or they do not go together.
    """
    if follow not in (AUTO, *FOLLOWING):
        expected = ", ".join(map(repr, (AUTO, *FOLLOWING)))
        raise ValueError(f"`follow` is {follow!r}: expected one of {expected}")
    if follow != AUTO and given not in (AUTO, LaplaceProposal.name):
        raise ValueError(
            f"`follow` is {follow!r} and `proposal` {given!r}: expected `proposal` 'auto' or "
            "'laplace', whose Gaussian paths follow the parameters, or `follow` 'auto'"
        )
    if isinstance(given, Proposal):
        return given
    if callable(given):
        return ProgramProposal(given)
    for name, make in _NAMED.items():
        if given == name:
            return make()
    if given == AUTO:
        return None
    raise ValueError(f"`proposal` is {given!r}: expected 'auto', 'prior', 'laplace' or a function")


def choose_proposal(plan: Plan, follow: str = AUTO) -> Proposal:
    """The proposal for a model: one that knows the data, where all local priors allow it.

    Arguments:
        plan: The model.
        follow: How Gaussian paths are to follow the parameters.
    """
    trace = look_at(plan)
    if _has_path(plan, trace):
        return _path(follow)
    _refuse(plan, follow)
    for group in plan.structure.groups:
        for name, split in split_mixtures(group, trace).items():
            if not has_gaussian_form(trace.nodes[name]["fn"], None if split is None else 0):
                return PriorProposal()
    return LaplaceProposal()


def suited(plan: Plan, proposal: Proposal, follow: str) -> Proposal:
    """A proposal that a user has named, of the kind that serves the model."""
    if isinstance(proposal, LaplaceProposal):
        if _has_path(plan, look_at(plan)):
            return _path(follow)
        _refuse(plan, follow)
    return proposal


def _path(follow: str) -> PathProposal:
    """Gaussian paths that follow the parameters as a word says."""
    return PathProposal() if follow == AUTO else PathProposal(FOLLOWING[follow], is_told=True)


def _refuse(plan: Plan, follow: str) -> None:
    """Refuses a way for paths to follow the parameters where there is no path."""
    if follow != AUTO:
        names = [name for group in plan.structure.groups for name in group.sites]
        raise ValueError(
            f"`follow` is {follow!r}, and {names} are no path, but numbers of independent "
            "elements, whose proposal has one way to follow the parameters: expected 'auto'"
        )


def _has_path(plan: Plan, trace: poutine.Trace) -> bool:
    """Whether some group's elements have many numbers each, beside those in plates of their own.

    A loop of a few sites is a path, too, if they depend on the first of them, and unless a prior is
    a mixture, whose components this hides; and so are a few numbers whose prior is known by its
    density alone, as that of a user's own autoregression.
    """
    groups = plan.structure.groups
    events = [[torch.Size(trace.nodes[name]["fn"].event_shape) for name in g.sites] for g in groups]
    longest = max(sum(event.numel() for event in of_group) for of_group in events)
    if longest >= LONG or any(group.joined for group in groups):
        return True
    splits = [pair for group in groups for pair in split_mixtures(group, trace).items()]
    priors = [(name, trace.nodes[name]["fn"], split is None) for name, split in splits]
    if any(is_whole and _is_density_alone(name, fn) for name, fn, is_whole in priors):
        return True
    loops = [sites for group in groups for sites in chains(group.sites).values()]
    if not any(len(sites) >= _LOOP and _is_recursion(plan, sites) for sites in loops):
        return False
    return all(is_whole and has_gaussian_form(fn, None) for _, fn, is_whole in priors)


def _is_density_alone(name: str, fn: TorchDistribution) -> bool:
    """Whether a prior of several numbers, each free, is no known transform of noise."""
    if fn.event_shape.numel() < 2 or has_gaussian_form(fn, None):
        return False
    try:
        normal_transform(fn)
    except ValueError:
        return bool(transform_of(name, fn).inverse_shape(fn.event_shape) == fn.event_shape)
    return False


def _is_recursion(plan: Plan, sites: list[str]) -> bool:
    """Whether sites of a loop depend on the first of them."""
    run = Run(plan.model, plan.args, plan.kwargs, plan.structure.values)
    return not run.dependents(sites[:1]).isdisjoint(sites)
