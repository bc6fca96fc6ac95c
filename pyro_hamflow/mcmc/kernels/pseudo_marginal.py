"""The kernels that users name, for models whose likelihood is estimated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.scrutiny import look, mend_proposal, misses, more_of_prior, refit_at
from pyro_hamflow.mcmc.adaptation.mass import FullMass, InverseMass
from pyro_hamflow.mcmc.kernels.base import HamiltonianKernel
from pyro_hamflow.mcmc.kernels.hmc_nuts import HMC, NUTS
from pyro_hamflow.mcmc.transitions.base import Info, State, Transition
from pyro_hamflow.mcmc.transitions.noise_refresh import CorrelatedRefresh, Refresh
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import Strategy, find_start

_REPLICATES = 32
# Where joint moves overtake conditional ones, by effective draws per gradient: measured in
# benchmarks/methods.py for noise that is accepted as a whole, and element by element.
_LARGEST_VARIANCE = 3.0
_LARGEST_FACTORISED_VARIANCE = 20.0
_SLOW_VARIANCE = 10.0
_NOISY_VARIANCE = 100.0  # beyond which chains of any method stay where they are for long
_WANTED_VARIANCE = 1.0  # of the estimate, as where the number of particles is settled
_LOOKS = 4
_FAR = 1.0
_METHODS = ("auto", "joint", "conditional")


class PseudoMarginal(HamiltonianKernel):
    """What makes a kernel pseudo-marginal: the noise of an estimate is part of the state.

    Arguments:
        model: A Pyro model with noise sites.
        method: ``"joint"`` moves parameters and noise together; ``"conditional"`` moves parameters
            with the noise held, and then refreshes the noise; ``"auto"`` chooses by the variance
            of the estimate, and says so.
        refresh: The move of the noise under the conditional method; fresh independent noise for
            every element if not given.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If a number lies outside its range; when run, if the model has no noise sites,
            or one of the faults that :class:`~pyro_hamflow.model.potential.Potential` lists.
    """

    separate_noise = True

    method: str
    refresh: Refresh

    def choose_moves(self, method: str, refresh: Refresh | None) -> None:
        """Settles how noise is moved."""
        if method not in _METHODS:
            raise ValueError(f"`method` is {method!r}: expected one of {_METHODS}")
        self.method = method
        self.refresh = refresh or CorrelatedRefresh()
        self.chosen_method = method
        self.log_likelihood_variance = math.nan
        self.max_pareto_k = math.nan
        self._recent: list[Tensor] = []
        self._remarks: list[str] = []

    def begin(self, *args: Any, **kwargs: Any) -> State:
        self._recent, self._remarks, self.max_pareto_k = [], [], math.nan
        model = self.model
        if isinstance(model, MarginalModel):
            model.untune()
        state = super().begin(*args, **kwargs)
        if isinstance(model, MarginalModel):
            if model.remark:
                self.messages.insert(0, f"{type(self).__name__}: {model.remark}")
            if model.pilot_distance > _FAR:
                self.messages.append(
                    f"{type(self).__name__}: the search for the posterior's mode did not come to "
                    f"rest; the chains may start {model.pilot_distance:.2g} posterior standard "
                    "deviations from it, and warm-up has to find the rest of the way."
                )
        return state

    def advance(self, state: State) -> tuple[State, Info]:
        """One iteration of all chains; tunes while warm-up lasts, the estimator included."""
        warming = self.warming
        state, info = super().advance(state)
        if warming:
            self._recent.append(state.position)
            if not self.warming:
                self._examine(state)
        return state, info

    def retuned(self, state: State) -> State:
        """Fits the estimator anew, at the mean of the window's draws, where that is worth it.

        The noise is drawn anew with it. Nothing changes where the estimate's variance is small
        enough, for a new estimator means new programs.
        """
        window, self._recent = self._recent, []
        model, potential = self.model, self.potential
        if not isinstance(model, MarginalModel) or callable(model.proposal) or not window:
            return state
        args, kwargs = potential.args, potential.kwargs
        draws = [potential.constrain(row) for row in state.position[:_LOOKS]]
        with torch.random.fork_rng():
            better = None
            is_noisy = self._variance(state.position) > _WANTED_VARIANCE
            if is_noisy and model.proposal == "prior":
                better = more_of_prior(model, draws, args, kwargs)
            elif is_noisy:
                centre = potential.constrain(torch.cat(window[len(window) // 2 :]).mean(0))
                better = refit_at(model, centre, draws, args, kwargs)
            candidate = better or copy.copy(model)
            if candidate.may_choose_proposal:
                remark = mend_proposal(candidate, draws[:1], args, kwargs)
                if remark is not None:
                    self.messages.insert(0, f"{type(self).__name__}: {remark}")
                    better = candidate
            if better is None:
                return state
            model.adopt(better)
            self._potential = self._new_potential(args, kwargs)
        position, noise = find_start(self._potential, len(state.position), state.position, 0.0)
        self._transition = self.make_transition(self._potential, position)
        return self._transition.begin(position, noise)

    def _examine(self, state: State) -> None:
        """Looks at the frozen estimator at the last draws of warm-up; says first what is wrong."""
        potential, model = self.potential, self.model
        self.log_likelihood_variance = self._variance(state.position)
        name = type(self).__name__
        if self.log_likelihood_variance > _NOISY_VARIANCE:
            self.messages.insert(
                0,
                f"{name}: the log-likelihood estimate is too noisy at the chains' own draws, with "
                f"variance {self.log_likelihood_variance:.3g}: take more particles, "
                "`points='rqmc'` or another proposal.",
            )
        if not isinstance(model, MarginalModel):
            return
        draws = [potential.constrain(row) for row in state.position[:_LOOKS]]
        with torch.random.fork_rng():
            looks = [look(model, draw, potential.args, potential.kwargs) for draw in draws]
            self.max_pareto_k = max(found.max_pareto_k for found in looks)
            remark = misses(model, draws, potential.args, potential.kwargs)
        if remark:
            self.messages.insert(0, f"{name}: {remark}")

    def _variance(self, position: Tensor) -> float:
        """The estimate's, the median over chains, at their positions."""
        potential, count = self.potential, len(position)
        values = [
            potential.value(position, potential.draw_noise(count)) for _ in range(_REPLICATES)
        ]
        return float(torch.stack(values).double().var(0).median())

    def make_transition(self, potential: Potential, position: Tensor) -> Transition:
        if not potential.noise_sites:
            raise ValueError(
                "the model has no noise sites: expected a model from `marginalize`, or one that "
                "calls `pyro_hamflow.noise`; for other models use `HMC` or `NUTS`"
            )
        if self.method == "auto":
            self.chosen_method = self._choose(potential, position)
        else:
            self.chosen_method = self.method
        if self.chosen_method == "joint":
            return self.make_joint_transition(potential, len(position))
        inner = self.make_parameter_transition(potential, len(position))
        return ConditionalTransition(inner, self.refresh)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {
            "method": self.chosen_method,
            "refresh": repr(self.refresh),
            "log_likelihood_variance": self.log_likelihood_variance,
            "max_pareto_k": self.max_pareto_k,
        }

    def _choose(self, potential: Potential, position: Tensor) -> str:
        """Which of the two ways serves, by the variance of the estimate where the chains start."""
        self.log_likelihood_variance = self._variance(position)
        if potential.factorises and self.log_likelihood_variance <= _LARGEST_FACTORISED_VARIANCE:
            method, why = "conditional", "each element's noise is refreshed on its own"
        elif self.log_likelihood_variance <= _LARGEST_VARIANCE:
            method, why = "conditional", "fresh noise is often accepted as a whole"
        else:
            method, why = "joint", "with the noise held, the parameters could move little"
        if self.log_likelihood_variance > _SLOW_VARIANCE:
            why += "; more particles would let them move further"
        self.messages = [message for message in self.messages if message not in self._remarks]
        self._remarks = [
            f"{type(self).__name__}: the log-likelihood estimate has variance "
            f"{self.log_likelihood_variance:.3g} where the chains start; "
            f"moves are {method} ({why})."
        ]
        self.messages += self._remarks
        return method


