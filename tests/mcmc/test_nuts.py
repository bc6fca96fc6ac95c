"""No-U-Turn trajectories: against a recursive oracle, at their edges, and against known targets."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MCMC, NUTS, PseudoMarginalNUTS, marginalize, noise
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation import estimator
from pyro_hamflow.mcmc.transitions.base import DIVERGENCE, Tuning
from pyro_hamflow.mcmc.transitions.nuts import JointNUTSTransition, NUTSTransition
from pyro_hamflow.model.potential import Potential
from tests.helpers.exact_draws import Y, bent, latent
from tests.helpers.kinds import long_but
from tests.helpers.paths import returns, volatility

CHAINS = 48


# --- a trajectory by recursion ------------------------------------------------------------------


class Oracle:
    """One chain's trajectory, built by recursion as its definition reads.

    Arguments:
        start: Position and momentum.
        step: From position, momentum and a signed step size to the next pair.
        hamiltonian: Of a pair.
        whiten: From a momentum to the parameters' whitened momentum.
    """

    def __init__(self, start, step, hamiltonian, whiten, step_size, max_depth):
        self.start, self.step, self.whiten = start, step, whiten
        self.error = lambda pair: hamiltonian(pair) - hamiltonian(start)
        self.step_size, self.max_depth = step_size, max_depth
        self.diverged = False

    def subtree(self, pair, sign, depth):
        """The points that follow a pair, in the order of their making, and whether all is well."""
        if depth == 0:
            point = self.step(*pair, sign * self.step_size)
            error = float(self.error(point))
            fine = error <= DIVERGENCE
            self.diverged |= not fine
            return [point], fine
        first, fine = self.subtree(pair, sign, depth - 1)
        if not fine:
            return first, False
        second, fine = self.subtree(first[-1], sign, depth - 1)
        return first + second, fine and not self.turned(first, second)

    def turned(self, first, second):
        a = [self.whiten(momentum) for _, momentum in first]
        b = [self.whiten(momentum) for _, momentum in second]

        def against(path, *ends):
            return any(float(path @ end) <= 0.0 for end in ends)

        return (
            against(sum(a) + sum(b), a[0], b[-1])
            or against(sum(a) + b[0], a[0], b[0])
            or against(sum(b) + a[-1], a[-1], b[-1])
        )

    def run(self, levels):
        """The draw, and how many points were made.

        Arguments:
            levels: Three uniform numbers for every point: direction, pick, and acceptance.
        """
        points, draw, total = [self.start], self.start, 1.0
        made, levels = 0, iter(levels)
        for depth in range(self.max_depth):
            used = [next(levels)]
            sign = 1.0 if used[0][0] < 0.5 else -1.0
            added, fine = self.subtree(points[-1] if sign > 0 else points[0], sign, depth)
            used += [next(levels) for _ in added[1:]]
            made += len(added)
            if not fine:
                break
            weights = [math.exp(-float(self.error(point))) for point in added]
            pick, mass = None, 0.0
            for point, weight, level in zip(added, weights, used, strict=True):
                mass += weight
                pick = point if mass == 0 or level[1] < weight / mass else pick
            if used[-1][2] < mass / total:
                draw = pick
            total += mass
            old = points if sign > 0 else points[::-1]
            points = old + added if sign > 0 else (old + added)[::-1]
            if self.turned(old, added):
                break
        return draw, made


def run_both(transition, state, tuning, step, hamiltonian, whiten, monkeypatch, *, depth=10):
    """The transition and the oracle, from the same start with the same random numbers."""
    torch.manual_seed(3)
    joint = isinstance(transition, JointNUTSTransition)
    momentum = tuning.kinetic.sample(CHAINS)
    position = state.position
    if joint:
        momentum = torch.cat([momentum, torch.randn_like(state.noise)], -1)
        position = torch.cat([position, state.noise], -1)
    torch.manual_seed(3)
    levels, rand = [], torch.rand

    def record(*size, **settings):
        levels.append(rand(*size, **settings))
        return levels[-1]

    monkeypatch.setattr(torch, "rand", record)
    moved, info = transition.step(state, tuning, 2**depth - 1)
    monkeypatch.undo()
    levels = [level for level in levels if level.shape == (3, CHAINS)]  # not those of recovery
    new = torch.cat([moved.position, moved.noise], -1) if joint else moved.position
    limit = depth
    if joint:
        limit = min(depth, int(math.log2(math.pi / tuning.step_size + 1)))
    for chain in range(CHAINS):
        pair = (position[chain], momentum[chain])
        noise = state.noise[chain]
        oracle = Oracle(
            pair,
            lambda z, r, size, noise=noise: step(z, r, size, noise),
            lambda pair, noise=noise: hamiltonian(pair, noise),
            whiten,
            tuning.step_size,
            limit,
        )
        draw, made = oracle.run([level[:, chain].tolist() for level in levels])
        assert made == info.n_steps[chain]
        assert oracle.diverged == info.diverging[chain]
        assert torch.allclose(draw[0], new[chain], rtol=1e-6, atol=1e-8)
    return info


@pytest.mark.parametrize(
    ("step_size", "mass"),
    long_but(
        lambda case: case != (0.05, "diagonal"),
        itertools.product([0.05, 0.3, 1.2], ["diagonal", "dense"]),
    ),
)
def test_trajectories_are_the_recursive_ones(step_size, mass, monkeypatch):
    potential = Potential(bent)
    transition = NUTSTransition(potential, CHAINS, 10)
    inverse_mass = torch.tensor([0.8, 1.5, 0.6])
    if mass == "dense":
        inverse_mass = torch.diag(inverse_mass) + 0.3
    kinetic = GaussianKinetic(inverse_mass)
    torch.manual_seed(0)
    position = torch.randn(CHAINS, 3)
    state = transition.state_at(position, position[:, :0])
    full = torch.diag(inverse_mass) if mass == "diagonal" else inverse_mass
    root = torch.linalg.cholesky(full)

    def step(z, r, size, noise):
        slope = potential.gradients(z[None], noise[None])[1][0]
        r = r - 0.5 * size * slope
        z = z + size * full @ r
        return z, r - 0.5 * size * potential.gradients(z[None], noise[None])[1][0]

    def hamiltonian(pair, noise):
        z, r = pair
        return potential.value(z[None], noise[None])[0] + 0.5 * r @ full @ r

    info = run_both(
        transition,
        state,
        Tuning(step_size, kinetic),
        step,
        hamiltonian,
        lambda r: root.mT @ r,
        monkeypatch,
    )
    depths = set(info.further["tree_depth"].tolist())
    assert len(depths) > 2, "trajectories of few lengths only"
    assert step_size < 1 or info.diverging.any()


@pytest.mark.parametrize("step_size", long_but([0.4], [0.1, 0.4]))
def test_joint_trajectories_are_the_recursive_ones(step_size, monkeypatch):
    potential = Potential(marginalize(latent, ["x"], num_particles=2), (Y,), separate_noise=True)
    transition = JointNUTSTransition(potential, CHAINS, 10)
    size = potential.dimension
    kinetic = GaussianKinetic(torch.tensor([0.8, 0.4]))
    torch.manual_seed(0)
    state = transition.state_at(torch.randn(CHAINS, 2), potential.draw_noise(CHAINS))

    def slope(x):
        _, a, b = potential.gradients(x[None, :size], x[None, size:])
        return torch.cat([a[0], b[0]])

    def step(x, m, h, _):
        m = m - 0.5 * h * slope(x)
        z = x[:size] + h * kinetic.inverse_mass * m[:size]
        c, s = math.cos(h), math.sin(h)
        u, p = x[size:], m[size:]
        x, m = torch.cat([z, c * u + s * p]), torch.cat([m[:size], c * p - s * u])
        return x, m - 0.5 * h * slope(x)

    def hamiltonian(pair, _):
        x, m = pair
        kinetic_part = 0.5 * (kinetic.inverse_mass * m[:size]) @ m[:size]
        rest = 0.5 * (x[size:] @ x[size:] + m[size:] @ m[size:])
        return potential.value(x[None, :size], x[None, size:])[0] + kinetic_part + rest

    tuning = Tuning(step_size, kinetic)
    whiten = lambda m: kinetic.root * m[:size]  # noqa: E731
    info = run_both(transition, state, tuning, step, hamiltonian, whiten, monkeypatch)
    assert info.n_steps.max() <= math.pi / step_size, "the noise turned by more than half a circle"
    assert (info.n_steps == 2 ** int(math.log2(math.pi / step_size + 1)) - 1).any()
    assert not info.further["reached_max_treedepth"].any()


# --- edges --------------------------------------------------------------------------------------


def test_depth_is_limited():
    transition = NUTSTransition(Potential(bent), 8, 3)
    position = torch.zeros(8, 3)
    state = transition.state_at(position, position[:, :0])
    _, info = transition.step(state, Tuning(1e-4, GaussianKinetic(torch.ones(3))), 1023)
    assert (info.n_steps == 7).all()
    assert (info.further["tree_depth"] == 3).all()
    assert info.further["reached_max_treedepth"].all()


def test_one_step_is_a_limit_too():
    transition = NUTSTransition(Potential(bent), 8, 3)
    position = torch.zeros(8, 3)
    state = transition.state_at(position, position[:, :0])
    _, info = transition.step(state, Tuning(0.1, GaussianKinetic(torch.ones(3))), 1)
    assert (info.n_steps == 1).all()


def test_broken_numbers_are_counted():
    """A trajectory that leaves the density's support ends, and its draw stays inside."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(x > 0.5, math.nan, 0.0) * x)

    transition = NUTSTransition(Potential(model), 200, 10)
    position = torch.full((200, 1), 0.3)
    state = transition.state_at(position, position[:, :0])
    moved, info = transition.step(state, Tuning(0.1, GaussianKinetic(torch.ones(1))), 1023)
    assert 0.2 < info.diverging.double().mean() < 1.0
    assert (moved.position <= 0.5).all()
    assert info.acceptance_rate.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    long_but(
        [(JointNUTSTransition, torch.float64)],
        [(NUTSTransition, torch.float32), (JointNUTSTransition, torch.float64)],
    ),
)
def test_compiled_is_eager(kind, dtype, compiled_at_once):
    """With the same random numbers the compiled program makes the same trajectories."""
    torch.set_default_dtype(dtype)
    marginal = marginalize(latent, ["x"], num_particles=2)
    draws = []
    for compile_graphs in (False, True):
        potential = Potential(
            marginal, (Y.to(dtype),), separate_noise=True, compile_graphs=compile_graphs
        )
        transition = kind(potential, 4, 5)
        torch.manual_seed(0)
        position, noise = torch.randn(4, 2), torch.randn(4, potential.noise_dimension)
        state = transition.state_at(position, noise)
        moved, info = transition.step(state, Tuning(0.1, GaussianKinetic(torch.ones(2))), 31)
        assert moved.position.dtype == dtype
        assert info.energy_error.dtype == torch.float64
        draws.append(moved.position)
    assert torch.allclose(draws[0], draws[1], rtol=1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("depth", [0, 21])
def test_depth_out_of_range(depth):
    with pytest.raises(ValueError, match=f"`max_tree_depth` is {depth}: expected 1 to 20"):
        NUTS(bent, max_tree_depth=depth)


def test_statistics_of_a_run():
    mcmc = MCMC(NUTS(bent), 50, 50, num_chains=3, seed=0, disable_progbar=True)
    mcmc.run()
    stats = mcmc.draws.stats
    depth, steps = stats["tree_depth"], stats["n_steps"]
    assert depth.shape == steps.shape == (3, 50)
    assert ((steps >= 2 ** (depth - 1)) & (steps < 2**depth)).all()
    assert (stats["n_gradients"] == steps).all()
    assert not stats["reached_max_treedepth"].any()


def test_trajectories_cut_short_are_told():
    kernel = NUTS(bent, max_tree_depth=2, step_size=1e-3, adapt_step_size=False)
    mcmc = MCMC(kernel, 10, 0, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run()
    assert "20 of 20 trajectories reached `max_tree_depth`" in mcmc.messages[0]


@pytest.mark.parametrize("method", ["joint", "conditional"])
def test_statistics_of_a_pseudo_marginal_run(method):
    marginal = marginalize(latent, ["x"], num_particles=4)
    kernel = PseudoMarginalNUTS(marginal, method=method)
    mcmc = MCMC(kernel, 50, 50, num_chains=3, seed=0, disable_progbar=True)
    mcmc.run(Y)
    stats = mcmc.draws.stats
    more = 0 if method == "joint" else 1
    assert (stats["n_gradients"] == stats["n_steps"] + more).all()
    assert (stats["n_densities"] == (1 if method == "joint" else 2)).all()
    assert mcmc.draws.local["x"].shape == (3, 50, 3)


def by_hand(num_particles):
    """The latent-variable model with an estimate that is accepted or rejected as a whole."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        x = mean + 3.0 * noise("u", (num_particles, len(y)))
        terms = dist.Bernoulli(logits=2.0 * x).log_prob(y)
        pyro.factor("estimate", (terms.logsumexp(0) - math.log(num_particles)).sum())

    return model


@pytest.mark.parametrize(
    ("model", "chosen", "why"),
    [
        (by_hand(2), "joint", "with the noise held, the parameters could move little"),
        (by_hand(200), "conditional", "fresh noise is often accepted as a whole"),
        (
            marginalize(latent, ["x"], num_particles=2, proposal="prior"),
            "conditional",
            "each element's noise is refreshed on its own",
        ),
    ],
    ids=["one block, few", "one block, many", "blocks"],
)
def test_method_is_chosen_by_the_variance(model, chosen, why):
    kernel = PseudoMarginalNUTS(model)
    mcmc = MCMC(kernel, 5, 5, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(Y.repeat(6))
    assert kernel.settings["method"] == chosen
    assert why in mcmc.messages[0]


@pytest.mark.parametrize(
    ("largest", "chosen", "why"),
    [(0.001, "joint", "noise of a path moves with the parameters"), (0.25, "conditional", "whole")],
)
def test_method_of_one_path_is_chosen_by_a_smaller_variance(largest, chosen, why, monkeypatch):
    monkeypatch.setattr(estimator, "_LARGEST_PATH_VARIANCE", largest)
    kernel = PseudoMarginalNUTS(marginalize(volatility, ["x"], num_particles=1))
    mcmc = MCMC(kernel, 5, 5, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(returns(20))
    assert kernel.settings["method"] == chosen
    assert why in mcmc.messages[0]
