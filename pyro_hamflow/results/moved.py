r"""Likelihood estimates from points that are moved to where an element's weights are.

A proposal serves the whole posterior, and an element that it fits badly at a draw keeps noisy
weights from any number of points. But the particles of that draw themselves tell where it should
have put them. In terms of its normal noise u, of density :math:`\varphi`, the estimate of an
element is the mean of its weights f(u). With the mean m of u under :math:`f \varphi` and twice its
covariance, :math:`L L^\top`, most new points are :math:`m + L z`, and one in eight is z as it was.
Every u is shared out between the two kinds, as in :mod:`~pyro_hamflow.marginal.proposals.laplace`:
both are weighed by

.. math:: f(u) \, \frac{\varphi(u)}
                       {(1 - \epsilon) \, N(u; m, L L^\top) + \epsilon \, \varphi(u)},

the first kind with share :math:`1 - \epsilon`, the other with :math:`\epsilon`. That is unbiased
whatever m and L are, as long as other points told them, and no weight is above
:math:`1 / \epsilon` times the proposal's own. Each stratum of a group's particles is moved for
itself.

References:
    | Adaptive Importance Sampling in General Mixture Classes (Cappé et al., 2008)
    | https://arxiv.org/abs/0710.4242
    | Safe and Effective Importance Sampling (Owen and Zhou, 2000)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hamflow.marginal.estimator import Estimate
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.noise_layout import Layout
from pyro_hamflow.marginal.points import place_points
from pyro_hamflow.marginal.proposals.prior import PriorProposal
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.trace import plate_shape
from pyro_hamflow.results.terms import Term, densities

_ONE_IN = 8  # points stays where it was
_SHARE = 0.05  # of these in the mixture that all points are weighed by
# Times the covariance: skewed posteriors end later than a Gaussian does. With one, the error of 545
# random-effects logits was four times as large as with two; from 1.6 to 2.5 it was the same.
_WIDER = 2.0


class Part(NamedTuple):
    """One stratum of a group's particles.

    Attributes:
        size: How many particles it has.
        shape: The shape of one particle's noise, the group's elements first.
    """

    size: int
    shape: torch.Size


def movable(
    source: Potential, model: MarginalModel, num_particles: int
) -> tuple[MarginalModel, MarginalModel]:
    """The model whose particles tell where to move points, and the model to move them in.

    Where particles can tell from what noise the prior would have made them, points are moved there:
    the prior of an element is the same wherever its likelihood is. Other particles tell their own
    noise.

    Arguments:
        source: The potential of the model as it was sampled.
        model: The model.
        num_particles: Enough for each component of its priors.
    """
    structure = model.plan(*source.args, **source.kwargs).structure
    discrete = set(structure.placeholders) - {n for group in structure.groups for n in group.sites}
    telling = model.proposal.telling_origins()
    if telling is None or discrete:  # for each of whose values the noise is another
        return model, model
    first, second = (model.refined(num_particles, "iid") for _ in range(2))
    first.take(telling)
    second.take(PriorProposal())
    plans = [part.plan(*source.args, **source.kwargs) for part in (first, second)]
    sizes = [[layout.dimension for layout in plan.layouts.values()] for plan in plans]
    return (first, second) if sizes[0] == sizes[1] else (model, model)


class MovedPoints:
    """A marginal model with its points where they are told to lie.

    Arguments:
        source: The potential of the model as it was sampled.
        model: The model.
        num_particles: How many points to take.

    Attributes:
        potential: Of the model with so many particles.
        parts: The strata of its groups.
        shift_dimension: How many normal numbers a run takes: those that shift the lattices of all
            parts, and noise of the model's own.
    """

    def __init__(self, source: Potential, model: MarginalModel, num_particles: int) -> None:
        refined = model.refined(num_particles, "iid")
        self.potential = Potential(refined, source.args, source.kwargs, separate_noise=True)
        plan = refined.plan(*source.args, **source.kwargs)
        self._nesting = plan.structure.nesting
        self._groups: list[tuple[Group, Layout]] = [
            (group, plan.layouts[group.name]) for group in plan.structure.groups
        ]
        self.parts = [
            Part(stratum.count, group.shape + (layout.dimension,))
            for group, layout in self._groups
            for stratum in layout.strata
        ]
        self._shifts = [part.shape.numel() for part in self.parts]
        names = {_noise_name(group) for group, _ in self._groups}
        others = [site for site in self.potential.noise_sites if site.name not in names]
        self._others = {site.name: site.stop - site.start for site in others}
        self.shift_dimension = sum(self._shifts) + sum(self._others.values())

    def examples(self, draws: int) -> list[Tensor]:
        """Places for so many draws, as :func:`gather` returns them: where points lie anyway."""
        like = self.potential.example
        centres = [like.new_zeros(draws, *part.shape) for part in self.parts]
        eyes = [torch.eye(part.shape[-1]).to(like) for part in self.parts]
        roots = [
            eye.expand(draws, *part.shape, -1) for eye, part in zip(eyes, self.parts, strict=True)
        ]
        return centres + roots

    def run(
        self, terms: Sequence[Term], position: Tensor, shift: Tensor, *places: Tensor
    ) -> tuple[Tensor, ...]:
        """One estimate of one draw.

        Arguments:
            terms: What is wanted.
            position: The parameters.
            shift: Normal noise, a vector.
            places: Centres and roots of all parts, without draws; none if points stay.

        Returns:
            The terms' log densities; and for each part, or each component of the priors where the
            particles tell their origins, the log of each element's total weight, of its squares'
            total, and the mean and the second moments of its noise.
        """
        count = len(self.parts)
        shifts = shift.split([*self._shifts, *self._others.values()])
        given = list(places) or [None] * 2 * count
        placed = map(_place, self.parts, shifts, given[:count], given[count:])
        points, corrections = zip(*placed, strict=True)
        noise = dict(zip(self._others, shifts[count:], strict=True))
        slices, start = [], 0
        for group, layout in self._groups:
            slices.append(slice(start, start := start + len(layout.strata)))
            noise[_noise_name(group)] = torch.cat(points[slices[-1]]).reshape(-1)
        flat = torch.cat([noise[site.name] for site in self.potential.noise_sites])
        trace = self.potential.trace(position, flat)
        moments: list[Tensor] = []
        for (group, layout), here in zip(self._groups, slices, strict=True):
            node = trace.nodes[f"{group.name}_log_likelihood"]
            estimate = node["infer"]["estimate"]
            weights = _weights(estimate, corrections[here], self._nesting)
            node["fn"] = dist.Unit(weights.logsumexp(0), validate_args=False)
            by_element = weights.reshape(len(weights), -1, *group.shape).logsumexp(1)
            at, sizes = torch.cat(points[here]), [stratum.count for stratum in layout.strata]
            if estimate.origins:
                at = _origins(estimate, layout)
                alike = groupby(layout.strata, lambda stratum: stratum.components)
                sizes = [sum(stratum.count for stratum in strata) for _, strata in alike]
            for own, noise_of in zip(by_element.split(sizes), at.split(sizes), strict=True):
                moments += _moments(own, noise_of)
        return *densities(trace, terms), *moments


def _noise_name(group: Group) -> str:
    return f"{group.name}_noise"


def _origins(estimate: Estimate, layout: Layout) -> Tensor:
    """The noise from which the priors would have made the particles."""

    def collect(*origins: Tensor) -> Tensor:
        blocks = zip(layout.blocks.values(), origins, strict=True)
        return torch.cat([block.collect(origin, estimate.group) for block, origin in blocks], -1)

    return torch.func.vmap(collect)(*(estimate.origins[name] for name in layout.blocks))


def _place(
    part: Part, shift: Tensor, centre: Tensor | None, root: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The points of a part, and the log of what their weights are multiplied by."""
    z = place_points("rqmc", part.size, shift.reshape(1, *part.shape))
    period = min(_ONE_IN, part.size)
    if centre is None or root is None or period == 1:
        return z, torch.zeros_like(z[..., 0])
    moves = (torch.arange(part.size, device=z.device) % period != period - 1)[:, None]
    moves = moves.reshape(-1, *[1] * len(part.shape))
    points = torch.where(moves, centre + _multiply(root, z), z)
    own = _solve(root, points - centre)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    plain = -0.5 * points.square().sum(-1)
    log_ratio = plain + 0.5 * own.square().sum(-1) + log_det  # to the density of moved points
    moving = float(moves.double().mean())
    weight = torch.where(moves[..., 0], (1.0 - _SHARE) / moving, _SHARE / (1.0 - moving)).to(z)
    share = z.new_tensor(_SHARE)
    return points, weight.log() - torch.logaddexp(torch.log1p(-share) - log_ratio, share.log())


