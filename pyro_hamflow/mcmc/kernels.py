"""The kernels that users name, for models whose density is known: HMC and NUTS."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pyro_hamflow.mcmc.hamiltonian_kernel import HamiltonianKernel
from pyro_hamflow.mcmc.hmc import HMCTransition
from pyro_hamflow.mcmc.nuts import JointNUTSTransition, NUTSTransition
from pyro_hamflow.mcmc.pseudo_marginal import JointTransition
from pyro_hamflow.mcmc.transition import ParameterTransition, Transition
from pyro_hamflow.model.potential import Potential

_DEEPEST = 20


class HMC(HamiltonianKernel):
    """Hamiltonian Monte Carlo with vectorised chains.

    Runs in :class:`pyro_hamflow.MCMC`, all chains at once, and in :class:`pyro.infer.MCMC`. On a
    model with noise sites it treats the noise as parameters.

    Arguments:
        model: A Pyro model.
        trajectory_length: The mean time of a trajectory, where the posterior has unit scale.
        jitter: By which share trajectories are at random shorter or longer.
        max_num_steps: The most steps of a trajectory.
        settings: The other arguments of
            :class:`~pyro_hamflow.mcmc.hamiltonian_kernel.HamiltonianKernel`.

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
        model: Callable[..., Any],
        *,
        trajectory_length: float = math.pi / 2,
        jitter: float = 0.4,
        max_num_steps: int = 1000,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        if not trajectory_length > 0:
            raise ValueError(
                f"`trajectory_length` is {trajectory_length}: expected a positive time"
            )
        if not 0 <= jitter < 1:
            raise ValueError(f"`jitter` is {jitter}: expected 0 <= jitter < 1")
        if max_num_steps < 1:
            raise ValueError(f"`max_num_steps` is {max_num_steps}: expected 1 or more")
        self.trajectory_length = trajectory_length
        self.jitter = jitter
        self.max_num_steps = max_num_steps

    def make_parameter_transition(
        self, potential: Potential, num_chains: int
    ) -> ParameterTransition:
        return HMCTransition(potential, num_chains)

    def make_joint_transition(self, potential: Potential, num_chains: int) -> Transition:
        return JointTransition(potential, num_chains)

    def draw_num_steps(self, step_size: float) -> int:
        factor = 1.0 + self.jitter * (2.0 * torch.rand(()).item() - 1.0)
        steps = round(self.trajectory_length * factor / step_size)
        return max(1, min(steps, self.max_num_steps))

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {
            "trajectory_length": self.trajectory_length,
            "jitter": self.jitter,
        }


class NUTS(HamiltonianKernel):
    """The No-U-Turn Sampler with vectorised chains.

    Trajectories grow until they turn back, so that no length needs to be set; their draws are
    picked from all their points. Runs in :class:`pyro_hamflow.MCMC`, all chains at once, and in
    :class:`pyro.infer.MCMC`. On a model with noise sites it treats the noise as parameters.

    Arguments:
        model: A Pyro model.
        max_tree_depth: The most doublings of a trajectory, 10 by default: 1,023 steps.
        settings: The other arguments of
            :class:`~pyro_hamflow.mcmc.hamiltonian_kernel.HamiltonianKernel`.

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
        self, model: Callable[..., Any], *, max_tree_depth: int = 10, **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        if not 1 <= max_tree_depth <= _DEEPEST:
            raise ValueError(
                f"`max_tree_depth` is {max_tree_depth}: expected 1 to {_DEEPEST} doublings"
            )
        self.max_tree_depth = max_tree_depth

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
