"""Learned energies never cost exactness: bias against known truths, invariance, and its power."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions import multiple_proposal as endpoint_module
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.multiple_proposal import (
    MultipleProposalTransition,
    pick_systematically,
)
from pyro_hamflow.mcmc.transitions.noise_refresh import (
    Blocks,
    CorrelatedRefresh,
    EllipticalSliceRefresh,
)
from pyro_hamflow.mcmc.transitions.per_leaf import PerLeafConditionalTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.surrogates.fit import fit_energy
from pyro_hamflow.surrogates.losses import Points
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from pyro_hamflow.surrogates.targets import SurrogateDensity, TrustRegion
from tests.helpers.exact_draws import CHAINS, MOST_POINTS, make_target, skewed, skewed_draws
from tests.helpers.kinds import long_but
from tests.helpers.laws import assert_invariant
from tests.helpers.learned import (
    EVERYWHERE,
    FRESH,
    KINDS,
    PROPOSALS,
    check_along,
    endpoint,
    network_beside,
    per_leaf,
)
from tests.helpers.native import spoil_line

NEARBY = TrustRegion(1.0, 2.0)
TRUST = {"everywhere": EVERYWHERE, "nearby": NEARBY}


# --- surrogates ---------------------------------------------------------------------------------


def points_of(potential, position):
    noise = potential.draw_noise(len(position))
    value, slope, _ = potential.gradients(position, noise)
    return Points(position, value, slope, position[:, :0])


def fitted(potential, position, *, steps, temper=1.0, shift=0.0):
    """A network that knows the energy, or that of a wider density shifted away."""
    torch.manual_seed(0)
    points = points_of(potential, position)
    network = PotentialNetwork(potential.dimension, hidden=(32, 32))
    network.whiten_by(position)
    wrong = points._replace(
        position=position + shift, value=temper * points.value, gradient=temper * points.gradient
    )
    fit_energy(network, wrong, num_steps=steps, learning_rate=1e-2)
    return network


def random_network(position):
    torch.manual_seed(1)
    network = PotentialNetwork(position.shape[1], hidden=(16, 16))
    network.whiten_by(position)
    with torch.no_grad():
        network.network.last.mul_(15.0)
    return network


@cache
def skewed_potential():
    return Potential(skewed)


def networks(potential, position):
    return {
        "good": lambda: fitted(potential, position, steps=600),
        "bad": lambda: fitted(potential, position, steps=300, temper=0.6, shift=0.4),
        "random": lambda: random_network(position),
    }


@cache
def network_of(quality):
    torch.manual_seed(5)
    return networks(skewed_potential(), skewed_draws(1000))[quality]()


# --- bias on a mixture of two normals -----------------------------------------------------------

STATIONARY = 40_000
MOVES = 12
TILT = 2.0
WEIGHT, SPREAD = 0.7, 0.35
TRUE_MEAN, MEAN_SD = 2 * WEIGHT - 1, math.sqrt(1.0 - (2 * WEIGHT - 1) ** 2 + SPREAD**2)


def two_normals():
    parts = dist.Normal(torch.tensor([-1.0, 1.0]), SPREAD)
    weights = torch.tensor([1 - WEIGHT, WEIGHT])
    pyro.sample("q", Mixture(dist.Categorical(weights), parts))


class Mixture(dist.MixtureSameFamily):
    support = dist.constraints.real


def mixture_draws(num_chains):
    side = torch.where(torch.rand(num_chains, 1) < WEIGHT, 1.0, -1.0)
    return side + SPREAD * torch.randn(num_chains, 1)


@cache
def mixture():
    """The target, and a network that was trained on other weights and another spread."""
    potential = Potential(two_normals)
    torch.manual_seed(0)
    position = 2.4 * torch.rand(800, 1) - 1.2
    points = points_of(potential, position)
    # As if most of the weight were on the other side: by a smooth step in the energy.
    step = torch.sigmoid(4.0 * position)
    tilt, slope = TILT * step, 4.0 * TILT * step * (1.0 - step)
    points = points._replace(value=points.value + tilt[:, 0], gradient=points.gradient + slope)
    network = PotentialNetwork(1, hidden=(16,))
    network.whiten_by(position)
    fit_energy(network, points, num_steps=500, learning_rate=1e-2)
    return potential, network


def bias(step):
    """By how many standard errors the mean of chains in equilibrium moves, in many transitions."""
    torch.manual_seed(2)
    start = position = mixture_draws(STATIONARY)
    for _ in range(MOVES):
        position = step(position)
    assert (position != start).any(-1).double().mean() > 0.9, "chains that stay where they are"
    score = (position.mean() - TRUE_MEAN) / (MEAN_SD / math.sqrt(STATIONARY))
    return float(score)


OURS = {
    "endpoint, hmc": lambda p, n: endpoint(p, n, "hmc", STATIONARY),
    "endpoint, nuts": lambda p, n: endpoint(p, n, "nuts", STATIONARY),
    "per leaf, hmc": lambda p, n: per_leaf(p, n, "hmc", STATIONARY),
    "per leaf, nuts": lambda p, n: per_leaf(p, n, "nuts", STATIONARY),
    "per leaf, gated": lambda p, n: per_leaf(p, n, "hmc", STATIONARY, trust=TrustRegion(1.2, 1.5)),
}
STEP, NUM_STEPS = 0.25, 8


@pytest.mark.parametrize("name", long_but(["per leaf, gated"], OURS))
def test_ours_are_unbiased(name):
    potential, network = mixture()
    transition = OURS[name](potential, network)
    tuning = Tuning(STEP, GaussianKinetic(torch.ones(1)))

    def step(position):
        state = transition.state_at(position, position[:, :0])
        return transition.step(state, tuning, NUM_STEPS)[0].position

    assert abs(bias(step)) < 3.0


class Published:
    """What the literature does instead, for comparison.

    Arguments:
        judged_by: The energy of the Metropolis test, "truth" or "surrogate".
        momentum: How strongly the force depends on the momentum, as that of a network of position
            and momentum does; the second half of a step then takes it to be zero.
        limit: The energy error at which a trajectory turns to the true gradient.
        cool: For how many more steps it then stays there, in the next iterations too.
    """

    def __init__(self, *, judged_by="truth", momentum=0.0, limit=math.inf, cool=0):
        self.potential, self.network = mixture()
        self.judged_by, self.momentum, self.limit, self.cool = judged_by, momentum, limit, cool
        self.left = torch.zeros(STATIONARY)

    def energy(self, q):
        if self.judged_by == "truth":
            return self.potential.value(q, q[:, :0])
        return self.network(q)

    def force(self, q, r, truth):
        learned = self.network.value_and_gradient(q)[1] + 0.5 * self.momentum * r.square()
        true = self.potential.gradients(q, q[:, :0])[1]
        return torch.where(truth[:, None], true, learned)

    @torch.no_grad()
    def step(self, q):
        r = torch.randn_like(q)
        start, first = q, self.energy(q) + 0.5 * r.square()[:, 0]
        if not self.cool:
            self.left = torch.zeros(STATIONARY)
        for _ in range(NUM_STEPS):
            truth = self.left > 0
            r = r - 0.5 * STEP * self.force(q, r, truth)
            q = q + STEP * r
            r = r - 0.5 * STEP * self.force(q, torch.zeros_like(r), truth)
            error = self.energy(q) + 0.5 * r.square()[:, 0] - first
            after = self.cool or math.inf
            self.left = torch.where(error > self.limit, after, (self.left - 1.0).clamp(min=0.0))
        accepted = torch.rand(STATIONARY).log() < -error
        return torch.where(accepted[:, None], q, start)


PUBLISHED = {
    "surrogate energy in the test": {"judged_by": "surrogate"},
    "force that knows the momentum": {"momentum": 2.0},
    "switch by the error so far": {"limit": 1.5},
    "switch with a cool-down that is carried on": {"limit": 1.5, "cool": 20},
}


@pytest.mark.parametrize("name", long_but(["surrogate energy in the test"], PUBLISHED))
def test_published_ways_are_biased(name):
    assert abs(bias(Published(**PUBLISHED[name]).step)) > 10.0


# --- invariance ---------------------------------------------------------------------------------

MASS = torch.tensor([0.7, 0.6, 0.9], dtype=torch.float64)


def check(transition, step_size, *, num_steps=4, moves=2, least=0.2):
    """Moves exact draws of the skewed density, and compares after each move."""
    torch.manual_seed(3)
    position = skewed_draws(CHAINS)
    state = transition.state_at(position, position[:, :0])
    tuning = Tuning(step_size, GaussianKinetic(MASS))
    for _ in range(moves):
        state, info = transition.step(state, tuning, num_steps)
        assert_invariant({"theta": position}, {"theta": state.position})
    assert least < info.acceptance_rate.mean().item() < 0.995
    assert (state.position != position).any(-1).double().mean() > 0.3
    value = transition.target.evaluate(state.position, state.noise).value
    assert torch.allclose(value, state.evaluation.value, rtol=1e-10, atol=1e-10)
    return info


@pytest.mark.parametrize(
    ("quality", "kind"),
    long_but(
        [("good", "hmc"), ("random", "hmc")],
        itertools.product(["good", "bad", "random"], KINDS),
    ),
)
def test_invariance_endpoint(quality, kind):
    network = network_of(quality)
    level = float(network(skewed_draws(1000)).detach().quantile(0.9))
    transition = endpoint(skewed_potential(), network, kind, num_transitions=2, level=level)
    num_steps = 4 if kind == "hmc" else MOST_POINTS
    info = check(transition, 0.5, num_steps=num_steps, moves=PROPOSALS)
    assert (info.n_gradients == 0).all() and (info.n_densities == 1).all()
    rate = info.acceptance_rate.mean().item()
    assert (rate > 0.8) == (quality == "good"), rate


@pytest.mark.parametrize(
    ("quality", "kind"),
    long_but([("random", "nuts")], itertools.product(["good", "bad", "random"], KINDS)),
)
def test_invariance_endpoint_native(quality, kind):
    network = network_of(quality)
    level = float(network(skewed_draws(1000)).detach().quantile(0.9))
    transition = endpoint(
        skewed_potential(), network, kind, num_transitions=2, level=level, engine="native"
    )
    num_steps = 4 if kind == "hmc" else MOST_POINTS
    check(transition, 0.5, num_steps=num_steps, moves=PROPOSALS)


@pytest.mark.parametrize(
    ("quality", "kind", "trust"),
    long_but(
        [(quality, "hmc", trust) for quality in ("good", "random") for trust in TRUST]
        + [("good", "nuts", "everywhere"), ("random", "nuts", "nearby")],
        itertools.product(["good", "bad", "random"], KINDS, TRUST),
    ),
)
def test_invariance_per_leaf(quality, kind, trust):
    trust = TRUST[trust]
    transition = per_leaf(skewed_potential(), network_of(quality), kind, trust=trust)
    num_steps = 4 if kind == "hmc" else MOST_POINTS
    info = check(transition, 0.5, num_steps=num_steps)
    assert (info.n_densities == info.n_steps).all()
    assert (info.n_gradients <= info.n_steps).all()
    assert bool(info.n_gradients.any()) == (trust is NEARBY)


@cache
def latent_network(name):
    return network_beside(make_target(name))


def check_latent(name, transition):
    check_along(make_target(name), transition)


REFRESHES = {"correlated": CorrelatedRefresh(0.8), "slice": EllipticalSliceRefresh()}


@pytest.mark.parametrize(
    ("name", "refresh"),
    long_but(
        [("prior-8", "correlated"), ("by_hand-1", "slice")],
        itertools.product(["prior-8", "laplace-2", "by_hand-1"], REFRESHES),
    ),
)
def test_invariance_endpoint_with_noise(name, refresh):
    refresh = REFRESHES[refresh]
    potential = make_target(name).potential
    transition = endpoint(potential, latent_network(name), "hmc", refresh=refresh)
    check_latent(name, transition)


@pytest.mark.parametrize("name", long_but(["by_hand-1"], ["prior-8", "laplace-2", "by_hand-1"]))
def test_invariance_endpoint_with_noise_native(name):
    potential = make_target(name).potential
    check_latent(name, endpoint(potential, latent_network(name), "hmc", engine="native"))


@pytest.mark.parametrize("name", ["prior-8", "by_hand-1"])
def test_invariance_per_leaf_with_noise(name):
    potential = make_target(name).potential
    leaf = per_leaf(potential, latent_network(name), "hmc")
    check_latent(name, PerLeafConditionalTransition(leaf, FRESH, Blocks(potential)))


def test_a_star_is_known_when_its_first_draw_comes():
    target = make_target("prior-8")
    position, noise, _ = target.draws()
    transition = endpoint(target.potential, latent_network("prior-8"), "hmc")
    state = transition.state_at(position, noise)
    tuning = Tuning(0.8, GaussianKinetic(torch.tensor([0.7, 0.4])))
    state, _ = transition.step(state, tuning, 4)
    ahead = [later for later, _ in transition.ahead]
    assert len(ahead) == PROPOSALS - 1 and not transition.ended(state)
    for later in ahead:
        state, _ = transition.step(state, tuning, 4)
        assert state is later and state.noise is ahead[0].noise
    assert transition.ended(state)


def test_impossible_proposals_are_never_drawn():
    def half_line():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("half", torch.where(x < 0.0, 0.0, -math.inf))

    transition = endpoint(Potential(half_line), PotentialNetwork(1), "hmc", 50)
    state = transition.state_at(torch.full((50, 1), -0.5), torch.zeros(50, 0))
    for _ in range(2 * PROPOSALS):
        state, info = transition.step(state, Tuning(0.5, GaussianKinetic(torch.eye(1))), 4)
        assert (state.position < 0.0).all()
        assert info.diverging.any()
        assert (info.energy_error[info.diverging] == math.inf).all()


# --- the checks fail on spoilt samplers ---------------------------------------------------------


def weigh(monkeypatch, spoilt):
    """Other weights, made by a function of the honest ones and their arguments."""
    honest = MultipleProposalTransition.log_weights

    def log_weights(self, value, learned):
        return spoilt(lambda *energies: honest(self, *energies), value, learned)

    monkeypatch.setattr(MultipleProposalTransition, "log_weights", log_weights)


def forget_surrogate(monkeypatch):
    """Weights by the true energy alone, as if proposals came from anywhere."""
    weigh(monkeypatch, lambda honest, value, learned: honest(value, 0.0 * learned))


def forget_truth(monkeypatch):
    """The surrogate's word for the energy, so that all weigh the same."""
    weigh(monkeypatch, lambda honest, value, learned: honest(0.0 * value, 0.0 * learned))


