"""The prior of a path given the other sites: its density, its Gaussian form, and draws from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pyro.poutine as poutine
import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_hamflow.marginal.path_density import Order
from pyro_hamflow.marginal.whitening.affine import BandedPrior, CovariancePrior, PriorForm
from pyro_hamflow.marginal.whitening.curvature import dominant, gradient_and_bands
from pyro_hamflow.marginal.whitening.densities import PRIOR, Densities
from pyro_hamflow.model.kinds import Arguments, Model
from pyro_hamflow.model.sites import Site, add_jacobians, constrain, split
from pyro_hamflow.model.trace import log_density, run_with
from pyro_hamflow.model.unused import with_own_prior
from pyro_hamflow.programs.validation import no_validation

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """The variables of a path: its sites on the real line, in an order of few bands.

    Attributes:
        sites: The sites of the path.
        order: How the variables come from the sites' flat vector.
        width: How many lower bands the prior's precision has; none if its covariance is known.
        is_gaussian: Whether the prior's precision is the same everywhere.
    """

    sites: list[Site]
    order: Order
    width: int | None = None
    is_gaussian: bool = True

    @property
    def names(self) -> list[str]:
        """The names of the sites."""
        return [site.name for site in self.sites]

    def free(self, u: Tensor) -> Values:
        """The sites' values on the real line, from variables ``(*, n)``."""
        return split(self.sites, self.order.to_sites(u))

    def values(self, u: Tensor) -> Values:
        """The sites' values in their supports."""
        return constrain(self.sites, self.free(u))

    def variables(self, values: Values) -> Tensor:
        """The variables ``(n,)``, from values in the sites' supports."""
        parts = [site.transform.inv(values[site.name]).reshape(-1) for site in self.sites]
        return self.order.from_sites(torch.cat(parts))


class PathPrior(NamedTuple):
    """The prior of a path in one model with its data.

    Attributes:
        model: The model.
        data: Its arguments.
        layout: The path's variables.
        others: Values of all latent sites, for those that are not told.
        unused: Which masked entries of its sites nothing depends on: they keep their priors.
        densities: Its log density as a program, and that of the rest of the model; if made.
    """

    model: Model
    data: Arguments
    layout: Layout
    others: Values
    unused: Values
    densities: Densities | None = None

    def log_density(self, u: Tensor, parameters: Values) -> Tensor:
        """The log density of variables ``(n,)``, given values of other sites."""
        trace = self._run(parameters | self.layout.values(u))
        with no_validation():
            terms = [log_density(trace.nodes[name]).sum() for name in self.layout.names]
        total = torch.stack(terms).sum()
        return add_jacobians(total, self.layout.sites, self.layout.free(u))

    def log_density_to_fit(self, u: Tensor, parameters: Values) -> Tensor:
        """The same where it need not be exact: of the model as it was when it was first seen."""
        if self.densities is not None:
            path = self.layout.order.to_sites(u)
            found = self.densities(PRIOR, path, self.others | parameters)
            if found is not None:
                return found
        return self.log_density(u, parameters)

    def form(self, u: Tensor, parameters: Values) -> PriorForm:
        """The Gaussian that the prior is; of one that is none, one that is alike at ``u``."""
        if self.layout.width is None:
            (name,) = self.layout.names
            fn = multivariate_normal(self._run(parameters | self.layout.values(u)).nodes[name])
            assert fn is not None  # as it was when the path was laid out
            return CovariancePrior(fn.loc, fn.scale_tril)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self.log_density_to_fit(u, parameters)
            gradient, bands = gradient_and_bands(value, u, self.layout.width)
        if not torch.is_grad_enabled():
            gradient, bands = gradient.detach(), bands.detach()
        if not self.layout.is_gaussian:
            bands = dominant(bands)
        return BandedPrior.at(u.detach(), gradient, bands)

    def form_of(self, first: Tensor, second: Tensor) -> PriorForm:
        """A form from its tensors."""
        return (CovariancePrior if self.layout.width is None else BandedPrior)(first, second)

    def draw(self, parameters: Values) -> Tensor:
        """Variables ``(n,)`` drawn from the prior, given values of other sites."""
        drawn = set(self.layout.names)
        known = {n: v for n, v in (self.others | parameters).items() if n not in drawn}
        nodes = self._given(known).nodes
        return self.layout.variables({name: nodes[name]["value"] for name in drawn})

    def _run(self, values: Values) -> poutine.Trace:
        return self._given(self.others | values)

    def _given(self, values: Values) -> poutine.Trace:
        model, (args, kwargs) = self.model, self.data
        trace = run_with(model, lambda msg: values.get(msg["name"]), *args, **kwargs)
        for name, unused in self.unused.items():
            trace.nodes[name].update(with_own_prior(trace.nodes[name], unused))
        return trace


def multivariate_normal(site: dict[str, object]) -> MultivariateNormal | None:
    """A site's prior, if it is one multivariate normal that counts as it is."""
    fn = site["fn"]
    plain = site["scale"] == 1.0 and site["mask"] is None
    if isinstance(fn, MultivariateNormal) and plain and not fn.batch_shape:
        return fn
    return None
