"""Gaussian sites of a path, fitted at a mode of path and parameters.

Given parameters the path's mode is found by Newton's method, each step the mean of the prior times
the sites at the last. The parameters are led to where the whitened density is highest at noise
zero, which is Laplace's approximation of their marginal posterior. The joint mode of path and
parameters would not do: paths that do not move have a density without bound. Nothing here has to be
exact: any sites give the same posterior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.marginal.pilot import climb
from pyro_hamflow.marginal.whitening.affine import AffineMap, CovarianceMap
from pyro_hamflow.marginal.whitening.curvature import gradient_and_bands, raised
from pyro_hamflow.marginal.whitening.path_prior import PathPrior, Values
from pyro_hamflow.marginal.whitening.sites import PathSites, following
from pyro_hamflow.marginal.whitening.split_model import SplitModel
from pyro_hamflow.model.kinds import Arguments, Model
from pyro_hamflow.model.sites import Site, flatten
from pyro_hamflow.programs.banded import multiply
from pyro_hamflow.programs.capture import Program, capture
from pyro_hamflow.programs.validation import no_validation

_STEPS = 60  # of Newton at most
_HALVINGS = 12  # of a step that leads down
_MOST_FOLLOWED = 64  # coordinates of parameters: each takes two fits
_STEP = 0.02  # ahead and behind, on the real line


class PathFit(NamedTuple):
    """What whitening a path in a model with its data needs.

    Attributes:
        prior: The path's prior, and its layout.
        sites: The sites.
        u: The path's variables at the mode.
        followed: The parameters that the sites follow.
        centre: Their values there, on the real line, of shape ``(k,)``.
    """

    prior: PathPrior
    sites: PathSites
    u: Tensor
    followed: list[Site]
    centre: Tensor

    def map(self, parameters: Values) -> AffineMap:
        """From noise to the path's variables, given values of the sites drawn so far."""
        shift = flatten(self.followed, parameters, self.u) - self.centre
        return self.prior.form(self.u, parameters).times(*self.sites.at(shift))


def log_prob_of(prior: PathPrior, path: AffineMap, z: Tensor, parameters: Values) -> Tensor:
    """The log density, under a path's prior, of the noise that a map leads to it."""
    if isinstance(path, CovarianceMap):
        return path.log_prob(z)
    return prior.log_density(path.forward(z), parameters) + path.log_volume()


def fit_path(model: Model, data: Arguments, names: Sequence[str]) -> PathFit:
    """Fits the sites of a path to a model and its data.

    Raises:
        ValueError: If the sites are not a path that can be whitened.
    """
    split = SplitModel(model, data, names)
    search = _Search(split)
    theta = split.start
    if len(theta):
        theta = climb(search.slope, theta).position
    held = search.sites(theta)
    u = search.u
    followed = [s for s in split.parameters if s.stop <= min(split.num_before, _MOST_FOLLOWED)]
    size = sum(site.stop - site.start for site in followed)
    steps = _STEP * torch.eye(len(theta), dtype=theta.dtype, device=theta.device)[:size]
    pairs = [(search.sites(theta + step, u), search.sites(theta - step, u)) for step in steps]
    sites = following(held, pairs, _STEP) if pairs else PathSites.held(*held)
    others = split.prior.others | split.values(theta) | split.prior.layout.values(u)
    others = {name: value.detach() for name, value in others.items()}
    return PathFit(split.prior._replace(others=others), sites, u, followed, theta[:size])


class _Search:
    """The mode of a path, from one value of the parameters to the next.

    Attributes:
        u: Where it was found last.
    """

    def __init__(self, split: SplitModel) -> None:
        self.split = split
        self.u = split.start.new_zeros(len(split.prior.layout.order))
        self._terms = _captured(self._terms_at, split.start, self.u)
        self._density = _captured(self._density_at, split.start, self.u)
        width, n = split.width, len(self.u)
        bands, linear = self.u.new_ones(n, width), self.u
        self._whitened = _captured(self._whitened_at, split.start, self.u, bands, linear)

    def _terms_at(self, theta: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """The prior's form, and the gradient and bands of the rest."""
        split = self.split
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            terms = gradient_and_bands(split.log_rest(theta, u), u, split.width)
        form = split.prior.form(u, split.values(theta)).tensors
        return tuple(term.detach() for term in (*form, *terms))

    def _density_at(self, theta: Tensor, u: Tensor) -> tuple[Tensor]:
        """The joint log density."""
        with torch.no_grad():
            return (self.split.log_rest(theta, u) + self.split.log_prior(theta, u),)

    def _whitened_at(
        self, theta: Tensor, u: Tensor, precision: Tensor, linear: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minus the log density of parameters and noise zero, and its gradient."""
        split = self.split
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            values = split.values(theta)
            path = split.prior.form(u, values).times(precision, linear)
            zero = torch.zeros_like(u)
            there = log_prob_of(split.prior, path, zero, values)
            value = -(there + split.log_rest(theta, path.forward(zero)))
            (slope,) = torch.autograd.grad(value, theta)
        return value.detach(), slope

    def slope(self, theta: Tensor) -> tuple[float, Tensor]:
        """Minus the log density where the noise is zero, and its gradient, with new sites."""
        try:
            before = self.u
            value, slope = self._whitened(theta, self.u, *self.sites(theta))
            if not bool(value.isfinite()):
                self.u = before
            return float(value), slope
        except (RuntimeError, ValueError):  # as of a matrix that is not positive definite there
            self.u = before
            return math.inf, torch.zeros_like(theta)

    def sites(self, theta: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The precision and linear terms of the sites at the path's mode."""
        u = self.u if start is None else start
        (value,) = self._density(theta, u)
        tolerance = 10.0 * torch.finfo(u.dtype).eps ** 0.75
        for _ in range(_STEPS):
            precision, linear, mean = self._step(theta, u)
            step, size = mean - u, 1.0
            rest = float(step.abs().max()) <= tolerance * (1.0 + float(u.abs().max()))
            for _ in range(1 if rest else _HALVINGS):
                moved = u + size * step
                (new,) = self._density(theta, moved)
                if bool(new >= value - tolerance * value.abs()):
                    break
                size *= 0.5
            else:
                break
            u, value = moved, new
            if rest:
                break
        self.u = u
        precision, linear, _ = self._step(theta, u)
        return precision, linear

    def _step(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sites at a path, and the mean to which they lead."""
        first, second, gradient, bands = self._terms(theta, u)
        precision = raised(bands)
        linear = gradient + multiply(precision, u)
        form = self.split.prior.form_of(first, second)
        return precision, linear, form.times(precision, linear).forward(torch.zeros_like(u))


def _captured(function: Program, *examples: Tensor) -> Program:
    """A function as a graph, or itself where it is none."""
    try:
        with no_validation():
            return capture(function, *examples)
    except Exception:  # whatever a model's own code may raise while it is traced
        return function
