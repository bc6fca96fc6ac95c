r"""Independence Metropolis: every proposal comes from a frozen guide.

The guide draws positions with something more, such as momenta: its density M is that of the pair.
The target is the posterior times the density r of that something given the position, and for a
likelihood estimate times that of its noise. A proposal is accepted with the ratio of the importance
weights :math:`W = p(\theta, y \mid u)\, r / M` there and here; of several, one is picked by its
weight first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_hamflow.checks import whole
from pyro_hamflow.flows.lost_modes import describe_lost_modes
from pyro_hamflow.flows.pyro_guides import as_guide
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.transitions.base import select
from pyro_hamflow.mcmc.transitions.independence import IndependenceTransition
from pyro_hamflow.model.guides import DensityGuide, draw_from, log_ratio_at
from pyro_hamflow.model.kinds import Args, Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import fault

_TRIES = 100  # of the guide, for starts of finite density


class FlowMH(Kernel):
    """Independence Metropolis from a frozen guide, all chains at once.

    Its moves jump between modes, as far as the guide covers them; no gradient is evaluated. It runs
    in :class:`pyro_hamflow.MCMC` and in :class:`pyro.infer.MCMC`, needs no warm-up, and starts from
    draws of the guide. On a model with noise sites each proposal brings fresh noise. Where descents
    from elsewhere find modes that the guide lacks, a message says so: no chain would come there.

    Arguments:
        model: A Pyro model.
        guide: A trained :class:`~pyro_hamflow.AutoFlow` or
            :class:`~pyro_hamflow.AutoNeuralHamiltonianFlow`, one of Pyro's own guides whose density
            is known, or anything that fills the protocol
            :class:`~pyro_hamflow.model.guides.DensityGuide`. It must not be trained further while
            draws are made.
        num_proposals: How many proposals are made for each draw. They are evaluated together, so
            that several cost little more than one wherever overhead outweighs arithmetic.
        jit_compile: Whether to compile the model's density to machine code.

    Raises:
        TypeError: If the model is not callable, or the guide lacks a method of the protocol.
        ValueError: If the number is less than one; when run, if the guide is of another dimension
            than the model, or the model has one of the faults that
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    Invariant:
        The posterior, exactly; on a model with noise sites the extended density of parameters and
        noise. How fast chains forget where they were depends on how well the guide covers it.

    References:
        | Adaptive Monte Carlo augmented with normalizing flows (Gabrié et al., 2022)
        | https://arxiv.org/abs/2105.12603

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> guide = AutoNeuralHamiltonianFlow(model, hidden=(8, 8))
        >>> mcmc = MCMC(FlowMH(model, guide), num_samples=100, warmup_steps=0, disable_progbar=True)
        >>> mcmc.run(torch.tensor(1.0))
        >>> mcmc.get_samples()["mean"].shape
        torch.Size([100])
    """

    def __init__(
        self,
        model: Model,
        guide: DensityGuide | AutoGuide,
        *,
        num_proposals: int = 1,
        jit_compile: bool = False,
    ) -> None:
        self._guide: DensityGuide = as_guide("guide", guide, DensityGuide)
        self.num_proposals = whole("num_proposals", num_proposals, 1)
        super().__init__(ModelTarget(model, separate_noise=True, jit_compile=jit_compile))

    def prepare(
        self,
        args: Args,
        kwargs: dict[str, Any],
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> Potential:
        potential = super().prepare(args, kwargs, initial_params)
        self._guide.prepare(*args, **kwargs)
        with torch.no_grad():  # refuses a guide of another model, or without an inverse
            log_ratio_at(self._guide, self._draw(potential, 1).clone())
        return potential

    @torch.no_grad()
    def _draw(self, potential: Potential, num_chains: int) -> Tensor:
        return draw_from(self._guide, potential, num_chains)[0]

    def start(
        self, num_chains: int, initial_params: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """From draws of the guide, unless told where; tells of modes that it has lost."""
        lost = describe_lost_modes(self._guide, self.potential)
        if lost is not None:
            self.plan.say(lost[0].lower() + lost[1:])
        if initial_params is not None:
            return super().start(num_chains, initial_params)
        potential = self.potential
        position, noise = self._draw(potential, num_chains), potential.draw_noise(num_chains)
        for _ in range(_TRIES):
            good = potential.value(position, noise).isfinite()
            if good.all():
                return position, noise
            position = select(good, position, self._draw(potential, num_chains))
            noise = select(good, noise, potential.draw_noise(num_chains))
        bad = int((~good).nonzero()[0])
        raise ValueError(
            f"`guide` drew no point of finite density in {_TRIES} tries: "
            f"{fault(potential, position[bad], noise[bad])}"
        )

    def make_transition(self, potential: Potential, position: Tensor) -> IndependenceTransition:
        return IndependenceTransition(potential, self._guide, self.num_proposals)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {
            "guide": repr(self._guide).splitlines()[0],
            "num_proposals": self.num_proposals,
        }
