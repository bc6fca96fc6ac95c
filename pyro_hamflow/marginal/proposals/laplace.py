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

Where parameters move a likelihood along, as an intercept does that is added to the variable, the
site has to move with it, or particles held would hold the parameters too. So :math:`\eta` follows
the parameters to first order.

A likelihood that is no Gaussian looks like another one where a wider prior lets the variable go. So
two sites are fitted, under the pilot's prior and under one of a many times larger variance, and for
every parameter value their mean is taken, weighted by how wide the prior is there.

Priors that are no Gaussians are taken in coordinates in which they are; see
:mod:`pyro_hamflow.marginal.scores`.

Where the true likelihood falls off more slowly than the site, or has another mode, such a proposal
alone would have unbounded weights. So some particles come from the prior, and every value is shared
out between the two kinds: the part

.. math:: (1 - \epsilon) q(v) / \big((1 - \epsilon) q(v) + \epsilon p(v)\big)

of its likelihood is left to the proposal's, the rest to the prior's. The estimate is the mean over
the proposal's particles plus that over the prior's. It is unbiased whatever :math:`\epsilon` and
the numbers of particles, and no weight exceeds the likelihood by more than :math:`1 / \epsilon`. A
small :math:`\epsilon` leaves those places to the proposal that it serves well. With the shares of
the numbers of particles (the balance heuristic) the prior's would add noise there, for each of them
is close to the posterior or not by chance.

Where there is but one particle for each component, none comes from the prior. The normal noise
:math:`z` is stretched then, :math:`z + 10^{-4} z^5`, which is next to nothing for :math:`|z| < 2`
and gives the proposal heavier tails than any Gaussian prior.

References:
    | Optimally Combining Sampling Techniques for Monte Carlo Rendering (Veach and Guibas, 1995)
    | Safe and Effective Importance Sampling (Owen and Zhou, 2000)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.marginal.noise_layout import Block
from pyro_hamflow.marginal.proposals.base import Draw
from pyro_hamflow.marginal.proposals.gaussian_form import GaussianForm, gaussian_form
from pyro_hamflow.marginal.scores import Reference
from pyro_hamflow.marginal.structure import Group

_STRETCH = 1e-4
WIDER = 32.0  # times the pilot's prior variance
_SHARPNESS = 5.0  # of the passage from one site to the other


@dataclass(frozen=True)
class LikelihoodSite:
    """The site of one local site: precision, and linear term given earlier coordinates.

    Attributes:
        tightness: Of the prior that it was fitted under; see :func:`tightness`.
        precision: I, of shape ``(*batch, k, k)``.
        linear: The constant part of eta, of shape ``(*batch, k)``.
        coupling: Its slope in the coordinates of the sites before, ``(*batch, k, before)``.
        slopes: Its slope in the parameters, of shape ``(*batch, k, parameters)``; none if it stays.
        near: Where the coordinates of a prior that is no Gaussian are held.
    """

    tightness: Tensor
    precision: Tensor
    linear: Tensor
    coupling: Tensor | None
    slopes: Tensor | None = None
    near: Reference | None = None

    def moved(self, shift: Tensor | None) -> LikelihoodSite:
        """The site where parameters have moved by ``shift``, a vector, on the real line."""
        if shift is None or self.slopes is None:
            return self
        change = self.slopes.reshape(-1, self.slopes.shape[-1]) @ shift.to(self.slopes.dtype)
        return replace(self, linear=self.linear + change.reshape(self.linear.shape), slopes=None)

    def towards(self, wide: LikelihoodSite, prior_precision: Tensor) -> LikelihoodSite:
        """The mean of this site and one fitted under a wider prior that suits a prior."""
        gone = (self.tightness - tightness(prior_precision)) / math.log(WIDER)
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


class Spread(NamedTuple):
    """What of a proposal about several modes is not in their sites.

    Attributes:
        log_shares: The logarithm of each mode's share, of shape ``(modes, *group.shape)``.
        tail: By how much the noise is stretched, of shape ``(*group.shape)``.
    """

    log_shares: Tensor
    tail: Tensor


