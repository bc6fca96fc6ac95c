"""How far an estimator reaches that was fitted at one place, and what is done where that is short.

A Gaussian proposal is fitted at one mode's parameters. Where the local sites' posterior is another
at the other modes, as under another labeling of components, it hardly finds likelihood there. The
mean of its estimates is right all the same, but by values too rare to be seen, so that a population
has no particle there. Particles from the prior, though more are needed, serve all modes alike.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.flows.descent import Descent
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.mending import number_from_prior
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.marginal.proposals.prior import PriorProposal
from pyro_hamflow.marginal.scrutiny import look
from pyro_hamflow.marginal.settle import repeated_estimates
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.process import random_state_kept

_CLIMBS = 16  # from draws of the prior: all of them to one of two equal modes once in 30000 times
_APART = 0.1  # of the prior's spread, beyond which their ends count as several
_REPLICATES = 16  # estimates by the model's own proposal
_MATTERS = 10.0  # log units below the best point, down to which points matter
_SHORT = 5.0  # log units
_ERRORS = 5.0


class Shortfall(NamedTuple):
    """By how much a proposal's estimates are too low at some points that matter.

    Attributes:
        size: In log units, beyond that at the point where it is least.
        variance: That of an estimate from one particle of the prior, the median over the points.
    """

    size: float
    variance: float


def extend_reach(target: ModelTarget) -> str | None:
    """Draws particles from the prior where a fitted proposal is short at some of the modes.

    It is left as it is where a user has chosen it, and where the prior's particles, as many as are
    taken at most, would vary as much.

    Arguments:
        target: The model, captured; captured anew where its proposal is changed.

    Returns:
        What was found and done, in a sentence; mostly nothing.
    """
    model, potential = target.model, target.potential
    if not isinstance(model, MarginalModel) or not model.proposal.needs_fit:
        return None
    data = Arguments(potential.args, potential.kwargs)
    found = None
    with random_state_kept(), suppress(ValueError):  # of priors that cannot be drawn from
        torch.manual_seed(0)
        found = find_shortfall(model, potential, data)
    if found is None:
        return None
    said = (
        f"the Gaussian proposal of {list(model.sites)}, fitted at one place of the posterior, is "
        f"up to {found.size:.2g} short in the log likelihood at others that count as much, so that "
        "modes there would be lost"
    )
    count = number_from_prior(found.variance)
    if not model.may_choose_proposal or 0.5 * found.variance / count > found.size:
        return f"{said}: take `proposal='prior'`, or more particles."
    other = copy.copy(model)
    other.take(PriorProposal(), count)
    model.adopt(other)
    target.capture(*data)
    return f"{said}; particles come from the prior instead, {model.settled_particles} of each."


def find_shortfall(model: MarginalModel, potential: Potential, data: Arguments) -> Shortfall | None:
    """Compares estimates with those of many particles from the prior, where these find modes.

    Arguments:
        model: A marginal model whose proposal has been fitted.
        potential: The same, captured.
        data: What it is called with.

    Returns:
        How much is missing; nothing where that is no more than errors and noise can be.
    """
    positions = torch.cat([potential.flatten(model.prepared.pilot)[None], _points(model, data)])
    log_prior = -Prior(potential).value(positions, potential.draw_noise(len(positions))).double()
    rows: list[tuple[float, float, float, float]] = []
    for position in positions:
        parameters = potential.constrain(position)
        by_prior = look(model, parameters, data, from_prior=True)
        own = repeated_estimates(model, parameters, _REPLICATES, data).sum(-1)
        total = float(by_prior.log_likelihood.sum())
        error = float(by_prior.error.square().sum().sqrt())
        rows.append((total, error, float(own.mean()), by_prior.variance(1)))
    total, error, own, variance = torch.tensor(rows, dtype=torch.float64).mT
    height = log_prior + torch.maximum(total, own)
    matters = height > height.max() - _MATTERS
    short = (total - own)[matters].clamp(min=0.0)
    excess = short - short.min()
    if not bool((excess > _SHORT + _ERRORS * error[matters]).any()):
        return None
    return Shortfall(float(excess.max()), float(variance[matters].median()))


def _points(model: MarginalModel, data: Arguments) -> Tensor:
    """Tops of the posterior, about, as climbs from draws of the prior find them."""
    by_prior = copy.copy(model)
    by_prior.take(PriorProposal())
    potential = Potential(by_prior, *data, separate_noise=True)
    start, _ = Prior(potential).draw(_CLIMBS)
    scale = start.std(0)
    ends = Descent(potential, scale, potential.draw_noise(1)).run(start)
    position = ends.position[ends.value.isfinite()]
    cells = (position / (_APART * scale)).round()
    _, cell = cells.unique(dim=0, return_inverse=True)
    return torch.stack([position[cell == number][0] for number in cell.unique()])
