"""Gaussian sites of a likelihood, and the algebra of Gaussians in batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.marginal.gaussian_form import GaussianForm
from pyro_hamflow.marginal.scores import Reference

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


def chosen(options: list[Sites], number: Tensor) -> Sites:
    """One of several groups of sites that are alike, by its number, a scalar."""

    def pick(parts: Iterable[Tensor]) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*parts))[number]

    def one(sites: list[LikelihoodSite]) -> LikelihoodSite:
        couplings = [site.coupling for site in sites if site.coupling is not None]
        slopes = [site.slopes for site in sites if site.slopes is not None]
        held = [site.near for site in sites if site.near is not None]
        return LikelihoodSite(
            pick(site.tightness for site in sites),
            pick(site.precision for site in sites),
            pick(site.linear for site in sites),
            pick(couplings) if couplings else None,
            pick(slopes) if slopes else None,
            Reference(*map(pick, zip(*held, strict=True))) if held else None,
        )

    pairs = {name: zip(*(sites[name] for sites in options), strict=True) for name in options[0]}
    chosen_pairs = {name: [one(list(sites)) for sites in pair] for name, pair in pairs.items()}
    return {name: (narrow, wide) for name, (narrow, wide) in chosen_pairs.items()}


class Spread(NamedTuple):
    """What of a proposal about several modes is not in their sites.

    Attributes:
        log_shares: The logarithm of each mode's share, of shape ``(modes, *group.shape)``.
        tail: By how much the noise is stretched, of shape ``(*group.shape)``.
    """

    log_shares: Tensor
    tail: Tensor


def tightness(precision: Tensor) -> Tensor:
    """The mean logarithm of a precision's eigenvalues, of shape ``(*batch)``."""
    if precision.shape[-1] == 1:
        return precision[..., 0, 0].log()
    return torch.logdet(precision) / precision.shape[-1]


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product of each matrix of a batch with its vector."""
    return (matrix @ vector[..., None])[..., 0]


def origin_of(v: Tensor, form: GaussianForm) -> Tensor:
    """The noise from which the prior would have made v."""
    if v.shape[-1] == 1:
        return (v - form.loc) * form.precision[..., 0].sqrt()
    root = torch.linalg.cholesky(torch.linalg.inv(form.precision))
    return torch.linalg.solve_triangular(root, (v - form.loc)[..., None], upper=False)[..., 0]


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
