"""Transitions that follow a learned energy, put together by hand."""

from __future__ import annotations

import math

import torch

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.multiple_proposal import MultipleProposalTransition
from pyro_hamflow.mcmc.transitions.native import NativeTransition, Stream
from pyro_hamflow.mcmc.transitions.native_energy import NativeEnergy
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, CorrelatedRefresh
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.mcmc.transitions.per_leaf import PerLeafTransition
from pyro_hamflow.surrogates.fit import fit_energy
from pyro_hamflow.surrogates.losses import Points
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from pyro_hamflow.surrogates.targets import JudgedDensity, SurrogateDensity
from tests.helpers.exact_draws import CHAINS, DEPTH
from tests.helpers.laws import assert_invariant

EVERYWHERE = None
FRESH = CorrelatedRefresh()


PROPOSALS = 3


KINDS = {
    "hmc": lambda density, chains: HMCTransition(density, chains),
    "nuts": lambda density, chains: NUTSTransition(density, chains, DEPTH),
}


def endpoint(
    potential,
    network,
    kind,
    chains=CHAINS,
    *,
    refresh=FRESH,
    num_transitions=1,
    level=math.inf,
    engine="torch",
):
    density, stream = SurrogateDensity(potential, network), Stream()
    density.softened_above.fill_(level)
    depth = DEPTH if kind == "nuts" else None

    def inner(rows):
        if engine == "native":
            return NativeTransition(density, depth, stream)
        return KINDS[kind](density, rows)

    return MultipleProposalTransition(
        potential,
        density,
        inner,
        chains,
        refresh,
        Blocks(potential),
        num_transitions=num_transitions,
        num_proposals=PROPOSALS,
        energy=NativeEnergy(potential) if engine == "native" else None,
    )


def per_leaf(potential, network, kind, chains=CHAINS, *, trust=EVERYWHERE):
    density = JudgedDensity(potential, network, trust)
    return PerLeafTransition(density, KINDS[kind](density, chains))


def network_beside(target):
    """A network that knows the energy of an extended target's two parameters nearly."""
    position, noise, _ = target.draws()
    torch.manual_seed(4)
    value, slope, _ = target.potential.gradients(position, noise)
    network = PotentialNetwork(2, hidden=(16,))
    network.whiten_by(position)
    usual = (value - value.median()).abs() < 20.0  # weights of a Gaussian site are unbounded
    points = Points(position, value, slope, position[:, :0]).pick(usual)
    fit_energy(network, points, num_steps=300, learning_rate=1e-2)
    with torch.no_grad():
        network.linear += 0.5  # too good a network would hide what a correction is for
    return network


def check_along(target, transition):
    """Moves exact draws of an extended target, and compares parameters, noise and local sites."""
    position, noise, x = target.draws()
    torch.manual_seed(6)
    state = transition.state_at(position, noise)
    tuning = Tuning(0.8, GaussianKinetic(torch.tensor([0.7, 0.4])))
    for _ in range(PROPOSALS + 1):  # into the next set, where the noise is refreshed once more
        state, info = transition.step(state, tuning, 4)
    local = state.evaluation.local.get("x")
    before = target.quantities(position, noise, None if local is None else x)
    assert_invariant(before, target.quantities(state.position, state.noise, local))
    assert 0.1 < info.acceptance_rate.mean().item() < 0.98
