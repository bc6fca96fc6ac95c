r"""Neural Hamiltonian Flows: densities moved along Hamiltonian motion, the energies learned.

A position from a base is given momenta, and both follow the leapfrog steps of
:math:`H(q, p) = V(q) + K(p)` to :math:`(q_T, p_T)`. The motion preserves volume, so that the
density of the pair, the *phase*, is known exactly:

.. math:: M(q_T, p_T) = \pi_0(q_0)\, f(p_0 \mid q_0), \quad (q_0, p_0) = T^{-1}(q_T, p_T).

That of the position alone is the integral over momenta, which any density :math:`r(p \mid q)`
estimates without bias as the mean of :math:`M(q, p) / r(p \mid q)` over its draws. The logarithm of
one such ratio is in the mean a lower bound of the log density, which fits the flow to samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_hamflow.checks import number, positive, whole
from pyro_hamflow.dynamics.kinetic import VectorField
from pyro_hamflow.flows.bases import map_tensors, standard_normal
from pyro_hamflow.flows.encoder import Encoder, StandardMomenta
from pyro_hamflow.networks.kinetic import LearnedGaussianKinetic, LearnedKinetic
from pyro_hamflow.networks.perceptron import ScalarNetwork
from pyro_hamflow.networks.trajectory import follow


class DensityEstimate(NamedTuple):
    """An estimated log density.

    Attributes:
        value: The estimate.
        error: Its standard error.
    """

    value: Tensor
    error: Tensor


class NeuralHamiltonianFlow(nn.Module):
    r"""A density on :math:`\mathbb R^D` made by learned Hamiltonian motion.

    Called, it gives a :class:`FlowDistribution`, a torch and Pyro distribution of positions.

    Arguments:
        dimension: D.
        base: The distribution :math:`\pi_0` of the positions that it starts from, with event shape
            ``(D,)``; standard normal if not given. Type and device of the flow are those of its
            draws.
        kinetic: Makes the kinetic energy, given D: the classical one, its mass learned, by default.
        hidden: The widths of the hidden layers of the potential and the encoders.
        num_steps: L, the number of leapfrog steps.
        time: T, how long the motion takes.
        encode_start: Whether the first momenta's density f(p | q) is learned, a Gaussian whose
            mean and scale depend on q; else it is N(0, I).
        encode_end: The same of r(p | q), of the last momenta.
        symmetric: Whether potential and encoders are unchanged by q -> -q, p -> -p, so that a
            symmetric base becomes a symmetric density, if the kinetic energy is even too.
        stiffness: Adds :math:`\tfrac12 k \lVert q \rVert^2` to the potential, k learned from this
            value on. With 1, the flow begins as a rotation of phases, which keeps a standard
            normal; without, the potential is the network alone, as in the paper.

    Raises:
        ValueError: If a number lies outside its range, or the base is of another dimension.

    Invariant:
        The motion preserves volume, and is undone by the motion back, to rounding error.

    References:
        | Fixed-kinetic Neural Hamiltonian Flows (Souveton et al., 2023)
        | https://hal.science/hal-03976501
        | Hamiltonian Generative Networks (Toth et al., 2020)
        | https://openreview.net/forum?id=HJenn6VFvB

    Example:
        >>> flow = NeuralHamiltonianFlow(2, hidden=(16, 16))
        >>> flow().sample((5,)).shape
        torch.Size([5, 2])
        >>> flow().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        dimension: int,
        *,
        base: Any = None,
        kinetic: Callable[[int], LearnedKinetic] = LearnedGaussianKinetic,
        hidden: Sequence[int] = (128, 128),
        num_steps: int = 10,
        time: float = 1.0,
        encode_start: bool = False,
        encode_end: bool = True,
        symmetric: bool = False,
        stiffness: float | None = None,
    ) -> None:
        super().__init__()
        whole("dimension", dimension, 1)
        whole("num_steps", num_steps, 1)
        positive("time", time)
        if stiffness is not None:
            number("stiffness", stiffness)
        base = standard_normal(dimension) if base is None else base
        if tuple(base.batch_shape + base.event_shape) != (dimension,) or not base.event_shape:
            raise ValueError(
                f"`base` has batch shape {tuple(base.batch_shape)} and event shape "
                f"{tuple(base.event_shape)}: expected () and ({dimension},); see `to_event`"
            )
        self.dimension, self.num_steps, self.time = dimension, num_steps, time
        self.base = base
        self.potential_network = ScalarNetwork(dimension, hidden, symmetric=symmetric)
        self.kinetic = kinetic(dimension)
        self.stiffness = None if stiffness is None else nn.Parameter(torch.tensor(stiffness))

        def momenta(*, learned: bool) -> Encoder | StandardMomenta:
            return Encoder(dimension, hidden, symmetric=symmetric) if learned else StandardMomenta()

        self.start_momenta, self.end_momenta = (
            momenta(learned=encode_start),
            momenta(learned=encode_end),
        )
        example = base.sample()
        super().to(dtype=example.dtype, device=example.device)

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"{type(self).__name__}({self.dimension}, num_steps={self.num_steps}, "
            f"time={self.time:g}, kinetic={type(self.kinetic).__name__}, {count} parameters)"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Moves the base too, which is no module, when the flow moves or changes its type."""
        self.base = map_tensors(self.base, fn)
        return super()._apply(fn, *args, **kwargs)

    # --- motion ---------------------------------------------------------------------------------

    def potential(self, q: Tensor) -> Tensor:
        """The learned potential V of positions ``(*, D)``, of shape ``(*,)``."""
        value = self.potential_network(q)
        return (
            value if self.stiffness is None else value + 0.5 * self.stiffness * q.square().sum(-1)
        )

    def potential_gradient(self, q: Tensor) -> Tensor:
        """The gradient of V, in closed form."""
        return self.gradient_field()(q)

    def gradient_field(self) -> VectorField:
        """The gradient of V as a function of positions, at the present parameters."""
        return self.potential_network.field(self.stiffness)

    def push(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Follows the motion from the base to the flow's density; T.

        Arguments:
            q: Positions, of shape ``(*, D)``.
            p: Their momenta.
        """
        return self._move(q, p, self.time)

    def pull(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Follows the motion back; the inverse of :meth:`push`."""
        return self._move(q, p, -self.time)

    def path(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and momenta along the motion, start and end included.

        Returns:
            Two tensors of shape ``(num_steps + 1, *, D)``.
        """
        phases = [(q, p)]
        for _ in range(self.num_steps):
            phases.append(self._move(*phases[-1], self.time / self.num_steps, num_steps=1))
        positions, momenta = zip(*phases, strict=True)
        return torch.stack(positions), torch.stack(momenta)

    def _move(
        self, q: Tensor, p: Tensor, time: float, num_steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        count = self.num_steps if num_steps is None else num_steps
        gradient, velocity = self.gradient_field(), self.kinetic.velocity_field()
        return follow(gradient, velocity, q, p, time / count, count)

    # --- densities ------------------------------------------------------------------------------

    def draw_phase(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Draws positions with momenta, through which gradients flow to the parameters.

        Returns:
            Positions and momenta of shape ``(*sample_shape, D)``, and log M of shape
            ``sample_shape``.
        """
        shape = torch.Size(sample_shape)
        base = self.base
        q = base.rsample(shape) if base.has_rsample else base.sample(shape)
        p, log_momenta = self.start_momenta.draw(q)
        return *self.push(q, p), base.log_prob(q) + log_momenta

    def log_phase(self, q: Tensor, p: Tensor) -> Tensor:
        """Log M of positions and momenta ``(*, D)``, of shape ``(*,)``; exact."""
        q, p = self.pull(q, p)
        return self.base.log_prob(q) + self.start_momenta.log_density(q, p)

    def log_ratio(self, q: Tensor) -> Tensor:
        """Log M(q, p) - log r(p | q) with p drawn from r: a lower bound of the log density.

        In the mean, that is; and the mean of its exponential is the density.
        """
        p, log_momenta = self.end_momenta.draw(q)
        return self.log_phase(q, p) - log_momenta

    def estimate_log_density(self, q: Tensor, num_momenta: int = 64) -> DensityEstimate:
        r"""The log density of positions, estimated by importance sampling of their momenta.

        The density's estimate has no bias; its logarithm has one of about minus half the square of
        the standard error.

        Arguments:
            q: Positions, of shape ``(*, D)``.
            num_momenta: How many momenta each is given.
        """
        whole("num_momenta", num_momenta, 2)
        ratios = self.log_ratio(q.expand(num_momenta, *q.shape))
        value = ratios.logsumexp(0) - math.log(num_momenta)
        spread = (ratios - value).exp().std(0)
        return DensityEstimate(value, spread / math.sqrt(num_momenta))

    def forward(self, num_momenta: int = 64) -> FlowDistribution:
        """The distribution of positions at the present parameters."""
        return FlowDistribution(self, num_momenta)


class FlowDistribution(TorchDistribution):
    """The positions of a flow, as a distribution for Pyro's models or torch's.

    Its ``log_prob`` is an estimate, drawn anew at each call, of which the exponential has no bias;
    in the mean it is below the log density, so that training on it maximises a bound.

    Arguments:
        flow: The flow.
        num_momenta: How many momenta the density of each position is estimated from.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        flow: NeuralHamiltonianFlow,
        num_momenta: int = 64,
        batch_shape: Sequence[int] = (),
    ) -> None:
        whole("num_momenta", num_momenta, 1)
        self.flow, self.num_momenta = flow, num_momenta
        super().__init__(torch.Size(batch_shape), torch.Size([flow.dimension]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        return FlowDistribution(self.flow, self.num_momenta, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.flow.draw_phase(torch.Size(sample_shape) + self.batch_shape)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(
            torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        )
        ratios = self.flow.log_ratio(value.expand(self.num_momenta, *value.shape))
        return ratios.logsumexp(0) - math.log(self.num_momenta)
