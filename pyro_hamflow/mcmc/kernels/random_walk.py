"""The kernel that users name for moves without gradients: random-walk Metropolis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.mcmc.adaptation.estimator import EstimatorTuning
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.mass import FullMass, InverseMass
from pyro_hamflow.mcmc.adaptation.step_and_mass import StepAndMass
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.transitions.noise_refresh import Refresh
from pyro_hamflow.mcmc.transitions.trajectories import RandomSteps
from pyro_hamflow.model.function import PotentialFunction
from pyro_hamflow.model.kinds import Args, Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import Strategy

# At which the walk moves furthest, of a normal density of one to four dimensions, and beyond.
_BEST_RATES = {1: 0.44, 2: 0.35, 3: 0.32, 4: 0.28}
_BEST_RATE = 0.234  # in many dimensions: by theory, not tuned


class RandomWalk(Kernel):
    """Random-walk Metropolis with vectorised chains.

    Steps are normal, their scale and covariance found in warm-up. It is slow, and it needs no
    gradient but for where it starts. It runs in :class:`pyro_hamflow.MCMC`, all chains at once, and
    in :class:`pyro.infer.MCMC`. On a model with noise sites it moves the parameters with the noise
    held, and then refreshes the noise.

    Arguments:
        model: A Pyro model.
        step_size: The first scale of steps, in units of the posterior's; found by trial if not
            given.
        inverse_mass_matrix: The first covariance of steps but for the square of their scale.
        target_accept_prob: The mean acceptance probability that warm-up aims for; that at which the
            walk moves furthest if not given: .44 in one dimension, .234 in five and more.
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
        | Optimal scaling for various Metropolis-Hastings algorithms (Roberts, Rosenthal, 2001)
        | https://doi.org/10.1214/ss/1015346320

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> mcmc = MCMC(RandomWalk(model), num_samples=200, num_chains=4, disable_progbar=True)
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
        target_accept_prob: float | None = None,
        init_strategy: Strategy | None = None,
        refresh: Refresh | None = None,
        engine: str = "auto",
    ) -> None:
        self._chooses_rate = target_accept_prob is None
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
                RandomSteps(),
                StepAndMass(
                    step_size=step_size,
                    adapt_step_size=adapt_step_size,
                    adapt_mass_matrix=adapt_mass_matrix,
                    full_mass=full_mass,
                    inverse_mass_matrix=inverse_mass_matrix,
                    target_accept_prob=_BEST_RATE
                    if target_accept_prob is None
                    else target_accept_prob,
                    single_steps=True,
                ),
                EstimatorTuning("conditional", refresh, RandomSteps(), required=False),
            ),
            engine=engine,
        )

    def prepare(
        self,
        args: Args,
        kwargs: dict[str, Any],
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> Potential:
        potential = super().prepare(args, kwargs, initial_params)
        if self._chooses_rate:
            rate = _BEST_RATES.get(potential.dimension, _BEST_RATE)
            self.hamiltonian.step_and_mass.target_accept_prob = rate
        return potential
