"""Samplers keep their targets: many chains, begun from exact draws, follow them after some moves.

The latent-variable model has bounded likelihood, so that its joint posterior of parameters and
local sites is drawn exactly by rejection from the prior. Its extended target then follows: one
particle of each element, picked uniformly, is given the noise that leads to the element's local
value, and all other noise is standard normal. Each check is shown to fail on samplers
spoilt in one point.
"""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import CorrelatedRefresh, EllipticalSliceRefresh, marginalize, noise
from pyro_hamflow.dynamics import integrators
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.marginal import particles as particles_module
from pyro_hamflow.marginal.noise_layout import Stratum
from pyro_hamflow.marginal.points import lattice
from pyro_hamflow.mcmc.transitions import hmc, nuts, pseudo_marginal
from pyro_hamflow.mcmc.transitions import noise_refresh as refresh_module
from pyro_hamflow.mcmc.transitions import trajectory as tree
from pyro_hamflow.mcmc.transitions.base import Decision, State, Tuning, select, select_evaluation
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks
from pyro_hamflow.mcmc.transitions.nuts import JointNUTSTransition, NUTSTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition, JointTransition
from pyro_hamflow.model.potential import Potential
from tests.helpers.laws import assert_invariant

CHAINS = 10_000
DEPTH = 5
MOST_POINTS = 2**DEPTH - 1
Y = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
SLOPE = 2.0
WEIGHT = 0.7  # of the first component of the mixture prior


# --- targets ------------------------------------------------------------------------------------


def skewed():
    """An asymmetric density that Pyro can draw from exactly."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    shift = pyro.sample("shift", dist.Normal(rate, 0.5 + 0.2 * rate))
    pyro.sample("share", dist.Beta(1.5, 2.0 + torch.sigmoid(shift)))


def skewed_draws(num_chains):
    rate = dist.Gamma(2.0, 1.0).sample((num_chains,))
    shift = dist.Normal(rate, 0.5 + 0.2 * rate).sample()
    share = dist.Beta(1.5, 2.0 + torch.sigmoid(shift)).sample()
    return torch.stack([rate.log(), shift, share.logit()], 1)


DATA = torch.tensor([0.3, -1.2, 2.2, 0.9], dtype=torch.float64)


def conjugate(y):
    precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(0.5, precision.rsqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)


def conjugate_draws(num_chains):
    """Draws of the normal-gamma posterior, in closed form."""
    count, y = len(DATA), DATA
    strength = 1.0 + count
    centre = (0.5 + y.sum()) / strength
    rate = 1.0 + 0.5 * (y.square().sum() + 0.25 - strength * centre.square())
    precision = dist.Gamma(2.0 + 0.5 * count, rate).sample((num_chains,))
    mean = dist.Normal(centre, (strength * precision).rsqrt()).sample()
    return torch.stack([precision.log(), mean], 1)


def latent(y):
    """Binary answers with a local effect each; two parameters, one of them skewed."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.7))
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.Normal(mean, scale))
        pyro.sample("y", dist.Bernoulli(logits=SLOPE * x), obs=y)


def latent_mixture(y):
    """The same with a mixture for the local effect, whose components are summed exactly."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.7))
    parts = dist.Normal(torch.stack([mean, -mean - 1.0]), torch.stack([scale, 0.5 + 0 * scale]))
    weights = torch.tensor([WEIGHT, 1 - WEIGHT], dtype=y.dtype)
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts))
        pyro.sample("y", dist.Bernoulli(logits=SLOPE * x), obs=y)


def wide_proposal(parameters, y):
    """A proposal of one's own, wider than the prior and off its centre."""
    with pyro.plate("group", len(y)):
        location = 0.5 * parameters["mean"] + 0.3 * (2 * y - 1)
        pyro.sample("x", dist.Normal(location, 1.5 * parameters["scale"] + 0.5))


