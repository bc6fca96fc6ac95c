"""The kernels that users name whose trajectories follow a learned energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.mcmc.adaptation.estimator import EstimatorTuning
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.mass import FullMass, InverseMass
from pyro_hamflow.mcmc.adaptation.step_and_mass import StepAndMass
from pyro_hamflow.mcmc.adaptation.surrogate_run import SurrogateChoices
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.transitions.noise_refresh import Refresh
from pyro_hamflow.mcmc.transitions.trajectories import HMCTrajectories, NUTSTrajectories
from pyro_hamflow.model.function import PotentialFunction
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.model.start import Strategy
from pyro_hamflow.surrogates.amortized.surrogate import AmortizedSurrogate
from pyro_hamflow.surrogates.learner import TrainingSettings
from pyro_hamflow.surrogates.losses import EnergyLoss
from pyro_hamflow.surrogates.potential_network import PotentialNetwork


class HNNHMC(Kernel):
    """Hamiltonian Monte Carlo along a learned energy, with vectorised chains.

    A network learns the posterior's energy in warm-up; trajectories then follow its gradient, which
    costs microseconds, and each draw is judged by the model's own energy. It pays where the model's
    gradient is dear; where it would not, true gradients are followed, and the run says so. On a
    model with noise sites the network learns the energy of the parameters alone; one estimate
    judges where they move with the noise held, and another the noise that is then drawn. Runs in
    :class:`pyro_hamflow.MCMC`, all chains at once, and in :class:`pyro.infer.MCMC`.

    Its arguments, and the errors that it raises, are those of
    :class:`~pyro_hamflow.mcmc.adaptation.surrogate_run.SurrogateChoices`, of its ``training``, and
    of :class:`~pyro_hamflow.HMC`.

    Attributes:
        surrogate: The network, after a run; its ``save`` writes it to a file.
        report: What it took to learn it, and what it is good for.

    Invariant:
        The posterior, exactly, whatever the network has learned, once warm-up has ended: it is then
        frozen, its gradient depends on the position alone, and the true energy decides.

    References:
        | Neural network gradient Hamiltonian Monte Carlo (Li, Holbrook, Shahbaba, Baldi, 2017)
        | https://arxiv.org/abs/1711.05307

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> kernel = HNNHMC(model, fallback=False, training_steps=100)
        >>> mcmc = MCMC(kernel, num_samples=50, warmup_steps=60, num_chains=4, disable_progbar=True)
        >>> mcmc.run(torch.ones(3))
        >>> mcmc.get_samples()["mean"].shape, len(kernel.report.trainings)
        (torch.Size([200]), 3)
    """

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: PotentialFunction | None = None,
        *,
        surrogate: PotentialNetwork | AmortizedSurrogate | None = None,
        correction: str = "auto",
        num_transitions: int = 2,
        num_proposals: int = 16,
        true_share: float = 0.05,
        trust_radius: float = 1.5,
        hidden: Sequence[int] = (64, 64),
        outputs: int = 1,
        loss: EnergyLoss | None = None,
        training_points: int | None = None,
        training_steps: int = 1000,
        rounds: int = 2,
        fallback: bool = True,
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
                potential_fn=potential_fn,
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
            SurrogateChoices(
                surrogate,
                correction,
                num_transitions,
                num_proposals,
                true_share,
                trust_radius,
                TrainingSettings(
                    tuple(hidden), outputs, loss, training_points, training_steps, rounds
                ),
                fallback,
            ),
            engine=engine,
        )


class HNNNUTS(Kernel):
    """The No-U-Turn Sampler along a learned energy, with vectorised chains.

    What :class:`HNNHMC` is to HMC: trajectories grow along the network's gradient until they turn
    back. Each draw of the learned density so made is accepted or refused as a whole, by one true
    energy, or, with ``correction="per leaf"``, every point is weighted by its own.

    Its arguments, and the errors that it raises, are those of
    :class:`~pyro_hamflow.mcmc.adaptation.surrogate_run.SurrogateChoices`, of its ``training``, and
    of :class:`~pyro_hamflow.NUTS`.

    Attributes:
        surrogate: The network, after a run; its ``save`` writes it to a file.
        report: What it took to learn it, and what it is good for.

    Invariant:
        The posterior, exactly, whatever the network has learned, once warm-up has ended: No-U-Turn
        transitions are reversible for the learned density, and the true energy corrects for it.

    References:
        | Efficient Bayesian inference with latent Hamiltonian neural networks in No-U-Turn Sampling
        | https://arxiv.org/abs/2208.06120

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> kernel = HNNNUTS(model)  # whose gradients are cheap
        >>> mcmc = MCMC(kernel, num_samples=50, num_chains=4, disable_progbar=True)
        >>> mcmc.run(torch.ones(3))
        >>> kernel.report.following
        'true gradients'
    """

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: PotentialFunction | None = None,
        *,
        surrogate: PotentialNetwork | AmortizedSurrogate | None = None,
        correction: str = "auto",
        num_transitions: int = 2,
        num_proposals: int = 16,
        true_share: float = 0.05,
        trust_radius: float = 1.5,
        hidden: Sequence[int] = (64, 64),
        outputs: int = 1,
        loss: EnergyLoss | None = None,
        training_points: int | None = None,
        training_steps: int = 1000,
        rounds: int = 2,
        fallback: bool = True,
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
                potential_fn=potential_fn,
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
            SurrogateChoices(
                surrogate,
                correction,
                num_transitions,
                num_proposals,
                true_share,
                trust_radius,
                TrainingSettings(
                    tuple(hidden), outputs, loss, training_points, training_steps, rounds
                ),
                fallback,
            ),
            engine=engine,
        )
