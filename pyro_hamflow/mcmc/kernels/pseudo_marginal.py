"""The kernels that users name, for models whose likelihood is estimated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.mcmc.adaptation.estimator import EstimatorTuning
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.mass import FullMass, InverseMass
from pyro_hamflow.mcmc.adaptation.step_and_mass import StepAndMass
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.transitions.noise_refresh import Refresh
from pyro_hamflow.mcmc.transitions.trajectories import HMCTrajectories, NUTSTrajectories
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.model.start import Strategy


class PseudoMarginalHMC(Kernel):
    """Pseudo-marginal Hamiltonian Monte Carlo with vectorised chains.

    Samples the exact posterior of a model whose likelihood is estimated: one made by
    :func:`~pyro_hamflow.marginalize`, or one that calls :func:`~pyro_hamflow.noise`. Runs in
    :class:`pyro_hamflow.MCMC`, all chains at once, and in :class:`pyro.infer.MCMC`.

    Its arguments, and the errors that it raises, are those of
    :class:`~pyro_hamflow.mcmc.adaptation.estimator.EstimatorTuning` and of
    :class:`~pyro_hamflow.HMC`; a model without noise sites is refused when it is run.

    Invariant:
        The extended density of parameters and noise, and so the exact posterior of the parameters
        for any number of particles, once warm-up has ended.

    References:
        | Pseudo-Marginal Hamiltonian Monte Carlo (Alenlöv et al., 2021)
        | https://arxiv.org/abs/1607.02516

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("group", len(y)):
        ...         x = pyro.sample("x", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Poisson(x.exp()), obs=y)
        >>> marginal = marginalize(model, ["x"], num_particles=8)
        >>> mcmc = MCMC(PseudoMarginalHMC(marginal), num_samples=200, disable_progbar=True)
        >>> mcmc.run(torch.tensor([2.0, 0.0, 1.0]))
        >>> mcmc.get_samples()["mean"].shape
        torch.Size([200])
    """

    def __init__(
        self,
        model: Model,
        *,
        method: str = "auto",
        refresh: Refresh | None = None,
        step_size: float | None = None,
        trajectory_length: float | None = None,
        num_steps: int | None = None,
        jitter: float = 0.4,
        max_num_steps: int = 1000,
        min_stepsize: float = 1e-10,
        max_stepsize: float = 1e10,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: FullMass = "auto",
        inverse_mass_matrix: InverseMass | None = None,
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,
        target_accept_prob: float = 0.8,
        init_strategy: Strategy | None = None,
        engine: str = "auto",
    ) -> None:
        trajectories = HMCTrajectories(trajectory_length, num_steps, jitter, max_num_steps)
        super().__init__(
            ModelTarget(
                model,
                separate_noise=True,
                transforms=transforms,
                max_plate_nesting=max_plate_nesting,
                jit_compile=jit_compile,
                init_strategy=init_strategy,
            ),
            Hamiltonian(
                trajectories,
                StepAndMass(
                    step_size=step_size,
                    adapt_step_size=adapt_step_size,
                    adapt_mass_matrix=adapt_mass_matrix,
                    full_mass=full_mass,
                    inverse_mass_matrix=inverse_mass_matrix,
                    target_accept_prob=target_accept_prob,
                    min_stepsize=min_stepsize,
                    max_stepsize=max_stepsize,
                ),
                EstimatorTuning(method, refresh, trajectories),
            ),
            engine=engine,
        )


class PseudoMarginalNUTS(Kernel):
    """The pseudo-marginal No-U-Turn Sampler with vectorised chains.

    Samples what :class:`PseudoMarginalHMC` does, along trajectories that grow until the parameters
    turn back. Joint trajectories turn the noise by half a circle at most. Runs in
    :class:`pyro_hamflow.MCMC`, all chains at once, and in :class:`pyro.infer.MCMC`.

    Its arguments, and the errors that it raises, are those of
    :class:`~pyro_hamflow.mcmc.adaptation.estimator.EstimatorTuning` and of
    :class:`~pyro_hamflow.NUTS`; a model without noise sites is refused when it is run.

    Invariant:
        The extended density of parameters and noise, and so the exact posterior of the parameters
        for any number of particles, once warm-up has ended.

    References:
        | Pseudo-Marginal Hamiltonian Monte Carlo (Alenlöv et al., 2021)
        | https://arxiv.org/abs/1607.02516
        | The No-U-Turn Sampler (Hoffman, Gelman, 2014)
        | https://arxiv.org/abs/1111.4246

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("group", len(y)):
        ...         x = pyro.sample("x", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Poisson(x.exp()), obs=y)
        >>> marginal = marginalize(model, ["x"], num_particles=8)
        >>> mcmc = MCMC(PseudoMarginalNUTS(marginal), num_samples=50, disable_progbar=True)
        >>> mcmc.run(torch.tensor([2.0, 0.0, 1.0]))
        >>> mcmc.get_samples()["mean"].shape
        torch.Size([50])
    """

    def __init__(
        self,
        model: Model,
        *,
        method: str = "auto",
        refresh: Refresh | None = None,
        step_size: float | None = None,
        max_tree_depth: int = 10,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: FullMass = "auto",
        inverse_mass_matrix: InverseMass | None = None,
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,
        target_accept_prob: float = 0.8,
        init_strategy: Strategy | None = None,
        engine: str = "auto",
    ) -> None:
        trajectories = NUTSTrajectories(max_tree_depth)
        super().__init__(
            ModelTarget(
                model,
                separate_noise=True,
                transforms=transforms,
                max_plate_nesting=max_plate_nesting,
                jit_compile=jit_compile,
                init_strategy=init_strategy,
            ),
            Hamiltonian(
                trajectories,
                StepAndMass(
                    step_size=step_size,
                    adapt_step_size=adapt_step_size,
                    adapt_mass_matrix=adapt_mass_matrix,
                    full_mass=full_mass,
                    inverse_mass_matrix=inverse_mass_matrix,
                    target_accept_prob=target_accept_prob,
                ),
                EstimatorTuning(method, refresh, trajectories),
            ),
            engine=engine,
        )
