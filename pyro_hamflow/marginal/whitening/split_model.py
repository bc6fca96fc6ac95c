"""A model with a path, its log density in two parts: the path's prior, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from torch import Tensor

from pyro_hamflow.marginal.whitening.densities import REST, Densities
from pyro_hamflow.marginal.whitening.handlers import values_before
from pyro_hamflow.marginal.whitening.layout import (
    check_sites,
    flat_layout,
    lay_out,
    parameters_before,
    path_names,
    refuse_later_parameters,
)
from pyro_hamflow.marginal.whitening.path_prior import PathPrior, Values
from pyro_hamflow.model.kinds import Arguments, Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.sites import add_jacobians, constrain, flatten, split
from pyro_hamflow.programs.validation import no_validation

_DRAWS = 15  # from the priors, in whose middle the search begins


class SplitModel:
    """A Pyro model as functions of its parameters on the real line and its path's variables.

    Arguments:
        model: The model.
        data: What it is called with.
        sites: The sites of the path.

    Attributes:
        prior: The path's prior given the parameters.
        width: The bands of the rest's Hessian in the path.
        parameters: The other sites, on the real line one after the other.
        num_before: How many of their coordinates are drawn before the path.
        start: Parameters to begin with, in the middle of their priors.
        spread: By how much they differ there, each by itself.
        draws: Some draws from there, of shape ``(draws, k)``.

    Raises:
        ValueError: If the sites are not a path that can be whitened.
    """

    def __init__(self, model: Model, data: Arguments, sites: Sequence[str]) -> None:
        potential = self._potential = Potential(model, data.args, data.kwargs)
        self._model, self._data = model, data
        names = path_names(potential, sites)
        check_sites(potential, names)
        layout = flat_layout(potential, names)
        self._names = set(names)
        self.parameters = [site for site in potential.sites if site.name not in names]
        self._natural, self._in_path = layout.order, layout.sites
        self._evaluator = self._evaluator_of(potential)
        position = 0.1 * potential.vectors(1)[0][0]
        others = {name: node["value"].detach() for name, node in potential.runs.latent.items()}
        self._others = others | {
            name: value.detach() for name, value in potential.constrain(position).items()
        }
        self.start, self.spread, self.draws = self._prior_range(names)
        unused = {n: found for n, found in potential.runs.unused.items() if n in self._names}
        self.prior = PathPrior(model, data, layout, self._others, unused)
        parts = [position[site.start : site.stop] for site in potential.sites if site.name in names]
        densities = Densities(
            self._functions(),
            [site.name for site in self.parameters],
            torch.cat(parts),
            self._others,
        )
        self.prior = prior = self.prior._replace(densities=densities)
        layout, self.width = lay_out(
            prior, lambda u: self.log_rest(self.start, u), names, potential
        )
        self.prior = prior._replace(layout=layout)
        before = parameters_before(potential, names)
        sizes = [site.stop - site.start for site in self.parameters if site.name in before]
        self.num_before = sum(sizes)
        later = [site.name for site in self.parameters if site.name not in before]
        refuse_later_parameters(
            self.prior, self.start.new_zeros(len(layout.order.places)), later, before
        )

    def _evaluator_of(self, potential: Potential) -> TraceEinsumEvaluator:
        position, noise = (0.1 * part[0] for part in potential.vectors(1))
        return potential.runs.evaluator_of(self._rest_of(potential.trace(position, noise)))

    def __getstate__(self) -> dict[str, Any]:
        """Programs stay in the process that made them."""
        return self.__dict__ | {"_potential": None, "_evaluator": None}

    def restore(self) -> None:
        """Makes the programs that another process has kept."""
        if self._potential is None:
            self._potential = Potential(self._model, self._data.args, self._data.kwargs)
            self._evaluator = self._evaluator_of(self._potential)
            if self.prior.densities is not None:
                self.prior.densities.make(self._functions())

    def _functions(self) -> list[Callable[[Tensor, Values], Tensor]]:
        """The log densities of a flat path and of all else, given the other sites' values."""
        natural = replace(self.prior.layout, order=self._natural)
        prior = self.prior._replace(layout=natural, densities=None)
        return [prior.log_density, self._log_rest]

    def _prior_range(self, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """The middle and spread of draws of parameters from their priors; and the draws."""
        potential, draws = self._potential, []
        with poutine.block(), no_validation():
            for _ in range(_DRAWS):
                given = values_before(
                    names, potential.original, *potential.args, **potential.kwargs
                )
                known = {site.name for site in self.parameters} & given.keys()
                values = self._others | {name: given[name].detach() for name in known}
                draws.append(flatten(self.parameters, values, potential.example))
        drawn = torch.stack(draws)
        middle = drawn.median(0).values
        spread = (drawn - middle).abs().median(0).values
        return middle, torch.where(spread > 0.0, spread, torch.ones_like(spread)), drawn

    def _rest_of(self, trace: poutine.Trace) -> poutine.Trace:
        part = trace.copy()
        for name in self._names:
            part.remove_node(name)
        return part

    def free(self, theta: Tensor) -> Values:
        """The parameters' sites on the real line."""
        return split(self.parameters, theta)

    def values(self, theta: Tensor) -> Values:
        """The parameters' sites in their supports."""
        return constrain(self.parameters, self.free(theta))

    def log_rest(self, theta: Tensor, u: Tensor) -> Tensor:
        """The log density of all but the path, of parameters on the real line."""
        path, densities = self.prior.layout.order.to_sites(u), self.prior.densities
        total = None if densities is None else densities(REST, path, self.values(theta))
        if total is None:
            total = self._log_rest(path, self.values(theta))
        return add_jacobians(total, self.parameters, self.free(theta))

    def _log_rest(self, path: Tensor, values: Values) -> Tensor:
        """The same of the path's sites and of parameters in their supports."""
        assert self._potential is not None and self._evaluator is not None
        values = values | constrain(self._in_path, split(self._in_path, path))
        trace = self._rest_of(self._potential.runs.at(values))
        with no_validation():
            total = self._evaluator.log_prob(trace)
            return total if isinstance(total, Tensor) else path.new_zeros(())  # no other sites

    def pull(self, theta: Tensor, u: Tensor) -> Tensor:
        """The gradient of :meth:`log_rest` in the path's variables."""
        with torch.enable_grad():
            free = u if u.requires_grad else u.detach().requires_grad_()
            total = self.log_rest(theta, free)
            if not total.requires_grad:  # no data, or the model computes with them outside torch
                return torch.zeros_like(u)
            (gradient,) = torch.autograd.grad(
                total, free, create_graph=True, materialize_grads=True
            )
        return gradient if torch.is_grad_enabled() else gradient.detach()

    def log_prior(self, theta: Tensor, u: Tensor) -> Tensor:
        """The path's log density given the parameters."""
        return self.prior.log_density_to_fit(u, self.values(theta))
