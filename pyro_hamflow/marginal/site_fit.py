"""Gaussian sites of a likelihood, fitted at one value of the parameters, and how they move.

Each element's mode is found by Newton's method; the curvature there less the prior's is the site's
precision. How the sites move with the parameters follows from the modes' movement, by the implicit
function theorem, and from that of the priors; both are taken from differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_hamflow.marginal.newton import gradients, maximise
from pyro_hamflow.marginal.noise_layout import Block, Layout
from pyro_hamflow.marginal.proposals.laplace import (
    WIDER,
    LikelihoodSite,
    Sites,
    Spread,
    apply,
    tightness,
)
from pyro_hamflow.marginal.scores import Reference
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.trace import depth_of, plate_shape
from pyro_hamflow.programs.vectorize import Vectorized

_AT_ONCE = 64  # parameter values that the model runs with at once
_ASIDE = 1e-3  # prior standard deviations
_NOTHING = 1e-5  # relative to the largest slope, what differences may leave of none


def _to_batch(coordinates: Tensor, block: Block, group: Group) -> Tensor:
    """Repeats the coordinates of each element over the plates inside the group's."""
    shape = plate_shape(group.frames, depth_of(block.frames))
    return coordinates.reshape(shape + [coordinates.shape[-1]])


Evaluate = Callable[[dict[str, Tensor] | None], tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]


class Fitted(NamedTuple):
    """The sites of one group, and where they were fitted.

    Attributes:
        sites: For each mode and local site a site under its prior, and one under a wider prior.
        mode: The coordinates where the joint density is highest, ``(*group.shape, dimension)``.
        spread: How several modes share out each element, and their tails; none if one was sought.
    """

    sites: tuple[Sites, ...]
    mode: Tensor
    spread: Spread | None = None


class Joint(Protocol):
    """The log joint density of a group's elements as a function of its coordinates."""

    def __call__(self, parameters: dict[str, Tensor], times: float) -> Evaluate:
        """Fixes the parameters.

        Arguments:
            parameters: The values of all sites that are not integrated out.
            times: By how much the priors' variance is multiplied.

        Returns:
            A function of the coordinates of each site (prior means if ``None``): the log joint
            density of each element, and each site's prior mean and precision.
        """


