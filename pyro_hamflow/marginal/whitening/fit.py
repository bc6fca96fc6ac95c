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
from pyro_hamflow.marginal.whitening.sites import Held, PathSites
from pyro_hamflow.marginal.whitening.split_model import SplitModel
from pyro_hamflow.model.kinds import Arguments, Model
from pyro_hamflow.model.sites import flatten
from pyro_hamflow.programs.banded import multiply
from pyro_hamflow.programs.capture import Program, capture
from pyro_hamflow.programs.validation import no_validation

_STEPS = 60  # of Newton at most
_HALVINGS = 40  # of a step that leads down: where curvature is negative it may lead far away
_MOST_FOLLOWED = 64  # coordinates of parameters: each takes two fits
_STARTS = 3  # of searches, until one comes to rest
_REST = 0.1  # posterior standard deviations
_CHAINS = 20  # places to start from
_NEAR = 0.01  # of the prior's spread
_STEP = 0.02  # ahead and behind, on the real line


class WhiteningFit(NamedTuple):
    """What whitening a path in a model with its data needs.

    Attributes:
        split: The model.
        prior: The path's prior, with values of all latent sites at the mode.
        sites: The sites.
        centre: The parameters where they were fitted, on the real line.
        followed: How many coordinates of them, from the first on, the sites follow.
        starts: Values of all parameters, about as far from the mode as posterior draws are.
    """

    split: SplitModel
    prior: PathPrior
    sites: PathSites
    centre: Tensor
    followed: int
    starts: list[Values]

    @property
    def u(self) -> Tensor:
        """The path's variables at the mode, of shape ``(n,)``."""
        return self.sites.held.mode

    def map(self, parameters: Values) -> AffineMap:
        """From noise to the path's variables, given values of the sites drawn so far."""
        theta = flatten(self.split.parameters, self.prior.others | parameters, self.u)
        mode, precision = self.sites.at((theta - self.centre)[: self.followed])
        linear = multiply(precision, mode) + self.split.pull(theta, mode)
        return self.prior.form(self.u, parameters).times(precision, linear)


def log_prob_of(prior: PathPrior, path: AffineMap, z: Tensor, parameters: Values) -> Tensor:
    """The log density, under a path's prior, of the noise that a map leads to it."""
    if isinstance(path, CovarianceMap):
        return path.log_prob(z)
    return prior.log_density(path.forward(z), parameters) + path.log_volume()


def fit_whitening(model: Model, data: Arguments, names: Sequence[str]) -> WhiteningFit:
    """Fits the sites of a path to a model and its data.

    Raises:
        ValueError: If the sites are not a path that can be whitened.
    """
    split = SplitModel(model, data, names)
    search = _Search(split)
    theta = search.top() if len(split.start) else split.start
    held = search.sites(theta)
    size = min(split.num_before, _MOST_FOLLOWED)
    steps = _STEP * torch.eye(len(theta), dtype=theta.dtype, device=theta.device)[:size]
    pairs = [
        (search.sites(theta + step, held.mode), search.sites(theta - step, held.mode))
        for step in steps
    ]
    sites = PathSites.following(held, pairs, _STEP)
    others = split.prior.others | split.values(theta) | split.prior.layout.values(held.mode)
    others = {name: value.detach() for name, value in others.items()}
    search.u = held.mode
    starts = [split.values(start) for start in search.draws(theta)]
    return WhiteningFit(split, split.prior._replace(others=others), sites, theta, size, starts)