class LaplaceProposal:
    """Particles from the prior times a Gaussian site of the likelihood; see the module's text.

    Arguments:
        group: The group of local sites.
        blocks: Their coordinates.
        sites: The fitted sites; before the fit, none.
        shift: By how much the parameters they follow have moved, on the real line; a vector.
        from_prior: Whether this particle comes from the prior, true or false; ``None`` where no
            particle does.
        tells_origins: Whether draws tell from what noise the prior would have made them.
    """

    stratified = True
    is_defended = True
    enough_particles = 16

    def __init__(
        self,
        group: Group,
        blocks: dict[str, Block],
        sites: Sites,
        shift: Tensor | None = None,
        from_prior: Tensor | None = None,
        *,
        tells_origins: bool = False,
    ) -> None:
        self.group = group
        self.blocks = blocks
        self.sites = sites
        self.shift = shift
        self.from_prior = from_prior
        self.tells_origins = tells_origins
        self.before: list[Tensor] = []

    def noise_shape(self, name: str, fn: object, components: int | None) -> torch.Size:
        form = gaussian_form(name, fn, None if components is None else 0)
        return form.loc.shape[-1:]

    def draw(self, name: str, fn: object, noise: Tensor, component: int | None) -> Draw:
        form = gaussian_form(name, fn, component, self.sites[name][0].near).to(noise.dtype)
        precision, linear = self.site(name, form, self.sites)
        v, log_proposal = _propose(form, precision, linear, noise, self.from_prior)
        self.before.append(self.blocks[name].gather(v, self.group))
        origin = origin_of(v, form) if self.tells_origins else None
        return Draw(form.value(v), (log_gaussian(v, form) - log_proposal,), origin)

    def site(self, name: str, form: GaussianForm, sites: Sites) -> tuple[Tensor, Tensor]:
        """The precision and linear term of a site, for a prior and given what comes before."""
        narrow, wide = sites[name]
        site = narrow.moved(self.shift).towards(wide.moved(self.shift), form.precision)
        if site.coupling is None:
            return site.precision, site.linear
        batch = torch.broadcast_shapes(*[part.shape[:-1] for part in self.before])
        earlier = torch.cat([part.expand(*batch, -1) for part in self.before], -1)
        return site.precision, site.linear + apply(site.coupling, earlier)


def tightness(precision: Tensor) -> Tensor:
    """The mean logarithm of a precision's eigenvalues, of shape ``(*batch)``."""
    if precision.shape[-1] == 1:
        return precision[..., 0, 0].log()
    return torch.logdet(precision) / precision.shape[-1]


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product of each matrix of a batch with its vector."""
    return (matrix @ vector[..., None])[..., 0]


def _propose(
    form: GaussianForm, precision: Tensor, linear: Tensor, z: Tensor, from_prior: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Draws v from prior times site, or from the prior; log q(v) + (k/2) log 2 pi is the former's.

    Where none come from the prior, the noise is stretched.
    """
    total, own = form.precision + precision, form.precision
    if z.shape[-1] == 1:
        total, own = total[..., 0], own[..., 0]
        mean = (own * form.loc + linear) / total
        log_det = 0.5 * total[..., 0].log()
        if from_prior is None:
            stretched, log_noise = _stretch(z)
            return mean + stretched * total.rsqrt(), log_noise + log_det
        centre = torch.where(from_prior, form.loc, mean)
        v = centre + z * torch.where(from_prior, own, total).rsqrt()
        return v, log_det - 0.5 * (total * (v - mean).square())[..., 0]
    root = torch.linalg.cholesky(total)
    target = (own @ form.loc[..., None])[..., 0] + linear
    mean = torch.cholesky_solve(target[..., None], root)[..., 0]
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if from_prior is None:
        stretched, log_noise = _stretch(z)
        return mean + solve(root, stretched), log_noise + log_det
    centre = torch.where(from_prior, form.loc, mean)
    v = centre + solve(torch.where(from_prior, torch.linalg.cholesky(own), root), z)
    return v, log_det - 0.5 * apply(root.mT, v - mean).square().sum(-1)


def origin_of(v: Tensor, form: GaussianForm) -> Tensor:
    """The noise from which the prior would have made v."""
    if v.shape[-1] == 1:
        return (v - form.loc) * form.precision[..., 0].sqrt()
    root = torch.linalg.cholesky(torch.linalg.inv(form.precision))
    return torch.linalg.solve_triangular(root, (v - form.loc)[..., None], upper=False)[..., 0]


def _stretch(z: Tensor) -> tuple[Tensor, Tensor]:
    """Noise with heavier tails, and its log density."""
    log_stretch = torch.log1p(5 * _STRETCH * z.pow(4)).sum(-1)
    return z + _STRETCH * z.pow(5), -0.5 * z.square().sum(-1) - log_stretch


def solve(root: Tensor, vector: Tensor) -> Tensor:
    """What the transpose of a lower triangular matrix maps to a vector."""
    return torch.linalg.solve_triangular(root.mT, vector[..., None], upper=True)[..., 0]


def log_gaussian(v: Tensor, form: GaussianForm) -> Tensor:
    """The prior's log density at v, plus (k/2) log 2 pi."""
    gap = v - form.loc
    if v.shape[-1] == 1:
        precision = form.precision[..., 0, 0]
        return 0.5 * precision.log() - 0.5 * precision * gap[..., 0].square()
    quadratic = (gap[..., None, :] @ form.precision @ gap[..., None])[..., 0, 0]
    return 0.5 * torch.logdet(form.precision) - 0.5 * quadratic
