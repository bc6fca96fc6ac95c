"""The guide whose density is a Neural Hamiltonian Flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor

from pyro_hamflow.flows.bases import students_t
from pyro_hamflow.flows.drawn import DrawnWithDensity
from pyro_hamflow.flows.flow_guide import FlowGuide
from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.networks.kinetic import LearnedGaussianKinetic, LearnedKinetic

_FREEDOM = 20.0


class AutoNeuralHamiltonianFlow(FlowGuide):
    r"""A guide that moves positions from a Gaussian, or from the prior, by Hamiltonian motion.

    Trains by :func:`~pyro_hamflow.fit_guide`, or as any guide does: with :class:`pyro.infer.SVI` or
    as an ``ELBOModule``, on whole data or subsampled. The flow lives on the phases of all
    parameters, moved to the real line and standardised; the density of their momenta is part of the
    bound:

    .. math:: \mathrm{ELBO} = E_M [\log p(\theta, y) + \log r(p_T \mid q_T) - \log M(q_T, p_T)].

    What it leaves of the posterior's shape, :func:`~pyro_hamflow.importance_sample` and
    :class:`~pyro_hamflow.FlowMH` correct. On a model with noise sites the flow covers the
    parameters, and the noise is drawn afresh from N(0, I), its own law. A noisy estimate draws the
    guide to where it is less noisy, and its noise is part of the weights besides: have
    :func:`~pyro_hamflow.estimator_quality` tell of a standard deviation of some 0.5 or less rather
    than of the 1 that :func:`~pyro_hamflow.marginalize` aims at for chains. Few local variables are
    served best by a lattice, ``points="rqmc"``; where k stays above 0.7, take more particles, or
    ``proposal="prior"``. Discrete sites that can be enumerated are left to enumeration.

    Arguments:
        model: A Pyro model.
        start: Where the flow begins. ``"laplace"``: around the posterior's mode, with the
            covariance of a Gaussian fitted there and the tails of Student's t with 20 degrees of
            freedom, since thinner ones than the posterior's cannot be corrected. ``"prior"``: at
            the prior. Or a distribution of all parameters on the real line, with event shape
            ``(dimension,)``, such as a Gaussian whose coupling is known.
        kinetic: As in :class:`~pyro_hamflow.NeuralHamiltonianFlow`.
        hidden: The widths of the hidden layers of the networks.
        num_steps: The number of leapfrog steps.
        time: How long the motion takes.
        reverse_encoder: Whether r(p | q) is learned, rather than N(0, I). It tightens the bound.
        symmetric: Whether the flow is symmetric about where it starts.
        stiffness: As in :class:`~pyro_hamflow.NeuralHamiltonianFlow`.
        init_loc_fn: Where the search for the mode begins; one of Pyro's.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If an argument lies outside its range; at the first call, if a latent site lies
            in a subsampled plate, or the model has one of the faults that
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    References:
        | Fixed-kinetic Neural Hamiltonian Flows (Souveton et al., 2023), section 6
        | https://hal.science/hal-03976501

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> guide = AutoNeuralHamiltonianFlow(model, hidden=(8, 8))
        >>> adam = pyro.optim.Adam({"lr": 1e-3})
        >>> svi = pyro.infer.SVI(model, guide, adam, pyro.infer.Trace_ELBO())
        >>> svi.step(torch.ones(3)) < 10.0
        True
    """

    def __init__(
        self,
        model: Model,
        *,
        start: Any = "laplace",
        kinetic: Callable[[int], LearnedKinetic] = LearnedGaussianKinetic,
        hidden: Sequence[int] = (32, 32),
        num_steps: int = 5,
        time: float = 1.0,
        reverse_encoder: bool = False,
        symmetric: bool = False,
        stiffness: float | None = 1.0,
        init_loc_fn: Callable[..., Any] = init_to_median,
    ) -> None:
        super().__init__(model, start, init_loc_fn)
        self._settings: dict[str, Any] = {
            "kinetic": kinetic,
            "hidden": tuple(hidden),
            "num_steps": num_steps,
            "time": time,
            "encode_start": True,
            "encode_end": reverse_encoder,
            "symmetric": symmetric,
            "stiffness": stiffness,
        }
        NeuralHamiltonianFlow(1, **self._settings)  # refuses bad settings now

    def make_flow(self, position: Tensor, base: Any) -> NeuralHamiltonianFlow:
        base = students_t(position, _FREEDOM) if base is None else base
        return NeuralHamiltonianFlow(len(position), base=base, **self._settings)

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        r"""Positions on the real line, and the log density that their weights divide by.

        That is :math:`\log M(q, p) - \log r(p \mid q)` of the phase drawn: over it, weights
        :math:`p(\theta, y)` have the evidence as their mean. Gradients flow through both.

        Returns:
            Positions of shape ``(num_samples, dimension)``, and one number for each.
        """
        flow = self.flow
        q, p, log_density = flow.draw_phase((num_samples,))
        log_ratio = log_density - flow.end_momenta.log_density(q, p)
        return self.to_position(q), log_ratio - self.log_volume()

    def log_ratio(self, position: Tensor) -> Tensor:
        """The same log density at given positions, with momenta drawn from r(p | q)."""
        return self.flow.log_ratio(self.standardise(position)) - self.log_volume()

    # --- what Pyro calls ------------------------------------------------------------------------

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        phases = self.get_posterior()
        phase = pyro.sample(f"_{self._pyro_name}_phase", phases, infer={"is_auxiliary": True})
        q, p = phase.chunk(2, -1)
        if poutine.get_mask() is not False:
            # A factor, but without a warning where the guide is called by hand.
            surplus = self.flow.end_momenta.log_density(q, p) + self.log_volume()
            nothing = dist.Delta(torch.zeros_like(surplus), log_density=-surplus)
            pyro.sample(f"_{self._pyro_name}_momenta", nothing, infer={"is_auxiliary": True})
        return self.to_position(q)

    def get_posterior(self, *args: Any, **kwargs: Any) -> DrawnWithDensity:
        """The distribution of phases: standardised positions, and their momenta behind them."""
        flow = self.flow  # asked for once: Pyro registers its parameters each time

        def draw(shape: torch.Size) -> tuple[Tensor, Tensor]:
            q, p, log_density = flow.draw_phase(shape)
            return torch.cat([q, p], -1), log_density

        def log_density(phase: Tensor) -> Tensor:
            return flow.log_phase(*phase.chunk(2, -1))

        return DrawnWithDensity(2 * self.dimension, draw, log_density)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} has no map of positions alone, its flow moves positions with "
            "momenta: NeuTra needs another guide; to correct this one use `importance_sample` or "
            "`FlowMH`"
        )

    get_base_dist = get_transform
