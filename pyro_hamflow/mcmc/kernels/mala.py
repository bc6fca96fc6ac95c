"""The kernel that users name for single steps along the gradient: MALA."""

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
from pyro_hamflow.mcmc.transitions.trajectories import HMCTrajectories
from pyro_hamflow.model.function import PotentialFunction
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.model.start import Strategy


class MALA(Kernel):
    r"""The Metropolis-adjusted Langevin algorithm with vectorised chains.

    It is Hamiltonian Monte Carlo of a single leapfrog step: with a fresh momentum, step size
    :math:`\epsilon` and inverse mass :math:`\Sigma`, the proposal from z is normal, of mean
    :math:`z - \tfrac12 \epsilon^2 \Sigma \nabla U(z)` and covariance :math:`\epsilon^2 \Sigma`, and
    the energy error is the logarithm of Metropolis's ratio. It runs in :class:`pyro_hamflow.MCMC`,
    all chains at once, and in :class:`pyro.infer.MCMC`. On a model with noise sites it moves the
    parameters with the noise held and then refreshes the noise, or moves both together where the
    estimate is too noisy for that, and says so.

    Arguments:
        model: A Pyro model.
        inverse_mass_matrix: The first covariance of steps but for the square of their size.
        target_accept_prob: The mean acceptance probability that warm-up aims for; .574 is where the
            chain moves furthest in many dimensions.
        refresh: The move of the noise; fresh independent noise for every element if not given.
        engine: As in :class:`~pyro_hamflow.HMC`.

    The other arguments are those of :class:`~pyro_hamflow.marginal.model_target.ModelTarget` and
    of :class:`~pyro_hamflow.mcmc.adaptation.step_and_mass.StepAndMass`.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If a number lies outside its range; when run, if the model has faults, which
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    Invariant:
        The posterior, exactly, once warm-up has ended; on a model with noise sites the extended
        density of parameters and noise.

    References:
        | Exponential convergence of Langevin distributions and their discrete approximations
          (Roberts, Tweedie, 1996)
        | https://doi.org/10.2307/3318418
        | Optimal scaling of discrete approximations to Langevin diffusions (Roberts, Rosenthal,
          1998)
        | https://doi.org/10.1111/1467-9868.00123

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> mcmc = MCMC(MALA(model), num_samples=200, num_chains=4, disable_progbar=True)
        >>> mcmc.run(torch.ones(3))
        >>> mcmc.get_samples()["mean"].shape
        torch.Size([800])
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        potential_fn: PotentialFunction | None = None,
        step_size: float | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: FullMass = "auto",
        inverse_mass_matrix: InverseMass | None = None,
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,
        target_accept_prob: float = 0.574,
        init_strategy: Strategy | None = None,
        refresh: Refresh | None = None,
        engine: str = "auto",
    ) -> None:
        one_step = HMCTrajectories(None, num_steps=1, jitter=0.0, max_num_steps=1)
        super().__init__(
            ModelTarget(
                model,
                potential_fn=potential_fn,
                separate_noise=True,
                transforms=transforms,
                max_plate_nesting=max_plate_nesting,
                jit_compile=jit_compile,
                init_strategy=init_strategy,
            ),
            Hamiltonian(
                one_step,
                StepAndMass(
                    step_size=step_size,
                    adapt_step_size=adapt_step_size,
                    adapt_mass_matrix=adapt_mass_matrix,
                    full_mass=full_mass,
                    inverse_mass_matrix=inverse_mass_matrix,
                    target_accept_prob=target_accept_prob,
                    single_steps=True,
                ),
                EstimatorTuning("auto", refresh, one_step, required=False),
            ),
            engine=engine,
        )
