"""The kernels that users name, for models whose density is known: HMC and NUTS."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyro_hamflow.checks import between, positive, whole
from pyro_hamflow.mcmc.adaptation.mass import FullMass, InverseMass
from pyro_hamflow.mcmc.kernels.base import HamiltonianKernel, meaningless
from pyro_hamflow.mcmc.transitions.base import ParameterTransition, Transition
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.nuts import JointNUTSTransition, NUTSTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import JointTransition
from pyro_hamflow.model.function import PotentialFunction
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import Strategy

_DEEPEST = 20


class HMC(HamiltonianKernel):
    """Hamiltonian Monte Carlo with vectorised chains.

    Runs in :class:`pyro_hamflow.MCMC`, all chains at once, and in :class:`pyro.infer.MCMC`. On a
    model with noise sites it treats the noise as parameters.

    Arguments:
        model: A Pyro model.
        trajectory_length: The mean time of a trajectory, where the posterior has unit scale; a
            quarter of a turn, half of pi, if not given.
        num_steps: The number of steps of each trajectory, whatever their size, where no length is
            given.
        jitter: By which share trajectories are at random shorter or longer.
        max_num_steps: The most steps of a trajectory, where their number is not given.

    The other arguments are those of
    :class:`~pyro_hamflow.mcmc.kernels.base.HamiltonianKernel`, in Pyro's order.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If a number lies outside its range; when run, if the model has faults, which
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    Invariant:
        The posterior, exactly, once warm-up has ended: step size and mass are then frozen, and the
        random length of a trajectory does not depend on its state.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011)
        | https://arxiv.org/abs/1206.1901

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> mcmc = MCMC(HMC(model), num_samples=200, num_chains=4, disable_progbar=True)
        >>> mcmc.run(torch.ones(3))
        >>> mcmc.get_samples()["mean"].shape
        torch.Size([800])
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: PotentialFunction | None = None,
        step_size: float | None = None,
        trajectory_length: float | None = None,
        num_steps: int | None = None,
        adapt_step_size: bool = True,  # noqa: FBT001, FBT002
        adapt_mass_matrix: bool = True,  # noqa: FBT001, FBT002
        full_mass: FullMass = "auto",
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,  # noqa: FBT001, FBT002
        jit_options: Mapping[str, Any] | None = None,
        ignore_jit_warnings: bool = False,  # noqa: FBT001, FBT002
        target_accept_prob: float = 0.8,
        init_strategy: Strategy | None = None,
        *,
        min_stepsize: float = 1e-10,
        max_stepsize: float = 1e10,
        inverse_mass_matrix: InverseMass | None = None,
        jitter: float = 0.4,
        max_num_steps: int = 1000,
    ) -> None:
        super().__init__(
            model,
            potential_fn=potential_fn,
            step_size=step_size,
            adapt_step_size=adapt_step_size,
            adapt_mass_matrix=adapt_mass_matrix,
            full_mass=full_mass,
            inverse_mass_matrix=inverse_mass_matrix,
            transforms=transforms,
            max_plate_nesting=max_plate_nesting,
            jit_compile=jit_compile,
            jit_options=jit_options,
            ignore_jit_warnings=ignore_jit_warnings,
            target_accept_prob=target_accept_prob,
            init_strategy=init_strategy,
            min_stepsize=min_stepsize,
            max_stepsize=max_stepsize,
        )
        if trajectory_length is not None:
            positive("trajectory_length", trajectory_length)
        between("jitter", jitter, 0.0, 1.0, ends="low")
        if num_steps is not None:
            whole("num_steps", num_steps, 1)
        whole("max_num_steps", max_num_steps, 1)
        self.fixed_num_steps = num_steps if trajectory_length is None else None
        self.trajectory_length = math.pi / 2 if trajectory_length is None else trajectory_length
        self.jitter = jitter
        self.max_num_steps = max_num_steps

    def make_parameter_transition(
        self, potential: Potential, num_chains: int
    ) -> ParameterTransition:
        return HMCTransition(potential, num_chains)

    def make_joint_transition(self, potential: Potential, num_chains: int) -> Transition:
        return JointTransition(potential, num_chains)

    def draw_num_steps(self, step_size: float) -> int:
        if self.fixed_num_steps is not None:
            return self.fixed_num_steps
        factor = 1.0 + self.jitter * (2.0 * torch.rand(()).item() - 1.0)
        steps = round(self.trajectory_length * factor / step_size)
        return max(1, min(steps, self.max_num_steps))

    @property
    def settings(self) -> dict[str, Any]:
        fixed = self.fixed_num_steps
        length = {"trajectory_length": self.trajectory_length, "jitter": self.jitter}
        return super().settings | (length if fixed is None else {"num_steps": fixed})

    @property
    def num_steps(self) -> int:
        """How many steps a trajectory of mean length takes."""
        if self.fixed_num_steps is not None:
            return self.fixed_num_steps
        assert self.step_size is not None
        return max(1, int(self.trajectory_length / self.step_size))


