"""Whether draws end where the posterior goes on: at an end of a scale, or where some diverged.

Under a map few trajectories diverge, even where what lies further out is never drawn: steps that
are too long for it are rejected before they diverge. Chains of shorter steps, which begin at the
outermost draws and stay with them or beyond, have the posterior's share there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow import arviz_bridge
from pyro_hamflow.mcmc.diagnosis import worst
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.messages import FEWEST
from pyro_hamflow.mcmc.necks import name_of
from pyro_hamflow.mcmc.transitions.base import State, Tuning, select_state
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.model.sites import Site
from pyro_hamflow.model.transported import TransportedTarget
from pyro_hamflow.process import undisturbed

_NEAR = 0.1  # of the draws, beyond the places where trajectories diverged, in their log mean
# Coordinates up to which models are looked at where none diverged, and of the smallest sites whose
# ends are: scales are few. Of two coordinates it takes some seconds, of twelve half a minute.
_SMALL, _COLUMNS = 8, 4
_OUTER = 0.1  # of the draws, which chains begin at
_CHAINS, _MOVES = 320, 40  # in all, and how often each moves; the later half of it counts
_SHORTER, _DEPTH = 4.0, 4  # steps are so many times, with so many doublings at most
# What is told lies beyond all draws: of the posterior, and in draws that are worth independent
# ones. By chance these are missed with probability exp(-number): at one end where trajectories
# diverged, or at any of eight. Eight schools in units of their scale, of which seven seeds
# diverged, had .0008 at most and 1.7; a product whose last hundredth was not drawn, .003 to .008
# and three to eleven.
_LEAST_SHARE, _LEAST_THERE, _LEAST_ANYWHERE = 0.002, 2.7, 7.0


class Edge(NamedTuple):
    """The draws' end of a parameter.

    Attributes:
        column: The coordinate.
        is_low: Whether it is the lower end.
        diverged: Whether trajectories diverged near it.
        share: Of the posterior, that lies beyond all draws.
        number: How many draws this would be, in independent ones.
    """

    column: int
    is_low: bool
    diverged: bool = False
    share: float = 0.0
    number: float = 0.0

    @property
    def excess(self) -> float:
        """How early draws end: above one, if that is more than chance."""
        limit = _LEAST_THERE if self.diverged else _LEAST_ANYWHERE
        return min(self.share / _LEAST_SHARE, self.number / limit)


def earliest_edge(kernel: Kernel, draws: Draws) -> Edge | None:
    """The end at which draws of a run end most early; none where moves had no map."""
    _, length, dimension = draws.extent
    if kernel._phase is None or kernel.warming or length < FEWEST or not dimension:
        return None
    transition, tuning = kernel.phase.transition, kernel.phase.tuning
    if not isinstance(transition, NUTSTransition) or tuning is None:
        return None
    target = transition.target
    if not isinstance(target, TransportedTarget):
        return None
    diverged = int(draws.stats["diverging"].sum())
    places = list(transition.places)[-diverged:] if diverged else []
    near = _end_near(draws, target.positions(torch.stack(places))[0]) if places else None
    if near is not None:
        return look_beyond(target, tuning, draws, [near])[0]
    if dimension > _SMALL:
        return None
    by_size = sorted(kernel.potential.sites, key=lambda site: site.stop - site.start)
    columns = [column for site in by_size for column in range(site.start, site.stop)]
    ends = [Edge(column, is_low) for column in columns[:_COLUMNS] for is_low in (True, False)]
    found = look_beyond(target, tuning, draws, ends)
    return max(found, key=lambda edge: edge.excess)


def _end_near(draws: Draws, places: Tensor) -> Edge | None:
    """The end that places ``(places, dimension)`` are nearest to; none if they are at none."""
    columns = worst(draws)
    rows, at = draws.columns(columns).flatten(0, 1), places[:, columns].cpu()
    above = torch.stack([(rows > place).double().mean(0) for place in at])
    beyond = torch.stack([above, 1.0 - above]).clamp(min=0.5 / len(rows)).log().mean(1).exp()
    is_low, place = divmod(int(beyond.argmin()), len(columns))
    return Edge(columns[place], bool(is_low), diverged=True) if beyond.min() < _NEAR else None


def look_beyond(
    target: TransportedTarget, tuning: Tuning, draws: Draws, ends: Sequence[Edge]
) -> list[Edge]:
    """What lies beyond all draws at some ends, by chains of shorter steps than the draws' own.

    Arguments:
        target: What was drawn from.
        tuning: What trajectories were tuned to.
        draws: The draws.
        ends: Which ends.

    Invariant:
        Chains leave the posterior beyond all but a tenth of the draws exactly invariant: a move
        out of there is rejected.
    """
    position = draws.position.flatten(0, 1)
    count = max(1, int(_OUTER * len(position)))
    column = torch.tensor([end.column for end in ends], device="cpu")
    sign = torch.tensor([-1.0 if end.is_low else 1.0 for end in ends], device="cpu").double()
    heights = sign * position[:, column].double()
    outer = heights.argsort(0)[-count:]
    least, most = heights.gather(0, outer)[[0, -1]]
    some = outer[
        torch.linspace(0, count - 1, min(_CHAINS // len(ends), count), device="cpu").long()
    ]
    shape = some.shape  # chains of each end, ends
    begin = position[some.flatten()].to(target.example)
    reached = torch.zeros_like(most)
    with undisturbed(0), torch.no_grad():
        moves = NUTSTransition(target, len(begin), _DEPTH)
        noise = begin.new_zeros(len(begin), target.noise_dimension)
        state = moves.state_at(target.coordinates(begin), noise)
        shorter = Tuning(tuning.step_size / _SHORTER, tuning.kinetic)
        own = column.expand(shape).reshape(-1, 1).to(begin.device)

        def height(state: State) -> Tensor:
            there = target.positions(state.position)[0].gather(1, own)
            return sign * there.double().cpu().reshape(shape)

        for number in range(_MOVES):
            moved, _ = moves.step(state, shorter, 2**_DEPTH - 1)
            stays_out = (height(moved) >= least).flatten().to(begin.device)
            state = select_state(stays_out, moved, state)
            if 2 * number >= _MOVES:
                reached += (height(state) > most).double().mean(0) * 2.0 / _MOVES
    missing = reached / (1.0 - reached).clamp(min=1e-6) * count / len(position)  # to what is drawn
    shares = (missing / (1.0 + missing)).tolist()
    is_outer = (heights >= least).double().reshape(*draws.position.shape[:2], -1)
    worth = arviz_bridge.ess(is_outer.numpy()).clip(max=len(position)).tolist()
    return [
        end._replace(share=share, number=share * independent)
        for end, share, independent in zip(ends, shares, worth, strict=True)
    ]


def edge_message(edge: Edge, sites: Sequence[Site]) -> str:
    """One sentence, and the remedies."""
    name, end = name_of(sites, edge.column), "small" if edge.is_low else "large"
    where = f"Divergences lie where '{name}' is {end}, and draws end there too early"
    if not edge.diverged:
        where = f"Draws end too early where '{name}' is {end}"
    return (
        f"{where}: {edge.share:.1%} of the posterior or more lie beyond all of them, where "
        "chains with shorter steps go on. Warm up for longer, raise `target_accept_prob`, or "
        "reparametrise the model."
    )