@cache
def by_hand(num_particles):
    """The first latent-variable model with an estimate written by hand."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.7))
        x = mean + scale * noise("u", (num_particles, len(y)))
        terms = dist.Bernoulli(logits=SLOPE * x).log_prob(y)
        pyro.factor("estimate", (terms.logsumexp(0) - math.log(num_particles)).sum())

    return model


def posterior_draws(num_chains, *, mixture):
    """Exact draws of position, mixture component and local sites, by rejection from the prior."""
    kept, total = [], 0
    while total < num_chains:
        mean, log_scale = torch.randn(num_chains), 0.7 * torch.randn(num_chains)
        shape = (num_chains, len(Y))
        first = torch.rand(shape) < WEIGHT if mixture else torch.ones(shape, dtype=torch.bool)
        location = torch.where(first, mean[:, None], -mean[:, None] - 1.0)
        scale = torch.where(first, log_scale.exp()[:, None], 0.5)
        x = location + scale * torch.randn(shape)
        likelihood = torch.sigmoid(SLOPE * x * (2 * Y - 1)).prod(1)
        good = torch.rand(num_chains) < likelihood
        draws = torch.cat([mean[:, None], log_scale[:, None], first.double(), x], 1)
        kept.append(draws[good])
        total += len(kept[-1])
    draws = torch.cat(kept)[:num_chains]
    groups = len(Y)
    return draws[:, :2], draws[:, 2 : 2 + groups] > 0.5, draws[:, 2 + groups :]


class Extended:
    """A model with an estimated likelihood, and exact draws of its extended target."""

    def __init__(self, kind, num_particles, proposal="prior", points="iid"):
        self.num_particles, self.points, self.kind = num_particles, points, kind
        self.groups = len(Y)
        self._draws = None
        # Short enough for estimates that vary a lot, or jump where a lattice point wraps round.
        self.joint_step = 0.5 if callable(proposal) or points == "rqmc" else 0.8
        self.joint_nuts_step = 0.3 if points == "rqmc" else 0.4
        if kind == "by hand":
            self.model = by_hand(num_particles)
        else:
            model = latent_mixture if kind == "mixture" else latent
            self.model = marginalize(
                model, ["x"], num_particles=num_particles, proposal=proposal, points=points
            )
        self.potential = Potential(self.model, (Y,), separate_noise=True)
        if kind != "by hand":
            layout = self.model.plan(Y).layouts["x"]
            self.strata = layout.strata
            # The same particles, each moved by noise of its own.
            self.single = marginalize(model, ["x"], num_particles=num_particles, proposal=proposal)
            if proposal == "laplace":
                self.single.fit(Y, pilot=self.model.pilot((Y,), {}))
        else:
            self.strata = (Stratum((), num_particles),)
        self.counts = [stratum.count for stratum in self.strata]

    @property
    def vectors(self):
        """How many noise vectors each stratum has."""
        return self.counts if self.points == "iid" else [1] * len(self.counts)

    def values(self, position, u):
        """The particles of every chain, ``(chains, particles, groups)``, iid noise given."""
        parameters = {"mean": position[:, 0], "scale": position[:, 1].exp()}
        if self.kind == "by hand":
            return parameters["mean"][:, None, None] + parameters["scale"][:, None, None] * u
        group = self.single.plan(Y).structure.groups[0]

        def particles(u, mean, scale):
            values = {"mean": mean, "scale": scale}
            return self.single.estimate(group, u[..., None], values, Y).values["x"]

        return torch.func.vmap(particles)(u, parameters["mean"], parameters["scale"])

    def invert(self, position, x):
        """The noise that leads each particle, were it alone, to the local values, by bisection."""
        shape = (len(x), sum(self.counts), self.groups)
        low, high = torch.full(shape, -40.0), torch.full(shape, 40.0)
        if self.kind != "by hand" and self.model.proposal == "laplace":
            low, high = low / 2, high / 2
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = self.values(position, middle) > x[:, None]
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return 0.5 * (low + high)

    def draws(self):
        """Exact draws, made once: positions, noise, local sites."""
        if self._draws is None:
            self._draws = self._make_draws(CHAINS)
        return self._draws

    def _make_draws(self, num_chains):
        mixture = self.kind == "mixture"
        position, first, x = posterior_draws(num_chains, mixture=mixture)
        shape = (num_chains, self.groups)
        z = self.invert(position, x)
        u = torch.randn(num_chains, sum(self.vectors), self.groups)
        # Which kind of particle drew the local value: by the densities and the kinds' shares.
        slope = self.values(position, z + 1.0) - self.values(position, z)
        density = (-0.5 * z.square()).exp() / slope
        kinds = density.split(self.counts, 1)
        kinds = [s.share * part[:, 0] for s, part in zip(self.strata, kinds, strict=True)]
        pick, below = torch.rand(shape), {}
        start = vector = 0
        for stratum, kind, vectors in zip(self.strata, kinds, self.vectors, strict=True):
            count, components = stratum.count, stratum.components
            alike = zip(self.strata, kinds, strict=True)
            total = sum(other for s, other in alike if s.components == components)
            mine = ~first if ("x", 1) in components else first
            if stratum.is_shared:
                low = below.get(components, 0.0)
                below[components] = low + kind / total
                mine = mine & (low <= pick) & (pick < below[components])
            index = torch.randint(count, shape)
            point = z.gather(1, start + index[:, None])[:, 0]
            if self.points == "rqmc":
                shift = torch.special.ndtr(point) - lattice(count, 1)[index, 0]
                edge = torch.finfo(shift.dtype).eps  # beyond which no lattice point lies
                point = torch.special.ndtri((shift - shift.floor()).clamp(edge, 1 - edge))
                slot = torch.zeros_like(index)
            else:
                slot = index
            slot = vector + slot[:, None]
            old = u.gather(1, slot)[:, 0]
            u.scatter_(1, slot, torch.where(mine, point, old)[:, None])
            start, vector = start + count, vector + vectors
        return position, u.flatten(1), x

    def quantities(self, position, u, x):
        """What is compared: parameters, local sites, and the noise of each element."""
        u = u.reshape(len(u), -1, self.groups)
        result = {"theta": position, "first noise": u[:, 0]}
        if u.shape[1] > 1:
            result |= {"mean noise": u.mean(1), "noise norm": u.square().mean(1).sqrt()}
        return result if x is None else result | {"x": x}


# --- checks -------------------------------------------------------------------------------------

REFRESHES = {
    "fresh": CorrelatedRefresh(0.0),
    "correlated": CorrelatedRefresh(0.9),
    "slice": EllipticalSliceRefresh(),
}
TARGETS = {
    "prior-8": ("normal", 8),
    "laplace-2": ("normal", 2, "laplace"),
    "function-2": ("normal", 2, wide_proposal),
    "rqmc-8": ("normal", 8, "prior", "rqmc"),
    "by_hand-1": ("by hand", 1),
}
MORE_TARGETS = {
    "prior-1": ("normal", 1),
    "prior-2": ("normal", 2),
    "laplace-1": ("normal", 1, "laplace"),
    "laplace-8": ("normal", 8, "laplace"),
    "function-1": ("normal", 1, wide_proposal),
    "function-8": ("normal", 8, wide_proposal),
    "rqmc-2": ("normal", 2, "prior", "rqmc"),
    "rqmc-laplace-8": ("normal", 8, "laplace", "rqmc"),
    "mixture-3": ("mixture", 3),
    "mixture-laplace-3": ("mixture", 3, "laplace"),
    "mixture-rqmc-5": ("mixture", 5, "prior", "rqmc"),
    "by_hand-2": ("by hand", 2),
    "by_hand-8": ("by hand", 8),
}


@pytest.fixture(
    params=[*TARGETS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_TARGETS)],
    scope="module",
)
def target(request):
    return make_target(request.param)


@cache
def make_target(name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    target = Extended(*(TARGETS | MORE_TARGETS)[name])
    target.draws()
    torch.set_default_dtype(before)
    return target


def check(target, transition, *, step=None, moves=2):
    """Moves exact draws of the extended target a few times, and compares."""
    position, u, x = target.draws()
    state = transition.begin(position, u)
    tuning, num_steps = setting(target, transition)
    rates, depths = [], set()
    for _ in range(moves):
        state, info = (step or transition.step)(state, tuning, num_steps)
        rates.append(info.acceptance_rate.mean().item())
        depths |= depths_of(info)
    local = state.evaluation.local.get("x")
    before = target.quantities(position, u, None if local is None else x)
    assert_invariant(before, target.quantities(state.position, state.noise, local))
    assert 0.2 < min(rates) < 0.98, "the moves are too good or too bad for the check to have power"
    assert "tree_depth" not in info.further or len(depths) > 2, "trajectories of few lengths only"
    value = target.potential.value(state.position, state.noise)
    assert torch.allclose(value, state.evaluation.value, rtol=1e-10, atol=1e-10)
    gradient = transition.begin(state.position, state.noise).gradient
    assert torch.allclose(gradient, state.gradient, rtol=1e-9, atol=1e-9), "a gradient of elsewhere"


def setting(target, transition):
    """Tuning and number of steps with which the checks have power."""
    inner = getattr(transition, "inner", transition)
    if isinstance(inner, HMCTransition | JointTransition):
        step_size = target.joint_step if inner is transition else 0.9
        return Tuning(step_size, GaussianKinetic(torch.tensor([0.7, 0.4]))), 4
    # A light mass, so that parameters turn back long before the noise has made half a turn.
    step_size = target.joint_nuts_step if inner is transition else 0.5
    return Tuning(step_size, GaussianKinetic(torch.tensor([2.0, 1.2]))), MOST_POINTS


def depths_of(info):
    """The depths of trajectories that occurred."""
    return set() if "tree_depth" not in info.further else set(info.further["tree_depth"].tolist())


def joint(target):
    return JointTransition(target.potential, CHAINS)


def conditional(target, refresh):
    inner = HMCTransition(target.potential, CHAINS)
    return ConditionalTransition(inner, refresh, Blocks(target.potential))


def conditional_hmc(target):
    return conditional(target, CorrelatedRefresh())


def joint_nuts(target):
    return JointNUTSTransition(target.potential, CHAINS, DEPTH)


def conditional_nuts(target):
    inner = NUTSTransition(target.potential, CHAINS, DEPTH)
    return ConditionalTransition(inner, CorrelatedRefresh(), Blocks(target.potential))


def test_invariance_joint(target):
    check(target, joint(target))


@pytest.mark.parametrize("refresh", REFRESHES.values(), ids=REFRESHES)
def test_invariance_conditional(target, refresh):
    check(target, conditional(target, refresh))


@pytest.mark.parametrize("make", [joint_nuts, conditional_nuts])
def test_invariance_pseudo_marginal_nuts(target, make):
    check(target, make(target))


def test_blocks_conditional():
    """One block for an estimate by hand, one for each element otherwise."""
    assert not Blocks(make_target("by_hand-1").potential).groups
    blocks = Blocks(make_target("prior-8").potential)
    assert [group.shape for group in blocks.groups] == [torch.Size([3])]


HMC_TARGETS = {
    "skewed": (skewed, (), skewed_draws, [0.7, 0.6, 0.9]),
    "conjugate": (conjugate, (DATA,), conjugate_draws, [0.3, 0.6]),
}


@cache
def potential_of(name):
    model, args, _, _ = HMC_TARGETS[name]
    return Potential(model, args)


def hmc_of(name):
    return HMCTransition(potential_of(name), CHAINS)


def check_known(name, mass, transition, step_size, num_steps, *, step=None, moves=2, chains=CHAINS):
    """Moves exact draws of a target without noise a few times, and compares."""
    _, _, draw, inverse_mass = HMC_TARGETS[name]
    inverse_mass = torch.tensor(inverse_mass)
    if mass == "dense":
        inverse_mass = torch.diag(inverse_mass) + 0.15
    tuning = Tuning(step_size, GaussianKinetic(inverse_mass))
    position = draw(chains)
    state = transition.begin(position, position.new_zeros(chains, 0))
    depths = set()
    for _ in range(moves):
        state, info = (step or transition.step)(state, tuning, num_steps)
        depths |= depths_of(info)
    assert_invariant({"theta": position}, {"theta": state.position})
    assert 0.3 < info.acceptance_rate.mean().item() < 0.98
    assert "tree_depth" not in info.further or len(depths) > 2, "trajectories of few lengths only"
    fresh = transition.begin(state.position, state.noise)
    assert torch.allclose(fresh.evaluation.value, state.evaluation.value, rtol=1e-10)
    assert torch.allclose(fresh.gradient, state.gradient, rtol=1e-10, atol=1e-10)


def check_hmc(name, mass, *, step=None):
    check_known(name, mass, hmc_of(name), 0.5, 4, step=step)


def check_nuts(name, mass, step_size, *, wrap=None, moves=2, chains=CHAINS):
    transition = NUTSTransition(potential_of(name), chains, DEPTH)
    step = wrap and wrap(transition)
    check_known(
        name, mass, transition, step_size, MOST_POINTS, step=step, moves=moves, chains=chains
    )


@pytest.mark.parametrize("mass", ["diagonal", "dense"])
@pytest.mark.parametrize("name", HMC_TARGETS)
def test_invariance_hmc(name, mass):
    check_hmc(name, mass)


@pytest.mark.parametrize("mass", ["diagonal", "dense"])
@pytest.mark.parametrize(
    ("name", "step_size"),
    [("skewed", 0.3), ("skewed", 0.7), ("conjugate", 0.4), ("conjugate", 0.7)],
)
def test_invariance_nuts(name, step_size, mass):
    """Step sizes under which most trajectories have 8 to 31 points, and 2 to 7."""
    check_nuts(name, mass, step_size)


@pytest.mark.slow
@pytest.mark.parametrize("mass", ["diagonal", "dense"])
@pytest.mark.parametrize("name", HMC_TARGETS)
def test_invariance_nuts_of_many_chains(name, mass):
    check_nuts(name, mass, 0.6, moves=4, chains=10 * CHAINS)


# --- the checks fail on spoilt samplers ---------------------------------------------------------


def _always(error, level):
    yes = torch.ones_like(error, dtype=torch.bool)
    return Decision(yes, yes.to(error), error, ~yes)


def accept_always(monkeypatch):
    monkeypatch.setattr(hmc, "metropolis", _always)
    monkeypatch.setattr(pseudo_marginal, "metropolis", _always)


def forget_kinetic_energy(monkeypatch):
    monkeypatch.setattr(GaussianKinetic, "energy", lambda self, r: torch.zeros_like(r[:, 0]))


def forget_noise_norm(monkeypatch):
    monkeypatch.setattr(
        pseudo_marginal, "_half_square_gain", lambda new, old: torch.zeros_like(new[:, 0])
    )


def rotate_wrongly(monkeypatch):
    monkeypatch.setattr(
        integrators,
        "rotate",
        lambda u, p, t: (u * t.cos() + p * t.sin(), p * t.cos() - 0.8 * u * t.sin()),
    )


def keep_rejected_sites(monkeypatch):
    def select_evaluation(accepted, new, old):
        value = select(accepted, new.value, old.value)
        return new._replace(value=value)

    monkeypatch.setattr(pseudo_marginal, "select_evaluation", select_evaluation)


def accept_all_blocks(monkeypatch):
    ratios = Blocks.log_ratios

    def zero(self, new, old):
        return {name: torch.zeros_like(ratio) for name, ratio in ratios(self, new, old).items()}

    monkeypatch.setattr(Blocks, "log_ratios", zero)


def confuse_blocks(monkeypatch):
    ratios = Blocks.log_ratios

    def rolled(self, new, old):
        return {name: ratio.roll(1, -1) for name, ratio in ratios(self, new, old).items()}

    monkeypatch.setattr(Blocks, "log_ratios", rolled)


def test_mistaken_share_of_the_prior_is_noticed(monkeypatch):
    """As if the defended proposal's weights were those of another mixture."""
    target = Extended(*TARGETS["laplace-2"])
    target.draws()
    check(target, joint(target))
    monkeypatch.setattr(particles_module, "PRIOR_SHARE", 0.3)
    spoilt = Extended(*TARGETS["laplace-2"])
    spoilt.draws()
    with pytest.raises(AssertionError, match="standard errors"):
        check(spoilt, joint(spoilt))


