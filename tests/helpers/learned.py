"""Transitions that follow a learned energy, put together by hand."""

from __future__ import annotations

import math

from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.multiple_proposal import MultipleProposalTransition
from pyro_hamflow.mcmc.transitions.native import NativeTransition, Stream
from pyro_hamflow.mcmc.transitions.native_energy import NativeEnergy
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, CorrelatedRefresh
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.mcmc.transitions.per_leaf import PerLeafTransition
from pyro_hamflow.surrogates.targets import JudgedDensity, SurrogateDensity
from tests.helpers.exact_draws import CHAINS, DEPTH

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
