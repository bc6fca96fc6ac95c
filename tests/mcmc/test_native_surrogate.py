"""Learned energies in machine code: torch's own trajectories and energies, in whole runs."""

from __future__ import annotations

import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HNNHMC, HNNNUTS, MCMC, marginalize
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.native import NativeTransition, Stream
from pyro_hamflow.mcmc.transitions.native_energy import NativeEnergy
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.machine_code import compiler
from pyro_hamflow.surrogates.costs import Clock
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from pyro_hamflow.surrogates.targets import SurrogateDensity
from tests.helpers.exact_draws import bent, make_target
from tests.helpers.native import assert_same, by_both
from tests.helpers.zoo import eight_schools_noncentred

CHAINS, DEPTH = 24, 6
KERNELS = [HNNHMC, HNNNUTS]


def density_of(model, *, level, hidden=(16, 16)):
    """A network that has learned nothing, softened above an energy."""
    potential = Potential(model)
    torch.manual_seed(0)
    network = PotentialNetwork(potential.dimension, hidden=hidden)
    network.whiten_by(torch.randn(50, potential.dimension))
    with torch.no_grad():
        network.network.last.mul_(30.0)
    density = SurrogateDensity(potential, network)
    density.softened_above.fill_(level)
    return density


@pytest.mark.parametrize("level", [torch.inf, 1.0])
@pytest.mark.parametrize("depth", [None, DEPTH])
def test_trajectories_are_those_of_torch(depth, level, monkeypatch):
    density = density_of(bent, level=level)
    slow = HMCTransition(density, CHAINS)
    if depth is not None:
        slow = NUTSTransition(density, CHAINS, depth)
    position = torch.randn(CHAINS, density.dimension)
    mass = torch.eye(density.dimension) + 0.2
    tuning = Tuning(0.3, GaussianKinetic(mass), torch.rand(CHAINS) + 0.5)
    native = NativeTransition(density, depth, Stream())
    num_steps = 7 if depth is None else 2**depth - 1
    tree = depth is not None
    expected, found = by_both(slow, native, position, tuning, num_steps, monkeypatch, tree=tree)
    assert_same(expected, found)
    assert found[1].accepted.any()


def test_several_transitions_are_those_one_by_one():
    density = density_of(bent, level=2.0)
    together, apart = (NativeTransition(density, DEPTH, Stream(7)) for _ in range(2))
    position = torch.randn(CHAINS, density.dimension)
    tuning = Tuning(0.3, GaussianKinetic(torch.eye(density.dimension)))
    state, info, steps = together.several(
        together.state_at(position, position[:, :0]), tuning, 63, 3
    )
    other, count = apart.state_at(position, position[:, :0]), torch.zeros(CHAINS).long()
    for _ in range(3):
        other, last = apart.step(other, tuning, 63)
        count += last.n_steps
    assert torch.equal(state.position, other.position)
    assert torch.equal(info.energy, last.energy)
    assert torch.equal(steps, count)


@pytest.mark.parametrize("name", ["prior-8", pytest.param("laplace-2", marks=pytest.mark.slow)])
def test_energies_and_local_sites_are_those_of_torch(name):
    target = make_target(name)
    potential = target.potential
    position = 0.3 * torch.randn(9, potential.dimension)
    noise, energy = potential.draw_noise(9), NativeEnergy(potential)
    torch.manual_seed(1)
    expected = potential.evaluate(position, noise)
    torch.manual_seed(1)
    found = energy.evaluate(position, noise)
    assert torch.allclose(found.value, expected.value, rtol=1e-10)
    assert found.local.keys() == expected.local.keys()
    for one, other in zip((found.log_likelihoods, found.local), expected[1:], strict=True):
        for part in other:
            assert torch.allclose(one[part], other[part], rtol=1e-10), part


def learner(kind, model=eight_schools_noncentred, **settings):
    return kind(model, **({"fallback": False, "training_steps": 60, "rounds": 1} | settings))


def run(kernel, *, draws=50, **settings):
    mcmc = MCMC(kernel, draws, 60, num_chains=3, disable_progbar=True, seed=2, **settings)
    mcmc.run()
    return mcmc


@pytest.mark.parametrize("kind", KERNELS)
def test_runs_have_the_statistics_of_torch(kind):
    expected, found = (run(learner(kind, engine=engine)) for engine in ("torch", "native"))
    kinds = [
        {name: (stat.dtype, stat.shape) for name, stat in mcmc.draws.stats.items()}
        for mcmc in (expected, found)
    ]
    assert kinds[0] == kinds[1]
    assert found.draws.position.dtype == expected.draws.position.dtype
    assert found.kernel.settings["engine"] == "native"
    assert found.kernel.settings["engine_reason"] == "asked for"
    assert found.kernel.report.following == "surrogate"
    position = found.draws.position.flatten(0, 1)
    lp = -found.kernel.potential.value(position, position[:, :0])
    assert torch.allclose(found.draws.stats["lp"].flatten(), lp)