class NUTS(HamiltonianKernel):
    """The No-U-Turn Sampler with vectorised chains.

    Trajectories grow until they turn back, so that no length needs to be set; their draws are
    picked from all their points. Runs in :class:`pyro_hamflow.MCMC`, all chains at once, and in
    :class:`pyro.infer.MCMC`. On a model with noise sites it treats the noise as parameters.

    Arguments:
        model: A Pyro model.
        use_multinomial_sampling: Points are always picked by their weights; slices are not.
        max_tree_depth: The most doublings of a trajectory, 10 by default: 1,023 steps.

    The other arguments are those of
    :class:`~pyro_hamflow.mcmc.kernels.base.HamiltonianKernel`, in Pyro's order.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If a number lies outside its range; when run, if the model has faults, which
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    Invariant:
        The posterior, exactly, once warm-up has ended: step size and mass are then frozen.

    References:
        | The No-U-Turn Sampler (Hoffman, Gelman, 2014)
        | https://arxiv.org/abs/1111.4246
        | A conceptual introduction to Hamiltonian Monte Carlo (Betancourt, 2017), appendix A
        | https://arxiv.org/abs/1701.02434

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> mcmc = MCMC(NUTS(model), num_samples=100, num_chains=4, disable_progbar=True)
        >>> mcmc.run(torch.ones(3))
        >>> mcmc.get_samples()["mean"].shape
        torch.Size([400])
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: PotentialFunction | None = None,
        step_size: float | None = None,
        adapt_step_size: bool = True,  # noqa: FBT001, FBT002
        adapt_mass_matrix: bool = True,  # noqa: FBT001, FBT002
        full_mass: FullMass = "auto",
        use_multinomial_sampling: bool = True,  # noqa: FBT001, FBT002
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,  # noqa: FBT001, FBT002
        jit_options: Mapping[str, Any] | None = None,
        ignore_jit_warnings: bool = False,  # noqa: FBT001, FBT002
        target_accept_prob: float = 0.8,
        max_tree_depth: int = 10,
        init_strategy: Strategy | None = None,
        *,
        inverse_mass_matrix: InverseMass | None = None,
    ) -> None:
        super().__init__(
            model,
            potential_fn=potential_fn,
            step_size=step_size,
            adapt_step_size=adapt_step_size,
            adapt_mass_matrix=adapt_mass_matrix,
            full_mass=full_mass,
            inverse_mass_matrix=inverse_mass_matrix,
            transforms=transforms,
            max_plate_nesting=max_plate_nesting,
            jit_compile=jit_compile,
            jit_options=jit_options,
            ignore_jit_warnings=ignore_jit_warnings,
            target_accept_prob=target_accept_prob,
            init_strategy=init_strategy,
        )
        meaningless("use_multinomial_sampling=False", given=not use_multinomial_sampling)
        self.max_tree_depth = whole("max_tree_depth", max_tree_depth, 1, _DEEPEST)

    def make_parameter_transition(
        self, potential: Potential, num_chains: int
    ) -> ParameterTransition:
        return NUTSTransition(potential, num_chains, self.max_tree_depth)

    def make_joint_transition(self, potential: Potential, num_chains: int) -> Transition:
        return JointNUTSTransition(potential, num_chains, self.max_tree_depth)

    def draw_num_steps(self, step_size: float) -> int:
        return 2**self.max_tree_depth - 1

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"max_tree_depth": self.max_tree_depth}
