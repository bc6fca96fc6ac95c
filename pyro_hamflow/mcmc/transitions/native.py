"""The same trajectories in machine code, each chain for itself: many draws in one call."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.mcmc.transitions.base import Block, Info, State, Tuning
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target
from pyro_hamflow.programs.engines import calls
from pyro_hamflow.programs.engines.buffers import NotSupported
from pyro_hamflow.programs.engines.calls import Motion, NoiseMoves, Place, Request
from pyro_hamflow.programs.engines.native import Looks, native_program
from pyro_hamflow.programs.made import Made
from pyro_hamflow.surrogates.targets import SurrogateDensity

_SEEDS = 2**62  # of which one is drawn
_CALL = 0.1  # seconds that a call should last, so that progress is seen and keys are heard
_GROWTH = 64  # by which calls become longer at most, from one to the next
_WORTH_THREADS = 1e-3  # seconds, for which it is worth to start threads


class Stream:
    """Random numbers of a run: with what they are seeded, and how far it has come.

    Attributes:
        seed: From torch's random state, if not given.
        num_draws: How many draws were made.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = int(torch.randint(_SEEDS, (), device="cpu")) if seed is None else seed
        self.num_draws = 0


class NativeMoves:
    """Draws in calls of machine code, which make many of every chain.

    Random numbers are functions of a seed, the chain and the number of its draw, so that draws
    depend neither on threads nor on how calls are cut.

    Arguments:
        target: The target.
        kind: Of the gradient that trajectories follow: in the position, or in the noise as well;
            ``"value"`` where chains walk at random.
        max_tree_depth: The most doublings of a trajectory; none where trajectories have lengths.
        stream: The random numbers.
        looks: What the model says beside its potential, where noise moves.
        moves: How noise moves then.

    Raises:
        NotSupported: If there is no machine code for the target.
    """

    def __init__(
        self,
        target: Potential | SurrogateDensity,
        kind: str,
        max_tree_depth: int | None,
        stream: Stream,
        looks: Looks | None = None,
        moves: NoiseMoves | None = None,
    ) -> None:
        self.walks = kind == "value"
        graph = _graph_of(target, "gradient" if self.walks else kind)
        if graph is None:
            raise NotSupported("a model that is not captured")
        self.target: Target = target
        examples = [part[0] for part in target.vectors(1)]
        self.program = native_program(graph, examples, looks, gradient=not self.walks)
        self.max_tree_depth = max_tree_depth
        self.stream = stream
        self.moves = moves
        self.most_steps = 2 ** (max_tree_depth or 0) - 1
        self._last_call = 0.0
        self._size = 1

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        moved, made = self.draw(state, tuning, [num_steps])
        return moved, self.info(made.at(0))

    def draw(
        self, state: State, tuning: Tuning, num_steps: list[int], **given: Tensor
    ) -> tuple[State, calls.Made]:
        """Makes draws from a state on; arguments are those of :meth:`call`."""
        raise NotImplementedError

    def block(self, state: State, tuning: Tuning, num_steps: list[int]) -> tuple[State, Block]:
        """As many draws as numbers of steps, with all that is kept of them."""
        raise NotImplementedError

    def call(
        self, place: Place, tuning: Tuning, num_steps: list[int], **given: Tensor
    ) -> calls.Made:
        """Makes draws of every chain, one after the other, and moves on where chains are.

        Arguments:
            place: Where chains are.
            tuning: What their moves are tuned to.
            num_steps: For each draw, how many steps trajectories take, or may take at most.
            given: Numbers in place of random ones, as a
                :class:`~pyro_hamflow.programs.engines.calls.Request` has them.
        """
        began = time.perf_counter()
        turning = self.max_tree_depth is not None
        most = [min(number, self.most_steps) for number in num_steps] if turning else num_steps
        straight = Motion.WALK if self.walks else Motion.STRAIGHT
        request = Request(
            root=tuning.kinetic.root,
            step_sizes=tuning.step_sizes(place.position),
            num_steps=torch.tensor(most, dtype=torch.long, device="cpu"),
            motion=Motion.DOUBLING if turning else straight,
            slots=1 + (self.max_tree_depth or 0),
            seed=self.stream.seed,
            first_draw=self.stream.num_draws,
            threads=torch.get_num_threads() if self._last_call > _WORTH_THREADS else 1,
            moves=self.moves,
            **given,
        )
        made = self.program.draw(place, request)
        self.stream.num_draws += len(num_steps)
        self._last_call = time.perf_counter() - began
        self._size = len(num_steps)
        return made

    def draws_at_once(self) -> int:
        """How many draws the next call should make; they do not depend on it."""
        return draws_within(self._size, self._last_call)

    def info(self, made: calls.Made) -> Info:
        """The statistics of draws, of the shape of their parts."""
        further: dict[str, Any] = {}
        if self.max_tree_depth is not None:
            depth = torch.log2(made.n_steps.double() + 1.0).ceil()
            cut = made.limited & (made.n_steps == self.most_steps)
            further = {"tree_depth": depth.long(), "reached_max_treedepth": cut}
        return Info(
            accepted=made.accepted,
            acceptance_rate=made.rate,
            energy_error=made.error,
            diverging=made.diverging,
            energy=made.energy,
            n_steps=made.n_steps,
            n_gradients=made.n_steps,
            n_densities=made.n_densities,
            further=further,
        )


