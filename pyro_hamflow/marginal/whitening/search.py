"""The search for the path and the parameters about which the sites of a path are fitted.

Given parameters the path's mode is found by Newton's method, each step the mean of the prior times
the sites at the last. The parameters are led to where the whitened density is highest at noise
zero, which is Laplace's approximation of their marginal posterior. The joint mode of path and
parameters would not do: paths that do not move have a density without bound.

A density with kinks (:mod:`~pyro_hamflow.marginal.path_kinks`) has no mode that tells of it. There,
the mean and deviations of the Gaussian that agrees with it are found, and the parameters of the
highest lower bound of the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.marginal.climb import Top, climb
from pyro_hamflow.marginal.other_modes import other_modes
from pyro_hamflow.marginal.path_kinks import (
    CLOSELY,
    COARSELY,
    Cells,
    about,
    come_to_rest,
    has_kinks,
    is_flat,
)
from pyro_hamflow.marginal.whitening.curvature import gradient_and_bands, raised
from pyro_hamflow.marginal.whitening.sites import Held
from pyro_hamflow.marginal.whitening.split_model import SplitModel
from pyro_hamflow.programs.banded import multiply
from pyro_hamflow.programs.capture import Program, capture
from pyro_hamflow.programs.validation import no_validation

_STEPS = 60  # of Newton at most
_HALVINGS = 40  # of a step that leads down: where curvature is negative it may lead far away
MOST_FOLLOWED = 64  # coordinates of parameters: each takes two fits
_LOOKS, _STARTS = 2, 3  # searches, and if none of them comes to rest
_REST = 0.1  # posterior standard deviations
_CHAINS = 20  # places to start from
_NEAR = 0.01  # of the prior's spread


class Search:
    """The mode of a path, from one value of the parameters to the next.

    Attributes:
        u: Where it was found last.
        place: With the deviations about it, where the density has kinks; else none.
    """

    def __init__(self, split: SplitModel) -> None:
        self.split = split
        self.u = split.start.new_zeros(len(split.prior.layout.order.places))
        self.u = self._prior_mean(split.start)
        self._terms = _captured(self._terms_at, split.start, self.u)
        self._density = _captured(self._density_at, split.start, self.u)
        example = self.u.new_ones(len(self.u), split.width)
        self._laplace = _captured(self._laplace_at, split.start, self.u, example)
        self.place: Cells | None = None
        self._cells: Cells | None = None
        self._rest: Program = self._rest_at
        self._volume: Program = self._volume_at
        self._look_for_kinks()

    def _look_for_kinks(self) -> None:
        """Finds where to take gradients, if the density of all but the path has kinks."""
        split = self.split
        self.sites(split.start)
        first, second, _, bands = self._terms(split.start, self.u)
        deviations = split.prior.form_of(first, second).deviations(raised(bands))
        if not bool(is_flat(bands, deviations).any()):
            return
        self._rest = _captured(self._rest_at, split.start, self.u)
        place, width = Cells(self.u, deviations), split.width
        _, told = about(self._slopes(split.start), place, *place, width)
        if has_kinks(bands, told, deviations):
            self._volume = _captured(self._volume_at, split.start, self.u, torch.ones_like(bands))
            self.place = place

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

    def _rest_at(self, theta: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """The density of all but the path, and its gradients in parameters and path."""
        with torch.enable_grad():
            theta, u = (part.detach().requires_grad_() for part in (theta, u))
            value = self.split.log_rest(theta, u)
            slopes = torch.autograd.grad(value, (theta, u), materialize_grads=True)
        return value.detach(), *slopes

    def _volume_at(self, theta: Tensor, u: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
        """The path's prior at a mean and the volume about it, and their gradient."""
        split = self.split
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            form = split.prior.form(u, split.values(theta))
            value = split.log_prior(theta, u) + form.about(precision, u).log_volume()
            (slope,) = torch.autograd.grad(value, theta, materialize_grads=True)
        return value.detach(), slope

    def _rests(self, theta: Tensor, paths: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`_rest_at` finds of many paths."""
        if isinstance(self._rest, GraphModule):
            found: tuple[Tensor, ...] = torch.func.vmap(self._rest, in_dims=(None, 0))(theta, paths)
            return found
        rows = [self._rest(theta, path) for path in paths]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))

    def _slopes(self, theta: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda paths: self._rests(theta, paths)[2]

    def hold(self) -> None:
        """Takes gradients where they were taken last, so that all is smooth in the parameters."""
        self._cells = self.place

    def _averaged(self, theta: Tensor, place: Cells) -> Held:
        """The sites of a density with kinks, about the mean of the path."""
        split = self.split
        first, second, *_ = self._terms(theta, place.centre)
        form = split.prior.form_of(first, second)

        def site(place: Cells) -> tuple[Tensor, Tensor]:
            cells = self._cells or place
            slope, bands = about(self._slopes(theta), cells, *place, split.width)
            precision = raised(bands)
            return precision, slope + multiply(precision, place.centre)

        def moments(precision: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
            mean = form.times(precision, linear).forward(torch.zeros_like(linear))
            return mean, form.deviations(precision)

        place = come_to_rest(site, moments, place, CLOSELY if self._cells else COARSELY)
        held = Held(place.centre, site(place)[0])
        if bool(held.mode.isfinite().all()):
            self.place, self.u = place, place.centre
        return held

    def _bound(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the evidence's lower bound of the Gaussian about a path's mean, and its gradient.

        It does not change with the Gaussian to first order, so that this may be held.
        """
        assert self.place is not None
        held = self._averaged(theta, self.place)
        values, slopes, _ = self._rests(theta, self.place.points())
        shares = self.place.masses(*self.place)[0][:, 0]
        value, slope = self._volume(theta, held.mode, held.precision)
        value = value + 0.5 * (held.precision[:, 0] * self.place.spread.square()).sum()
        return -(shares @ values + value), -(shares @ slopes + slope)

    def slope(self, theta: Tensor) -> tuple[float, Tensor]:
        """Minus Laplace's log marginal density of the parameters, and its gradient."""
        before = self.u
        try:
            if self.place is not None:
                value, slope = self._bound(theta)
            else:
                held = self.sites(theta)
                value, slope = self._laplace(theta, held.mode, held.precision)
        except (RuntimeError, ValueError):  # as of a matrix that is not positive definite there
            value, slope = theta.new_tensor(math.inf), torch.zeros_like(theta)
        if not bool(value.isfinite()):
            self.u = before
        return float(value), slope

    def top(self) -> tuple[Tensor, tuple[float, ...]]:
        """The parameters of highest density, from the middle of their priors and from draws.

        And how high other modes are beside them, as ratios of densities.

        Chains start about them, so that no diagnostic tells of modes that none comes to.
        """
        start, spread = self.split.start, self.split.spread

        def slope(steps: Tensor) -> tuple[float, Tensor]:
            value, slope = self.slope(start + spread * steps)
            return value, spread * slope

        tops: list[Top] = []
        paths: list[tuple[Tensor, Cells | None]] = []
        for number, draw in enumerate((start, *self.split.draws[: _STARTS - 1])):
            rested = [top for top in tops if top.distance <= _REST]
            if number >= _LOOKS and rested:
                break
            self.u = self._prior_mean(draw)
            tops.append(climb(slope, (draw - start) / spread, tops=rested))
            paths.append((self.u, self.place))
        finite = [number for number, top in enumerate(tops) if math.isfinite(top.value)]
        if not finite:
            return start, ()
        best = min(finite, key=lambda number: tops[number].value)
        others = other_modes(slope, tops[best], tops)
        self.u, self.place = paths[best]
        return start + spread * tops[best].position, others

    def draws(self, theta: Tensor) -> Tensor:
        """Draws about the top, as Laplace's approximation has them, of shape ``(draws, k)``.

        Where it has none, or parameters are many, they stay close to the top.
        """
        spread, size = self.split.spread, len(theta)
        noise = torch.randn(_CHAINS, size).to(theta)
        near = theta + _NEAR * spread * noise
        if not 0 < size <= MOST_FOLLOWED:
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
        if self.place is not None:
            return self._averaged(theta, self._cells or self.place)
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
