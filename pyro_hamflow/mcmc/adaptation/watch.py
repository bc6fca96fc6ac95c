"""Whether warm-up gets anywhere, and whether it has converged, by its last window."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import Info

_LARGEST_RHAT = 1.1  # of a window's pieces, which are short: looser than that of draws
_LARGEST_SHARE = 0.05  # of trees cut
_LARGEST_CHANGE = 2.0  # of the step size
_FEWEST = 10  # iterations in a piece of the window
_IN_A_ROW = 10  # iterations that lead nowhere
_CUT, _SHORT = 16, 31  # by which trajectories are shorter then, and steps that are few enough


class Watch:
    """Looks at one window of iterations, piece by piece.

    Arguments:
        before: How many iterations there are until it begins.
        length: How many it has.
        joins: Whether it is to be joined with those over other chains.
    """

    def __init__(self, before: int, length: int, *, joins: bool = False) -> None:
        self.length = length
        self.joins = joins
        self._done = -before
        self._means: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._counts: list[int] = []
        self._sizes: list[float] = []
        self._limited = self._ended = 0

    def update(self, position: Tensor, info: Info, step_size: float) -> None:
        """Takes in one iteration of all chains; those before the window are passed over."""
        self._done += 1
        if self._done <= 0:
            return
        pieces = 2 if self.joins or len(position) > 1 else 4
        piece = min((self._done - 1) * pieces // self.length, pieces - 1)
        rows = position.detach().double()
        if piece == len(self._means):
            self._means.append(torch.zeros_like(rows))
            self._sums.append(torch.zeros_like(rows))
            self._counts.append(0)
        self._counts[piece] += 1
        shift = rows - self._means[piece]
        self._means[piece] += shift / self._counts[piece]
        self._sums[piece] += shift * (rows - self._means[piece])
        self._sizes.append(step_size)
        limited = info.further.get("reached_max_treedepth")
        if limited is not None:
            self._limited += int(limited.sum())
            self._ended += len(position)

    @staticmethod
    def joined(parts: Sequence[Watch]) -> Watch:
        """One over the chains of some others, whose windows are over."""
        whole = Watch(0, parts[0].length, joins=True)
        pieces = range(len(parts[0]._means))
        whole._means = [torch.cat([part._means[i] for part in parts]) for i in pieces]
        whole._sums = [torch.cat([part._sums[i] for part in parts]) for i in pieces]
        whole._counts = parts[0]._counts
        sizes = zip(*(part._sizes for part in parts), strict=True)
        whole._sizes = [math.exp(sum(map(math.log, each)) / len(each)) for each in sizes]
        whole._limited = sum(part._limited for part in parts)
        whole._ended = sum(part._ended for part in parts)
        return whole

    def rhat(self) -> Tensor:
        """Split R-hat of each coordinate, over the pieces of all chains, ``(dimension,)``."""
        count = min(self._counts)
        within = torch.cat([total / (count - 1) for total in self._sums]).mean(0)
        between = torch.cat(self._means).var(0)
        return ((count - 1) / count + between / within).sqrt()

    def doubts(self) -> list[str]:
        """Signs that warm-up has not converged, a phrase each; none if it has."""
        doubts = []
        if min(self._counts, default=0) >= _FEWEST:
            worst = float(self.rhat().nan_to_num(nan=torch.inf).max())
            if worst > _LARGEST_RHAT:
                doubts.append(f"its draws disagree (R-hat {worst:.2f})")
        if self._limited > _LARGEST_SHARE * self._ended:
            share = self._limited / self._ended
            doubts.append(f"{share:.0%} of its trajectories reached `max_tree_depth`")
        quarter = len(self._sizes) // 8
        if quarter:
            late, last = self._sizes[-2 * quarter : -quarter], self._sizes[-quarter:]
            change = sum(map(math.log, last)) / quarter - sum(map(math.log, late)) / quarter
            if abs(change) > math.log(_LARGEST_CHANGE):
                doubts.append("the step size still " + ("rises" if change > 0.0 else "falls"))
        return doubts


class Standstill:
    """Shortens trajectories that are cut before they get anywhere, until the mass is another one.

    Where the density has no bound, the step size falls for ever, and most trajectories take all the
    steps that they may without going as far as a standard deviation by the mass found so far.

    Attributes:
        found: Whether it came to that.
    """

    def __init__(self) -> None:
        self.found = False
        self._in_a_row = 0

    def shortened(self, num_steps: int) -> int:
        """How many steps trajectories may take, of so many."""
        if self._in_a_row < _IN_A_ROW:
            return num_steps
        return min(num_steps, max(_SHORT, num_steps // _CUT))

    def update(self, info: Info, num_steps: int, step_size: float) -> None:
        """Takes in one iteration of all chains.

        Arguments:
            info: What is known of it.
            num_steps: How many steps each trajectory might take.
            step_size: Of each step, in standard deviations.
        """
        cut = info.further.get("reached_max_treedepth")
        if cut is None or num_steps <= _SHORT or self._in_a_row >= _IN_A_ROW:
            return
        leads_nowhere = num_steps * step_size < 1.0 and bool(cut.double().mean() >= 0.5)
        self._in_a_row = self._in_a_row + 1 if leads_nowhere else 0
        self.found |= self._in_a_row >= _IN_A_ROW

    def restart(self) -> None:
        """Lets trajectories be as long as they may again."""
        self._in_a_row = 0