def shrink_proposal(monkeypatch):
    """As if the noise were added with weight 1 - rho ** 2, not with its root."""
    monkeypatch.setattr(refresh_module, "math", SimpleNamespace(sqrt=lambda value: value))


def choose(transition, other):
    """The transition where the first coordinate is positive, and another step elsewhere."""

    def step(state, tuning, num_steps):
        first, info = transition.step(state, tuning, num_steps)
        second = other(state, tuning, num_steps)
        where = state.position[:, 0] > 0
        parts = (select(where, new, old) for new, old in zip(first[:3], second[:3], strict=True))
        return State(*parts, select_evaluation(where, first.evaluation, second.evaluation)), info

    return step


def adapt_step_size(transition):
    """A step size that depends on the state."""

    def other(state, tuning, num_steps):
        return transition.step(state, tuning._replace(step_size=0.3), num_steps)[0]

    return choose(transition, other)


def redraw_noise(transition):
    """New noise after the move, outside any accepted move."""

    def step(state, tuning, num_steps):
        state, info = transition.step(state, tuning, num_steps)
        noise = torch.randn_like(state.noise)
        return transition.begin(state.position, noise), info

    return step


def pick_any_particle(transition):
    """Local sites recovered without looking at the weights."""

    def step(state, tuning, num_steps):
        state, info = transition.step(state, tuning, num_steps)
        values = make_target("prior-8").values(state.position, state.noise.reshape(CHAINS, 8, -1))
        evaluation = state.evaluation._replace(local={"x": values[:, 0]})
        return state._replace(evaluation=evaluation), info

    return step


