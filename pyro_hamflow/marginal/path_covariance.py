r"""Paths whose prior is one multivariate normal, and whose likelihood looks at each number alone.

So are latent Gaussian processes. Their precision has no bands, and finding it takes a product with
every unit vector. But a model that gives a covariance has made its root C. In the prior's own
standard normal noise v, of :math:`x = \mu + C v`, the prior times sites of precision W has
precision :math:`I + C^\top W C`: one product and one factor are all that the proposal needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_hamflow.marginal.gaussian_form import Component
from pyro_hamflow.marginal.path_bands import Bands
from pyro_hamflow.marginal.path_density import Expansion, Parts, PartsAt, PathCoordinates
from pyro_hamflow.marginal.path_fit import PathFit
from pyro_hamflow.marginal.path_looks import LookAt
from pyro_hamflow.marginal.path_modes import captured_or_not, site_at
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.proposals.base import Draw
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.marginal.whitening.affine import CovarianceMap, CovariancePrior
from pyro_hamflow.marginal.whitening.path_prior import multivariate_normal


class CovarianceParticle:
    """One vector of a group, drawn when its prior is known.

    Arguments:
        coordinates: How it becomes the value of its site.
        map_of: The map from noise to it, given the prior.
        noise: Of shape ``(n,)``.
        log_noise: The noise's log density, plates where they are.
    """

    def __init__(
        self,
        coordinates: PathCoordinates,
        map_of: Callable[[CovariancePrior], CovarianceMap],
        noise: Tensor,
        log_noise: Tensor,
    ) -> None:
        self.coordinates = coordinates
        self.map_of = map_of
        self.noise = noise
        self.log_density = log_noise

    def draw(self, name: str, fn: Any, noise: Tensor, component: Component | None) -> Draw:
        found = self.map_of(CovariancePrior(fn.loc, fn.scale_tril))
        self.log_density = self.log_density - found.log_volume()
        value, density = self.coordinates.site(name, fn, found.forward(self.noise))
        return Draw(value, (density,))

    def mix(self, log_ratios: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return log_ratios[0] - self.log_density, None


def has_covariance(bands: Bands, n: int, group: Group, trace: Trace) -> bool:
    """Whether a path is as the module's text says, unless its likelihood has kinks.

    Arguments:
        bands: How many bands its densities have.
        n: How many numbers it has.
        group: Its sites.
        trace: A run of the model.
    """
    is_dense = 1 < bands.prior == n and bands.likelihood == 1 and not bands.order.lag
    if not is_dense or group.shape or len(group.sites) > 1:
        return False
    return multivariate_normal(trace.nodes[group.sites[0]]) is not None


@dataclass(frozen=True)
class CovarianceLook:
    r"""The log joint density to second order: the prior as it is, and a Gaussian site.

    With :math:`B = 1 + W^{1/2} K W^{1/2}` for the prior's covariance K and the site's precision W,
    Newton's step in the direction of the slope s is :math:`K (s - W^{1/2} B^{-1} W^{1/2} K s)`:
    one factor.

    Attributes:
        prior: The prior.
        covariance: K, of shape ``(n, n)``.
        place: The path that is looked at, ``(n,)``.
        value: The log joint density there.
        slope: Its gradient.
        site: The expansion of the likelihood.
    """

    prior: CovariancePrior
    covariance: Tensor
    place: Tensor
    value: Tensor
    slope: Tensor
    site: Expansion

    def step(self, damping: Tensor) -> Tensor:
        """Newton's step, where damping adds to the prior's precision."""
        root, share, half = self._factor(damping), 1.0 / (1.0 + damping), self._half
        pull = share * half * (self.covariance @ self.slope)
        inner = torch.cholesky_solve(pull[:, None], root)[:, 0]
        return share * (self.covariance @ (self.slope - half * inner))

    def deviations(self) -> Tensor:
        return self._map.deviations()

    def mass(self) -> Tensor:
        return self.value + self._map.log_volume()

    def gaussian(self, place: Tensor) -> CovarianceMap:
        return self._map

    def is_finite(self) -> Tensor:
        return self.slope.isfinite().all() & self.site.bands.isfinite().all()

    def chosen(self, other: CovarianceLook, better: Tensor) -> CovarianceLook:
        return other if bool(better) else self

    @cached_property
    def _half(self) -> Tensor:
        """The root of the site's precision, nothing where it is not known."""
        return self.site.bands[:, 0].nan_to_num(nan=0.0, posinf=0.0).sqrt()

    @cached_property
    def _map(self) -> CovarianceMap:
        weights = self._half.square()
        return self.prior.times(weights[:, None], self.site.gradient + weights * self.place)

    def _factor(self, damping: Tensor) -> Tensor:
        """The root of B."""
        inner = self._half[:, None] * self.covariance * self._half / (1.0 + damping)
        inner.diagonal().add_(1.0)
        return torch.linalg.cholesky_ex(inner).L


def covariance_looks(
    plan: Plan, group: Group, parts_at: PartsAt, x: Tensor, parameters: dict[str, Tensor]
) -> LookAt:
    """The joint log density to second order, by the covariance that the model gives.

    Arguments:
        plan: The model.
        group: The path's site.
        parts_at: The log densities, for given values of the parameters.
        x: A path to look from.
        parameters: Values of the parameters to look at.
    """
    names = list(parameters)

    def prior(*values: Tensor) -> tuple[Tensor, ...]:
        found = []

        def choose(msg: Message) -> Tensor:
            found.append(msg["fn"])
            return x

        plan.run(group, dict(zip(names, values, strict=True)), choose)
        (fn,) = found
        return fn.loc, fn.scale_tril, fn.covariance_matrix

    def likelihood(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        parts = parts_at(dict(zip(names, values, strict=True)))
        return parts.likelihood(x), *site_at(parts, x, 1, None)

    prior_of = captured_or_not(prior, *parameters.values())
    likelihood_of = captured_or_not(likelihood, x, *parameters.values())

    def look_at(parameters: dict[str, Tensor]) -> Callable[[Tensor], CovarianceLook]:
        values = [parameters[name].detach() for name in names]
        loc, root, covariance = (part.detach() for part in prior_of(*values))
        known = CovariancePrior(loc, root)

        def look(x: Tensor) -> CovarianceLook:
            value, slope, bands = (part.detach() for part in likelihood_of(x, *values))
            site, (own, pull) = Expansion(slope, bands), known.log_density(x)
            return CovarianceLook(known, covariance, x, value + own, slope - pull, site)

        return look

    return look_at


def map_at(
    fit: PathFit, parts: Parts, parameters: dict[str, Tensor], prior: CovariancePrior
) -> CovarianceMap:
    """The Gaussian approximation for some values of the parameters, as a map from noise.

    Arguments:
        fit: What was found of the path.
        parts: Its log densities for these values.
        parameters: The values.
        prior: The prior for them.
    """
    site, (place, deviations) = fit.held, (fit.mode, None)
    if fit.steps:
        place, deviations = fit.moved(parameters)
    for step in range(max(fit.steps, 1)):
        if fit.steps:
            site = site_at(parts, place, 1, deviations)
        found = prior.times(site.bands, site.gradient + site.bands[..., 0] * place)
        if step < fit.steps - 1:
            place = found.forward(torch.zeros_like(place))
    return found
