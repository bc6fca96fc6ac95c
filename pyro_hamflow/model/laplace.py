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

Where the true likelihood falls off more slowly than the site, Gaussian proposals would have
unbounded weights. The normal noise :math:`z` is therefore stretched, :math:`z + \epsilon z^5`,
which is next to nothing for :math:`|z| < 2` and gives the proposal heavier tails than any Gaussian
prior: weights are bounded wherever the likelihood is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_hamflow.model.layout import Block
from pyro_hamflow.model.proposals import Draw, GaussianForm, gaussian_form
from pyro_hamflow.model.structure import Group

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
    """

    tightness: Tensor
    precision: Tensor
    linear: Tensor
    coupling: Tensor | None
    slopes: Tensor | None = None

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


class LaplaceProposal:
    """Particles from the prior times a Gaussian site of the likelihood; see the module's text.

    Arguments:
        group: The group of local sites.
        blocks: Their coordinates.
        sites: The fitted sites; before the fit, none.
        shift: By how much the parameters they follow have moved, on the real line; a vector.
    """

    stratified = True
    enough_particles = 16

    def __init__(
        self,
        group: Group,
        blocks: dict[str, Block],
        sites: Sites,
        shift: Tensor | None = None,
    ) -> None:
        self.group = group
        self.blocks = blocks
        self.sites = sites
        self.shift = shift
        self.before: list[Tensor] = []

    def noise_shape(self, name: str, fn: object, components: int | None) -> torch.Size:
        form = gaussian_form(name, fn, None if components is None else 0)
        return form.loc.shape[-1:]

    def draw(self, name: str, fn: object, noise: Tensor, component: int | None) -> Draw:
        form = gaussian_form(name, fn, component).to(noise.dtype)
        (narrow, wide), block = self.sites[name], self.blocks[name]
        site = narrow.moved(self.shift).towards(wide.moved(self.shift), form.precision)
        linear = site.linear
        if site.coupling is not None:
            batch = torch.broadcast_shapes(*[part.shape[:-1] for part in self.before])
            earlier = torch.cat([part.expand(*batch, -1) for part in self.before], -1)
            linear = linear + apply(site.coupling, earlier)
        v, log_proposal = _propose(form, site.precision, linear, noise)
        self.before.append(block.gather(v, self.group))
        return Draw(form.value(v), log_gaussian(v, form) - log_proposal)


def tightness(precision: Tensor) -> Tensor:
    """The mean logarithm of a precision's eigenvalues, of shape ``(*batch)``."""
    if precision.shape[-1] == 1:
        return precision[..., 0, 0].log()
    return torch.logdet(precision) / precision.shape[-1]


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product of each matrix of a batch with its vector."""
    return (matrix @ vector[..., None])[..., 0]


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
