"""How an estimator is fitted to a model and its data, before anything is sampled."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_hamflow.marginal.mending import mend_proposal
from pyro_hamflow.marginal.pilot import Pilot, find_pilot, typical
from pyro_hamflow.marginal.settle import repeated_estimates, settle_particles
from pyro_hamflow.marginal.tuned_estimator import TunedEstimator
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.model.trace import run_with
from pyro_hamflow.process import random_state_kept

FAR = 1.0  # posterior standard deviations, from which on a pilot is not at the mode
_ESTIMATES = 64  # of the likelihood at a pilot


def prepare(
    marginal: TunedEstimator,
    data: Arguments,
    start: dict[str, Tensor] | None,
    *,
    moves: bool,
) -> None:
    """Finds a pilot, fits the proposal there, and finds how many particles and modes it needs.

    Arguments:
        marginal: The model, which is held at its structure for these arguments.
        data: What the model is called with.
        start: Unconstrained values to begin the search for the pilot at.
        moves: Whether the noise is to move together with the parameters.
    """
    if marginal.num_particles is None:
        marginal.settle(None)
    bare = copy.copy(marginal)
    found = _find(marginal, data, start)
    marginal.fit(*data.args, pilot=found.values, **data.kwargs)
    if marginal.proposal.misses_modes:
        found = _higher(marginal, bare, found, data)
    if marginal.num_particles is None and marginal.proposal.needs_fit:
        settle_particles(marginal, data, moves=moves)
    remark = _told_of_ends(found.escaped) if found.escaped else None
    if remark is None and found.refused and found.distance > FAR:
        remark = _told_of_rounding(found.refused)
    # A proposal fitted far away misses this and that, but for one that looks for it itself.
    if found.distance <= FAR or not marginal.proposal.is_comparable:
        remark = mend_proposal(marginal, [found.values], data) or remark
    marginal.prepared = replace(
        marginal.prepared,
        distance=found.distance,
        remark=remark,
        other_modes=found.other_modes,
        covariance=found.covariance if found.distance <= FAR else None,
    )


def _find(marginal: TunedEstimator, data: Arguments, start: dict[str, Tensor] | None) -> Pilot:
    """Searches for a pilot, in double precision if the model runs in it.

    In single precision the slopes of thousands of counts are rounding, by which a search comes to
    rest nowhere, or far off.
    """
    layouts = marginal.plan(*data.args, **data.kwargs).layouts.values()
    if all(layout.example.dtype == torch.float64 for layout in layouts):
        return find_pilot(marginal, data, start)
    wide, known = copy.copy(marginal), _in_double(data)
    before, found, refused = torch.get_default_dtype(), None, ""
    try:
        torch.set_default_dtype(torch.float64)
        found = find_pilot(wide, known, _in_double(start))
    except Exception as error:  # whatever a model's own code may raise, as for tensors of two types
        refused = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        torch.set_default_dtype(before)
    if found is None:
        return find_pilot(marginal, data, start)._replace(refused=refused)
    with random_state_kept():
        trace = run_with(marginal.model, lambda msg: None, *data.args, **data.kwargs)
    values = {name: v.to(trace.nodes[name]["value"].dtype) for name, v in found.values.items()}
    return found._replace(values=values)


def _in_double(nested: Any) -> Any:
    """Tensors of numbers with a point in double precision, and all else as it is."""

    def wide(part: Any) -> Any:
        return part.double() if isinstance(part, Tensor) and part.is_floating_point() else part

    return tree_map(wide, nested)


def _higher(
    marginal: TunedEstimator, other: TunedEstimator, found: Pilot, data: Arguments
) -> Pilot:
    """The higher of two pilots, with the proposal fitted there: the other search begins at a draw.

    Where a proposal misses other modes, estimates may rise towards parameters at which it serves,
    and not towards those of the posterior; but none of many estimates is far too high.
    """
    second = _find(other, data, typical(marginal, data))
    other.fit(*data.args, pilot=second.values, **data.kwargs)
    with random_state_kept():
        torch.manual_seed(0)
        if _height(other, second, data) > _height(marginal, found, data):
            marginal.take_over(other.prepared)
            found = second
    return found


def _height(marginal: TunedEstimator, pilot: Pilot, data: Arguments) -> float:
    """The logarithm of the prior times the mean of many estimates."""
    values = pilot.values
    estimates = repeated_estimates(marginal, values, _ESTIMATES, data).sum(-1)
    trace = run_with(marginal.model, lambda msg: values.get(msg["name"]), *data.args, **data.kwargs)
    prior = sum(float(trace.nodes[n]["fn"].log_prob(v).sum()) for n, v in values.items())
    return prior + float(estimates.logsumexp(0))


def _told_of_ends(sites: tuple[str, ...]) -> str:
    names = " and ".join(f"'{name}'" for name in sites)
    return (
        "the posterior density may have no bound: in the search for its mode it rose all the way "
        f"to the end of the support of {names}, as a scale goes to zero for data that are fitted "
        "exactly; look at the priors of scales."
    )


def _told_of_rounding(reason: str) -> str:
    return (
        "the search for the posterior's mode did not come to rest. It was made in single "
        f"precision, for in double precision it ended with an error ({reason}); that may be why, "
        "as slopes of large counts are rounding then. The chains may start far from the mode, and "
        "warm-up has to find the rest of the way."
    )