def draws_within(size: int, seconds: float) -> int:
    """How many draws a call should make, by how long the latest took for how many."""
    return max(1, min(_GROWTH * size, int(size * _CALL / max(seconds, 1e-6))))


def _graph_of(target: Potential | SurrogateDensity, kind: str) -> GraphModule | None:
    """One chain's potential and gradient, if they are captured."""
    if isinstance(target, SurrogateDensity):
        return target.chain_graph()
    return target.programs.base(kind)


class NativeTransition(NativeMoves, Made):
    """Moves parameters along trajectories in machine code, the noise of an estimate held.

    Moves are those of :class:`~pyro_hamflow.mcmc.transitions.hmc.HMCTransition`, :class:`~
    pyro_hamflow.mcmc.transitions.nuts.NUTSTransition` or :class:`~pyro_hamflow.mcmc.transitions.
    random_walk.RandomWalkTransition`: given the same momenta, or steps, and uniform numbers they
    are the same to rounding. Of a learned density the network's weights are data: one library
    serves all networks of the same sizes, whatever the model and however often they are fitted.

    Arguments:
        target: The target, whose gradient is captured, or a learned one.
        max_tree_depth: The most doublings of a trajectory; none where trajectories have lengths.
        stream: The random numbers, which several transitions may share.
        kind: As in :class:`NativeMoves`.

    Invariant:
        The density exp(-U(z, u)) of the positions at their noise, exactly.

    References:
        | Parallel random numbers: as easy as 1, 2, 3 (Salmon et al., 2011)
        | https://doi.org/10.1145/2063384.2063405
    """

    def __init__(
        self,
        target: Potential | SurrogateDensity,
        max_tree_depth: int | None,
        stream: Stream,
        kind: str = "gradient",
    ) -> None:
        super().__init__(target, kind, max_tree_depth, stream)

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        value, gradient = self.program.gradient(position, noise)
        return State(position, noise, gradient, Evaluation(value, {}, {}))

    def draw(
        self, state: State, tuning: Tuning, num_steps: list[int], **given: Tensor
    ) -> tuple[State, calls.Made]:
        value = state.evaluation.value
        place = self.program.place(state.position, state.noise, value, state.gradient)
        made = self.call(place, tuning, num_steps, **given)
        evaluation = Evaluation(place.value, {}, {})
        return State(place.position, state.noise, place.gradient, evaluation), made

    def several(
        self, state: State, tuning: Tuning, num_steps: int, count: int
    ) -> tuple[State, Info, Tensor]:
        """So many moves, one after the other; what happened in the last; the steps of all."""
        moved, made = self.draw(state, tuning, [num_steps] * count)
        return moved, self.info(made.at(-1)), made.n_steps.sum(1)

    def block(self, state: State, tuning: Tuning, num_steps: list[int]) -> tuple[State, Block]:
        moved, made = self.draw(state, tuning, num_steps)
        return moved, Block(made.positions, made.values, self.info(made))
