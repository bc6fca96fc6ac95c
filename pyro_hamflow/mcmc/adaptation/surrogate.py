"""Where a run along a learned energy begins: where chains start, and its first phase."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.base import Phase
from pyro_hamflow.mcmc.adaptation.gather import Gather
from pyro_hamflow.mcmc.adaptation.learning import Learning
from pyro_hamflow.mcmc.adaptation.surrogate_run import SurrogateRun
from pyro_hamflow.mcmc.adaptation.verdict import GUESSED_STEPS
from pyro_hamflow.mcmc.transitions.base import State
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.surrogates.amortized.surrogate import AmortizedSurrogate
from pyro_hamflow.surrogates.learner import FEWEST_GATHER, Learner

_FEWEST_WARMUP = 5 * FEWEST_GATHER  # iterations


def start(
    run: SurrogateRun, num_chains: int, initial_params: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Where chains start: at draws from where an amortised surrogate expects the posterior.

    Further away it may have valleys that are none of the posterior's, and hold a chain there.
    """
    given, potential = run.choices.surrogate, run.source.potential
    if not isinstance(given, AmortizedSurrogate):
        run.surrogate = given
        return run.source.start(num_chains, initial_params)
    run.surrogate = given.at(potential)
    run.report.n_gradients += given.n_probes
    if initial_params is None and run.source.init_strategy is None:
        centre, _ = potential.vectors(num_chains)
        centre = run.surrogate.centre + torch.randn_like(centre) @ run.surrogate.root.mT
        try:
            return find_start(potential, num_chains, centre, 0.0)
        except ValueError:
            pass  # led astray by data unlike those of its training
    return run.source.start(num_chains, initial_params)


def first_phase(run: SurrogateRun, position: Tensor, noise: Tensor) -> tuple[Phase, State]:
    """The first phase: gathering, or following a given surrogate; plain tuning if neither pays."""
    potential, given = run.source.potential, run.surrogate
    if given is not None and given.dimension != potential.dimension:
        raise ValueError(
            f"`surrogate` has dimension {given.dimension}: expected {potential.dimension}, as "
            f"the model's sites {[site.name for site in potential.sites]} have"
        )
    kinetic = _first_kinetic(run, potential)
    steps = run.plan.warmup_steps
    learner = Learner(potential, run.choices.training, steps, run.native_draws)
    with random_state_kept():  # so that a run that learns nothing is the plain kernel's
        reason = _hopeless(run, learner, len(position))
    if reason is not None:
        run.say(f"true gradients are followed: {reason}.")
        run.report.following = "true gradients"
        moves = run.true_moves(position)
        return run.hamiltonian.first_phase(
            potential, moves, run.plan, position, noise, kinetic=kinetic
        )
    learning = Learning(run, learner, len(position), dense=kinetic.is_dense)
    phase, state = run.hamiltonian.first_phase(
        potential,
        learning.gathering_moves(),
        run.plan,
        position,
        noise,
        kinetic=kinetic,
        phase=partial(Gather, learning=learning),
        may_go_on=False,  # what is learned has its share of a warm-up of a given length
    )
    learner.log.entries.clear()
    if run.choices.surrogate is None:
        return phase, state
    return learning.follow_surrogate(state, phase.tuning, passing=False)


def _first_kinetic(run: SurrogateRun, potential: Potential) -> GaussianKinetic:
    """The first kinetic energy: by the spread of a given surrogate, if no mass was given."""
    step_and_mass = run.hamiltonian.step_and_mass
    kinetic = step_and_mass.first_kinetic(potential)
    if run.surrogate is None or step_and_mass.inverse_mass_matrix is not None:
        return kinetic
    spread = (run.surrogate.root @ run.surrogate.root.mT).to(potential.example)
    return step_and_mass.kinetic_by(potential, spread, kinetic)


def _hopeless(run: SurrogateRun, learner: Learner, chains: int) -> str | None:
    """Why learning cannot pay in this run, if that is known before it begins."""
    total, choices = run.plan.warmup_steps, run.choices
    if not run.source.potential.dimension:
        return "there is no parameter, and nothing to be learned"
    if choices.surrogate is None and total < _FEWEST_WARMUP:
        if not choices.fallback:
            raise ValueError(
                f"`warmup_steps` is {total}: expected {_FEWEST_WARMUP} or more, to learn a "
                "surrogate in"
            )
        return f"nothing can be learned in {total} iterations of warm-up, below {_FEWEST_WARMUP}"
    if not choices.fallback or choices.surrogate is not None:
        return None
    seconds = learner.clock.true_seconds(chains, GUESSED_STEPS)
    return learner.too_costly(GUESSED_STEPS * seconds * run.draws_ahead)