def forget_present(monkeypatch):
    """A chain that never stays where it is."""

    def spoilt(honest, value, learned):
        return honest(value, learned).index_fill(1, torch.tensor(0), -50.0)

    weigh(monkeypatch, spoilt)


def stay_in_the_centre(monkeypatch):
    """Proposals about where the chain is, which then is unlike the others."""
    honest = MultipleProposalTransition.move_along_surrogate

    def move(self, inner, position, tuning, num_steps):
        move_made = honest(self, inner, position, tuning, num_steps)
        return move_made._replace(position=position) if inner is self.to_centre else move_made

    monkeypatch.setattr(MultipleProposalTransition, "move_along_surrogate", move)


def read_in_order(monkeypatch):
    """Draws in the order of the candidates, so that the last of them comes last too often."""

    def in_order(weights, count):
        return pick_systematically(weights, count).sort(-1).values

    monkeypatch.setattr(endpoint_module, "pick_systematically", in_order)


def shrink_noise(monkeypatch):
    """A proposal for the noise that does not keep its law."""
    monkeypatch.setattr(torch, "randn_like", lambda x, honest=torch.randn_like: 0.8 * honest(x))


def accept_always(monkeypatch):
    """Trajectories of machine code that are never refused."""
    spoil_line("trajectories", "uniform(random, 0) < rate", "true", monkeypatch)


