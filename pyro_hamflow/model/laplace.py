r"""Proposals that know the data: the prior times a Gaussian approximation of the likelihood.

No proposal fitted at one parameter value serves a whole posterior. But the likelihood of a local
variable changes less with the parameters than its prior does. So what is fitted, at a *pilot* value
of the parameters, is a Gaussian approximation of the likelihood alone, a *site*
:math:`s(v) \propto \exp(\eta^\top v - \tfrac12 v^\top I v)`. For every parameter value it is
multiplied in closed form with the prior :math:`N(m_\theta, P_\theta^{-1})`,

.. math:: q_\theta(v) = N\big((P_\theta + I)^{-1} (P_\theta m_\theta + \eta),\;
                              (P_\theta + I)^{-1}\big),

which follows the parameters by itself. Several local sites are proposed one after the other, each
given those before it, as the pilot's Laplace approximation of them all says. Mixture priors are
taken component by component.

A likelihood that is no Gaussian looks like another one where a wider prior lets the variable go. So
two sites are fitted, under the pilot's prior and under one of a many times larger variance, and for
every parameter value their mean is taken, weighted by how wide the prior is there.

Where the true likelihood falls off more slowly than the site, Gaussian proposals would have
unbounded weights. The normal noise :math:`z` is therefore stretched, :math:`z + \epsilon z^5`,
which is next to nothing for :math:`|z| < 2` and gives the proposal heavier tails than any Gaussian
prior: weights are bounded wherever the likelihood is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.model.layout import Block, Layout
from pyro_hamflow.model.proposals import Draw, GaussianForm, gaussian_form
from pyro_hamflow.model.structure import Group, depth_of, plate_shape

_STRETCH = 1e-4
_NEWTON_STEPS = 30
_WIDER = 32.0  # times the pilot's prior variance
_SHARPNESS = 5.0  # of the passage from one site to the other


@dataclass(frozen=True)
class LikelihoodSite:
    """The site of one local site: precision, and linear term given earlier coordinates.

    Attributes:
        tightness: Of the prior that it was fitted under; see :func:`_tightness`.
        precision: I, of shape ``(*batch, k, k)``.
        linear: The constant part of eta, of shape ``(*batch, k)``.
        coupling: Its slope in the coordinates of the sites before, ``(*batch, k, before)``.
    """

    tightness: Tensor
    precision: Tensor
    linear: Tensor
    coupling: Tensor | None

    def towards(self, wide: LikelihoodSite, prior_precision: Tensor) -> LikelihoodSite:
        """The mean of this site and one fitted under a wider prior that suits a prior."""
        gone = (self.tightness - _tightness(prior_precision)) / math.log(_WIDER)
        share = torch.sigmoid(_SHARPNESS * (gone - 0.5))[..., None]
        coupling = None
        if self.coupling is not None and wide.coupling is not None:
            coupling = torch.lerp(self.coupling, wide.coupling, share[..., None])
        return LikelihoodSite(
            torch.lerp(self.tightness, wide.tightness, share[..., 0]),
            torch.lerp(self.precision, wide.precision, share[..., None]),
            torch.lerp(self.linear, wide.linear, share),
            coupling,
        )


Sites = dict[str, tuple[LikelihoodSite, LikelihoodSite]]  # of each local site, the pilot's first


class LaplaceProposal:
    """Particles from the prior times a Gaussian site of the likelihood; see the module's text.

    Arguments:
        group: The group of local sites.
        blocks: Their coordinates.
        sites: The fitted sites; before the fit, none.
    """

    stratified = True
    enough_particles = 16

    def __init__(
        self,
        group: Group,
        blocks: dict[str, Block],
        sites: Sites,
    ) -> None:
        self.group = group
        self.blocks = blocks
        self.sites = sites
        self.before: list[Tensor] = []

    def noise_shape(self, name: str, fn: object, components: int | None) -> torch.Size:
        form = gaussian_form(name, fn, None if components is None else 0)
        return form.loc.shape[-1:]

    def draw(self, name: str, fn: object, noise: Tensor, component: int | None) -> Draw:
        form = gaussian_form(name, fn, component)
        (narrow, wide), block = self.sites[name], self.blocks[name]
        site = narrow.towards(wide, form.precision)
        linear = site.linear
        if site.coupling is not None:
            batch = torch.broadcast_shapes(*[part.shape[:-1] for part in self.before])
            earlier = torch.cat([part.expand(*batch, -1) for part in self.before], -1)
            linear = linear + _apply(site.coupling, earlier)
        v, log_proposal = _propose(form, site.precision, linear, noise)
        self.before.append(block.gather(v, self.group))
        return Draw(form.value(v), log_gaussian(v, form) - log_proposal)


def _tightness(precision: Tensor) -> Tensor:
    """The mean logarithm of a precision's eigenvalues, of shape ``(*batch)``."""
    if precision.shape[-1] == 1:
        return precision[..., 0, 0].log()
    return torch.logdet(precision) / precision.shape[-1]