def walk(y):
    step = pyro.sample("step", dist.LogNormal(-1.0, 0.5))
    x = torch.zeros(())
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, step))
        pyro.sample(f"y_{t}", dist.Poisson(x.exp()), obs=y[t])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_path_is_integrated_out_along_a_learned_energy(engine):
    """All of a path is one estimate, and its true gradients are followed by the same engine."""
    y = torch.tensor([0.0, 1.0, 2.0, 2.0, 4.0, 7.0])
    kernel = learner(HNNNUTS, marginalize(walk, ["x"]), engine=engine, true_share=0.5)
    mcmc = MCMC(kernel, 200, 100, num_chains=4, disable_progbar=True, seed=2)
    mcmc.run(y)
    assert kernel.report.following == "surrogate"
    stats, step = mcmc.draws.stats, mcmc.draws.position[..., 0]
    assert stats["surrogate_error"].isnan().any() and not stats["surrogate_error"].isnan().all()
    estimates = stats["log_likelihood_estimate"]
    assert estimates.shape == step.shape and len(estimates.unique()) > step.numel() / 4
    expected, spread = moments_by_quadrature(y)
    error = spread / math.sqrt(float(arviz.ess(step.numpy())))
    assert abs(float(step.mean()) - expected) < 4.0 * error


def moments_by_quadrature(y):
    """Mean and standard deviation of the logarithm of the walk's step, by a grid."""
    steps, x = torch.linspace(-3.5, 1.5, 60), torch.linspace(-6.0, 6.0, 800)
    log_density = dist.Normal(-1.0, 0.5).log_prob(steps)
    for i, step in enumerate(steps.exp()):
        moves = dist.Normal(x[:, None], step).log_prob(x).softmax(-1)
        level = dist.Normal(0.0, step).log_prob(x).softmax(-1)
        for t, count in enumerate(y):
            level = level if t == 0 else level @ moves
            level = level * dist.Poisson(x.exp()).log_prob(count).exp()
        log_density[i] += level.sum().log()
    weights = log_density.softmax(-1)
    mean = (weights * steps).sum()
    return float(mean), float((weights * (steps - mean).square()).sum().sqrt())


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_seed_repeats_a_run_whatever_the_calls(engine):
    first = run(learner(HNNHMC, engine=engine, true_share=0.5))
    hooked = run(learner(HNNHMC, engine=engine, true_share=0.5), hook_fn=lambda *_: None)
    assert torch.equal(first.draws.position, hooked.draws.position)
    for name, stat in first.draws.stats.items():
        assert torch.equal(stat.nan_to_num(7.0), hooked.draws.stats[name].nan_to_num(7.0)), name
    followed = ~first.draws.stats["surrogate_error"].isnan()
    assert followed.any() and not followed.all()


@pytest.mark.slow
def test_refits_and_other_models_compile_nothing_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRO_HAMFLOW_CACHE", str(tmp_path))
    compiled, honest = [], compiler.compiled
    monkeypatch.setattr(compiler, "compiled", lambda *a: compiled.append(a) or honest(*a))

    def wide():
        pyro.sample("x", dist.Normal(0.0, 3.0).expand([10]).to_event(1))

    settings = {"engine": "native", "hidden": (11, 12), "rounds": 2, "true_share": 0.0}
    run(learner(HNNHMC, **settings))
    first = len(compiled)
    assert 1 <= first <= 3  # the network, the energy and the true gradient, whatever is kept
    run(learner(HNNHMC, **settings))
    assert len(compiled) == first
    run(learner(HNNHMC, wide, **settings))
    assert len(compiled) <= first + 2  # this model's own


@pytest.mark.slow
def test_single_precision():
    torch.set_default_dtype(torch.float32)
    mcmc = run(learner(HNNNUTS, engine="native"))
    assert mcmc.draws.position.dtype == mcmc.draws.stats["lp"].dtype == torch.float32
    assert mcmc.draws.stats["energy"].dtype == torch.float64
    assert mcmc.draws.stats["acceptance_rate"].mean() > 0.3


def test_without_a_compiler_torch_follows(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRO_HAMFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "compiler", lambda: None)
    mcmc = run(learner(HNNHMC, engine="native", hidden=(7,)), draws=20)
    assert mcmc.kernel.settings["engine"] == "torch"
    assert any("HNNHMC: draws are made by torch, for the native" in m for m in mcmc.messages)


def test_long_runs_are_native_where_nothing_is_said():
    for draws, engine in ((10**6, "native"), (100, "torch")):
        kernel = learner(HNNHMC)
        kernel.planned_draws = draws
        state = kernel.begin(4, 60)
        while kernel.warming:
            state, _ = kernel.advance(state)
        assert kernel.settings["engine"] == engine, kernel.settings["engine_reason"]


@pytest.mark.parametrize(("draws", "engine"), [(10**5, "native"), (20, "torch"), (None, "torch")])
def test_true_gradients_are_followed_by_machine_code_where_a_network_does_not_pay(draws, engine):
    kernel = HNNNUTS(eight_schools_noncentred)
    kernel.planned_draws = draws
    kernel.begin(4, 60)
    assert kernel.report.following == "true gradients"
    assert kernel.settings["engine"] == engine
    assert draws is not None or kernel._surrogate_run.native_draws is None


def test_what_a_network_has_to_beat_are_gradients_in_machine_code():
    potential = Potential(eight_schools_noncentred)
    torch_alone, few, many = (Clock(potential, draws) for draws in (None, 10.0, 1e6))
    assert few.true_seconds(4, 8.0) == few.seconds_later("gradient", 4)
    assert many.true_seconds(4, 8.0) < 0.2 * torch_alone.true_seconds(4, 8.0)


def test_what_is_judged_at_every_point_is_left_to_torch():
    mcmc = run(learner(HNNHMC, engine="native", correction="per leaf"), draws=10)
    assert mcmc.kernel.settings["engine"] == "torch"
    sentence = "HNNHMC: draws are made by torch, for every point of a trajectory is judged."
    assert sentence in mcmc.messages