SPOILT_PATCHES = {
    "joint": [accept_always, forget_kinetic_energy, forget_noise_norm, rotate_wrongly]
    + [keep_rejected_sites],
    "fresh": [accept_always, forget_kinetic_energy, accept_all_blocks, confuse_blocks],
    "correlated": [accept_all_blocks, shrink_proposal],
    "slice": [accept_all_blocks],
}
SPOILT_STEPS = [adapt_step_size, redraw_noise, pick_any_particle]


def _transition(method):
    target = make_target("prior-8")
    return joint(target) if method == "joint" else conditional(target, REFRESHES[method])


@pytest.mark.parametrize(
    ("method", "spoil"),
    [(method, spoil) for method, patches in SPOILT_PATCHES.items() for spoil in patches],
)
def test_spoilt_sampler_is_found_out(method, spoil, uncaptured, monkeypatch):
    transition = _transition(method)
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check(make_target("prior-8"), transition)


@pytest.mark.parametrize("spoil", SPOILT_STEPS)
@pytest.mark.parametrize("method", ["joint", "fresh"])
def test_spoilt_step_is_found_out(method, spoil):
    transition = _transition(method)
    with pytest.raises(AssertionError, match="standard errors"):
        check(make_target("prior-8"), transition, step=spoil(transition))


