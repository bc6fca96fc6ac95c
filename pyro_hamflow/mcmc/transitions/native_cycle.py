"""Moves in machine code and jumps of a flow, in turn: many draws in one call.

Proposals of a flow do not depend on where chains are. Those of many jumps are drawn, evaluated and
weighed together, and what remains for each draw is a local move, the flow's density where it ends,
both in machine code, and one comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_hamflow.mcmc.transitions.base import (
    Block,
    Info,
    State,
    Transition,
    Tuning,
    metropolis_of_point,
    select,
)
from pyro_hamflow.mcmc.transitions.independence import (
    IndependenceTransition,
    log_weight,
    pick_by_weight,
)
from pyro_hamflow.mcmc.transitions.mixture import CycleTransition, beginning, followed_by
from pyro_hamflow.mcmc.transitions.native import NativeMoves, NativeTransition, draws_within
from pyro_hamflow.model.guides import DensityGuide, draw_from, log_ratio_at
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target
from pyro_hamflow.process import undisturbed
from pyro_hamflow.programs.capture import ELEMENTS, capture
from pyro_hamflow.programs.engines.buffers import NotSupported
from pyro_hamflow.programs.engines.native import NativeProgram, native_program
from pyro_hamflow.programs.failures import first_line
from pyro_hamflow.programs.made import Made
from pyro_hamflow.programs.validation import no_validation

_ROWS = 4096  # of proposals made together
_TRIED = 64  # draws, at which both ways to a flow's density are compared
_WORTH_CODE = 500  # draws, from which on code of a flow's density is worth the time it takes
_SEEDS = 2**32  # that random states may be set to
_TOLERANCE = 1e-6  # of densities in double precision


class Pool(NamedTuple):
    """The proposals of many jumps, one of each already picked by the weights; moves first.

    Attributes:
        position: Of shape ``(moves, chains, dimension)``.
        value: The potential there, ``(moves, chains)``.
        gradient: Its gradient, like the position.
        others: The log sum of the weights of the proposals that were not picked.
        all: The same of all of them.
        uniform: For the test of each jump.
    """

    position: Tensor
    value: Tensor
    gradient: Tensor
    others: Tensor
    all: Tensor
    uniform: Tensor


class NativeCycle(Made):
    """Makes a local move in machine code, and then a jump: as a cycle of both does.

    The jumps are those of :class:`~pyro_hamflow.mcmc.transitions.independence.
    IndependenceTransition`. Each proposal serves one jump. All random numbers follow from the seed
    of the local move's stream and the number of the draw, so that draws do not depend on how many
    are made in a call.

    Arguments:
        local: The local move.
        guide: What makes the jumps, trained no further.
        num_proposals: How many proposals are made for each chain and jump.

    Invariant:
        The density exp(-U(z)) of the positions, exactly, for any guide that stays the same.

    Raises:
        NotSupported: If there is no machine code for the guide's density, or it is not a function
            of the position alone.

    References:
        | Particle Markov chain Monte Carlo methods (Andrieu, Doucet, Holenstein, 2010), 2.4.2, for
          iterated sampling importance resampling
        | https://doi.org/10.1111/j.1467-9868.2009.00736.x
    """

    def __init__(self, local: NativeTransition, guide: DensityGuide, num_proposals: int) -> None:
        if not isinstance(local.target, Potential):
            raise NotSupported("a learned density")
        self.target: Target = local.target
        self._potential = local.target
        self.local, self.guide, self.num_proposals = local, guide, num_proposals
        self._density = _density_of(guide, local.target, local.stream.seed)
        self._known: tuple[tuple[int, int], Pool] | None = None
        self._size, self._seconds = 1, 0.0  # of the latest call

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        return self.local.state_at(position, noise)

    def draws_at_once(self) -> int:
        """How many draws the next call should make; they do not depend on it."""
        return draws_within(self._size, self._seconds)

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        number = self.local.stream.num_draws
        moved, info = self.local.step(state, tuning, num_steps)
        return self._jump(number, moved, info)

    def block(self, state: State, tuning: Tuning, num_steps: list[int]) -> tuple[State, Block]:
        """As many draws as numbers of steps, with all that is kept of them."""
        began, made = time.perf_counter(), []
        for number in num_steps:
            state, info = self.step(state, tuning, number)
            made.append((state.position, state.evaluation.value, info))
        positions, values, infos = zip(*made, strict=True)
        info = tree_map(lambda *parts: torch.stack(parts, 1), *infos)
        self._size, self._seconds = len(num_steps), time.perf_counter() - began
        return state, Block(torch.stack(positions, 1), torch.stack(values, 1), info)

    def _jump(self, number: int, state: State, info: Info) -> tuple[State, Info]:
        """The jump of a draw by its number; gradients are those of where chains end."""
        old = state.evaluation.value
        here = self._log_weights(state.position, state.noise, old, refused=torch.inf)
        to = self._proposals(number, state)
        error = torch.logaddexp(to.others, here) - to.all
        accepted, rate, error, diverging = metropolis_of_point(error, to.uniform)
        value = select(accepted, to.value, old)
        moved = State(
            select(accepted, to.position, state.position),
            state.noise,
            select(accepted, to.gradient, state.gradient),
            Evaluation(value, {}, {}),
        )
        # Of each proposal the energy comes with its gradient, but for walkers that follow none.
        walks, count = self.local.walks, self.num_proposals
        jump = Info(
            accepted=accepted,
            acceptance_rate=rate,
            energy_error=error,
            diverging=diverging,
            energy=value,
            n_steps=0,
            n_gradients=0 if walks else count,
            n_densities=count if walks else 0,
        )
        return moved, followed_by(beginning("local", info), "global", jump, value.double() - old)

    def _log_weights(
        self, position: Tensor, noise: Tensor, value: Tensor, *, refused: float
    ) -> Tensor:
        """Logarithms of importance weights, up to a constant.

        Arguments:
            position: Where, of shape ``(rows, dimension)``.
            noise: None of it, of shape ``(rows, 0)``.
            value: The potential there.
            refused: What stands where the flow's density is no finite number.
        """
        log_ratio, _ = self._density.gradient(position, noise)
        found = log_weight(value, log_ratio)
        return found.masked_fill(~log_ratio.isfinite(), refused)

    def _proposals(self, number: int, state: State) -> Pool:
        """The proposals of a draw by its number, one pool after the other."""
        chains, dimension = state.position.shape
        most = min(_ROWS, ELEMENTS // dimension)
        moves = max(1, most // (chains * self.num_proposals))
        key = number // moves, chains
        if self._known is None or self._known[0] != key:
            with undisturbed((self.local.stream.seed + key[0]) % _SEEDS), torch.no_grad():
                self._known = key, self._pool(moves, chains)
        return Pool(*(part[number % moves] for part in self._known[1]))

    def _pool(self, moves: int, chains: int) -> Pool:
        """Proposals of so many jumps of each chain."""
        shape = moves, chains, self.num_proposals
        position, _ = draw_from(self.guide, self._potential, moves * chains * self.num_proposals)
        state = self.local.state_at(position, position[:, :0])
        value = state.evaluation.value
        weights = self._log_weights(position, state.noise, value, refused=-torch.inf)
        weights = weights.masked_fill(~weights.isfinite(), -torch.inf).reshape(shape)
        pick = pick_by_weight(weights)[..., None]

        def picked(part: Tensor) -> Tensor:
            rows = part.reshape(*shape, *part.shape[1:])
            where = pick.reshape(*pick.shape, *(1,) * (part.dim() - 1))
            return rows.take_along_dim(where, 2)[:, :, 0]

        return Pool(
            picked(position),
            picked(value),
            picked(state.gradient),
            weights.scatter(-1, pick, -torch.inf).logsumexp(-1),
            weights.logsumexp(-1),
            torch.rand(moves, chains, dtype=torch.float64),
        )


def beside_jumps(
    local: Transition,
    target: Potential,
    guide: DensityGuide,
    num_proposals: int,
    num_draws: int | None,
    say: Callable[[str], None] | None = None,
) -> Transition:
    """A local move and a jump in turn: in machine code, where there is some and it is worth it.

    Arguments:
        local: The local move.
        target: Its target.
        guide: What makes the jumps.
        num_proposals: How many proposals are made for each.
        num_draws: How many draws are to be made, if that is known.
        say: Tells the user why it is not machine code, where that was asked for: then it is taken
            for any number of draws.
    """
    reason = None
    if isinstance(local, NativeTransition) and (say or (num_draws or 0) >= _WORTH_CODE):
        try:
            return NativeCycle(local, guide, num_proposals)
        except NotSupported as error:
            reason = f"the native engine has no code for {error}"
    elif isinstance(local, NativeMoves):
        reason = "noise moves with the parameters"
    if say is not None and reason is not None:
        say(f"jumps are made by torch, for {reason}.")
    jumps = IndependenceTransition(target, guide, num_proposals)
    return CycleTransition({"local": local, "global": jumps})


def _density_of(guide: DensityGuide, target: Potential, seed: int) -> NativeProgram:
    """A flow's log density in machine code.

    Raises:
        NotSupported: If it cannot be captured, there is no code for it, or it disagrees.
    """

    def density(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return log_ratio_at(guide, position[None])[0], noise

    with undisturbed(seed % _SEEDS), torch.no_grad(), no_validation():
        position, _ = draw_from(guide, target, _TRIED)
        noise = position[:, :0]
        try:
            graph = capture(density, position[0], noise[0])
            program = native_program(graph, [position[0], noise[0]], gradient=False)
        except NotSupported:
            raise
        except Exception as error:  # whatever a guide's own code may raise while it is traced
            raise NotSupported(f"a flow's density, for {first_line(error)}") from error
        expected, (found, _) = log_ratio_at(guide, position), program.gradient(position, noise)
    tolerance = _TOLERANCE if position.dtype == torch.float64 else _TOLERANCE**0.5
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise NotSupported("a flow whose density is no function of the position alone")
    return program
