"""What is tuned of Hamiltonian moves, and the phase of a run that tunes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from pyro.infer.mcmc.adaptation import ArrowheadMassMatrix, BlockMassMatrix
from torch import Tensor

from pyro_hamflow.checks import between, flag, positive
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.mass import (
    Adapter,
    FullMass,
    InverseMass,
    MassForm,
    check_full_mass,
    check_inverse_mass,
    mass_form,
)
from pyro_hamflow.mcmc.adaptation.window import WarmUp
from pyro_hamflow.mcmc.transitions.base import Info, State, Transition, Tuning
from pyro_hamflow.mcmc.transitions.trajectories import Trajectories
from pyro_hamflow.model.potential import Potential

_FIRST_STEP = 0.1  # until one is searched for
_LONGEST_GROWTH = 2.0  # to which a step is doubled on trial


class StepAndMass:
    """What the user chose of step size and mass, and how both are found.

    Arguments:
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
        target_accept_prob: The mean acceptance probability that warm-up aims for.
        min_stepsize: The least step size that is tried out.
        max_stepsize: The largest.
        single_steps: Whether moves are single steps.

    Attributes:
        adapter: Pyro's object of the mass's structure, if one was set.
    """

    def __init__(
        self,
        *,
        step_size: float | None,
        adapt_step_size: bool,
        adapt_mass_matrix: bool,
        full_mass: FullMass,
        inverse_mass_matrix: InverseMass | None,
        target_accept_prob: float,
        min_stepsize: float = 1e-10,
        max_stepsize: float = 1e10,
        single_steps: bool = False,
    ) -> None:
        if step_size is not None:
            positive("step_size", step_size)
        between("target_accept_prob", target_accept_prob, 0.0, 1.0, ends="none")
        positive("min_stepsize", min_stepsize)
        if positive("max_stepsize", max_stepsize, infinite=True) < min_stepsize:
            raise ValueError(
                f"`min_stepsize` and `max_stepsize` are {min_stepsize} and {max_stepsize}: "
                "expected positive numbers in order"
            )
        flag("adapt_step_size", adapt_step_size)
        flag("adapt_mass_matrix", adapt_mass_matrix)
        if inverse_mass_matrix is not None:
            check_inverse_mass(inverse_mass_matrix)
        check_full_mass(full_mass)
        self.step_size = step_size
        self.adapt_step_size = adapt_step_size
        self.adapt_mass_matrix = adapt_mass_matrix
        self.full_mass = full_mass
        self.inverse_mass_matrix = inverse_mass_matrix
        self.target_accept_prob = target_accept_prob
        self.single_steps = single_steps
        self.min_stepsize, self.max_stepsize = min_stepsize, max_stepsize
        self.adapter: Adapter | None = None

    @property
    def adapts(self) -> bool:
        """Whether anything is tuned."""
        return self.adapt_step_size or self.adapt_mass_matrix

    def form(self, potential: Potential) -> MassForm:
        """The structure of the mass."""
        return mass_form(
            self.full_mass,
            potential.sites,
            arrowhead=isinstance(self.adapter, ArrowheadMassMatrix),
            given=self.inverse_mass_matrix,
        )

    def take_adapter(self, adapter: Adapter) -> None:
        """Takes the mass's structure from Pyro's object.

        Raises:
            TypeError: If it is none.
        """
        if not isinstance(adapter, BlockMassMatrix | ArrowheadMassMatrix):
            raise TypeError(
                f"`mass_matrix_adapter` is a {type(adapter).__name__}: expected a BlockMassMatrix "
                "or an ArrowheadMassMatrix of Pyro's"
            )
        self.adapter = adapter

    def empty_adapter(self) -> Adapter:
        """Pyro's object for the mass's structure, without a mass in it yet."""
        return copy.deepcopy(self.adapter) or BlockMassMatrix()

    def filled_adapter(self, potential: Potential, inverse_mass: Tensor) -> Adapter:
        """Pyro's object for the mass's structure, with this inverse mass in it."""
        return self.form(potential).fill(self.empty_adapter(), inverse_mass)

    def first_kinetic(self, potential: Potential) -> GaussianKinetic:
        """The kinetic energy by the inverse mass that was given, or ones."""
        form, given = self.form(potential), self.inverse_mass_matrix
        if given is None:
            ones = potential.example.new_ones(potential.dimension)
            return GaussianKinetic(torch.diag(ones) if form.dense else ones)
        return GaussianKinetic(form.flat(given).to(potential.example))

    def kinetic_by(
        self, potential: Potential, spread: Tensor, like: GaussianKinetic
    ) -> GaussianKinetic:
        """A kinetic energy whose inverse mass is a covariance, in the structure that is asked for.

        Arguments:
            potential: The target.
            spread: The covariance, of shape ``(dimension, dimension)``, or its diagonal.
            like: A kinetic energy; the new one is dense or diagonal as it is.
        """
        if not like.is_dense:
            return GaussianKinetic(spread.diag() if spread.dim() == 2 else spread)
        return GaussianKinetic(self.form(potential).shaped(spread))

    def first_tuning(self, kinetic: GaussianKinetic) -> Tuning:
        """The first tuning: the step size that was given, or one to begin the search with."""
        return Tuning(self.step_size or _FIRST_STEP, kinetic)

    def warm_up(
        self,
        potential: Potential,
        tuning: Tuning,
        steps: int,
        *,
        adapt_step_size: bool = True,
        adapt_mass: bool = True,
        most_steps: int | None = None,
        pools: bool = False,
    ) -> WarmUp:
        """A warm-up of ``steps`` iterations; it adapts what users and caller let it."""
        return WarmUp(
            tuning.step_size,
            tuning.kinetic,
            steps,
            target=self.target_accept_prob,
            adapt_step_size=adapt_step_size and self.adapt_step_size,
            adapt_mass=adapt_mass and self.adapt_mass_matrix,
            most_steps=most_steps,
            shaped=self.form(potential).shaped,
            pools=pools,
            single_steps=self.single_steps,
        )

    def reasonable_step_size(self, transition: Transition, state: State, tuning: Tuning) -> float:
        """Doubles or halves the step size until single steps are accepted about as wanted."""
        size = tuning.step_size

        def rate(size: float) -> float:
            info = transition.step(state, tuning._replace(step_size=size), 1)[1]
            return float(info.acceptance_rate.mean())

        growing = rate(size) > self.target_accept_prob
        for _ in range(30):
            trial = 2.0 * size if growing else 0.5 * size
            if not self.min_stepsize <= trial <= self.max_stepsize:
                return size
            if growing and (trial > _LONGEST_GROWTH or rate(trial) <= self.target_accept_prob):
                return size
            size = trial
            if not growing and rate(size) > self.target_accept_prob:
                return size
        return size


def warmed(
    warmup: WarmUp,
    transition: Transition,
    trajectories: Trajectories,
    state: State,
    most: float = math.inf,
) -> Iterator[tuple[State, Info]]:
    """Runs a warm-up to its end, and yields the state and the info of each iteration.

    Arguments:
        warmup: What is tuned.
        transition: The move.
        trajectories: How its trajectories end.
        state: Where to begin.
        most: The most steps of a trajectory.
    """
    while not warmup.finished:
        steps = trajectories.draw_num_steps(warmup.tuning.step_size)
        state, info = transition.step(state, warmup.tuning, int(min(steps, most)))
        warmup.update(state, info)
        yield state, info
