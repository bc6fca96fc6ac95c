"""Many chains that go before the user's own: what they find is what jumps are made of."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.step_and_mass import warmed
from pyro_hamflow.mcmc.transitions.base import Info, State, Transition, Tuning, judge
from pyro_hamflow.mcmc.transitions.independence import IndependenceTransition, choose
from pyro_hamflow.mcmc.transitions.native import NativeMoves
from pyro_hamflow.model.guides import DensityGuide
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.smc.resampling import log_mean_exp

_WARM_UP = 14  # iterations: of a thousand walkers these tell step and mass
# Walkers that do so, and for each dimension, where these may move without the others.
_TUNERS, _TUNERS_EACH = 100, 4
_APART = 10  # moves, after which a walker is compared with where it was, at most
_FORGOTTEN = 0.03  # correlation, below which no more moves are needed
MOST_STEPS = 127  # of a trajectory, as all walkers wait for the longest
_NOISE = 3.5  # standard errors of a correlation, which the largest of many may reach by chance
_COUNTS = (1, 2, 4, 8, 16, 32)  # of proposals that may be made for a jump
_WANTED_RATE = 0.5  # of jumps, beyond which more proposals gain little
# Jumps that are tried where a chain is, on average, beyond the first: as long as more proposals may
# be made; and by as many as may be, for which other flows would at best make half as many.
_LONGEST_STAY, _TOLERABLE_STAY = 1.2, 2.0
# Of the logarithm of the step size of a walker that starts anywhere, for each unit of acceptance
_GAIN, _TARGET = 2.0, 0.8  # below or above this
_LATE = 0.02  # of walkers, for which others do not wait
_REMOTE = 1000.0  # jumps, after which a walker leaves where it is: they are as good as none


class Visited(NamedTuple):
    """Where walkers have been: positions and their noise, rows first."""

    position: Tensor
    noise: Tensor


class Walkers:
    """Chains that start from draws about the posterior, and move locally and by jumps.

    Arguments:
        potential: The target.
        hamiltonian: How the local move's trajectories end, and what is tuned of them.
        transition: The local move, of as many chains as there are walkers.
        position: Where they start, of shape ``(walkers, dimension)``.
        noise: Their noise.
        kinetic: The first kinetic energy.

    Attributes:
        state: Where they are.
        tuning: The step size and the mass of the local move.
        num_steps: How many steps the latest move took, of each walker or of all alike.
    """

    def __init__(
        self,
        potential: Potential,
        hamiltonian: Hamiltonian,
        transition: Transition,
        position: Tensor,
        noise: Tensor,
        kinetic: GaussianKinetic,
    ) -> None:
        self.potential = potential
        self.hamiltonian = hamiltonian
        self.transition = transition
        self.state = transition.state_at(position, noise)
        self.tuning = hamiltonian.step_and_mass.first_tuning(kinetic)
        self.num_steps = torch.zeros((), dtype=torch.float64)
        self._path: list[Visited] = []

    def warm_up(self) -> None:
        """Finds step size and mass, each walker's spread about its own mean."""
        step_and_mass = self.hamiltonian.step_and_mass
        count = self.few(max(_TUNERS, _TUNERS_EACH * self.potential.dimension))
        state: State = tree_map(lambda part: part[:count], self.state)
        if step_and_mass.adapt_step_size and step_and_mass.step_size is None:
            size = step_and_mass.reasonable_step_size(self.transition, state, self.tuning)
            self.tuning = self.tuning._replace(step_size=size)
        warmup = step_and_mass.warm_up(self.potential, self.tuning, _WARM_UP)
        trajectories = self.hamiltonian.trajectories
        for moved, _ in warmed(warmup, self.transition, trajectories, state, MOST_STEPS):
            state = moved
        self.state = tree_map(
            lambda part, whole: torch.cat([part, whole[count:]]), state, self.state
        )
        self.tuning = warmup.tuning._replace(step_scale=None)

    def few(self, count: int) -> int:
        """How many walkers move where so many would do: all, where one program moves them all."""
        everyone = len(self.state.position)
        return min(count, everyone) if isinstance(self.transition, NativeMoves) else everyone

    def at(self, position: Tensor, noise: Tensor) -> Walkers:
        """Others, tuned alike, that start elsewhere: as many as :meth:`few` allows."""
        others = copy.copy(self)
        others.state = self.transition.state_at(position, noise)
        others._path = []
        return others

    def approach(self, most: int, level: float) -> None:
        """Moves from wherever they are, each by steps short enough for it to get on.

        Arguments:
            most: How many moves.
            level: The energy to come down to, below which they are done when most walkers are.
        """
        scale = self.state.position.new_ones(len(self.state.position), dtype=torch.float64)
        for _ in range(most):
            if float((self.state.evaluation.value > level).double().mean()) <= _LATE:
                return
            rate = self._move(self.tuning._replace(step_scale=scale)).acceptance_rate.double()
            scale = (scale * torch.exp(_GAIN * (rate - _TARGET))).clamp(max=1.0)

    def move(self, count: int) -> None:
        """Makes local moves, and remembers where they led."""
        for _ in range(count):
            self._move(self.tuning)
            self._path.append(Visited(self.state.position, self.state.noise))

    def _move(self, tuning: Tuning) -> Info:
        steps = self.hamiltonian.trajectories.draw_num_steps(tuning.step_size)
        self.state, info = self.transition.step(self.state, tuning, min(steps, MOST_STEPS))
        self.num_steps = torch.as_tensor(info.n_steps).double()
        return info

    def jump(self, guide: DensityGuide) -> float:
        """Makes a jump, and tells its acceptance."""
        jumps = IndependenceTransition(self.potential, guide)
        state, info = jumps.step(self.state)
        self.state = self.transition.state_at(state.position, state.noise)
        return float(info.acceptance_rate.mean())

    @torch.no_grad()
    def ceiling(self) -> float:
        """The acceptance of jumps where a flow is the posterior: one, but for an estimate's noise.

        It is that of fresh noise where walkers are, for their own noise is the posterior's.
        """
        if not self.potential.noise_dimension:
            return 1.0
        position, before = self.state.position, self.state.evaluation.value
        fresh = self.potential.draw_noise(len(position))
        error = self.potential.evaluate(position, fresh).value.double() - before.double()
        return float(judge(error)[0].mean())

    def persistence(self) -> float:
        """The lag-one autocorrelation of local moves, of the slowest coordinate or the density.

        It is that of walkers that started from the posterior, so that modes between which no move
        leads make it one, after however many moves. Of values, which a small mode far away shows
        in, or of ranks, whichever is larger; what chance alone may give is taken off. Once next to
        nothing is left, twice in a row, walkers need not go on.
        """
        before, last, excess, moves = self._places(), 1.0, 1.0, 0
        while moves < _APART and max(last, excess) >= _FORGOTTEN:
            self.move(1)
            last, excess, moves = excess, self._excess(before), moves + 1
        return excess ** (1.0 / moves)

    def _places(self) -> Tensor:
        """Positions and densities."""
        return torch.cat([self.state.position, self.state.evaluation.value[:, None]], 1)

    def _excess(self, before: Tensor) -> float:
        """The correlation with earlier places, beyond what chance may give."""
        after = self._places()
        correlation = max(
            float((_standard(first) * _standard(last)).mean(0).max())
            for first, last in ((before, after), (_ranks(before), _ranks(after)))
        )
        return max(correlation - _NOISE / math.sqrt(len(before)), 0.0)

    def visited(self, most: int) -> Visited:
        """The latest places where they have been, so many at most."""
        count = max(1, most // len(self.state.position))
        position, noise = zip(*self._path[-count:], strict=True)
        return Visited(torch.cat(position)[-most:], torch.cat(noise)[-most:])

    @torch.no_grad()
    def jumps(self, guide: DensityGuide) -> Jumps:
        """How a guide's jumps would go from where walkers are: for how many proposals."""
        transition = IndependenceTransition(self.potential, guide)
        here = transition.log_weight_at(self.state)
        proposed = transition.propose(max(_COUNTS) * len(here)).log_weights
        typical = log_mean_exp(proposed)
        for count in _COUNTS:
            log_weights = proposed[: count * len(here)].reshape(len(here), count)
            rate = float(choose(here, log_weights)[1].acceptance_rate.mean())
            stay = (here - typical - math.log(count)).exp().clamp(min=1.0).mean()
            if rate >= _WANTED_RATE and float(stay) <= _LONGEST_STAY:
                break
        suffices = rate >= _WANTED_RATE and float(stay) <= _TOLERABLE_STAY
        remote = float((here > typical + math.log(_REMOTE * count)).double().mean())
        return Jumps(count, rate, remote, suffices)


class Jumps(NamedTuple):
    """What a guide's jumps are worth.

    Attributes:
        num_proposals: How many proposals to make for each.
        acceptance_rate: How often one is made.
        remote: The share of walkers where the guide has next to no density.
        suffices: Whether so many proposals lead away from everywhere soon enough.
    """

    num_proposals: int
    acceptance_rate: float
    remote: float
    suffices: bool


def _ranks(rows: Tensor) -> Tensor:
    """The ranks of each column."""
    return rows.argsort(0).argsort(0)


def _standard(rows: Tensor) -> Tensor:
    """Each column with mean zero and variance one; zero where it does not vary."""
    rows = rows.double()
    return ((rows - rows.mean(0)) / rows.std(0)).nan_to_num(0.0)