class PseudoMarginalHMC(PseudoMarginal, HMC):
    """Pseudo-marginal Hamiltonian Monte Carlo with vectorised chains.

    Samples the exact posterior of a model whose likelihood is estimated: one made by
    :func:`~pyro_hamflow.marginalize`, or one that calls :func:`~pyro_hamflow.noise`. Runs in
    :class:`pyro_hamflow.MCMC`, all chains at once, and in :class:`pyro.infer.MCMC`.

    Its arguments, and the errors that it raises, are those of :class:`PseudoMarginal` and of
    :class:`~pyro_hamflow.HMC`.

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
        model: Callable[..., Any],
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
    ) -> None:
        super().__init__(
            model,
            step_size=step_size,
            trajectory_length=trajectory_length,
            num_steps=num_steps,
            jitter=jitter,
            max_num_steps=max_num_steps,
            min_stepsize=min_stepsize,
            max_stepsize=max_stepsize,
            adapt_step_size=adapt_step_size,
            adapt_mass_matrix=adapt_mass_matrix,
            full_mass=full_mass,
            inverse_mass_matrix=inverse_mass_matrix,
            transforms=transforms,
            max_plate_nesting=max_plate_nesting,
            jit_compile=jit_compile,
            target_accept_prob=target_accept_prob,
            init_strategy=init_strategy,
        )
        self.choose_moves(method, refresh)


class PseudoMarginalNUTS(PseudoMarginal, NUTS):
    """The pseudo-marginal No-U-Turn Sampler with vectorised chains.

    Samples what :class:`PseudoMarginalHMC` does, along trajectories that grow until the parameters
    turn back. Joint trajectories turn the noise by half a circle at most. Runs in
    :class:`pyro_hamflow.MCMC`, all chains at once, and in :class:`pyro.infer.MCMC`.

    Its arguments, and the errors that it raises, are those of :class:`PseudoMarginal` and of
    :class:`~pyro_hamflow.NUTS`.

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
        model: Callable[..., Any],
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
    ) -> None:
        super().__init__(
            model,
            step_size=step_size,
            max_tree_depth=max_tree_depth,
            adapt_step_size=adapt_step_size,
            adapt_mass_matrix=adapt_mass_matrix,
            full_mass=full_mass,
            inverse_mass_matrix=inverse_mass_matrix,
            transforms=transforms,
            max_plate_nesting=max_plate_nesting,
            jit_compile=jit_compile,
            target_accept_prob=target_accept_prob,
            init_strategy=init_strategy,
        )
        self.choose_moves(method, refresh)
