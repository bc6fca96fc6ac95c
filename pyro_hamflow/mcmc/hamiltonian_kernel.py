"""What all kernels share, for our runner and for Pyro's alike.

A kernel joins a model, a transition and a warm-up. Our runner moves all chains of a kernel at once
(:meth:`HamiltonianKernel.begin` and :meth:`~HamiltonianKernel.advance`); Pyro's moves one chain
(:meth:`~HamiltonianKernel.setup` and :meth:`~HamiltonianKernel.sample`). Both take the same path.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.record import Record
from pyro_hamflow.mcmc.transition import Info, ParameterTransition, State, Transition, Tuning
from pyro_hamflow.mcmc.warmup import WarmUp
from pyro_hamflow.model.arguments import same_arguments
from pyro_hamflow.model.marginal import MarginalModel
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start

_MASSES = (True, False, "auto")
_LARGEST_DENSE = 100
_FIRST_STEP = 0.1
_PILOT_RADIUS = 0.1
_OPENING_STEPS = 20


class HamiltonianKernel(MCMCKernel):
    """What the kernels share: potential, warm-up, and both faces.

    Arguments:
        model: A Pyro model.
        step_size: The integrator's first step size; found by trial if not given.
        adapt_step_size: Whether warm-up tunes it.
        target_accept_prob: The mean acceptance probability that warm-up aims for.
        full_mass: Whether the mass is a whole matrix, or its diagonal alone; ``"auto"`` is whole
            for up to a hundred parameters, and diagonal beyond.
        inverse_mass_matrix: The first one, of shape ``(dimension,)`` or, if the mass is whole,
            ``(dimension, dimension)``; ones if not given.
        adapt_mass_matrix: Whether warm-up tunes it.
        jit_compile: Whether to compile programs to machine code, which takes tens of seconds and
            makes long runs several times faster.
    """

    separate_noise = False

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float | None = None,
        adapt_step_size: bool = True,
        target_accept_prob: float = 0.8,
        full_mass: bool | str = "auto",
        inverse_mass_matrix: Tensor | None = None,
        adapt_mass_matrix: bool = True,
        jit_compile: bool = False,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` is {model!r}: expected a Pyro model, a callable")
        if step_size is not None and not step_size > 0:
            raise ValueError(f"`step_size` is {step_size}: expected a positive number")
        if not 0 < target_accept_prob < 1:
            raise ValueError(
                f"`target_accept_prob` is {target_accept_prob}: expected 0 < target_accept_prob < 1"
            )
        if full_mass not in _MASSES:
            raise ValueError(f"`full_mass` is {full_mass!r}: expected one of {_MASSES}")
        super().__init__()
        self.model = model
        self.adapt_step_size = adapt_step_size
        self.target_accept_prob = target_accept_prob
        self.full_mass = full_mass
        self.adapt_mass_matrix = adapt_mass_matrix
        self.jit_compile = jit_compile
        self._first_step_size = step_size
        self._first_inverse_mass = inverse_mass_matrix
        self._potential: Potential | None = None
        self._transition: Transition | None = None
        self._warmup: WarmUp | None = None
        self._initial_params: Mapping[str, Tensor] | None = None
        self._state: State | None = None
        self._returned: dict[str, Tensor] | None = None
        self._record = Record()
        self._last: Info | None = None
        self.messages: list[str] = []
        self.planned_draws: int | None = None  # of each chain, where the runner tells

    @abstractmethod
    def make_parameter_transition(
        self, potential: Potential, num_chains: int
    ) -> ParameterTransition:
        """The kernel's move of the parameters, noise held."""

    @abstractmethod
    def make_joint_transition(self, potential: Potential, num_chains: int) -> Transition:
        """The kernel's move of parameters and noise together."""

    def make_transition(self, potential: Potential, position: Tensor) -> Transition:
        """The kernel's whole move, for chains that start at given positions."""
        return self.make_parameter_transition(potential, len(position))

    @abstractmethod
    def draw_num_steps(self, step_size: float) -> int:
        """How many steps the next trajectories take, or may take at most."""

    # --- all chains at once: our runner ---------------------------------------------------------

    def begin(
        self,
        num_chains: int,
        warmup_steps: int,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Prepares a run: captures the model, finds starting points and a first step size.

        Arguments:
            num_chains: How many chains to move at once.
            warmup_steps: How many iterations to tune for.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
            initial_params: Unconstrained starting values, chains first.

        Returns:
            The first state.
        """
        self.messages = []
        with torch.random.fork_rng():  # so that a run repeats itself, captured already or not
            potential = self.prepare(args, dict(kwargs or {}), initial_params)
        position, noise = self._start(potential, num_chains, initial_params)
        self._transition = self.make_transition(potential, position)
        state = self._transition.begin(position, noise)
        tuning = Tuning(self._first_step_size or _FIRST_STEP, self._first_kinetic(potential))
        self._warmup = self._new_warmup(tuning, warmup_steps)
        if self.adapt_step_size and self._first_step_size is None:
            self._warmup.restart(self._reasonable_step_size(state))
        return state

    def advance(self, state: State) -> tuple[State, Info]:
        """One iteration of all chains; tunes while warm-up lasts."""
        warmup, transition = self._running()
        num_steps = self.draw_num_steps(warmup.tuning.step_size)
        if self.is_opening():
            num_steps = min(num_steps, _OPENING_STEPS)
        state, info = transition.step(state, warmup.tuning, num_steps)
        if not warmup.finished:
            changed = warmup.update(state.position, info.acceptance_rate)
            if changed and self.adapt_step_size and not warmup.finished:
                warmup.restart(self._reasonable_step_size(state))
        return state, info

    def is_opening(self) -> bool:
        """Whether trajectories are kept short, for chains are on their way to the typical set."""
        return self._running()[0].opening

    def progress(self, info: Info, record: Record) -> dict[str, str]:
        """What a progress bar shows: the step size, recent acceptance, divergences so far."""
        size = self.step_size
        rates = record.stats.get("acceptance_rate", [])[-100:] or [info.acceptance_rate]
        divergences = sum(int(d.sum()) for d in record.stats.get("diverging", []))
        shown = {} if size is None else {"step size": f"{size:.2e}"}
        return shown | {
            "acc. prob": f"{float(torch.cat(rates).mean()):.3f}",
            "divergences": str(divergences),
        }

    def site_shapes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The shape of each site on the real line."""
        return {site.name: site.shape for site in self.prepare(args, dict(kwargs)).sites}

    @property
    def potential(self) -> Potential:
        """The target of the latest run."""
        if self._potential is None:
            raise RuntimeError("the kernel has not been set up: run it first")
        return self._potential

    @property
    def step_size(self) -> float | None:
        """The current step size; none of a kernel that takes no steps."""
        return self._running()[0].tuning.step_size

    @property
    def kinetic(self) -> GaussianKinetic:
        """The current kinetic energy, of flat momenta."""
        return self._running()[0].tuning.kinetic

    @property
    def inverse_mass_matrix(self) -> dict[tuple[str, ...], Tensor]:
        """The current inverse mass in Pyro's form: the names of sites, in order, and their block.

        A vector is the diagonal of one.
        """
        inverse_mass = self.kinetic.inverse_mass
        sites = sorted(self.potential.sites, key=lambda site: site.name)
        order = torch.cat([torch.arange(site.start, site.stop) for site in sites])
        rows = inverse_mass[order]
        names = tuple(site.name for site in sites)
        return {names: rows if inverse_mass.dim() == 1 else rows[:, order]}

    @property
    def settings(self) -> dict[str, Any]:
        """How the kernel is set up, in plain values."""
        return {
            "kernel": type(self).__name__,
            "model": repr(self.model) if isinstance(self.model, MarginalModel) else "",
            "target_accept_prob": self.target_accept_prob,
            "full_mass": self.full_mass,
            "jit_compile": self.jit_compile,
        }

    def _running(self) -> tuple[WarmUp, Transition]:
        if self._warmup is None or self._transition is None:
            raise RuntimeError("the kernel has not been set up: run it first")
        return self._warmup, self._transition

    def _new_warmup(
        self,
        tuning: Tuning,
        warmup_steps: int,
        *,
        adapt_step_size: bool = True,
        adapt_mass: bool = True,
    ) -> WarmUp:
        """One that adapts what the kernel may, unless told to leave it."""
        return WarmUp(
            tuning.step_size,
            tuning.kinetic,
            warmup_steps,
            target=self.target_accept_prob,
            adapt_step_size=adapt_step_size and self.adapt_step_size,
            adapt_mass=adapt_mass and self.adapt_mass_matrix,
        )

    def _first_kinetic(self, potential: Potential) -> GaussianKinetic:
        dimension, given = potential.dimension, self._first_inverse_mass
        if isinstance(self.full_mass, bool):
            dense = self.full_mass
        elif given is not None:
            dense = given.dim() == 2
        else:
            dense = dimension <= _LARGEST_DENSE
        if given is None:
            ones = potential.example.new_ones(dimension)
            return GaussianKinetic(torch.diag(ones) if dense else ones)
        expected = (dimension, dimension) if dense else (dimension,)
        if tuple(given.shape) != expected:
            raise ValueError(
                f"`inverse_mass_matrix` has shape {tuple(given.shape)}: expected {expected}"
            )
        return GaussianKinetic(given.to(potential.example))

    def _reasonable_step_size(self, state: State) -> float:
        """Doubles or halves the step size until single steps are accepted about as wanted."""
        warmup, transition = self._running()
        tuning = warmup.tuning
        size = tuning.step_size

        def rate(size: float) -> float:
            info = transition.step(state, tuning._replace(step_size=size), 1)[1]
            return float(info.acceptance_rate.mean())

        growing = rate(size) > self.target_accept_prob
        for _ in range(30):
            trial = 2.0 * size if growing else 0.5 * size
            if growing and (trial > 2.0 or rate(trial) <= self.target_accept_prob):
                return size
            size = trial
            if not growing and rate(size) > self.target_accept_prob:
                return size
        return size

    def prepare(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> Potential:
        """Captures the model, unless it is captured already and has not changed since."""
        self._pilot: dict[str, Tensor] | None = None
        if self.separate_noise and isinstance(self.model, MarginalModel):
            self.model.plan(*args, **kwargs)  # finds faults of the sites, settles the proposal
            if initial_params is None or self.model.proposal == "laplace":
                start = None
                if initial_params is not None:
                    start = {name: value.mean(0) for name, value in initial_params.items()}
                self._pilot = self.model.pilot(args, kwargs, start)
        old = self._potential
        if old is not None and same_arguments((old.args, old.kwargs), (args, kwargs)):
            if old.is_current():
                return old
        self._potential = Potential(
            self.model,
            args,
            kwargs,
            separate_noise=self.separate_noise,
            compile_graphs=self.jit_compile,
        )
        return self._potential

    def _start(
        self, potential: Potential, num_chains: int, initial_params: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if initial_params is None:
            if self._pilot is None:
                return find_start(potential, num_chains)
            centre = potential.flatten(self._pilot)
            return find_start(potential, num_chains, centre, _PILOT_RADIUS)
        position = potential.ravel(initial_params, num_chains)
        return find_start(potential, num_chains, position, 0.0)

    # --- one chain at a time: Pyro's runner -----------------------------------------------------

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Prepares one chain; called by :class:`pyro.infer.MCMC`."""
        initial = self._initial_params
        chains_first = None if initial is None else {n: v[None] for n, v in initial.items()}
        self._record = Record()
        self._state = self.begin(1, warmup_steps, args, kwargs, chains_first)
        self._returned = self._params(self._state)

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Unconstrained values that the chain starts from."""
        if self._state is not None:
            return self._params(self._state)
        return dict(self._initial_params or {})

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor] | None) -> None:
        self._initial_params = params
        self._state = None

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One iteration of one chain; unconstrained values in and out."""
        state = self._state
        if state is None:
            raise RuntimeError("the kernel has not been set up: call `setup` first")
        if self._returned is not None and any(
            params[name] is not value and not torch.equal(params[name], value)
            for name, value in self._returned.items()
        ):
            position = self.potential.ravel({n: v[None] for n, v in params.items()}, 1)
            state = self._running()[1].begin(position, state.noise)
        warming = not self._running()[0].finished
        self._state, info = self.advance(state)
        self._last = info
        if not warming:
            self._record.append(self._state, info, self.step_size)
        self._returned = self._params(self._state)
        return self._returned

    def _params(self, state: State) -> dict[str, Tensor]:
        return {n: v[0] for n, v in self.potential.unravel(state.position).items()}

    @property
    def transforms(self) -> dict[str, Any]:
        """From each site's support to the real line."""
        if self._potential is None:
            return None  # type: ignore[return-value]  # Pyro's runner then calls `setup`
        return {site.name: site.transform.inv for site in self._potential.sites}

    def logging(self) -> dict[str, str] | None:
        """What Pyro's progress bar shows."""
        return None if self._last is None else self.progress(self._last, self._record)

    def diagnostics(self) -> dict[str, Any]:
        """Divergences, acceptance rate, and the whole record of the chain."""
        stats = self._record.stats
        divergences = [i for i, d in enumerate(stats.get("diverging", [])) if bool(d)]
        rates = stats.get("acceptance_rate", [])
        return {
            "divergences": divergences,
            "acceptance rate": float(torch.cat(rates).mean()) if rates else math.nan,
            "record": self._record,
        }

    def cleanup(self) -> None:
        """Forgets the chain, keeps what the model's capture and the tuning found."""
        self._initial_params = None
        self._state = None
        self._returned = None

    def __getstate__(self) -> dict[str, Any]:
        """Graphs and compiled programs stay in the process that made them."""
        state = self.__dict__.copy()
        return state | {
            "_potential": None,
            "_transition": None,
            "_warmup": None,
            "_state": None,
            "_returned": None,
        }
