"""What follows a learned energy and what judges it: torch, or machine code where that pays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from pyro_hamflow.mcmc.adaptation.surrogate_run import SurrogateRun
from pyro_hamflow.mcmc.transitions.base import Transition
from pyro_hamflow.mcmc.transitions.native import NativeTransition, Stream
from pyro_hamflow.mcmc.transitions.native_energy import NativeEnergy
from pyro_hamflow.mcmc.transitions.native_estimate import looks_of
from pyro_hamflow.mcmc.transitions.noise_refresh import Refresh
from pyro_hamflow.mcmc.transitions.trajectories import NUTSTrajectories, Trajectories
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.engines.choice import Choice, choose_engine
from pyro_hamflow.surrogates.targets import SurrogateDensity


class SurrogateEngine(NamedTuple):
    """What follows a learned density, and what judges it.

    Attributes:
        make_inner: Makes a move of the learned density, of so many rows.
        energy: The true energies in machine code; none where torch computes them.
        truth: The move along true gradients in machine code, likewise.
    """

    make_inner: Callable[[int], Transition]
    energy: NativeEnergy | None = None
    truth: Transition | None = None


def surrogate_engine(
    run: SurrogateRun,
    potential: Potential,
    density: SurrogateDensity,
    position: Tensor,
    noise: Tensor,
    refresh: Refresh,
) -> SurrogateEngine:
    """Chooses all of it, and keeps why for the run's settings.

    Arguments:
        run: What was chosen of the run.
        potential: The true target.
        density: The learned one.
        position: Where chains are, of shape ``(chains, dimension)``.
        noise: Their noise.
        refresh: How it moves.
    """
    wanted, trajectories, choices = run.engine.wanted, run.hamiltonian.trajectories, run.choices
    make_inner: Callable[[int], Transition] = partial(trajectories.parameter_transition, density)
    if wanted == "torch":
        return SurrogateEngine(make_inner)
    count, planned = choices.num_proposals, run.plan.num_draws
    sets = None if planned is None else (planned + run.plan.warmup_steps) / count
    rows, graph = position.repeat(count, 1), potential.programs.base("gradient")
    expected = trajectories.expected_steps(potential.dimension)
    network = choose_engine(
        wanted,
        density.chain_graph(),
        rows,
        noise[0, :0],
        sets,
        steps=2 * choices.num_transitions * expected,
    )
    estimated = bool(potential.recovery.estimates)
    looks = partial(looks_of, potential, refresh) if estimated else None
    # An estimate's true gradients are in the library of its energies.
    judge = choose_engine(wanted, graph, rows, noise[0], sets, looks, gradient=estimated, steps=1)
    truth, steps = judge, choices.true_share * expected
    if not estimated:
        truth = choose_engine(wanted, graph, position, noise[0], sets, steps=steps)
    run.engine.take(_joined(network, judge), run.plan)
    if network.name == "native":
        depth = trajectories.max_tree_depth if isinstance(trajectories, NUTSTrajectories) else None
        stream = Stream()
        make_inner = lambda _: NativeTransition(density, depth, stream)  # noqa: E731
    return SurrogateEngine(
        make_inner,
        NativeEnergy(potential) if judge.name == "native" else None,
        _truth(trajectories, potential, refresh) if truth.name == "native" else None,
    )


def _truth(trajectories: Trajectories, potential: Potential, refresh: Refresh) -> Transition | None:
    """The move along true gradients in machine code."""
    if potential.recovery.estimates:
        return trajectories.native_estimate_transition(potential, refresh)
    return None if potential.noise_sites else trajectories.native_transition(potential)


def leave_to_torch(run: SurrogateRun) -> None:
    """Says that torch moves what is judged at every point of a trajectory."""
    wanted = run.engine.wanted
    if wanted != "torch":
        reason = "every point of a trajectory is judged"
        run.engine.take(Choice("torch", reason, declined=wanted == "native"), run.plan)


def _joined(network: Choice, judge: Choice) -> Choice:
    """The network's engine; and, where it is another, why the true energies' is."""
    if judge.name == network.name:
        return network
    reason = f"{network.reason}; true energies are made by {judge.name}, for {judge.reason}"
    return network._replace(reason=reason)
