"""Gaussian sites of a likelihood, fitted at one value of the parameters, and how they move.

Each element's mode is found by Newton's method; the curvature there less the prior's is the site's
precision. How the sites move with the parameters follows from the modes' movement, by the implicit
function theorem, and from that of the priors; both are taken from differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_hamflow.marginal.fitted import Anchor, Fitted
from pyro_hamflow.marginal.joint_density import Joint
from pyro_hamflow.marginal.likelihood_site import WIDER, LikelihoodSite, Spread, apply, tightness
from pyro_hamflow.marginal.newton import gradients, maximise
from pyro_hamflow.marginal.noise_layout import Block, Layout
from pyro_hamflow.marginal.scores import Reference
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.trace import depth_of, plate_shape
from pyro_hamflow.programs.vectorize import Vectorized

_AT_ONCE = 64  # parameter values that the model runs with at once
_ASIDE = 1e-3  # prior standard deviations


def _to_batch(coordinates: Tensor, block: Block, group: Group) -> Tensor:
    """Repeats the coordinates of each element over the plates inside the group's."""
    shape = plate_shape(group.frames, depth_of(block.frames))
    return coordinates.reshape(shape + [coordinates.shape[-1]])


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
