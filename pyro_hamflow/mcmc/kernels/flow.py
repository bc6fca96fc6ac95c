r"""Independence Metropolis: every proposal comes from a frozen guide.

The guide draws positions with something more, such as momenta: its density M is that of the pair.
The target is the posterior times the density r of that something given the position, and for a
likelihood estimate times that of its noise. A proposal is accepted with the ratio of the importance
weights :math:`W = p(\theta, y \mid u)\, r / M` there and here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pyro_hamflow.mcmc.kernels.base import HamiltonianKernel
from pyro_hamflow.mcmc.transitions.base import (
    select,
)
from pyro_hamflow.mcmc.transitions.independence import FlowMHTransition, IndependenceProposal
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import fault

_TRIES = 100


class FlowMH(HamiltonianKernel):
    """Independence Metropolis from a frozen guide, all chains at once.

    Its moves jump between modes, as far as the guide covers them; no gradient is evaluated. It runs
    in :class:`pyro_hamflow.MCMC` and in :class:`pyro.infer.MCMC`, needs no warm-up, and starts from
    draws of the guide. On a model with noise sites each proposal brings fresh noise.

    Arguments:
        model: A Pyro model.
        guide: A trained :class:`~pyro_hamflow.AutoNeuralHamiltonianFlow`, or anything that fills
            the protocol :class:`IndependenceProposal`. It must not be trained further while draws
            are made.
        jit_compile: Whether to compile the model's density to machine code.

    Raises:
        TypeError: If the model is not callable, or the guide makes no proposals.
        ValueError: When run, if the guide is of another dimension than the model, or the model has
            one of the faults that :class:`~pyro_hamflow.model.potential.Potential` lists.

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

    separate_noise = True

    def __init__(
        self, model: Callable[..., Any], guide: IndependenceProposal, *, jit_compile: bool = False
    ) -> None:
        if not hasattr(guide, "propose") or not hasattr(guide, "log_ratio"):
            raise TypeError(
                f"`guide` is a {type(guide).__name__}: expected an AutoNeuralHamiltonianFlow, or a "
                "guide with methods `prepare`, `propose` and `log_ratio`"
            )
        super().__init__(
            model,
            step_size=1.0,
            adapt_step_size=False,
            full_mass=False,
            adapt_mass_matrix=False,
            jit_compile=jit_compile,
        )
        self._guide = guide

    def prepare(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> Potential:
        potential = super().prepare(args, kwargs, initial_params)
        self._guide.prepare(*args, **kwargs)
        width = self._guide.propose(1)[0].shape[-1]
        if width != potential.dimension:
            raise ValueError(
                f"`guide` proposes {width} parameters: expected {potential.dimension}, for the "
                f"sites {[site.name for site in potential.sites]}"
            )
        return potential

    def _start(
        self, potential: Potential, num_chains: int, initial_params: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if initial_params is not None:
            return super()._start(potential, num_chains, initial_params)
        position, noise = self._guide.propose(num_chains)[0], potential.draw_noise(num_chains)
        for _ in range(_TRIES):
            good = potential.value(position, noise).isfinite()
            if good.all():
                return position, noise
            position = select(good, position, self._guide.propose(num_chains)[0])
            noise = select(good, noise, potential.draw_noise(num_chains))
        bad = int((~good).nonzero()[0])
        raise ValueError(
            f"`guide` proposed no point of finite density in {_TRIES} tries: "
            f"{fault(potential, position[bad], noise[bad])}"
        )

    def make_parameter_transition(self, potential: Potential, num_chains: int) -> Any:
        return FlowMHTransition(potential, self._guide)

    make_joint_transition = make_parameter_transition

    def draw_num_steps(self, step_size: float) -> int:
        return 1

    @property
    def step_size(self) -> None:
        return None

    @property
    def settings(self) -> dict[str, Any]:
        unused = ("target_accept_prob", "full_mass")
        kept = {name: value for name, value in super().settings.items() if name not in unused}
        return kept | {"guide": repr(self._guide).splitlines()[0]}
