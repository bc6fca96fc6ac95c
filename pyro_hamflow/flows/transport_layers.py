"""What a map is made of: layers that gradients of densities move through too."""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from pyro_hamflow.model.transported import Transport

_WIDTH = 32  # of a conditioner's hidden layer: 64 learned no more of a funnel of 101 dimensions
# Logarithms of scales are linear up to the first, and bounded by the sum: without bounds, layers
# overflow one upon the other, and bent ones make a funnel's neck too wide. Where a layer scales
# locals by their globals, the others only refine it: out where nothing was learned they would
# multiply each other's errors; what is constant of their scales is free.
_LINEAR, _BEYOND = 8.0, 2.0
_REFINED, _FINER = 1.0, 1.0
_WEIGHTLESS = 30.0  # the logarithm of the scale of a prior that was not set


class Layer(Transport, Protocol):
    """A map that takes gradients with it, and is called as modules are."""

    def __call__(self, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` gives."""

    def pull(self, y: Tensor, gradient: Tensor, /) -> tuple[Tensor, Tensor]:
        """What came before moved rows, and the potential's gradient there, from that after."""


class Coupling(nn.Module):
    r"""Shifts and scales some coordinates by functions of others.

    With *a* the coordinates that stay and *b* those that move, :math:`b' = b\, e^{s(a)} + t(a)`; s
    and t are the outputs of a perceptron of one hidden layer and a linear part, s within bounds. It
    begins as the identity.

    Arguments:
        fixed: The coordinates that stay, of shape ``(fixed,)``.
        moved: Those that move, ``(moved,)``; together they are all.
        moves: Which these are: those of the sites before a cut, or after it; or any half, beside
            layers of cuts or without them.
    """

    fixed: Tensor
    moved: Tensor
    back: Tensor

    def __init__(
        self,
        fixed: Tensor,
        moved: Tensor,
        moves: Literal["any", "halves", "globals", "locals"] = "any",
    ) -> None:
        super().__init__()
        self.moves = moves
        wide = moves in {"any", "locals"}
        self._linear_to, self._beyond = (_LINEAR, _BEYOND) if wide else (_REFINED, _FINER)
        self.register_buffer("fixed", fixed)
        self.register_buffer("moved", moved)
        self.register_buffer("back", torch.cat([fixed, moved]).argsort())
        inputs, outputs = len(fixed), 2 * len(moved)
        self.first = nn.Parameter(torch.randn(_WIDTH, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(_WIDTH))
        self.last = nn.Parameter(torch.zeros(outputs, _WIDTH))
        self.linear = nn.Parameter(torch.zeros(outputs, inputs))
        self.constant = nn.Parameter(torch.zeros(outputs))

    @torch.no_grad()
    def add_linear(self, constants: Tensor, slopes: Tensor) -> None:
        """Adds a linear part to the shifts and the logarithms of the scales.

        Arguments:
            constants: Of shifts, then of logarithms, ``(2 moved,)``.
            slopes: Of both, along as many of the coordinates that stay, ``(some, 2 moved)``.
        """
        self.constant.add_(constants.to(self.constant))
        self.linear[:, : len(slopes)] += slopes.mT.to(self.linear) * math.sqrt(len(self.fixed))

    # Weights are counted in units of what many inputs add up to: learning rates suit all widths.
    @property
    def _last(self) -> Tensor:
        return self._trained(self.last) * (2.0 / math.sqrt(_WIDTH))

    @property
    def _linear(self) -> Tensor:
        return self._trained(self.linear) / math.sqrt(len(self.fixed))

    @property
    def _constant(self) -> Tensor:
        return self._trained(self.constant)

    def _trained(self, rows: Tensor) -> Tensor:
        """A parameter, of which an optimiser sees what it may change."""
        return rows

    def _condition(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The hidden layer's slope, the shift, the logarithm of the scale and its slope.

        Hidden units grow linearly both ways, so that shifts are extrapolated as well as scales.
        """
        inner = a @ self.first.mT + self.bias
        hidden = torch.sqrt(1.0 + inner.square())
        output = hidden @ self._last.mT + a @ self._linear.mT + self._constant
        shift, stretch = self._outputs(a, *output.tensor_split(2, -1))
        usual = 0.0 if self._linear_to == _LINEAR else self._constant[len(self.moved) :]
        within = (stretch - usual).clamp(-self._linear_to, self._linear_to)
        beyond = torch.tanh((stretch - usual - within) / self._beyond)
        return inner / hidden, shift, usual + within + self._beyond * beyond, 1.0 - beyond.square()

    def _outputs(self, a: Tensor, shift: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
        """The shift, and the logarithm of the scale before it is bounded."""
        return shift, stretch

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], -1)[..., self.back]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[..., self.fixed], x[..., self.moved]
        _, shift, log_scale, _ = self._condition(a)
        return self._join(a, b * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = y[..., self.fixed], y[..., self.moved]
        _, shift, log_scale, _ = self._condition(a)
        return self._join(a, (b - shift) * (-log_scale).exp()), -log_scale.sum(-1)

    def pull(self, y: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = y[..., self.fixed], y[..., self.moved]
        of_a, of_b = gradient[..., self.fixed], gradient[..., self.moved]
        slope, shift, log_scale, growth = self._condition(a)
        scale = log_scale.exp()
        before, of_before = (b - shift) / scale, of_b * scale
        of_stretch = (of_before * before - 1.0) * growth
        of_a = of_a + self._of_fixed(a, slope, of_b, of_stretch)
        return self._join(a, before), self._join(of_a, of_before)

    def _of_fixed(self, a: Tensor, slope: Tensor, of_shift: Tensor, of_stretch: Tensor) -> Tensor:
        """The gradient along the coordinates that stay, by that of the layer's outputs."""
        of_output = torch.cat([of_shift, of_stretch], -1)
        return ((of_output @ self._last) * slope) @ self.first + of_output @ self._linear


class Locals(Coupling):
    r"""Moves effects by a prior, whose centre and scale the others give, and by data.

    Precisions of a prior and of data add up, and the centre is the mean of both, weighted by them:
    with :math:`m_1, u` linear in *a*, and :math:`m_2, v` the outputs of a :class:`Coupling`, s is
    :math:`-\tfrac12 \log(e^{-2u} + e^{-2v})`. So a funnel is as narrow as the prior makes
    it, however far beyond the points that were learned from. The prior has no weight until it is
    set. Coordinates whose prior was set are not trained: steps of an optimiser would make a neck
    too wide for the sake of the many points elsewhere.

    Arguments:
        fixed: The coordinates that stay, of shape ``(fixed,)``.
        moved: Those that move, ``(moved,)``; together they are all.
    """

    prior: Tensor
    prior_slopes: Tensor
    settled: Tensor

    def __init__(self, fixed: Tensor, moved: Tensor) -> None:
        super().__init__(fixed, moved, "locals")
        weightless = torch.tensor([0.0, _WEIGHTLESS]).repeat_interleave(len(moved))
        self.register_buffer("prior", weightless)
        self.register_buffer("prior_slopes", torch.zeros(2 * len(moved), len(fixed)))
        self.register_buffer("settled", torch.zeros(len(moved), dtype=torch.bool))

    @torch.no_grad()
    def set_prior(self, which: Tensor, constants: Tensor, slopes: Tensor, data: Tensor) -> None:
        """Sets the centres and the logarithms of the scales of some coordinates that move.

        Arguments:
            which: Those, of shape ``(moved,)``.
            constants: Of the prior's centres, then of its logarithms, ``(2 some,)``.
            slopes: Of both, ``(fixed, 2 some)``.
            data: What data alone would give: constants and slopes, ``(1 + fixed, 2 some)``.
        """
        rows = which.repeat(2)
        self.prior[rows] = constants.to(self.prior)
        self.prior_slopes[rows] = slopes.mT.to(self.prior)
        self.last[rows] = 0.0
        self.constant[rows] = data[0].to(self.prior)
        self.linear[rows] = data[1:].mT.to(self.prior) * math.sqrt(len(self.fixed))

    def _trained(self, rows: Tensor) -> Tensor:
        return _kept(rows, self.settled.repeat(2))

    def _parts(self, a: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The prior's centres and logarithms, and its shares of the precisions."""
        centre, log_scale = (self.prior + a @ self.prior_slopes.mT).tensor_split(2, -1)
        return centre, log_scale, torch.sigmoid(2.0 * (stretch - log_scale))

    def _outputs(self, a: Tensor, shift: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
        centre, log_scale, share = self._parts(a, stretch)
        joint = log_scale - 0.5 * nn.functional.softplus(2.0 * (log_scale - stretch))
        return shift + share * (centre - shift), joint

    def _of_fixed(self, a: Tensor, slope: Tensor, of_shift: Tensor, of_stretch: Tensor) -> Tensor:
        inner = a @ self.first.mT + self.bias
        output = torch.sqrt(1.0 + inner.square()) @ self._last.mT + a @ self._linear.mT
        shift, stretch = (output + self._constant).tensor_split(2, -1)
        centre, _, share = self._parts(a, stretch)
        rest = 1.0 - share
        turn = 2.0 * share * rest * (centre - shift) * of_shift
        of_data = super()._of_fixed(a, slope, of_shift * rest, of_stretch * rest + turn)
        of_prior = torch.cat([of_shift * share, of_stretch * share - turn], -1)
        return of_data + of_prior @ self.prior_slopes


def _kept(rows: Tensor, settled: Tensor) -> Tensor:
    """The rows, of which those that are settled are constants to an optimiser."""
    return rows.detach().where(settled.view(-1, *[1] * (rows.dim() - 1)), rows)


class Bend(nn.Module):
    r"""Bends each coordinate, smoothly and up to the tails.

    :math:`y = \sinh(\delta\, \mathrm{asinh}(z) + \epsilon)`: :math:`\epsilon` makes it skew, and
    far out :math:`|y|` grows as :math:`|z|^\delta`.

    Arguments:
        dimension: Of the vectors.

    Attributes:
        settled: Which coordinates are not trained, of shape ``(dimension,)``.

    References:
        | Sinh-arcsinh distributions (Jones and Pewsey, 2009)
        | https://doi.org/10.1093/biomet/asp053
    """

    settled: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.register_buffer("settled", torch.zeros(dimension, dtype=torch.bool))
        self.skew = nn.Parameter(torch.zeros(dimension))
        self.log_tail = nn.Parameter(torch.zeros(dimension))

    @property
    def _skew(self) -> Tensor:
        return _kept(self.skew, self.settled)

    @property
    def _log_tail(self) -> Tensor:
        return _kept(self.log_tail, self.settled)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.sinh(self._log_tail.exp() * z.asinh() + self._skew)
        return y, self._growth(z, y)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self._unbent(y)
        return z, -self._growth(z, y)

    def _unbent(self, y: Tensor) -> Tensor:
        return torch.sinh((y.asinh() - self._skew) * (-self._log_tail).exp())

    def _growth(self, z: Tensor, y: Tensor) -> Tensor:
        slopes = 0.5 * (torch.log1p(y.square()) - torch.log1p(z.square())) + self._log_tail
        return slopes.sum(-1)

    def pull(self, y: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        z = self._unbent(y)
        wide, narrow = torch.sqrt(1.0 + y.square()), torch.sqrt(1.0 + z.square())
        slope = self._log_tail.exp() * wide / narrow
        of_log_slope = slope * y / wide.square() - z / narrow.square()
        return z, gradient * slope - of_log_slope
