"""The kernels that users name, for models whose density is known: HMC and NUTS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.mass import FullMass, InverseMass
from pyro_hamflow.mcmc.adaptation.step_and_mass import StepAndMass
from pyro_hamflow.mcmc.adaptation.transport import Transporting
from pyro_hamflow.mcmc.kernels.base import Kernel, meaningless
from pyro_hamflow.mcmc.transitions.trajectories import HMCTrajectories, NUTSTrajectories
from pyro_hamflow.model.function import PotentialFunction
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.model.start import Strategy


class HMC(Kernel):
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
        transport: A map of the parameters, in whose coordinates moves are made: ``"flow"`` learns
            one in warm-up, and drops it if it gains nothing; or a trained guide that has one, as
            :class:`~pyro.infer.autoguide.AutoIAFNormal`, or anything that fills the protocol
            :class:`~pyro_hamflow.model.transported.Transport`, neither to be trained further while
            draws are made. It pays where scales differ from place to place, as in funnels and
            hierarchical models; chains in different modes stay where they are.
        engine: What makes the draws. ``"torch"`` moves all chains at once by torch's operations;
            ``"native"`` moves each by itself in machine code, made by Inductor and a C++ compiler
            in some seconds and kept on disk (:func:`~pyro_hamflow.clear_cache`); ``"auto"`` takes
            the latter where it has code for all of the model's operations and the run is long
            enough. Both make the same trajectories, of other random numbers; ``settings`` and the
            attributes of results say which it was, and why.

    The other arguments are those of :class:`~pyro_hamflow.marginal.model_target.ModelTarget` and
    of :class:`~pyro_hamflow.mcmc.adaptation.step_and_mass.StepAndMass`, in Pyro's order.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If a number lies outside its range; when run, if the model has faults, which
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    Invariant:
        The posterior, exactly, once warm-up has ended: step size, mass and map are then frozen, and
        the random length of a trajectory does not depend on its state.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011)
        | https://arxiv.org/abs/1206.1901
        | NeuTra-lizing bad geometry in HMC using neural transport (Hoffman et al., 2019)
        | https://arxiv.org/abs/1903.03704

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
        model: Model | None = None,
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
        transport: Any = None,
        engine: str = "auto",
    ) -> None:
        meaningless("jit_options", given=jit_options is not None)
        meaningless("ignore_jit_warnings", given=ignore_jit_warnings)
        self.trajectories = HMCTrajectories(trajectory_length, num_steps, jitter, max_num_steps)
        super().__init__(
            ModelTarget(
                model,
                potential_fn=potential_fn,
                transforms=transforms,
                max_plate_nesting=max_plate_nesting,
                jit_compile=jit_compile,
                init_strategy=init_strategy,
            ),
            Hamiltonian(
                self.trajectories,
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
            ),
            transporting=None if transport is None else Transporting(transport),
            engine=engine,
        )

    @property
    def trajectory_length(self) -> float:
        """The mean time of a trajectory."""
        return self.trajectories.length

    @property
    def num_steps(self) -> int:
        """How many steps a trajectory of mean length takes."""
        fixed, size = self.trajectories.fixed_num_steps, self.step_size
        if fixed is not None or size is None:
            return fixed or 1
        return max(1, int(self.trajectory_length / size))


class NUTS(Kernel):
    """The No-U-Turn Sampler with vectorised chains.

    Trajectories grow until they turn back, so that no length needs to be set; their draws are
    picked from all their points. Runs in :class:`pyro_hamflow.MCMC`, all chains at once, and in
    :class:`pyro.infer.MCMC`. On a model with noise sites it treats the noise as parameters.

    Arguments:
        model: A Pyro model.
        use_multinomial_sampling: Points are always picked by their weights; slices are not.
        max_tree_depth: The most doublings of a trajectory, 10 by default: 1,023 steps.
        transport: As in :class:`HMC`.
        engine: As in :class:`HMC`.

    The other arguments are those of :class:`~pyro_hamflow.marginal.model_target.ModelTarget` and
    of :class:`~pyro_hamflow.mcmc.adaptation.step_and_mass.StepAndMass`, in Pyro's order.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If a number lies outside its range; when run, if the model has faults, which
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    Invariant:
        The posterior, exactly, once warm-up has ended: step size, mass and map are then frozen.

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
        model: Model | None = None,
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
        transport: Any = None,
        engine: str = "auto",
    ) -> None:
        meaningless("jit_options", given=jit_options is not None)
        meaningless("ignore_jit_warnings", given=ignore_jit_warnings)
        meaningless("use_multinomial_sampling=False", given=not use_multinomial_sampling)
        super().__init__(
            ModelTarget(
                model,
                potential_fn=potential_fn,
                transforms=transforms,
                max_plate_nesting=max_plate_nesting,
                jit_compile=jit_compile,
                init_strategy=init_strategy,
            ),
            Hamiltonian(
                NUTSTrajectories(max_tree_depth),
                StepAndMass(
                    step_size=step_size,
                    adapt_step_size=adapt_step_size,
                    adapt_mass_matrix=adapt_mass_matrix,
                    full_mass=full_mass,
                    inverse_mass_matrix=inverse_mass_matrix,
                    target_accept_prob=target_accept_prob,
                ),
            ),
            transporting=None if transport is None else Transporting(transport),
            engine=engine,
        )
