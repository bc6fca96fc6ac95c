"""Samplers of latent paths keep their extended target, and are found out where they are spoilt."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from pyro_hamflow import StretchRefresh
from pyro_hamflow.marginal.proposals.path import PathParticle
from pyro_hamflow.marginal.whitening.affine import CovarianceMap
from pyro_hamflow.mcmc.transitions import noise_refresh as refresh_module
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.multiple_proposal import MultipleProposalTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks
from pyro_hamflow.mcmc.transitions.nuts import JointNUTSTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition, JointTransition
from pyro_hamflow.programs import banded
from tests.helpers.exact_draws import CHAINS, DEPTH, check
from tests.helpers.exact_paths import ExtendedPath, path_target
from tests.helpers.kinds import long_but
from tests.helpers.learned import check_along, endpoint, network_beside


def splitting(target):
    return JointTransition(target.potential, CHAINS)


def splitting_nuts(target):
    return JointNUTSTransition(target.potential, CHAINS, DEPTH)


def stretches(target):
    inner = HMCTransition(target.potential, CHAINS)
    return ConditionalTransition(inner, StretchRefresh(2), Blocks(target.potential))


MOVES = [splitting, splitting_nuts, stretches]


@pytest.mark.parametrize("make", long_but([splitting, splitting_nuts], MOVES))
def test_paths_keep_their_target(make):
    """Where parameters and noise move together, and where stretches of the noise are renewed."""
    check(path_target(2), make(path_target(2)))


@pytest.mark.parametrize("make", long_but([splitting], MOVES))
def test_paths_of_a_known_covariance_keep_their_target(make):
    target = path_target(2, by_covariance=True)
    check(target, make(target))


@pytest.mark.slow
@pytest.mark.parametrize("make", MOVES)
@pytest.mark.parametrize("num_particles", [1, 8])
def test_paths_of_more_particles_keep_their_target(make, num_particles):
    check(path_target(num_particles), make(path_target(num_particles)))


@cache
def network():
    return network_beside(path_target(2))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_paths_judged_along_a_learned_energy_keep_their_target(engine):
    target = path_target(2)
    check_along(target, endpoint(target.potential, network(), "nuts", engine=engine))


@pytest.mark.parametrize("spoilt", ["log_weights", "_refreshed"])
def test_paths_that_are_not_judged_are_found_out(spoilt, monkeypatch):
    """Where the true estimate has no say, and where noise is renewed without being judged."""

    def ignore(self, value, learned):
        return 0.0 * learned

    def renew(self, state):
        noise = torch.randn_like(state.noise)
        return noise, self.energy.evaluate(state.position, noise), None, 1

    changed = {"log_weights": ignore, "_refreshed": renew}[spoilt]
    monkeypatch.setattr(MultipleProposalTransition, spoilt, changed)
    target = path_target(2)
    with pytest.raises(AssertionError, match="standard errors"):
        check_along(target, endpoint(target.potential, network(), "nuts"))


def halve_the_determinant(monkeypatch):
    monkeypatch.setattr(banded, "log_det", lambda root: root[..., 0].log().sum(-1))


def favour_far_paths(monkeypatch):
    mix = PathParticle.mix
    monkeypatch.setattr(
        PathParticle,
        "mix",
        lambda p, ratios: (mix(p, ratios)[0] + 0.05 * p.path.square().mean(-1), None),
    )


def test_spoilt_paths_of_a_known_covariance_are_found_out(monkeypatch):
    honest = path_target(2, by_covariance=True).draws()
    monkeypatch.setattr(
        CovarianceMap, "log_volume", lambda found: -0.5 * found.root.diagonal().log().sum()
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(2)
    target = ExtendedPath(2, by_covariance=True)
    torch.set_default_dtype(before)
    target.draws = lambda: honest
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, splitting(target))


def accept_every_stretch(monkeypatch):
    monkeypatch.setattr(
        refresh_module.Blocks,
        "log_ratios",
        lambda self, new, old: {g.name: torch.zeros(len(new.value)) for g in self.groups},
    )


SPOILT = [
    (splitting, halve_the_determinant),
    (splitting, favour_far_paths),
    (stretches, favour_far_paths),
    (stretches, accept_every_stretch),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "spoil"), SPOILT)
def test_spoilt_paths_are_found_out(make, spoil, monkeypatch):
    honest = path_target(2).draws()
    spoil(monkeypatch)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(2)
    target = ExtendedPath(2)
    torch.set_default_dtype(before)
    target.draws = lambda: honest
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, make(target))
