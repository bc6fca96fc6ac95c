r"""Paths whose prior is one multivariate normal, and whose likelihood looks at each number alone.

So are latent Gaussian processes. Their precision has no bands, and finding it takes a product with
every unit vector. But a model that gives a covariance has made its root C. In the prior's own
standard normal noise v, of :math:`x = \mu + C v`, the prior times sites of precision W has
precision :math:`I + C^\top W C`: one product and one factor are all that the proposal needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_hamflow.marginal.gaussian_form import Component
from pyro_hamflow.marginal.path_density import Parts, PathCoordinates
from pyro_hamflow.marginal.path_fit import PathFit
from pyro_hamflow.marginal.path_modes import site_at
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


def has_covariance(fit: PathFit, group: Group, run: Callable[[], Trace]) -> bool:
    """Whether a path is as the module's text says.

    Arguments:
        fit: What was found of it.
        group: Its sites.
        run: Runs the model.
    """
    n = fit.mode.shape[-1]
    is_dense = fit.bands.prior == n and fit.bands.likelihood == 1 and not fit.bands.order.lag
    if not is_dense or group.shape or len(group.sites) > 1 or fit.cells is not None:
        return False
    return multivariate_normal(run().nodes[group.sites[0]]) is not None


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