SPOILT = [forget_surrogate, forget_truth, forget_present, stay_in_the_centre, read_in_order]


@pytest.mark.parametrize(
    ("spoil", "engine"),
    [*((spoil, "torch") for spoil in SPOILT), *((spoil, "native") for spoil in SPOILT[:2])],
)
def test_spoilt_endpoint_is_found_out(spoil, engine, monkeypatch):
    transition = endpoint(skewed_potential(), network_of("bad"), "hmc", engine=engine)
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check(transition, 0.5, moves=PROPOSALS)


def test_spoilt_machine_code_along_a_surrogate_is_found_out(monkeypatch):
    accept_always(monkeypatch)
    transition = endpoint(skewed_potential(), network_of("bad"), "hmc", engine="native")
    with pytest.raises(AssertionError, match="standard errors"):
        check(transition, 1.2, moves=PROPOSALS)


def test_picks_come_as_often_as_their_weights_say():
    torch.manual_seed(0)
    weights = torch.tensor([[0.5, 0.3, 0.0, 0.2]], dtype=torch.float64)
    picks = pick_systematically(weights.expand(20_000, 4), 4)
    share = torch.nn.functional.one_hot(picks, 4).double()
    assert torch.allclose(share.mean(0), weights.expand(4, 4), atol=0.015)  # of each by itself
    assert ((share.sum(1) - 4 * weights).abs() < 1.0).all()  # and of all together


@pytest.mark.parametrize("spoil", [forget_surrogate, forget_truth, shrink_noise])
def test_spoilt_endpoint_with_noise_is_found_out(spoil, monkeypatch):
    transition = endpoint(make_target("prior-8").potential, latent_network("prior-8"), "hmc")
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check_latent("prior-8", transition)


def test_learned_energy_at_the_leaves_is_found_out():
    density = SurrogateDensity(skewed_potential(), network_of("bad"))
    transition = HMCTransition(density, CHAINS)
    with pytest.raises(AssertionError, match="standard errors"):
        check(transition, 0.5)
