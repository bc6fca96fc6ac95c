"""What an estimate's own weights say about it, and what a second estimate says.

The spread of a few estimates looks excellent where a proposal misses a mode altogether. So many
particles are looked at: the tail of their weights, and whether particles from the prior, which miss
nothing, find likelihood that the proposal's do not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.arviz_bridge import psislw
from pyro_hamflow.marginal.proposals.prior import PriorProposal
from pyro_hamflow.marginal.tuned_estimator import TunedEstimator
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.process import random_state_kept

_POINTS = 128  # particles of an element, where a proposal is looked at
_PRIOR_POINTS = 2048  # the same from the prior, few of which count
_AT_ONCE = 256  # of these in one run of the model
_WORST = 10  # elements whose weights' tail is fitted: those that vary most
_LARGE = 5.0  # times the mean, a weight of which there is a tail to speak of
# At their pilots 26 models of textbooks have no element beyond both: up to 4.9 errors, by tails of
# the prior's weights. Where modes are missed, as for y ~ Normal(x**2, .3), it is 9 to 48.
_ERRORS = 5.0
_SMALLEST = 0.1  # log units that matter, however surely they are found


class Look(NamedTuple):
    """What many particles say about the elements of a model.

    Attributes:
        log_likelihood: Log estimates, of shape ``(elements,)``.
        error: Their standard errors.
        log_weights: Log weights of all particles, ``(particles, elements)``.
    """

    log_likelihood: Tensor
    error: Tensor
    log_weights: Tensor

    def variance(self, num_particles: int) -> float:
        """About that of the log estimate with so many particles for each element."""
        return float(self.error.square().sum()) * len(self.log_weights) / num_particles

    @property
    def max_pareto_k(self) -> float:
        """The shape of the weights' tail, of the elements that vary most.

        Their weights relative to each element's total are taken together. Those of one element are
        too few to tell a heavy tail from a short one: the largest shape of ten of them is above one
        where the variance of the estimate is .05. And a shape knows no scale: weights that differ
        by a tenth may have any. So it is zero at most where none is five times their mean.
        """
        worst = self.error.nan_to_num(nan=math.inf).topk(min(_WORST, len(self.error))).indices
        weights = self.log_weights[:, worst]
        weights = weights - weights.logsumexp(0) + math.log(len(weights))
        finite = weights[weights.isfinite()]
        if len(finite) < 2 or float(finite.max() - finite.min()) <= 1e-9:
            return -math.inf
        k = psislw((finite - finite.max()).cpu().numpy())[1]
        if not math.isfinite(k):
            return -math.inf
        return k if float(finite.max()) > math.log(_LARGE) else min(k, 0.0)


def look(
    marginal: TunedEstimator,
    parameters: dict[str, Tensor],
    data: Arguments,
    *,
    from_prior: bool = False,
    alone: bool = False,
) -> Look:
    """Looks at many particles of each element.

    Arguments:
        marginal: A marginal model whose proposal has been fitted.
        parameters: Constrained values of the parameters.
        data: What the model is called with.
        from_prior: Whether the particles come from the prior instead of the model's proposal.
        alone: Whether a Gaussian proposal goes without those from the prior that defend it.
    """
    plan = marginal.plan(*data.args, **data.kwargs)
    least = max(len(layout.strata) for layout in plan.layouts.values())
    count = max(_AT_ONCE if from_prior else _POINTS, 8 * least)
    other = marginal.refined(count, "iid")
    rounds = 1
    if alone:
        other.take(other.proposal.undefended())
    if from_prior:
        other.take(PriorProposal())
        rounds = math.ceil(_PRIOR_POINTS / count)
    structure = plan.structure
    elements = []
    with random_state_kept(), torch.no_grad(), other.hold(structure):
        torch.manual_seed(0)
        plan = other.plan(*data.args, **data.kwargs)
        for group in structure.groups:
            layout = plan.layouts[group.name]
            parts: list[list[Tensor]] = [[] for _ in layout.strata]
            for _ in range(rounds):
                u = torch.randn(layout.noise_shape(group), dtype=layout.example.dtype)
                u = u.to(layout.example.device)
                weights = other.estimate(
                    group, u, dict(parameters), *data.args, **data.kwargs
                ).log_weights
                counts = [stratum.count for stratum in layout.strata]
                for part, piece in zip(parts, weights.split(counts), strict=True):
                    part.append(piece.double().reshape(len(piece), -1) - math.log(rounds))
            elements.append(_joined([torch.cat(part) for part in parts]))
    found = [torch.cat([part[i] for part in elements], -1) for i in range(3)]
    return Look(*found)


def _joined(strata: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Log estimates, their errors, and the log weights of particles in strata."""
    weights = torch.cat(strata)
    total = weights.logsumexp(0)
    square = torch.zeros_like(total)
    for part in strata:
        relative = (part - total).exp() * len(part)
        square = square + relative.var(0) / len(part)
    return total, square.sqrt(), weights


def missed(default: Look, prior: Look) -> Tensor:
    """The numbers of elements in which the prior's particles find what the proposal's miss."""
    gap = prior.log_likelihood - default.log_likelihood
    error = (prior.error.square() + default.error.square()).sqrt()
    return ((gap > _ERRORS * error) & (gap > _SMALLEST)).nonzero().flatten()


def misses(
    marginal: TunedEstimator,
    draws: list[dict[str, Tensor]],
    data: Arguments,
) -> str | None:
    """What a Gaussian proposal misses at some parameter values, in a sentence; mostly nothing.

    Arguments:
        marginal: A marginal model whose proposal has been fitted.
        draws: Constrained parameter values.
        data: What the model is called with.
    """
    if not marginal.proposal.is_comparable:
        return marginal.proposal.remark
    said, _ = find_misses(marginal, draws, data)
    return None if said is None else f"{said}: take `proposal='prior'`, or write one."


def find_misses(
    marginal: TunedEstimator,
    draws: list[dict[str, Tensor]],
    data: Arguments,
) -> tuple[str | None, float]:
    """What :func:`misses` says, without advice.

    Arguments are those of :func:`misses`.

    Returns:
        The sentence's beginning, and the variance of an estimate from one particle of the prior.
    """
    if not marginal.proposal.needs_fit:
        return None, 0.0
    gaps, variance = [], 0.0
    for parameters in draws:
        default = look(marginal, parameters, data, alone=True)
        prior = look(marginal, parameters, data, from_prior=True)
        gap = torch.zeros_like(default.log_likelihood)
        found = missed(default, prior)
        gap[found] = (prior.log_likelihood - default.log_likelihood)[found]
        gaps.append(gap)
        variance = max(variance, prior.variance(1))
    largest = torch.stack(gaps).amax(0)
    elements = largest.nonzero().flatten().tolist()
    if not elements:
        return None, variance
    listed = ", ".join(map(str, elements[:3])) + (", ..." if len(elements) > 3 else "")
    said = (
        f"the Gaussian proposal of {list(marginal.sites)} misses likelihood at {len(elements)} of "
        f"{len(largest)} elements ({listed}), up to {float(largest.max()):.2g} in its logarithm, "
        "as where there are several modes"
    )
    return said, variance