@dataclass(frozen=True)
class Anchor:
    """Where sites were fitted, so that they can tell how far parameters have moved since.

    Attributes:
        values: Constrained values of all parameters.
        followed: The names of those that are followed.
    """

    values: dict[str, Tensor]
    followed: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        """How many numbers each parameter has that is followed."""
        return [self.values[name].numel() for name in self.followed]

    def shift(self, parameters: dict[str, Tensor]) -> Tensor | None:
        """By how much parameters differ from here, a vector.

        In their supports, for there cut points and gaps between them are parts of linear
        predictors, with which the modes move in proportion.
        """
        parts = [(parameters[name] - self.values[name]).reshape(-1) for name in self.followed]
        return torch.cat(parts) if parts else None

    def at(self, shift: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`shift`."""
        parts = dict(zip(self.followed, shift.split(self.sizes), strict=True))
        return self.values | {
            name: self.values[name] + part.reshape(self.values[name].shape)
            for name, part in parts.items()
        }


def fit_sites(
    group: Group,
    layout: Layout,
    joint: Joint,
    anchor: Anchor,
    near: Tensor | None,
    held: dict[str, Reference],
) -> Fitted:
    """Fits the sites of one group at a pilot value of the parameters.

    Arguments:
        group: The group.
        layout: Its coordinates.
        joint: The log joint density of its elements.
        anchor: The parameters' values, and which of them the sites are to follow.
        near: The mode at parameter values close by, to begin the search at, for sites that serve
            here alone, and no wider prior; the prior means if not given.
        held: Where the coordinates of some sites are held.
    """
    narrow, mode = _fit(group, layout, joint, anchor, 1.0, near)
    narrow = {name: replace(site, near=held.get(name)) for name, site in narrow.items()}
    if near is not None:
        return Fitted(({name: (site, site) for name, site in narrow.items()},), mode)
    wide, _ = _fit(group, layout, joint, anchor, WIDER, None)
    return Fitted(({name: (narrow[name], wide[name]) for name in layout.blocks},), mode)


def fit_modes(
    group: Group,
    layout: Layout,
    joint: Joint,
    anchor: Anchor,
    places: Tensor,
    spread: Spread,
    held: dict[str, Reference],
) -> Fitted:
    """Fits the sites of one group about several modes of each element.

    Under a wider prior a mode may not be there, or lead to another: sites serve for all priors.

    Arguments:
        group: The group.
        layout: Its coordinates.
        joint: The log joint density of its elements.
        anchor: The parameters' values, and which of them the sites are to follow.
        places: The modes, of shape ``(modes, *group.shape, dimension)``.
        spread: Their shares and tails.
        held: Where the coordinates of some sites are held, those of all modes.
    """
    fits = [_fit(group, layout, joint, anchor, 1.0, place)[0] for place in places]
    modes = [{n: replace(site, near=held.get(n)) for n, site in fit.items()} for fit in fits]
    sites = [{name: (site, site) for name, site in mode.items()} for mode in modes]
    return Fitted(tuple(sites), places[0], spread)


def keep_what_moves(anchor: Anchor, fits: dict[Any, Fitted]) -> tuple[Anchor, dict[Any, Fitted]]:
    """Leaves out parameters that no site follows: those of priors, mostly.

    Arguments:
        anchor: What the sites follow.
        fits: The sites.
    """
    modes = [sites for fit in fits.values() for sites in fit.sites]
    sites = [site for mode in modes for pair in mode.values() for site in pair]
    slopes = [site.slopes for site in sites if site.slopes is not None]
    if not slopes:
        return anchor, fits
    largest = torch.stack([part.abs().flatten(0, -2).amax(0) for part in slopes]).amax(0)
    moves = (largest > _NOTHING * largest.max()).split(anchor.sizes)
    follows = [bool(part.any()) for part in moves]
    kept = torch.cat([part | part.any() for part in moves])

    def shorten(site: LikelihoodSite) -> LikelihoodSite:
        slopes = site.slopes if any(follows) else None
        return replace(site, slopes=None if slopes is None else slopes[..., kept])

    def shorten_all(fit: Fitted) -> Fitted:
        modes = ({n: (shorten(a), shorten(b)) for n, (a, b) in m.items()} for m in fit.sites)
        return fit._replace(sites=tuple(modes))

    shorter = {key: shorten_all(fit) for key, fit in fits.items()}
    followed = tuple(name for name, is_so in zip(anchor.followed, follows, strict=True) if is_so)
    return replace(anchor, followed=followed), shorter


def _fit(
    group: Group,
    layout: Layout,
    joint: Joint,
    anchor: Anchor,
    times: float,
    near: Tensor | None,
) -> tuple[dict[str, LikelihoodSite], Tensor]:
    """A site for each local site, under priors of so many times the variance, and the mode."""
    blocks = layout.blocks
    evaluate = joint(anchor.values, times)

    def unpack(v: Tensor) -> dict[str, Tensor]:
        return {name: block.spread(v, group) for name, block in blocks.items()}

    if near is None or not bool(evaluate(unpack(near))[0].isfinite().all()):
        _, priors = evaluate(None)
        # Beside the means: at the median some distributions' quantile functions have no slope.
        start = [
            blocks[name].collect(loc + _ASIDE * _deviations(precision), group)
            for name, (loc, precision) in priors.items()
        ]
        near = torch.cat(start, -1).detach()
    top = maximise(lambda v: evaluate(unpack(v))[0], near)
    values, vectors = torch.linalg.eigh(top.curvature)
    hessian = vectors @ (values.clamp(min=1e-6)[..., None] * vectors.mT)
    covariance = torch.linalg.inv(hessian)
    v = top.place.requires_grad_()
    _, priors = evaluate(unpack(v))
    sites = {
        name: _site(block, group, v, covariance, *priors[name]) for name, block in blocks.items()
    }
    mode = v.detach()
    if not anchor.followed:
        return sites, mode

    each_gradient, each_site = (Vectorized(f"Sites of {list(group.sites)}") for _ in range(2))

    def gradients_at(shifts: Tensor) -> Tensor:
        def total(shift: Tensor, v: Tensor) -> Tensor:
            return joint(anchor.at(shift), times)(unpack(v))[0].sum()

        modes = mode.expand(len(shifts), *mode.shape).clone().requires_grad_()
        # The gradient is taken outside, of operations that are batched already.
        (gradient,) = torch.autograd.grad(each_gradient(total, shifts, modes).sum(), modes)
        return gradient

    modes_slopes = covariance @ _differences(gradients_at, sum(anchor.sizes), mode)

    def linear_at(shift: Tensor) -> dict[str, Tensor]:
        v = mode + modes_slopes @ shift
        _, priors = joint(anchor.at(shift), times)(unpack(v))
        return {
            name: _linear(block, group, v, sites[name], *priors[name])
            for name, block in blocks.items()
        }

    slopes = _differences(partial(each_site, linear_at), sum(anchor.sizes), mode)
    return {name: replace(site, slopes=slopes[name]) for name, site in sites.items()}, mode


def _deviations(precision: Tensor) -> Tensor:
    return precision.diagonal(dim1=-2, dim2=-1).rsqrt()


def _differences(many: Callable[[Tensor], Any], size: int, example: Tensor) -> Any:
    """The derivatives at zero of a function of vectors, as the last dimension of its results.

    Arguments:
        many: The function for many vectors at once, which come first in its results.
        size: The length of a vector.
        example: A tensor of their type and device.
    """
    step = torch.finfo(example.dtype).eps ** (1 / 3)
    unit = torch.eye(size, dtype=example.dtype, device=example.device)

    def between(up: Tensor, down: Tensor) -> Tensor:
        return ((up - down) / (2 * step)).detach()

    blocks = [
        tree_map(between, many(step * part), many(-step * part)) for part in unit.split(_AT_ONCE)
    ]
    return tree_map(lambda *parts: torch.cat(parts).movedim(0, -1), *blocks)


def _linear(
    block: Block, group: Group, v: Tensor, site: LikelihoodSite, loc: Tensor, precision: Tensor
) -> Tensor:
    """The linear term with which a site's proposal has its mean at the mode."""
    mode = block.spread(v, group)
    linear = apply(precision + site.precision, mode) - apply(precision, loc)
    if site.coupling is None:
        return linear
    return linear - apply(site.coupling, _to_batch(v[..., : block.start], block, group))


def _site(
    block: Block,
    group: Group,
    v: Tensor,
    covariance: Tensor,
    loc: Tensor,
    precision: Tensor,
) -> LikelihoodSite:
    before, own = slice(0, block.start), slice(block.start, block.stop)
    joint = covariance[..., own, own]
    gain = None
    if block.start:
        gain = torch.linalg.solve(covariance[..., before, before], covariance[..., before, own]).mT
        joint = joint - gain @ covariance[..., before, own]
    width = block.event.numel()
    columns = block.stop - block.start
    full = torch.linalg.inv(joint)
    # Elements of inner plates are independent given what comes before: keep each one's own block.
    index = torch.arange(columns).reshape(-1, width)
    blocks = full[..., index[:, :, None], index[:, None, :]].flatten(-3)
    wide = Block(0, columns * width, block.frames, torch.Size([width, width]))
    own_precision = wide.spread(blocks, group)
    prior_precision = precision.detach()
    values, vectors = torch.linalg.eigh(own_precision - prior_precision)
    extra = vectors @ (values.clamp(min=0.0)[..., None] * vectors.mT)
    coupling = None
    if gain is not None:
        slopes = gradients(block.collect(loc, group), v)[..., before]
        rows = Block(0, columns * block.start, block.frames, torch.Size([width, block.start]))
        gain = rows.spread(gain.flatten(-2), group)
        slope = rows.spread(slopes.flatten(-2), group)
        coupling = ((prior_precision + extra) @ gain - prior_precision @ slope).detach()
    tight = tightness(prior_precision)
    site = LikelihoodSite(tight, extra.detach(), extra.new_zeros(()), coupling)
    linear = _linear(block, group, v.detach(), site, loc.detach(), prior_precision)
    return replace(site, linear=linear)
