"""The step size and the mass that suit a learned energy, found on it alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.step_and_mass import warmed
from pyro_hamflow.mcmc.transitions.base import Transition, Tuning
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.surrogates.targets import SurrogateDensity

_ATTUNED_BY, _SHORT = 2560, 15  # transitions in all, and points of their trajectories at most
_FEWEST_ATTUNED, _MOST_ATTUNED = 20, 40  # iterations that they are made in
_USUAL = 0.99  # of a surrogate's draws lie where it is not softened
_UNIT_STEP = 0.5  # where the scale is about one


def attuned(
    hamiltonian: Hamiltonian,
    potential: Potential,
    inner: Transition,
    density: SurrogateDensity,
    position: Tensor,
    tuning: Tuning,
    covariance: Tensor | None,
) -> Tuning:
    """Finds the step size that suits a surrogate, in a warm-up along it, at no true gradient.

    The surrogate is then softened above the energy that few of its draws exceed.

    Arguments:
        hamiltonian: How trajectories end, and what may be adapted.
        potential: The true target.
        inner: The move along the surrogate, of as many rows as there are positions.
        density: The surrogate.
        position: Where to begin, of shape ``(rows, dimension)``.
        tuning: What of it may not be adapted is kept.
        covariance: Of the points that the surrogate was fitted to, which the mass follows.
    """
    step_and_mass, trajectories = hamiltonian.step_and_mass, hamiltonian.trajectories
    kinetic, size = tuning.kinetic, tuning.step_size
    if step_and_mass.adapt_mass_matrix and covariance is not None:
        kinetic = step_and_mass.kinetic_by(potential, covariance, kinetic)
    tuning = Tuning(_UNIT_STEP if step_and_mass.adapt_step_size else size, kinetic)
    count = min(max(_ATTUNED_BY // len(position), _FEWEST_ATTUNED), _MOST_ATTUNED)
    warmup = step_and_mass.warm_up(potential, tuning, count, adapt_mass=False)
    state = inner.state_at(position, position[:, :0])
    steps = warmed(warmup, inner, trajectories, state, _SHORT)
    energies = [moved.evaluation.value for moved, _ in steps]
    late = torch.cat(energies[count // 2 :])
    density.softened_above.copy_(late.nanquantile(_USUAL))
    return warmup.tuning
