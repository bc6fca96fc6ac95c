"""What all kernels share, for our runner and for Pyro's alike.

A kernel joins a model, a transition and a warm-up. Our runner moves all chains of a kernel at once
(:meth:`HamiltonianKernel.begin` and :meth:`~HamiltonianKernel.advance`); Pyro's moves one chain, by
:class:`~pyro_hamflow.mcmc.kernels.pyro_face.SingleChain`. Both take the same path.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.mcmc.adaptation import ArrowheadMassMatrix, BlockMassMatrix
from torch import Tensor

from pyro_hamflow.checks import between, flag, positive, whole
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.mcmc.adaptation.mass import (
    Adapter,
    FullMass,
    InverseMass,
    MassForm,
    check_full_mass,
    check_inverse_mass,
    mass_form,
)
from pyro_hamflow.mcmc.adaptation.metric import first_scales
from pyro_hamflow.mcmc.adaptation.window import WarmUp
from pyro_hamflow.mcmc.draws import Record
from pyro_hamflow.mcmc.kernels.pyro_face import SingleChain
from pyro_hamflow.mcmc.transitions.base import Info, ParameterTransition, State, Transition, Tuning
from pyro_hamflow.model.function import FunctionPotential, PotentialFunction
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import Strategy, find_start

_FIRST_STEP = 0.1
_PILOT_RADIUS = 0.1
_OPENING_STEPS = 20


class HamiltonianKernel(SingleChain):
    """What the kernels share: potential, warm-up, and both faces.

    Arguments:
        model: A Pyro model.
        potential_fn: In place of a model, minus a log density of values on the real line, by the
            names of parameters; it needs ``initial_params``.
        step_size: The integrator's first step size; found by trial if not given.
        adapt_step_size: Whether warm-up tunes it.
        adapt_mass_matrix: Whether warm-up tunes the mass.
        full_mass: Whether the mass is a whole matrix, or its diagonal alone; ``"auto"`` is whole
            for up to 500 parameters, and diagonal beyond. A list of tuples of names makes the
            block of each tuple's sites dense, and all others diagonal; so does an
            :class:`~pyro.infer.mcmc.adaptation.ArrowheadMassMatrix` set as
            ``mass_matrix_adapter``, with those sites as the head.
        inverse_mass_matrix: The first one, as the kernel's property of that name gives it, or of
            shape ``(dimension,)`` or, if anything is dense, ``(dimension, dimension)`` in the
            model's order; ones if not given.
        transforms: From the support of a site to the real line, by name, where it is not to be
            the map that is registered for the support. Parameters of a ``potential_fn`` are on the
            real line: their draws are taken back by these.
        max_plate_nesting: How many dimensions, counted from the right, may be plates, where
            discrete sites are summed out; found by a run of the model if not given.
        jit_compile: Whether to compile programs to machine code, which takes tens of seconds and
            makes long runs several times faster.
        jit_options: Has no meaning here.
        ignore_jit_warnings: Has no meaning here.
        target_accept_prob: The mean acceptance probability that warm-up aims for.
        init_strategy: Where chains start, as Pyro's guides take it:
            :func:`~pyro.infer.autoguide.initialization.init_to_median` and its kin. If not given,
            near the pilot of a marginal model, and within two units around zero elsewhere.
        min_stepsize: The least step size that is tried out.
        max_stepsize: The largest.
    """

    separate_noise = False

    def __init__(
        self,
        model: Callable[..., Any] | None,
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
        jit_options: Mapping[str, Any] | None = None,
        ignore_jit_warnings: bool = False,
        target_accept_prob: float = 0.8,
        init_strategy: Strategy | None = None,
        min_stepsize: float = 1e-10,
        max_stepsize: float = 1e10,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("expected one of `model` and `potential_fn`")
        if not callable(model or potential_fn):
            name = "`potential_fn`" if model is None else "`model`"
            kind = "a function of parameters" if model is None else "a Pyro model, a callable"
            raise TypeError(f"{name} is {model or potential_fn!r}: expected {kind}")
        for name, transform in (transforms or {}).items():
            if not hasattr(transform, "log_abs_det_jacobian"):
                raise TypeError(
                    f"`transforms` of site '{name}' is {transform!r}: expected a torch Transform"
                )
        if init_strategy is not None and not callable(init_strategy):
            raise TypeError(f"`init_strategy` is {init_strategy!r}: expected a function of a site")
        if step_size is not None:
            positive("step_size", step_size)
        between("target_accept_prob", target_accept_prob, 0.0, 1.0, ends="none")
        positive("min_stepsize", min_stepsize)
        if positive("max_stepsize", max_stepsize, infinite=True) < min_stepsize:
            raise ValueError(
                f"`min_stepsize` and `max_stepsize` are {min_stepsize} and {max_stepsize}: "
                "expected positive numbers in order"
            )
        if max_plate_nesting is not None:
            whole("max_plate_nesting", max_plate_nesting, 0)
        flag("adapt_step_size", adapt_step_size)
        flag("adapt_mass_matrix", adapt_mass_matrix)
        flag("jit_compile", jit_compile)
        if inverse_mass_matrix is not None:
            check_inverse_mass(inverse_mass_matrix)
        check_full_mass(full_mass)
        meaningless("jit_options", given=jit_options is not None)
        meaningless("ignore_jit_warnings", given=ignore_jit_warnings)
        super().__init__()
        self.model = model
        self.potential_fn = potential_fn
        self.init_strategy = init_strategy
        self.max_plate_nesting = max_plate_nesting
        self.min_stepsize, self.max_stepsize = min_stepsize, max_stepsize
        self.adapt_step_size = adapt_step_size
        self.target_accept_prob = target_accept_prob
        self.full_mass = full_mass
        self.adapt_mass_matrix = adapt_mass_matrix
        self.jit_compile = jit_compile
        self._first_step_size = step_size
        self._first_inverse_mass = inverse_mass_matrix
        self._given_transforms = None if transforms is None else dict(transforms)
        self._adapter: Adapter | None = None
        self._example: dict[str, Tensor] | None = None  # of the parameters of a function
        self._potential: Potential | None = None
        self._transition: Transition | None = None
        self._warmup: WarmUp | None = None
        self.messages: list[str] = []
        self.planned_draws: int | None = None  # of each chain, where the runner tells
        self.most_warmup_steps: int | None = None  # likewise; as many as planned if not

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
        kinetic = self._first_kinetic(potential)
        if warmup_steps and self.adapt_mass_matrix and kinetic.is_identity:
            scales = first_scales(potential, position, noise)
            kinetic = GaussianKinetic(torch.diag(scales) if kinetic.is_dense else scales)
        tuning = Tuning(self._first_step_size or _FIRST_STEP, kinetic)
        most = self.most_warmup_steps if self._may_go_on() else None
        self._warmup = self._new_warmup(tuning, warmup_steps, most_steps=most)
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
            changed = warmup.update(state, info)
            if changed and not warmup.finished:
                state = self.retuned(state)
            if changed and self.adapt_step_size and not warmup.finished:
                warmup.restart(self._reasonable_step_size(state))
            if warmup.finished:
                self._tell_of_warmup(warmup)
        return state, info

    def retuned(self, state: State) -> State:
        """What a kernel tunes of its target at the end of a window of warm-up, if anything."""
        return state

    def moved_to(self, position: Tensor, noise: Tensor) -> State:
        return self._running()[1].begin(position, noise)

    @property
    def warming(self) -> bool:
        return not self._running()[0].finished

    def is_opening(self) -> bool:
        """Whether trajectories are kept short, for chains are on their way to the typical set."""
        return self._running()[0].opening

    @property
    def warmup_left(self) -> int:
        """How many iterations of warm-up are to come, as far as is known."""
        return self._running()[0].remaining

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
        """The current inverse mass in Pyro's form: tuples of names of sites, and their block.

        A vector is the diagonal of one. Sites that no tuple of ``full_mass`` names are together, in
        the order of their names.
        """
        return self._mass_form(self.potential).by_name(self.kinetic.inverse_mass)

    @property
    def mass_matrix_adapter(self) -> Adapter:
        """The current mass in an object of Pyro's, to be read.

        Set to an :class:`~pyro.infer.mcmc.adaptation.ArrowheadMassMatrix` before a run, it gives
        the mass that structure; warm-up estimates it in its own way.
        """
        adapter = copy.deepcopy(self._adapter) or BlockMassMatrix()
        if self._warmup is None:
            return adapter
        return self._mass_form(self.potential).fill(adapter, self.kinetic.inverse_mass)

    @mass_matrix_adapter.setter
    def mass_matrix_adapter(self, adapter: Adapter) -> None:
        if not isinstance(adapter, BlockMassMatrix | ArrowheadMassMatrix):
            raise TypeError(
                f"`mass_matrix_adapter` is a {type(adapter).__name__}: expected a BlockMassMatrix "
                "or an ArrowheadMassMatrix of Pyro's"
            )
        self._adapter = adapter

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
        most_steps: int | None = None,
    ) -> WarmUp:
        """One that adapts what the kernel may, unless told to leave it."""
        return WarmUp(
            tuning.step_size,
            tuning.kinetic,
            warmup_steps,
            target=self.target_accept_prob,
            adapt_step_size=adapt_step_size and self.adapt_step_size,
            adapt_mass=adapt_mass and self.adapt_mass_matrix,
            most_steps=most_steps,
            shaped=self._mass_form(self.potential).shaped,
        )

    def _mass_form(self, potential: Potential) -> MassForm:
        return mass_form(
            self.full_mass,
            potential.sites,
            arrowhead=isinstance(self._adapter, ArrowheadMassMatrix),
            given=self._first_inverse_mass,
        )

    def _may_go_on(self) -> bool:
        """Whether more warm-up than was planned could be of use."""
        return self.adapt_step_size or self.adapt_mass_matrix

    def _tell_of_warmup(self, warmup: WarmUp) -> None:
        """Says if warm-up took longer than was planned, or has not converged."""
        took = f"{type(self).__name__}: warm-up went on to {warmup.warmup_steps} iterations"
        if warmup.doubts:
            self.messages.append(
                f"{took}, its limit, and has not converged: in its last window "
                f"{' and '.join(warmup.doubts)}."
            )
        elif warmup.has_gone_on:
            self.messages.append(f"{took}, after which it had converged.")

    def _first_kinetic(self, potential: Potential) -> GaussianKinetic:
        form, given = self._mass_form(potential), self._first_inverse_mass
        if given is None:
            ones = potential.example.new_ones(potential.dimension)
            return GaussianKinetic(torch.diag(ones) if form.dense else ones)
        return GaussianKinetic(form.flat(given).to(potential.example))

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
            if not self.min_stepsize <= trial <= self.max_stepsize:
                return size
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
        if self.model is None:
            return self._prepare_function(initial_params)
        if self.separate_noise and isinstance(self.model, MarginalModel):
            self.model.plan(*args, **kwargs)  # finds faults of the sites, settles the proposal
            if initial_params is None or self.model.proposal == "laplace":
                start = None
                if initial_params is not None:
                    start = {name: value.mean(0) for name, value in initial_params.items()}
                self._pilot = self.model.pilot(args, kwargs, start)
        if self._potential is not None and self._potential.renew(args, kwargs):
            return self._potential
        self._potential = self._new_potential(args, kwargs)
        return self._potential

    def _new_potential(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Potential:
        assert self.model is not None
        return Potential(
            self.model,
            args,
            kwargs,
            separate_noise=self.separate_noise,
            compile_graphs=self.jit_compile,
            transforms=self._given_transforms,
            max_plate_nesting=self.max_plate_nesting,
        )

    def _prepare_function(self, initial_params: Mapping[str, Tensor] | None) -> Potential:
        """The same of a potential that is a function: starting values say what it is of."""
        if initial_params is not None:
            example = {name: value[0] for name, value in initial_params.items()}
            self._example = {
                name: value if value.is_floating_point() else value.to(torch.get_default_dtype())
                for name, value in example.items()
            }
        if self._example is None:
            raise ValueError(
                "`initial_params` is None: expected values to start from, as the names and shapes "
                "of the parameters of `potential_fn` are theirs"
            )
        old, shapes = self._potential, {name: v.shape for name, v in self._example.items()}
        if old is not None and {site.name: site.shape for site in old.sites} == shapes:
            if old.renew((), {}):
                return old
        assert self.potential_fn is not None
        self._potential = FunctionPotential(
            self.potential_fn,
            self._example,
            compile_graphs=self.jit_compile,
            transforms=self._given_transforms,
        )
        return self._potential

    def _start(
        self, potential: Potential, num_chains: int, initial_params: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if initial_params is None:
            if self._pilot is None or self.init_strategy is not None:
                return find_start(potential, num_chains, strategy=self.init_strategy)
            centre = potential.flatten(self._pilot)
            return find_start(potential, num_chains, centre, _PILOT_RADIUS)
        for name, value in initial_params.items():
            if not bool(torch.as_tensor(value).isfinite().all()):
                raise ValueError(
                    f"`initial_params` of site '{name}' is not finite: expected finite numbers"
                )
        position = potential.ravel(initial_params, num_chains)
        return find_start(potential, num_chains, position, 0.0)

    @property
    def transforms(self) -> dict[str, Any]:
        """From each site's support to the real line."""
        if self._potential is not None:
            return self._potential.transforms
        if self.model is None:
            return dict(self._given_transforms or {})
        return None  # type: ignore[return-value]  # Pyro's runner then calls `setup`

    def transform_by(self, transforms: Mapping[str, Any]) -> None:
        """Takes other maps from supports to the real line, from the next run on."""
        self._given_transforms = dict(transforms)
        self._potential = None

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


def meaningless(name: str, *, given: bool) -> None:
    """Says that an argument of Pyro's does nothing here, if it was given."""
    if given:
        warnings.warn(
            f"`{name}` has no meaning in pyro_hamflow, and is not used", UserWarning, stacklevel=4
        )
