"""Parameters and the noise of a likelihood estimate, moved in machine code."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import Block, Info, State, Tuning
from pyro_hamflow.mcmc.transitions.native import NativeMoves, Stream
from pyro_hamflow.mcmc.transitions.noise_refresh import (
    Blocks,
    CorrelatedRefresh,
    EllipticalSliceRefresh,
    Refresh,
    StretchRefresh,
)
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.trace import plate_shape
from pyro_hamflow.programs.engines import calls
from pyro_hamflow.programs.engines.buffers import NotSupported
from pyro_hamflow.programs.engines.calls import NoiseMoves
from pyro_hamflow.programs.engines.native import Looks
from pyro_hamflow.programs.made import Made

_REFRESHES = {CorrelatedRefresh: 1, StretchRefresh: 2, EllipticalSliceRefresh: 3}


class Parts(NamedTuple):
    """What a model says beside its potential: of one chain, in which order and of which shapes.

    Attributes:
        looks: Its evaluation as a graph.
        factors: The shape of each group's factors of the estimate.
        local: The shape of each local site.
    """

    looks: Looks
    factors: dict[str, torch.Size]
    local: dict[str, torch.Size]


def parts_of(target: Potential) -> Parts:
    """What a model says beside its potential.

    Raises:
        NotSupported: If it is not captured, or has local sites of integers.
    """
    graph = target.programs.base("evaluate")
    if graph is None:
        raise NotSupported("a model that is not captured")
    examples = [example[0] for example in target.examples("evaluate", 1)]
    value, *results = graph(*examples)
    if any(result.dtype != target.example.dtype for result in results):
        raise NotSupported("local sites of another type than the parameters")
    _, factors, local = target.recovery.evaluation(value, *results)
    is_local = [
        flag
        for estimate in target.recovery.estimates
        for flag in (False, *(True for _ in estimate.group.sites))
    ]
    sizes = [(part.numel(), flag) for part, flag in zip(results, is_local, strict=True)]
    return Parts(
        Looks(graph, examples[2], tuple(sizes)),
        {name: part.shape for name, part in factors.items()},
        {name: part.shape for name, part in local.items()},
    )


def looks_of(target: Potential, refresh: Refresh | None) -> Looks:
    """What a model says beside its potential, if there is code for the move of its noise.

    Raises:
        NotSupported: If there is none.
    """
    parts = parts_of(target)
    noise_moves(target, parts, refresh)
    return parts.looks


def noise_moves(target: Potential, parts: Parts, refresh: Refresh | None) -> NoiseMoves:
    """How the noise moves: by a refresh, or with the parameters if there is none.

    Raises:
        NotSupported: If there is no code for the refresh.
    """
    if refresh is not None and type(refresh) not in _REFRESHES:
        raise NotSupported(f"the refresh {refresh!r}")
    blocks, noise = Blocks(target), target.vectors(1)[1][0]
    of_noise, of_factors, of_local = _block_numbers(blocks, parts, len(noise))
    return NoiseMoves(
        0 if refresh is None else _REFRESHES[type(refresh)],
        of_noise,
        of_factors,
        of_local,
        factorises=bool(blocks.groups),
        blocks=len(of_factors) if blocks.groups else 1,
        along=blocks.along(noise),
        correlation=getattr(refresh, "correlation", 0.0),
        stretches=getattr(refresh, "num_stretches", 1),
    )


def _block_numbers(blocks: Blocks, parts: Parts, noise_dimension: int) -> tuple[Tensor, ...]:
    """To which block each number belongs: of the noise, of the factors, of the local sites."""
    sizes = [noise_dimension, *(parts.looks.room(local=local) for local in (False, True))]
    numbers = [torch.zeros(size, dtype=torch.long, device="cpu") for size in sizes]
    first = at = 0
    for group, site in zip(blocks.groups, blocks.sites, strict=True):
        count = group.shape.numel()
        own = first + torch.arange(count, device="cpu").reshape(group.shape)
        numbers[0][site.start : site.stop] = own[None, ..., None].expand(site.shape).reshape(-1)
        numbers[1][first : first + count] = own.reshape(-1)
        for name, event_dim in zip(group.sites, group.event_dims, strict=True):
            shape = parts.local[name]
            plates = plate_shape(group.frames, len(shape) - event_dim)
            spread = own.reshape(plates + [1] * event_dim).expand(shape).reshape(-1)
            numbers[2][at : at + len(spread)] = spread
            at += len(spread)
        first += count
    return tuple(numbers)


class NativeEstimateTransition(NativeMoves, Made):
    """Moves parameters and the noise of a likelihood estimate in machine code.

    Along joint trajectories, those of :class:`~pyro_hamflow.mcmc.transitions.pseudo_marginal.
    JointTransition` or :class:`~pyro_hamflow.mcmc.transitions.nuts.JointNUTSTransition`; or as
    :class:`~pyro_hamflow.mcmc.transitions.pseudo_marginal.ConditionalTransition` does. Given the
    same random numbers, draws are the same to rounding.

    Arguments:
        target: The target, whose gradient and evaluation are captured.
        max_tree_depth: The most doublings of a trajectory; none where trajectories have lengths.
        refresh: The move of the noise after that of the parameters; none where trajectories move
            both.
        stream: The random numbers.
        walks: Whether parameters walk at random.

    Invariant:
        The extended density of parameters and noise, exactly, for every number of particles.
    """

    def __init__(
        self,
        target: Potential,
        max_tree_depth: int | None,
        refresh: Refresh | None,
        stream: Stream,
        *,
        walks: bool = False,
    ) -> None:
        self._parts = parts_of(target)
        moves = noise_moves(target, self._parts, refresh)
        kind = "gradients" if refresh is None else "value" if walks else "gradient"
        super().__init__(target, kind, max_tree_depth, stream, self._parts.looks, moves)
        self.is_joint = refresh is None
        # Moves by a splitting keep no gradient.
        self._keeps_gradient = not walks and (refresh is not None or max_tree_depth is not None)

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        evaluation = self.target.evaluate(position, noise)
        gradient = torch.zeros_like(position)
        if self._keeps_gradient:
            gradient = self.program.gradient(position, noise)[1]
        return State(position, noise, gradient, evaluation)

    def draw(
        self, state: State, tuning: Tuning, num_steps: list[int], **given: Tensor
    ) -> tuple[State, calls.Made]:
        value, factors, local = state.evaluation
        place = self.program.place(
            state.position,
            state.noise,
            value,
            state.gradient,
            [factors[name] for name in self._parts.factors],
            [local[name] for name in self._parts.local],
        )
        if self.is_joint and self.max_tree_depth is not None:
            half_turn = int(math.pi / tuning.step_size)
            num_steps = [max(1, min(number, half_turn)) for number in num_steps]
        made = self.call(place, tuning, num_steps, **given)
        gradient = place.gradient if self._keeps_gradient else state.gradient
        evaluation = Evaluation(
            place.value,
            split_rows(place.likelihoods, self._parts.factors),
            split_rows(place.local, self._parts.local),
        )
        return State(place.position, place.noise, gradient, evaluation), made

    def block(self, state: State, tuning: Tuning, num_steps: list[int]) -> tuple[State, Block]:
        moved, made = self.draw(state, tuning, num_steps)
        estimate = made.estimate if self._parts.factors else None
        local = split_rows(made.locals, self._parts.local)
        return moved, Block(made.positions, made.values, self.info(made), local, estimate)

    def info(self, made: calls.Made) -> Info:
        info = super().info(made)
        if self.is_joint:
            return info
        count = made.n_steps if self.walks else made.n_steps + 1
        return info._replace(n_gradients=count).adding(refresh_rate=made.share)


def split_rows(rows: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Values by their names, from numbers in a row, the last dimension."""
    parts = rows.split([shape.numel() for shape in shapes.values()], -1) if shapes else ()
    return {
        name: part.reshape(*part.shape[:-1], *shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
