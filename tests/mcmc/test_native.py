"""Moves in machine code: torch's own trajectories, whatever threads and calls, in whole runs."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, MCMC, NUTS, RandomWalk, to_inference_data
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.mcmc.transitions.random_walk import RandomWalkTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.machine_code import compiler
from tests.helpers.exact_draws import bent
from tests.helpers.native import WAYS, assert_same, by_both, native_transition, native_walk
from tests.helpers.zoo import ZOO, correlations, eight_schools_noncentred

CHAINS, DEPTH = 24, 6
MASSES = ["diagonal", "dense"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """How machine code moves several chains."""
    WAYS[request.param](monkeypatch)
    return request.param


def kinetic_of(dimension, mass):
    inverse_mass = 0.5 + torch.rand(dimension)
    if mass == "dense":
        inverse_mass = torch.diag(inverse_mass) + 0.2
    return GaussianKinetic(inverse_mass)


MOVES = {
    "tree": (
        lambda potential: NUTSTransition(potential, CHAINS, DEPTH),
        lambda potential: native_transition(potential, DEPTH),
    ),
    "line": (
        lambda potential: HMCTransition(potential, CHAINS),
        lambda potential: native_transition(potential, None),
    ),
    "walk": (RandomWalkTransition, native_walk),
}


def both(model, mass, step_size, num_steps, monkeypatch, *, move, spread=1.0):
    """One draw by torch and one in machine code, with the same momenta and uniform numbers."""
    potential = Potential(model)
    transitions = [make(potential) for make in MOVES[move]]
    tuning = Tuning(step_size, kinetic_of(potential.dimension, mass), torch.rand(CHAINS) + 0.5)
    position = spread * torch.randn(CHAINS, potential.dimension)
    return by_both(*transitions, position, tuning, num_steps, monkeypatch, tree=move == "tree")


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("step_size", [0.05, 0.3, 0.8])
def test_trees_are_those_of_torch(step_size, mass, way, monkeypatch):
    expected, found = both(bent, mass, step_size, 2**DEPTH - 1, monkeypatch, move="tree")
    assert_same(expected, found)
    info = found[1]
    assert len(set(info.further["tree_depth"].tolist())) > 2, "trajectories of few lengths only"
    assert step_size < 0.8 or info.diverging.any()
    assert step_size > 0.1 or info.further["reached_max_treedepth"].any()


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_limited_trees_are_those_of_torch(num_steps, way, monkeypatch):
    assert_same(*both(bent, "dense", 0.1, num_steps, monkeypatch, move="tree"))


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("step_size", [0.1, 0.4])
def test_straight_trajectories_are_those_of_torch(step_size, mass, way, monkeypatch):
    expected, found = both(bent, mass, step_size, 7, monkeypatch, move="line")
    assert_same(expected, found)
    accepted = found[1].accepted
    assert accepted.any() and not accepted.all()


@pytest.mark.parametrize("mass", MASSES)
def test_walks_are_those_of_torch(mass, monkeypatch):
    expected, found = both(bent, mass, 0.7, 1, monkeypatch, move="walk")
    assert_same(expected, found)
    accepted = found[1].accepted
    assert accepted.any() and not accepted.all()


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", ZOO)
def test_trajectories_of_the_zoo_are_those_of_torch(name, move, monkeypatch):
    num_steps = 2**DEPTH - 1 if move == "tree" else 6
    found = both(ZOO[name], "dense", 0.1, num_steps, monkeypatch, move=move, spread=0.5)
    assert_same(*found)


def test_trajectories_through_factorisations_are_those_of_torch(monkeypatch):
    assert_same(
        *both(correlations, "dense", 0.1, 2**DEPTH - 1, monkeypatch, move="tree", spread=0.5)
    )


def draws_of(transition, *, cuts, threads=1):
    """Draws of some chains in calls of so many draws each."""
    torch.set_num_threads(threads)
    transition.stream.seed = 5
    position = torch.zeros(6, transition.target.dimension)
    state = transition.state_at(position, position[:, :0])
    tuning = Tuning(0.4, kinetic_of(position.shape[1], "diagonal"))
    parts = []
    for count in cuts:
        transition._last_call = float(threads > 1)
        state, made = transition.draw(state, tuning, [31] * count)
        parts.append(made.positions)
    torch.set_num_threads(1)
    return torch.cat(parts, 1)


def test_draws_depend_neither_on_threads_nor_on_calls(way):
    potential = Potential(bent)
    torch.manual_seed(0)
    expected = draws_of(native_transition(potential, 5), cuts=[12])
    for settings in ({"cuts": [1] * 12}, {"cuts": [5, 7]}, {"cuts": [12], "threads": 3}):
        torch.manual_seed(0)
        assert torch.equal(expected, draws_of(native_transition(potential, 5), **settings))
    assert not torch.equal(expected[0], expected[1])
    assert len(expected[0].unique(dim=0)) > 6


def quartic():
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), (2,)))
    pyro.factor("quartic", -0.25 * x.pow(4).sum())


def test_large_gains_of_energy_are_those_of_torch(way, monkeypatch):
    """Weights go beyond what a number holds, where the first steps fall from far out."""
    potential = Potential(quartic)
    transitions = [make(potential) for make in MOVES["tree"]]
    position = 20.0 + torch.rand(CHAINS, 2)
    tuning = Tuning(1.8**0.5 / 20.0, GaussianKinetic(torch.ones(2)))
    expected, found = by_both(*transitions, position, tuning, 31, monkeypatch, tree=True)
    assert_same(expected, found)
    assert (found[1].energy_error < -1000.0).any()


@pytest.mark.parametrize("depth", [5, None])
def test_chains_side_by_side_draw_what_each_draws(depth, monkeypatch):
    """With a rest of chains, and trees of other lengths."""
    potential, found = Potential(bent), []
    position = torch.randn(10, 3)
    tuning = Tuning(0.1, kinetic_of(3, "dense"), torch.linspace(0.5, 2.0, 10))
    for make in WAYS.values():
        with monkeypatch.context() as patch:
            make(patch)
            transition = native_transition(potential, depth)
            transition.stream.seed = 3
            state = transition.state_at(position, position[:, :0])
            found.append(transition.draw(state, tuning, [31] * 10)[1])
    assert len(found[0].n_steps.unique()) > (3 if depth else 0)
    for name, one in found[0]._asdict().items():
        other = getattr(found[1], name)
        assert torch.allclose(one.double(), other.double(), rtol=1e-6, atol=1e-6), name


def test_random_numbers_are_those_of_their_laws(way):
    """Where every move is accepted, as on a flat density, momenta are what moves."""

    def flat():
        pyro.sample("x", dist.Normal(0.0, 1e8).expand([3]).to_event(1))

    transition = native_transition(Potential(flat), None)
    position = torch.zeros(1, 3)
    state = transition.state_at(position, position[:, :0])
    tuning = Tuning(1.0, GaussianKinetic(torch.ones(3)))
    _, made = transition.draw(state, tuning, [1] * 40_000)
    shifts = made.positions[0].diff(dim=0)
    assert made.accepted.all()
    error = len(shifts) ** -0.5
    assert (shifts.mean(0).abs() < 4.5 * error).all()
    assert ((shifts.T.cov() - torch.eye(3)).abs() < 4.5 * 1.5 * error).all()
    assert ((shifts**4).mean(0) - 3.0).abs().max() < 4.5 * 96**0.5 * error
    for point in (-1.5, 0.0, 1.0):
        share = torch.special.ndtr(torch.tensor(point))
        assert ((shifts < point).double().mean(0) - share).abs().max() < 4.5 * 0.5 * error
    assert (shifts[1:] * shifts[:-1]).mean(0).abs().max() < 4.5 * error


def run(kernel, *, draws=60, **settings):
    mcmc = MCMC(kernel, draws, 60, num_chains=3, disable_progbar=True, seed=2, **settings)
    mcmc.run()
    return mcmc


@pytest.mark.parametrize("kernel", [HMC, NUTS, RandomWalk])
def test_runs_have_the_statistics_of_torch(kernel):
    expected = run(kernel(eight_schools_noncentred, engine="torch"))
    found = run(kernel(eight_schools_noncentred, engine="native"))
    kinds = [
        {name: (stat.dtype, stat.shape) for name, stat in mcmc.draws.stats.items()}
        for mcmc in (expected, found)
    ]
    assert kinds[0] == kinds[1]
    assert found.draws.position.dtype == expected.draws.position.dtype
    assert found.draws.position.shape == expected.draws.position.shape
    potential = found.kernel.potential
    position = found.draws.position.flatten(0, 1)
    lp = -potential.value(position, position[:, :0])
    assert torch.allclose(found.draws.stats["lp"].flatten(), lp)
    settings = to_inference_data(found).attrs["kernel_settings"]
    assert '"engine": "native"' in settings and '"engine_reason": "asked for"' in settings


def test_a_seed_repeats_a_run_whatever_the_calls():
    seen = []
    first = run(NUTS(eight_schools_noncentred, engine="native"))
    again = run(
        NUTS(eight_schools_noncentred, engine="native"),
        hook_fn=lambda kernel, params, stage, i: seen.append((stage, i)),
    )
    assert torch.equal(first.draws.position, again.draws.position)
    assert seen == [(s, i) for s in ("Warmup", "Sample") for i in range(60)]
    kept = run(NUTS(eight_schools_noncentred, engine="native"), save_warmup=True)
    assert torch.equal(first.draws.position, kept.draws.position)
    assert kept.warmup_draws.position.shape[1] == 60


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    mcmc = run(NUTS(eight_schools_noncentred, engine="native"))
    assert mcmc.draws.position.dtype == mcmc.draws.stats["lp"].dtype == torch.float32
    assert mcmc.draws.stats["energy"].dtype == torch.float64
    assert mcmc.draws.stats["acceptance_rate"].mean() > 0.5


def interrupt(kernel, params, stage, i):
    if stage == "Sample" and i == 20:
        raise KeyboardInterrupt


def test_an_interrupted_run_keeps_its_draws():
    with pytest.warns(RuntimeWarning, match="interrupted: 21 of 60"):
        mcmc = run(NUTS(eight_schools_noncentred, engine="native"), hook_fn=interrupt)
    assert mcmc.draws.position.shape[1] == 21


def test_without_a_compiler_torch_draws(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRO_HAMFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "compiler", lambda: None)
    mcmc = run(NUTS(ZOO["weighted_terms"], engine="native"), draws=5)
    assert mcmc.kernel.settings["engine"] == "torch"
    sentence = "NUTS: draws are made by torch, for the native engine has no code for"
    assert any(sentence in message for message in mcmc.messages)


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="`engine` is 'rust'"):
        NUTS(bent, engine="rust")


def test_moves_under_a_map_are_left_to_torch():
    kernel = NUTS(eight_schools_noncentred, transport="flow", engine="native", max_tree_depth=2)
    kernel.begin(4, 20)
    assert kernel.settings["engine_reason"] == "moves are made under a map"
    assert "NUTS: draws are made by torch, for moves are made under a map." in kernel.messages


def test_long_runs_are_native_where_nothing_is_said():
    kernel = HMC(eight_schools_noncentred)
    kernel.planned_draws = 10**5
    kernel.begin(4, 20)
    assert kernel.settings["engine"] == "native"
    kernel.planned_draws = 100
    kernel.begin(4, 20)
    assert kernel.settings["engine"] == "torch"
