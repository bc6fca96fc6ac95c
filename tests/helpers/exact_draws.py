"""Targets whose exact draws are known, and the check that transitions keep them.

The latent-variable model has bounded likelihood, so that its joint posterior of parameters and
local sites is drawn exactly by rejection from the prior. Its extended target then follows: one
particle of each element, picked uniformly, is given the noise that leads to the element's local
value, and all other noise is standard normal.
"""

from __future__ import annotations

import math
from functools import cache

import pyro
import pyro.distributions as dist
import torch

from pyro_hamflow import marginalize, noise
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.marginal.noise_layout import Stratum
from pyro_hamflow.marginal.points import lattice, noise_count
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.native_estimate import NativeEstimateTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import JointTransition
from pyro_hamflow.model.potential import Potential
from tests.helpers.laws import assert_invariant

CHAINS = 10_000
DEPTH = 5
MOST_POINTS = 2**DEPTH - 1
Y = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
SLOPE = 2.0
WEIGHT = 0.7  # of the first component of the mixture prior


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


def bent():
    """An asymmetric density with a narrow end, where long and broken trajectories occur."""
    scale = pyro.sample("scale", dist.Normal(0.0, 1.5))
    pyro.sample("x", dist.Normal(0.3 * scale.square(), scale.exp()).expand([2]).to_event(1))


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
        return [noise_count(self.points, count) for count in self.counts]

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
        if self.kind != "by hand" and self.model.proposal.name == "laplace":
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
            elif self.points == "antithetic":
                mirrored = index >= vectors
                point = torch.where(mirrored, -point, point)
                slot = torch.where(mirrored, index - vectors, index)
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
    "antithetic-3": ("normal", 3, "prior", "antithetic"),
    "antithetic-laplace-8": ("normal", 8, "laplace", "antithetic"),
    "mixture-3": ("mixture", 3),
    "mixture-laplace-3": ("mixture", 3, "laplace"),
    "mixture-rqmc-5": ("mixture", 5, "prior", "rqmc"),
    "by_hand-2": ("by hand", 2),
    "by_hand-8": ("by hand", 8),
}


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
    state = transition.state_at(position, u)
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
    gradient = transition.state_at(state.position, state.noise).gradient
    assert torch.allclose(gradient, state.gradient, rtol=1e-9, atol=1e-9), "a gradient of elsewhere"


def setting(target, transition):
    """Tuning and number of steps with which the checks have power."""
    inner = getattr(transition, "inner", transition)
    joint, straight = inner is transition, isinstance(inner, HMCTransition | JointTransition)
    if isinstance(transition, NativeEstimateTransition):
        joint, straight = transition.is_joint, transition.max_tree_depth is None
    if straight:
        step_size = target.joint_step if joint else 0.9
        return Tuning(step_size, GaussianKinetic(torch.tensor([0.7, 0.4]))), 4
    # A light mass, so that parameters turn back long before the noise has made half a turn.
    step_size = target.joint_nuts_step if joint else 0.5
    return Tuning(step_size, GaussianKinetic(torch.tensor([2.0, 1.2]))), MOST_POINTS


def depths_of(info):
    """The depths of trajectories that occurred."""
    return set() if "tree_depth" not in info.further else set(info.further["tree_depth"].tolist())


HMC_TARGETS = {
    "skewed": (skewed, (), skewed_draws, [0.7, 0.6, 0.9]),
    "conjugate": (conjugate, (DATA,), conjugate_draws, [0.3, 0.6]),
}


@cache
def potential_of(name):
    model, args, _, _ = HMC_TARGETS[name]
    return Potential(model, args)


def check_known(name, mass, transition, step_size, num_steps, *, step=None, moves=2, chains=CHAINS):
    """Moves exact draws of a target without noise a few times, and compares."""
    _, _, draw, inverse_mass = HMC_TARGETS[name]
    inverse_mass = torch.tensor(inverse_mass)
    if mass == "dense":
        inverse_mass = torch.diag(inverse_mass) + 0.15
    tuning = Tuning(step_size, GaussianKinetic(inverse_mass))
    position = draw(chains)
    state = transition.state_at(position, position.new_zeros(chains, 0))
    depths = set()
    for _ in range(moves):
        state, info = (step or transition.step)(state, tuning, num_steps)
        depths |= depths_of(info)
    assert_invariant({"theta": position}, {"theta": state.position})
    assert 0.3 < info.acceptance_rate.mean().item() < 0.98
    assert "tree_depth" not in info.further or len(depths) > 2, "trajectories of few lengths only"
    fresh = transition.state_at(state.position, state.noise)
    assert torch.allclose(fresh.evaluation.value, state.evaluation.value, rtol=1e-10)
    assert torch.allclose(fresh.gradient, state.gradient, rtol=1e-10, atol=1e-10)