def _to_batch(coordinates: Tensor, block: Block, group: Group) -> Tensor:
    """Repeats the coordinates of each element over the plates inside the group's."""
    shape = plate_shape(group.frames, depth_of(block.frames))
    return coordinates.reshape(shape + [coordinates.shape[-1]])


def _propose(
    form: GaussianForm, precision: Tensor, linear: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Draws from prior times site with stretched noise; returns v and log q(v) + (k/2) log 2 pi."""
    stretched = z + _STRETCH * z.pow(5)
    log_stretch = torch.log1p(5 * _STRETCH * z.pow(4)).sum(-1)
    log_noise = -0.5 * z.square().sum(-1) - log_stretch
    total = form.precision + precision
    if z.shape[-1] == 1:
        total = total[..., 0]
        mean = (form.precision[..., 0] * form.loc + linear) / total
        v = mean + stretched * total.rsqrt()
        return v, log_noise + 0.5 * total[..., 0].log()
    root = torch.linalg.cholesky(total)
    target = (form.precision @ form.loc[..., None])[..., 0] + linear
    mean = torch.cholesky_solve(target[..., None], root)[..., 0]
    step = torch.linalg.solve_triangular(root.mT, stretched[..., None], upper=True)[..., 0]
    return mean + step, log_noise + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def log_gaussian(v: Tensor, form: GaussianForm) -> Tensor:
    """The prior's log density at v, plus (k/2) log 2 pi."""
    gap = v - form.loc
    if v.shape[-1] == 1:
        precision = form.precision[..., 0, 0]
        return 0.5 * precision.log() - 0.5 * precision * gap[..., 0].square()
    quadratic = (gap[..., None, :] @ form.precision @ gap[..., None])[..., 0, 0]
    return 0.5 * torch.logdet(form.precision) - 0.5 * quadratic


Evaluate = Callable[[dict[str, Tensor] | None], tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]


class Fitted(NamedTuple):
    """The sites of one group, and where they were fitted.

    Attributes:
        sites: For each local site a site under its prior, and one under a wider prior.
        mode: The coordinates where the joint density is highest, ``(*group.shape, dimension)``.
    """

    sites: Sites
    mode: Tensor


def fit_sites(
    group: Group,
    layout: Layout,
    joint: Callable[[float], Evaluate],
    near: Tensor | None = None,
    *,
    here_alone: bool = False,
) -> Fitted:
    """Fits the sites of one group at a pilot value of the parameters.

    Arguments:
        group: The group.
        layout: Its coordinates.
        joint: For how many times the priors' variance is wanted, a function of the coordinates of
            each site (prior means if ``None``) that returns the log joint density of each element,
            and each site's prior mean and precision.
        near: The mode at parameter values close by, to begin the search at; the prior means if not
            given.
        here_alone: Whether the sites serve these parameter values alone, and no wider prior.
    """
    narrow, mode = _fit(group, layout, joint(1.0), near)
    wide = narrow if here_alone else _fit(group, layout, joint(_WIDER), near)[0]
    return Fitted({name: (narrow[name], wide[name]) for name in layout.blocks}, mode)


def _fit(
    group: Group, layout: Layout, evaluate: Evaluate, near: Tensor | None
) -> tuple[dict[str, LikelihoodSite], Tensor]:
    """A site for each local site, under the priors of a joint density, and the mode."""
    blocks = layout.blocks

    def unpack(v: Tensor) -> dict[str, Tensor]:
        return {name: block.spread(v, group) for name, block in blocks.items()}

    if near is None or not bool(evaluate(unpack(near))[0].isfinite().all()):
        _, priors = evaluate(None)
        start = [blocks[name].collect(loc, group) for name, (loc, _) in priors.items()]
        near = torch.cat(start, -1).detach()
    v, hessian = _maximise(lambda v: evaluate(unpack(v))[0], near)
    covariance = torch.linalg.inv(hessian)
    v = v.requires_grad_()
    _, priors = evaluate(unpack(v))
    sites = {
        name: _site(block, group, v, covariance, *priors[name]) for name, block in blocks.items()
    }
    return sites, v.detach()


def _site(
    block: Block,
    group: Group,
    v: Tensor,
    covariance: Tensor,
    loc: Tensor,
    precision: Tensor,
) -> LikelihoodSite:
    before, own = slice(0, block.start), slice(block.start, block.stop)
    mode = block.spread(v.detach(), group)
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
    total = prior_precision + extra
    linear = _apply(total, mode) - _apply(prior_precision, loc.detach())
    tightness = _tightness(prior_precision)
    if gain is None:
        return LikelihoodSite(tightness, extra.detach(), linear.detach(), None)
    slopes = _slopes(block.collect(loc, group), v)[..., before]
    rows = Block(0, columns * block.start, block.frames, torch.Size([width, block.start]))
    gain = rows.spread(gain.flatten(-2), group)
    slope = rows.spread(slopes.flatten(-2), group)
    coupling = total @ gain - prior_precision @ slope
    earlier = _to_batch(v.detach()[..., before], block, group)
    linear = linear - _apply(coupling, earlier)
    return LikelihoodSite(tightness, extra.detach(), linear.detach(), coupling.detach())


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _slopes(values: Tensor, v: Tensor) -> Tensor:
    """The derivative of each element's values in its coordinates, ``(*, values, coordinates)``."""
    rows = []
    for i in range(values.shape[-1]):
        row = None
        if values.requires_grad:
            (row,) = torch.autograd.grad(
                values[..., i].sum(), v, retain_graph=True, allow_unused=True
            )
        rows.append(torch.zeros_like(v) if row is None else row)
    return torch.stack(rows, -2)


def _maximise(log_joint: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
    """Finds each element's mode by damped Newton steps; returns it with the negative Hessian."""
    damping = torch.full(v.shape[:-1], 1e-3, dtype=v.dtype, device=v.device)
    value, gradient, hessian = _derivatives(log_joint, v)
    eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    for _ in range(_NEWTON_STEPS):
        values, vectors = torch.linalg.eigh(hessian)
        curvature = vectors @ (values.abs().clamp(min=1e-6)[..., None] * vectors.mT)
        step = torch.linalg.solve(curvature + damping[..., None, None] * eye, gradient)
        moved = v + step
        new_value, new_gradient, new_hessian = _derivatives(log_joint, moved)
        better = new_value >= value
        damping = torch.where(better, damping * 0.2, damping * 10).clamp(1e-9, 1e9)
        v = torch.where(better[..., None], moved, v)
        gradient = torch.where(better[..., None], new_gradient, gradient)
        hessian = torch.where(better[..., None, None], new_hessian, hessian)
        value = torch.where(better, new_value, value)
        if gradient.abs().max() < 1e-8:
            break
    values, vectors = torch.linalg.eigh(hessian)
    return v, vectors @ (values.clamp(min=1e-6)[..., None] * vectors.mT)


def _derivatives(log_joint: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients and negative Hessians of all elements at once."""
    v = v.detach().requires_grad_()
    value = log_joint(v)
    (gradient,) = torch.autograd.grad(value.sum(), v, create_graph=True)
    hessian = -_slopes(gradient, v)
    hessian = 0.5 * (hessian + hessian.mT).detach()
    return value.detach(), gradient.detach(), hessian.nan_to_num()
