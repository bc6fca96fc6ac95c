"""How an estimator is fitted to a model and its data, before anything is sampled."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pyro_hamflow.marginal.mending import mend_proposal
from pyro_hamflow.marginal.pilot import find_pilot
from pyro_hamflow.marginal.settle import settle_particles
from pyro_hamflow.marginal.tuned_estimator import TunedEstimator
from pyro_hamflow.model.kinds import Arguments

FAR = 1.0  # posterior standard deviations, from which on a pilot is not at the mode


def prepare(
    marginal: TunedEstimator,
    data: Arguments,
    start: dict[str, Tensor] | None,
) -> None:
    """Finds a pilot, fits the proposal there, and finds how many particles and modes it needs.

    Arguments:
        marginal: The model, which is held at its structure for these arguments.
        data: What the model is called with.
        start: Unconstrained values to begin the search for the pilot at.
    """
    if marginal.num_particles is None:
        marginal.settle(None)
    found = find_pilot(marginal, data, start)
    marginal.fit(*data.args, pilot=found.values, **data.kwargs)
    if marginal.num_particles is None and marginal.proposal.needs_fit:
        settle_particles(marginal, data)
    remark = _told_of_ends(found.escaped) if found.escaped else None
    # A proposal fitted far away misses this and that, but for one that looks for it itself.
    if found.distance <= FAR or not marginal.proposal.is_comparable:
        remark = mend_proposal(marginal, [found.values], data) or remark
    marginal.prepared = replace(marginal.prepared, distance=found.distance, remark=remark)


def _told_of_ends(sites: tuple[str, ...]) -> str:
    names = " and ".join(f"'{name}'" for name in sites)
    return (
        "the posterior density may have no bound: in the search for its mode it rose all the way "
        f"to the end of the support of {names}, as a scale goes to zero for data that are fitted "
        "exactly; look at the priors of scales."
    )