class _Search:
    """The mode of a path, from one value of the parameters to the next.

    Attributes:
        u: Where it was found last.
    """

    def __init__(self, split: SplitModel) -> None:
        self.split = split
        self.u = split.start.new_zeros(len(split.prior.layout.order.places))
        self.u = self._prior_mean(split.start)
        self._terms = _captured(self._terms_at, split.start, self.u)
        self._density = _captured(self._density_at, split.start, self.u)
        example = self.u.new_ones(len(self.u), split.width)
        self._laplace = _captured(self._laplace_at, split.start, self.u, example)

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

    def _laplace_at(self, theta: Tensor, u: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
        """Minus Laplace's log marginal density where a path is at its mode, and its gradient.

        The mode follows the parameters by a step of Newton's method.
        """
        split = self.split
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            form = split.prior.form(u, split.values(theta))
            linear = split.pull(theta, u) + multiply(precision, u)
            mode = form.times(precision, linear).forward(torch.zeros_like(u))
            rest = split.log_rest(theta, mode)
            _, bands = gradient_and_bands(rest, mode, split.width)
            bands = bands.clamp(min=0.0) if split.width == 1 else bands
            volume = form.times(bands, linear).log_volume()
            value = -(rest + split.log_prior(theta, mode) + volume)
            (slope,) = torch.autograd.grad(value, theta, materialize_grads=True)
        return value.detach(), slope

    def slope(self, theta: Tensor) -> tuple[float, Tensor]:
        """Minus Laplace's log marginal density of the parameters, and its gradient."""
        before = self.u
        try:
            held = self.sites(theta)
            value, slope = self._laplace(theta, held.mode, held.precision)
        except (RuntimeError, ValueError):  # as of a matrix that is not positive definite there
            value, slope = theta.new_tensor(math.inf), torch.zeros_like(theta)
        if not bool(value.isfinite()):
            self.u = before
        return float(value), slope

    def top(self) -> Tensor:
        """The parameters of highest density, from the middle of their priors."""
        start, spread = self.split.start, self.split.spread

        def slope(steps: Tensor) -> tuple[float, Tensor]:
            value, slope = self.slope(start + spread * steps)
            return value, spread * slope

        best, found = math.inf, torch.zeros_like(start)
        for draw in (start, *self.split.draws[: _STARTS - 1]):
            self.u = self._prior_mean(draw)
            top = climb(slope, (draw - start) / spread)
            if top.value < best:
                best, found, u = top.value, top.position, self.u
            if top.distance <= _REST:
                break
        if best < math.inf:
            self.u = u
        return start + spread * found

    def draws(self, theta: Tensor) -> Tensor:
        """Draws about the top, as Laplace's approximation has them, of shape ``(draws, k)``.

        Where it has none, or parameters are many, they stay close to the top.
        """
        spread, size = self.split.spread, len(theta)
        noise = torch.randn(_CHAINS, size).to(theta)
        near = theta + _NEAR * spread * noise
        if not 0 < size <= _MOST_FOLLOWED:
            return near
        steps = torch.diag(_NEAR * spread)
        rows = [self.slope(theta + step)[1] - self.slope(theta - step)[1] for step in steps]
        scale = spread.outer(spread)
        hessian = scale * torch.stack(rows) / (2.0 * _NEAR * spread[:, None])
        values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
        if not bool(values.isfinite().all()):
            return near
        # Along what the data hardly tell, no farther than the prior goes.
        return theta + spread * ((values.clamp(min=1.0).rsqrt() * noise) @ vectors.mT)

    def _prior_mean(self, theta: Tensor) -> Tensor:
        """The middle of the path's prior, given parameters."""
        none = self.u.new_zeros(len(self.u), 1)
        form = self.split.prior.form(torch.zeros_like(self.u), self.split.values(theta))
        return form.times(none, none[:, 0]).forward(none[:, 0]).detach().nan_to_num()

    def sites(self, theta: Tensor, start: Tensor | None = None) -> Held:
        """The sites at the path's mode, searched from where one was found last, or elsewhere."""
        u = self.u if start is None else start
        (value,) = self._density(theta, u)
        tolerance = 10.0 * torch.finfo(u.dtype).eps ** 0.75
        for _ in range(_STEPS):
            step, size = self._mean(theta, u) - u, 1.0
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
        *_, bands = self._terms(theta, u)
        return Held(u, raised(bands))

    def _mean(self, theta: Tensor, u: Tensor) -> Tensor:
        """The mean of the prior times the sites at a path."""
        first, second, gradient, bands = self._terms(theta, u)
        precision = raised(bands)
        form = self.split.prior.form_of(first, second)
        path = form.times(precision, gradient + multiply(precision, u))
        return path.forward(torch.zeros_like(u))


def _captured(function: Program, *examples: Tensor) -> Program:
    """A function as a graph, or itself where it is none."""
    try:
        with no_validation():
            return capture(function, *examples)
    except Exception:  # whatever a model's own code may raise while it is traced
        return function
