r"""The path from a density that can be drawn from to a posterior.

At the inverse temperature :math:`\lambda` its density is :math:`r^{1 - \lambda} \gamma^\lambda`,
for the reference r and the unnormalised posterior :math:`\gamma`. From the prior that is the prior
times the likelihood to the power of :math:`\lambda`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_hamflow.model.guides import DensityGuide, draw_from, log_ratio_at
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.validation import no_validation


class Reference(Protocol):
    """A normalised density on the real line, and draws from it.

    Noise is N(0, I) beside it, or drawn with the positions; that density is left out.
    """

    def graph(self, kind: str, num_chains: int) -> Program:
        """Minus the log density and its gradients, of kinds as targets have them."""

    def value(self, position: Tensor, noise: Tensor) -> Tensor:
        """Minus the log density at positions ``(chains, dimension)``, of shape ``(chains,)``."""

    def draw(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Positions ``(chains, dimension)`` and noise ``(chains, noise_dimension)``."""


class GuideReference:
    """The density of a guide.

    Arguments:
        guide: The guide, frozen; its density has to be a function of positions.
        potential: Whose parameters it draws.

    Raises:
        ValueError: If its density at one and the same position differs from call to call, as that
            of a guide does which draws momenta beside.
    """

    def __init__(self, guide: DensityGuide, potential: Potential) -> None:
        self.guide = guide
        self.potential = potential
        with torch.no_grad():
            position = draw_from(guide, potential, 2)[0]
            if not torch.equal(log_ratio_at(guide, position), log_ratio_at(guide, position)):
                raise ValueError(
                    "`guide` tells another log density at each call, for it draws momenta beside "
                    "positions: expected one whose density is a function of positions"
                )

    def graph(self, kind: str, num_chains: int) -> Program:
        def program(position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad(), no_validation():
                position = position.detach().requires_grad_()
                value = -log_ratio_at(self.guide, position)
                (gradient,) = torch.autograd.grad(value.sum(), position)
            still = (torch.zeros_like(noise),) if kind == "gradients" else ()
            return value.detach(), gradient, *still

        return program

    def value(self, position: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad(), no_validation():
            return -log_ratio_at(self.guide, position)

    def draw(self, num_chains: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            position = draw_from(self.guide, self.potential, num_chains)[0]
        return position, self.potential.draw_noise(num_chains)


class PriorAndModes:
    """A prior and normals about modes, half and half.

    A path from the prior alone has next to nothing of a mode on its way that is much narrower than
    others, for there the likelihood counts by a power; along a path from here it keeps its share.

    Arguments:
        prior: The prior.
        mean: Of the normals, of shape ``(modes, dimension)``.
        precision: Their inverse covariances, of shape ``(modes, dimension, dimension)``.
    """

    def __init__(self, prior: Reference, mean: Tensor, precision: Tensor) -> None:
        self.prior, self.mean = prior, mean
        self.root = torch.linalg.cholesky(precision)
        self.inverse_root = torch.linalg.inv(self.root)
        modes, dimension = mean.shape
        log_volume = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        norm = 0.5 * dimension * math.log(2.0 * math.pi) + math.log(2.0 * modes)
        self.log_scale = log_volume - norm

    def graph(self, kind: str, num_chains: int) -> Program:
        start = self.prior.graph(kind, num_chains)

        def program(position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            value, gradient, *still = start(position, noise)
            standard, log_parts = self._parts(position, value)
            share = log_parts.softmax(0)
            pulls = torch.einsum("knd,ked->kne", standard, self.root)
            mixed = share[0][:, None] * gradient + (share[1:, :, None] * pulls).sum(0)
            return -log_parts.logsumexp(0), mixed, *(share[0][:, None] * part for part in still)

        return program

    def value(self, position: Tensor, noise: Tensor) -> Tensor:
        return -self._parts(position, self.prior.value(position, noise))[1].logsumexp(0)

    def _parts(self, position: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in each normal's unit, and each part's share times its density, prior first."""
        offset = position - self.mean[:, None]
        standard = offset @ self.root
        own = self.log_scale[:, None] - 0.5 * standard.square().sum(-1)
        return standard, torch.cat([-value[None] - math.log(2.0), own])

    def draw(self, num_chains: int) -> tuple[Tensor, Tensor]:
        position, noise = self.prior.draw(num_chains)
        picked = torch.randint(len(self.mean), (num_chains,), device=position.device)
        standard = torch.randn_like(position)[:, None]
        about = self.mean[picked] + (standard @ self.inverse_root[picked])[:, 0]
        with_prior = torch.rand(num_chains, 1, device=position.device) < 0.5  # of either
        return torch.where(with_prior, position, about), noise


class Ends(NamedTuple):
    """What a path's start and its end say at positions.

    Attributes:
        start: The reference's energy, of shape ``(chains,)``.
        end: The posterior's.
        start_gradient: Of the first in the position, of shape ``(chains, dimension)``.
        end_gradient: Of the second.
    """

    start: Tensor
    end: Tensor
    start_gradient: Tensor
    end_gradient: Tensor


class TemperedTarget:
    """A point of the path between a reference and a posterior, as a target.

    Arguments:
        reference: Where the path begins.
        potential: The posterior, where it ends.
        end: Its value and gradient for any number of chains, by machine code, where there is any.

    Attributes:
        inverse_temperature: Where on the path this is, a scalar between 0 and 1. It is an argument
            of all captured programs, so that it may be changed at any time.

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> potential = Potential(model, (torch.tensor(4.0),))
        >>> from pyro_hamflow.model.prior import Prior
        >>> target = TemperedTarget(Prior(potential), potential)
        >>> target.inverse_temperature.fill_(0.5)
        tensor(0.5000)
        >>> value, gradient = target.graph("gradient", 1)(torch.ones(1, 1), torch.zeros(1, 0))
        >>> gradient  # 1 - 0.5 * (4 - 1)
        tensor([[-0.5000]])
    """

    def __init__(
        self, reference: Reference, potential: Potential, end: Program | None = None
    ) -> None:
        self.reference, self.potential, self._end = reference, potential, end
        self.dimension, self.noise_dimension = potential.dimension, potential.noise_dimension
        self.example = potential.example
        self.inverse_temperature = torch.zeros_like(potential.example)

    def graph(self, kind: str, num_chains: int) -> Program:
        start, end = self._programs(kind, num_chains)

        def program(position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            pairs = zip(start(position, noise), end(position, noise), strict=True)
            return tuple(self._between(*pair) for pair in pairs)

        return program

    def _programs(self, kind: str, num_chains: int) -> tuple[Program, Program]:
        """Of the path's start and of its end."""
        end = self._end or self.potential.graph(kind, num_chains)
        return self.reference.graph(kind, num_chains), end

    def _between(self, start: Tensor, end: Tensor) -> Tensor:
        """What lies between the path's ends, of the finer of their types."""
        finer = torch.promote_types(start.dtype, end.dtype)
        return torch.lerp(start.to(finer), end.to(finer), self.inverse_temperature.to(finer))

    def vectors(self, num_chains: int) -> tuple[Tensor, Tensor]:
        return self.potential.vectors(num_chains)

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        if isinstance(self.reference, GuideReference) or self._end is not None:
            return function  # networks of others' and machine code are not recorded

        def at(inverse_temperature: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            here, self.inverse_temperature = self.inverse_temperature, inverse_temperature
            try:
                return function(*inputs)
            finally:
                self.inverse_temperature = here

        programs = self.potential.programs
        program = programs.accelerate(self, name, at, self.inverse_temperature, *examples)
        return lambda *inputs: program(self.inverse_temperature, *inputs)

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        start = self.reference.value(position, noise)
        if self._end is not None:
            end = self._end(position, noise)[0]
        else:
            end = self.potential.value(position, noise)
        return Evaluation(self._between(start, end), {}, {})

    def ends(self, position: Tensor, noise: Tensor) -> Ends:
        """What lies at the path's ends, which tells the energy and its gradient anywhere on it."""
        start, end = self._programs("gradient", len(position))
        (value, gradient), (end_value, end_gradient) = start(position, noise), end(position, noise)
        return Ends(value, end_value, gradient, end_gradient)

    def between(self, ends: Ends) -> tuple[Tensor, Tensor]:
        """The energy and its gradient, from what lies at the ends."""
        gradients = ends.start_gradient, ends.end_gradient
        return self._between(ends.start, ends.end), self._between(*gradients)

    def rows_at_once(self, num_chains: int) -> int:
        """For how many chains to run a program at once, of so many."""
        if self._end is not None:
            return num_chains
        return self.potential.programs.rows_at_once("gradient", num_chains)