def test_one_block_for_all_is_found_out_if_all_are_accepted(monkeypatch):
    target = make_target("by_hand-1")
    accept_all_blocks(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, conditional(target, CorrelatedRefresh()))


@pytest.mark.parametrize("spoil", [accept_always, forget_kinetic_energy])
def test_spoilt_hmc_is_found_out(spoil, uncaptured, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors|is not finite"):
        check_hmc("skewed", "diagonal")


def test_adapting_hmc_is_found_out():
    with pytest.raises(AssertionError, match="standard errors"):
        check_hmc("skewed", "diagonal", step=adapt_step_size(hmc_of("skewed")))


# --- and on spoilt No-U-Turn samplers -----------------------------------------------------------


def spoil_levels(change):
    """Trajectories whose random numbers are changed before they are used."""

    def spoil(monkeypatch):
        honest = tree.extend

        def extend(grown, motion, *settings):
            *settings, level = settings
            return honest(grown, motion, *settings, change(grown, level.clone()))

        monkeypatch.setattr(nuts, "extend", extend)

    spoil.__name__ = change.__name__
    return spoil


@spoil_levels
def pick_the_last_point(grown, level):
    level[1] = 0.0
    return level


@spoil_levels
def pick_any_point(grown, level):
    """Every point of a doubling with the same probability, whatever its weight."""
    number = grown.num_points + 1
    place = number - 2 ** number.double().log2().floor() + 1
    level[1] = torch.where(level[1] < 1 / place, 0.0, 1.0)
    return level


@spoil_levels
def accept_every_doubling(grown, level):
    level[2] = 0.0
    return level


@spoil_levels
def grow_forwards(grown, level):
    level[0] = 0.0
    return level


def spoil_turns(change):
    """Trajectories that judge by other U-turns."""

    def spoil(monkeypatch):
        honest = tree._turned
        monkeypatch.setattr(tree, "_turned", lambda *marks: change(honest, *marks))

    spoil.__name__ = change.__name__
    return spoil


@spoil_turns
def ignore_turns_of_subtrees(honest, *marks):
    turned = honest(*marks)
    turned[1:] = False
    return turned


@spoil_turns
def judge_turns_at_the_end(honest, starts, previous, sums, momentum_sum, end):
    return (end * (momentum_sum - sums[:-1])).sum(1) <= 0


@spoil_turns
def judge_turns_at_the_start(honest, starts, previous, sums, momentum_sum, end):
    return (starts[:-1] * (momentum_sum - sums[:-1])).sum(1) <= 0


def spoil_energy(change):
    """Points that are weighed by another energy."""

    def spoil(monkeypatch):
        plain, joint = nuts._energy, JointNUTSTransition._energy

        def spoilt(energy, point, value):
            return energy._replace(total=change(energy, point, value.double()))

        monkeypatch.setattr(nuts, "_energy", lambda *at: spoilt(plain(*at), *at))
        monkeypatch.setattr(
            JointNUTSTransition, "_energy", lambda self, *at: spoilt(joint(self, *at), *at)
        )

    spoil.__name__ = change.__name__
    return spoil


@spoil_energy
def turn_energy_round(energy, point, value):
    return -energy.total


@spoil_energy
def forget_kinetic_energy_of_points(energy, point, value):
    return energy.total - (energy.parameters - value)


@spoil_energy
def forget_energy_of_noise(energy, point, value):
    return energy.parameters


@spoil_energy
def forget_momentum_of_noise(energy, point, value):
    return energy.total - 0.5 * point.momentum[2:].double().square().sum(0)


def limit_by_state(transition):
    """Trajectories of one point where the first coordinate is negative."""
    return choose(transition, lambda state, tuning, _: transition.step(state, tuning, 1)[0])


def choose_step_size_by_state(transition):
    """Small steps where the first coordinate is negative; too small for trajectories to turn."""

    def other(state, tuning, num_steps):
        small = tuning._replace(step_size=0.1 * tuning.step_size)
        return transition.step(state, small, num_steps)[0]

    return choose(transition, other)


# What changes the law of a few moves so little that only many chains show it.
FAINT = [pick_any_point, grow_forwards, judge_turns_at_the_end, judge_turns_at_the_start]
SPOILT_TREES = [pick_the_last_point, accept_every_doubling, ignore_turns_of_subtrees]
SPOILT_TREES += [turn_energy_round, forget_kinetic_energy_of_points]
SPOILT_NUTS = {
    joint_nuts: [ignore_turns_of_subtrees, turn_energy_round, forget_kinetic_energy_of_points]
    + [forget_energy_of_noise, forget_momentum_of_noise],
    conditional_nuts: [ignore_turns_of_subtrees, turn_energy_round, accept_all_blocks],
}


@pytest.mark.parametrize("spoil", SPOILT_TREES)
def test_spoilt_nuts_is_found_out(spoil, uncaptured, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check_nuts("skewed", "diagonal", 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", FAINT)
def test_faintly_spoilt_nuts_is_found_out(spoil, uncaptured, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check_nuts("skewed", "diagonal", 0.6, moves=4, chains=10 * CHAINS)


@pytest.mark.parametrize("wrap", [limit_by_state, choose_step_size_by_state])
def test_nuts_of_two_minds_is_found_out(wrap):
    with pytest.raises(AssertionError, match="standard errors"):
        check_nuts("skewed", "diagonal", 0.5, wrap=wrap)


@pytest.mark.parametrize(
    ("make", "spoil"), [(make, spoil) for make, all_ in SPOILT_NUTS.items() for spoil in all_]
)
def test_spoilt_pseudo_marginal_nuts_is_found_out(make, spoil, uncaptured, monkeypatch):
    target = make_target("prior-8")
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, make(target))


@pytest.mark.parametrize("wrap", [limit_by_state, redraw_noise, pick_any_particle])
@pytest.mark.parametrize("make", [joint_nuts, conditional_nuts])
def test_spoilt_pseudo_marginal_nuts_step_is_found_out(make, wrap):
    target = make_target("prior-8")
    transition = make(target)
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, transition, step=wrap(transition))


@pytest.mark.parametrize("make", [conditional_hmc, conditional_nuts])
def test_gradient_at_old_noise_is_found_out(make, monkeypatch):
    """By itself: it changes the law of a few moves too little to be seen."""
    target = make_target("prior-8")
    transition = make(target)
    monkeypatch.setattr(transition.inner, "refreshed", lambda state, tuning: state)
    with pytest.raises(AssertionError, match="a gradient of elsewhere"):
        check(target, transition)