def _multiply(root: Tensor, z: Tensor) -> Tensor:
    return root[..., 0] * z if z.shape[-1] == 1 else (root @ z[..., None])[..., 0]


def _solve(root: Tensor, z: Tensor) -> Tensor:
    if z.shape[-1] == 1:
        return z / root[..., 0]
    return torch.linalg.solve_triangular(root, z[..., None], upper=False)[..., 0]


def _weights(estimate: Estimate, corrections: Sequence[Tensor], nesting: int) -> Tensor:
    """The log weights of all particles, corrected for where their points lie."""
    weights, correction = estimate.log_weights, torch.cat(list(corrections))
    enumerated = [1] * (weights.dim() - 1 - nesting)
    shape = enumerated + plate_shape(estimate.group.frames, nesting)
    return weights + correction.reshape(len(weights), *shape)


def _moments(log_weights: Tensor, points: Tensor) -> list[Tensor]:
    """Totals of weights and of their squares, and moments of points, as a run returns them."""
    total = log_weights.logsumexp(0)
    share = (log_weights - total).exp()[..., None]
    mean = (share * points).sum(0)
    second = (share[..., None] * points[..., :, None] * points[..., None, :]).sum(0)
    return [total, (2 * log_weights).logsumexp(0), mean, second]


def gather(moments: Sequence[Tensor]) -> list[Tensor]:
    """Where points should lie, from the moments of several estimates.

    The covariance is that of the weighted points, drawn towards the proposal's by as much as few
    points with weight tell little.

    Arguments:
        moments: As :meth:`MovedPoints.run` returns them, of shape ``(draws, estimates, *)``.

    Returns:
        For each part the means of its elements' points, of shape ``(draws, *shape)``; then for each
        a lower triangular root of their covariances, ``(draws, *shape, dimension)``.
    """
    centres, roots = [], []
    for total, square, mean, second in zip(*[iter(moments)] * 4, strict=True):
        size = mean.shape[-1]
        share = torch.softmax(total, 1)[..., None]
        centre = (share * mean).sum(1)
        spread = (share[..., None] * second).sum(1) - centre[..., :, None] * centre[..., None, :]
        effective = (2 * total.logsumexp(1) - square.logsumexp(1)).exp()[..., None, None]
        eye = torch.eye(size).to(spread)
        spread = (effective * spread + (size + 1) * eye) / (effective + size + 1)
        root, fails = torch.linalg.cholesky_ex(_WIDER * spread)
        known = (fails == 0) & centre.isfinite().all(-1) & root.isfinite().all(-1).all(-1)
        centres.append(torch.where(known[..., None], centre, 0.0))
        roots.append(torch.where(known[..., None, None], root, eye))
    return centres + roots
