"""What kernels are: a model, joined to transitions and phases; for our runner and for Pyro's.

Our runner moves all chains of a kernel at once (:meth:`Kernel.begin`, :meth:`Kernel.advance`);
Pyro's moves one chain (:class:`~pyro_hamflow.mcmc.kernels.pyro_face.PyroFace`). Both take the same
path. A kernel of one's own needs a transition, here of random-walk Metropolis:

    >>> class Walk:
    ...     def __init__(self, target):
    ...         self.target = target
    ...
    ...     def state_at(self, position, noise):
    ...         evaluation = self.target.evaluate(position, noise)
    ...         return State(position, noise, torch.zeros_like(position), evaluation)
    ...
    ...     def step(self, state):
    ...         proposed = state.position + torch.randn_like(state.position)
    ...         there = self.state_at(proposed, state.noise)
    ...         error = (there.evaluation.value - state.evaluation.value).double()
    ...         decision = metropolis_of_point(error, draw_uniform(len(error), error.device))
    ...         moved = select_state(decision.accepted, there, state)
    ...         energy = moved.evaluation.value.double()
    ...         return moved, Info(*decision, energy, n_steps=0, n_gradients=0, n_densities=1)
    >>> class RandomWalk(Kernel):
    ...     def make_transition(self, potential, position):
    ...         return Walk(potential)
    >>> def model():
    ...     pyro.sample("x", dist.Normal(0.0, 1.0))
    >>> mcmc = MCMC(RandomWalk(ModelTarget(model)), 50, num_chains=2, disable_progbar=True)
    >>> mcmc.run()
    >>> mcmc.get_samples()["x"].shape
    torch.Size([100])
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.marginal.other_modes import told_of_modes
from pyro_hamflow.mcmc.adaptation import surrogate
from pyro_hamflow.mcmc.adaptation.base import Moves, Phase, RunPlan, Sample
from pyro_hamflow.mcmc.adaptation.engine import Engine
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.mass import Adapter
from pyro_hamflow.mcmc.adaptation.surrogate_moves import AlongSurrogate
from pyro_hamflow.mcmc.adaptation.surrogate_run import SurrogateChoices, SurrogateRun
from pyro_hamflow.mcmc.adaptation.transport import Transporting
from pyro_hamflow.mcmc.adaptation.tune import Tune
from pyro_hamflow.mcmc.adaptation.verdict import SurrogateReport
from pyro_hamflow.mcmc.adaptation.window import Findings
from pyro_hamflow.mcmc.draws import Draws, Record
from pyro_hamflow.mcmc.kernels.pyro_face import PyroFace
from pyro_hamflow.mcmc.transitions.base import Info, State, padded
from pyro_hamflow.model.blind_gradients import warn_of_blind_gradient
from pyro_hamflow.model.kinds import Args, Kwargs, Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.transported import Transport, TransportedTarget
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.engines.choice import Choice
from pyro_hamflow.surrogates.potential_network import PotentialNetwork


class Kernel(PyroFace):
    """A model joined to a transition and, if anything is tuned, to phases that tune it.

    Arguments:
        source: The model.
        hamiltonian: How trajectories end and what is tuned of them, if moves are Hamiltonian.
        choices: How a learned energy is followed, if one is.
        transporting: How moves are transported, if they are.
        engine: What makes the draws: ``"torch"``; ``"native"``, machine code, each chain for
            itself; or ``"auto"``, the latter where it can and pays.

    Attributes:
        planned_draws: How many draws of each chain follow, where the runner tells.
        most_warmup_steps: How many iterations of warm-up there may be, likewise.
        hides_progress: Whether what precedes iterations shows no progress, likewise.
        pools_warmup: Whether warm-up waits for what that of other chains has found, likewise.
        plan: What the latest run was to be.
        made_of: The arguments that it was made of, and the keyword arguments.
    """

    made_of: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        made.made_of = args, kwargs
        return made

    def __init__(
        self,
        source: ModelTarget,
        hamiltonian: Hamiltonian | None = None,
        choices: SurrogateChoices | None = None,
        transporting: Transporting | None = None,
        engine: str = "torch",
    ) -> None:
        super().__init__()
        self.engine = engine
        self._engine = Engine(engine)
        self.source = source
        self.choices = choices
        self._transporting = transporting
        self._hamiltonian = hamiltonian
        self._surrogate_run: SurrogateRun | None = None
        self.planned_draws: int | None = None
        self.most_warmup_steps: int | None = None
        self.hides_progress = True
        self.pools_warmup = False
        self.plan = RunPlan(type(self).__name__, 1, 0)
        self._phase: Phase | None = None

    # --- what a kernel of one's own defines -------------------------------------------------------

    def make_transition(self, potential: Potential, position: Tensor) -> Any:
        """The move of chains that start at given positions.

        Its ``step`` takes a state alone where nothing is tuned; where moves are Hamiltonian, it is
        a :class:`~pyro_hamflow.mcmc.transitions.base.Transition`.
        """
        moves = self.hamiltonian
        if moves.estimator is not None:
            return moves.estimator.transition(potential, position)
        steps = moves.trajectories.expected_steps(potential.dimension)
        if self._engine.is_native(potential, position, self.plan, steps):
            return moves.trajectories.native_transition(potential)
        return moves.trajectories.parameter_transition(potential, len(position))

    def first_phase(self, position: Tensor, noise: Tensor) -> tuple[Phase, State]:
        """The phase that a run begins with, and its first state."""
        if self._surrogate_run is not None:
            return surrogate.first_phase(self._surrogate_run, position, noise)
        if self._transporting is not None:
            if self.engine != "torch":
                asked = self.engine == "native"
                under_map = Choice("torch", "moves are made under a map", declined=asked)
                self._engine.take(under_map, self.plan)
            return self._transporting.first_phase(
                self.potential, self.hamiltonian, self.plan, position, noise
            )
        transition = self.make_transition(self.potential, position)
        if self._hamiltonian is not None:
            return self._hamiltonian.first_phase(
                self.potential, transition, self.plan, position, noise, pools=self.plan.pools
            )
        return Sample(transition, transition.step), transition.state_at(position, noise)

    def start(
        self, num_chains: int, initial_params: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Where chains start, and their noise."""
        if self._surrogate_run is not None:
            return surrogate.start(self._surrogate_run, num_chains, initial_params)
        if self._transporting is not None:
            return self._transporting.start(self.source, num_chains, initial_params)
        return self.source.start(num_chains, initial_params)

    @property
    def settings(self) -> dict[str, Any]:
        """How the kernel is set up, in plain values."""
        return {
            "kernel": type(self).__name__,
            "model": repr(self.model) if isinstance(self.model, MarginalModel) else "",
            "jit_compile": self.source.jit_compile,
            "engine": self._engine.chosen.name,
            "engine_reason": self._engine.chosen.reason,
            **({} if self._hamiltonian is None else self._hamiltonian.settings),
            **({} if self._surrogate_run is None else self._surrogate_run.settings),
            **({} if self._transporting is None else self._transporting.settings),
        }

    # --- all chains at once: our runner -----------------------------------------------------------

    def begin(
        self,
        num_chains: int,
        warmup_steps: int,
        args: Args = (),
        kwargs: Kwargs | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Prepares a run: captures the model, finds starting points, makes the first phase.

        Arguments:
            num_chains: How many chains to move at once.
            warmup_steps: How many iterations to tune for.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
            initial_params: Unconstrained starting values, chains first.

        Returns:
            The first state.
        """
        self.plan = RunPlan(
            type(self).__name__,
            num_chains,
            warmup_steps,
            self.most_warmup_steps,
            self.planned_draws,
            hidden=self.hides_progress,
            pools=self.pools_warmup,
        )
        estimator = None if self._hamiltonian is None else self._hamiltonian.estimator
        if estimator is not None:
            estimator.start_over(self.source, self.plan, self._engine)
        with random_state_kept():  # so that a run repeats itself, captured already or not
            self.prepare(args, dict(kwargs or {}), initial_params)
        if self.choices is not None:
            self._surrogate_run = SurrogateRun(
                self.choices, self.hamiltonian, self.source, self.plan, self._engine
            )
        position, noise = self.start(num_chains, initial_params)
        if self._hamiltonian is not None and self._hamiltonian.trajectories.kind == "gradient":
            warn_of_blind_gradient(self.potential, position, noise)
        self._phase, state = self.first_phase(position, noise)
        if estimator is not None:
            estimator.tell_of_pilot()
        if self.source.other_modes:
            self.plan.say(told_of_modes(self.source.other_modes))
        return self._followed(state)

    def prepare(
        self,
        args: Args,
        kwargs: dict[str, Any],
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> Potential:
        """Captures the model, unless it is captured already and has not changed since."""
        return self.source.prepare(args, kwargs, initial_params)

    def advance(self, state: State) -> tuple[State, Info]:
        """One iteration of all chains; tunes while warm-up lasts."""
        state, info = self.phase.advance(state)
        return self._followed(state), info if self.choices is None else padded(info)

    def advance_many(self, state: State, most: int) -> tuple[State, Info, Draws] | None:
        """Up to so many draws in one call, with the last state; none where there are none.

        Arguments:
            state: Where chains are.
            most: How many there may be.
        """
        moves = self.phase.advance
        found = moves.many(state, most) if isinstance(moves, Moves | AlongSurrogate) else None
        if found is None:
            return None
        state, block = found
        draws = Draws.of_block(block, self.step_size)
        return state, block.info, draws

    @property
    def can_pool(self) -> bool:
        """Whether warm-up finds nothing but what it can share: step size and mass."""
        return self._hamiltonian is not None and not (self.choices or self._transporting)

    def share(self, state: State) -> Findings | None:
        """What is to be joined with what others have found; none if none of it is awaited."""
        return self.phase.share(state) if isinstance(self.phase, Tune) else None

    def take_in(self, findings: Findings, state: State) -> State:
        """Goes on with what all have found together."""
        assert isinstance(self.phase, Tune)
        return self._followed(self.phase.take_in(findings, state))

    def _followed(self, state: State) -> State:
        """The state to go on from: of the next phase, if this one is over."""
        following = self.phase.successor(state)
        if following is None:
            return state
        self._phase, state = following
        return self._followed(state)

    def moved_to(self, position: Tensor, noise: Tensor) -> State:
        target = self.phase.transition.target
        if isinstance(target, TransportedTarget):
            position = target.coordinates(position)
        return self.phase.transition.state_at(position, noise)

    def shown(self, state: State) -> State:
        """A state in the model's own coordinates, where it is moved in those of a map."""
        target = self.phase.transition.target
        if not isinstance(target, TransportedTarget):
            return state
        position, log_volume = target.positions(state.position)
        found = state.evaluation._replace(value=state.evaluation.value + log_volume)
        return state._replace(position=position, evaluation=found)

    @property
    def phase(self) -> Phase:
        """The present phase of the run."""
        if self._phase is None:
            raise RuntimeError("the kernel has not been set up: run it first")
        return self._phase

    @property
    def warming(self) -> bool:
        return self.phase.adapting

    @property
    def warmup_left(self) -> int:
        """How many iterations of warm-up are still to come, as far as is known."""
        return self.phase.remaining

    @property
    def messages(self) -> list[str]:
        """What the user is to be told of the latest run, in a sentence each."""
        return self.plan.messages

    def progress(self, info: Info, record: Record) -> dict[str, str]:
        """What a progress bar shows: the step size, recent acceptance, divergences so far."""
        size = self.step_size
        rates = record.stats.get("acceptance_rate", [])[-100:] or [info.acceptance_rate]
        shown = {} if size is None else {"step size": f"{size:.2e}"}
        return shown | {
            "acc. prob": f"{float(torch.cat(rates).mean()):.3f}",
            "divergences": str(record.divergences),
        }

    # --- what is known of model and moves ---------------------------------------------------------

    @property
    def model(self) -> Model | None:
        """The Pyro model, if that is what was given."""
        return self.source.model

    @property
    def potential(self) -> Potential:
        """The target of the latest run."""
        return self.source.potential

    def site_shapes(self, args: Args, kwargs: Kwargs) -> dict[str, Any]:
        """The shape of each site on the real line."""
        return {site.name: site.shape for site in self.prepare(args, dict(kwargs)).sites}

    @property
    def step_size(self) -> float | None:
        """The current step size; none of a kernel that takes no steps."""
        tuning = self.phase.tuning
        return None if tuning is None else tuning.step_size

    @property
    def hamiltonian(self) -> Hamiltonian:
        """How trajectories end and what is tuned of them."""
        if self._hamiltonian is None:
            raise AttributeError(f"{type(self).__name__} takes no steps, and has no mass")
        return self._hamiltonian

    @property
    def explored(self) -> Tensor | None:
        """Draws about from the posterior, found before chains began; none where they began at once.

        Of shape ``(places, dimension)``.
        """
        return None

    @property
    def surrogate(self) -> PotentialNetwork | None:
        """The network that the latest run learned or was given; none if it followed none."""
        return None if self._surrogate_run is None else self._surrogate_run.surrogate

    @property
    def transport(self) -> Transport | None:
        """The map in whose coordinates moves are made; none if they are plain ones."""
        target = self.phase.transition.target
        return target.transport if isinstance(target, TransportedTarget) else None

    @property
    def report(self) -> SurrogateReport:
        """What it took to learn the network, and what it is good for."""
        if self._surrogate_run is None:
            raise AttributeError(f"{type(self).__name__} has followed no learned energy yet")
        return self._surrogate_run.report

    @property
    def kinetic(self) -> GaussianKinetic:
        """The current kinetic energy, of flat momenta."""
        tuning = self.phase.tuning
        if tuning is None:
            raise AttributeError(f"{type(self).__name__} takes no steps, and has no mass")
        return tuning.kinetic

    @property
    def inverse_mass_matrix(self) -> dict[tuple[str, ...], Tensor]:
        """The current inverse mass in Pyro's form: tuples of names of sites, and their block.

        A vector is the diagonal of one. Sites that no tuple of ``full_mass`` names are together, in
        the order of their names. Under a map (:attr:`transport` is not none) it is the inverse mass
        of the map's coordinates: the numbers at a site's places are not of its own scale, for a map
        may mix sites.
        """
        form = self.hamiltonian.step_and_mass.form(self.potential)
        return form.by_name(self.kinetic.inverse_mass)

    @property
    def mass_matrix_adapter(self) -> Adapter:
        """The current mass in an object of Pyro's, to be read.

        Set to an :class:`~pyro.infer.mcmc.adaptation.ArrowheadMassMatrix` before a run, it gives
        the mass that structure; warm-up estimates it in its own way.
        """
        step_and_mass = self.hamiltonian.step_and_mass
        if self._phase is None:
            return step_and_mass.empty_adapter()
        return step_and_mass.filled_adapter(self.potential, self.kinetic.inverse_mass)

    @mass_matrix_adapter.setter
    def mass_matrix_adapter(self, adapter: Adapter) -> None:
        self.hamiltonian.step_and_mass.take_adapter(adapter)

    @property
    def transforms(self) -> dict[str, Any] | None:
        """Maps from each site's support to the real line; if none, Pyro calls ``setup`` first."""
        return self.source.transforms

    def transform_by(self, transforms: Mapping[str, Any]) -> None:
        """Takes other maps from supports to the real line, from the next run on."""
        self.source.transform_by(transforms)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs and compiled programs stay in the process that made them."""
        return self.__dict__ | {"_phase": None, "_state": None, "_returned": None}


def meaningless(name: str, *, given: bool) -> None:
    """Says that an argument of Pyro's does nothing here, if it was given."""
    if given:
        warnings.warn(
            f"`{name}` has no meaning in pyro_hamflow, and is not used", UserWarning, stacklevel=4
        )
