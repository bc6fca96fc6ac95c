"""Random walk, MALA, and moves made of several keep their targets; spoilt, they do not."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MALA, MCMC, CorrelatedRefresh, RandomWalk, marginalize, to_inference_data
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.kernels.random_walk import _BEST_RATE, _BEST_RATES
from pyro_hamflow.mcmc.transitions import mixture, random_walk
from pyro_hamflow.mcmc.transitions.base import (
    Tuning,
    metropolis,
    metropolis_of_point,
    select_state,
)
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.in_blocks import InBlocks
from pyro_hamflow.mcmc.transitions.independence import IndependenceTransition
from pyro_hamflow.mcmc.transitions.mixture import CycleTransition, MixtureTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition, JointTransition
from pyro_hamflow.mcmc.transitions.random_walk import RandomWalkTransition
from tests.helpers.exact_draws import (
    CHAINS,
    DEPTH,
    HMC_TARGETS,
    MOST_POINTS,
    check,
    check_known,
    make_target,
    potential_of,
)
from tests.helpers.guides import guide_of
from tests.helpers.kinds import long_but
from tests.helpers.laws import scores
from tests.helpers.native import native_estimate_transition, native_walk, spoil_line
from tests.helpers.targets import effects

TUNING = Tuning(0.7, GaussianKinetic(torch.tensor([0.7, 0.6, 0.9], dtype=torch.float64)))
NOISY = ["prior-8", "laplace-2", "rqmc-8", "by_hand-1"]


def conditional(target, inner):
    return ConditionalTransition(inner, CorrelatedRefresh(), Blocks(target.potential))


@pytest.mark.parametrize("mass", ["diagonal", "dense"])
@pytest.mark.parametrize("name", HMC_TARGETS)
def test_invariance_of_random_walk(name, mass):
    check_known(name, mass, RandomWalkTransition(potential_of(name)), 1.0, 1, moves=4)
    check_known(name, mass, native_walk(potential_of(name)), 1.0, 1, moves=4)


@pytest.mark.parametrize("name", long_but(["prior-8"], NOISY))
def test_invariance_of_random_walk_with_noise(name):
    target = make_target(name)
    check(target, conditional(target, RandomWalkTransition(target.potential)))
    refresh = CorrelatedRefresh()
    check(target, native_estimate_transition(target.potential, refresh, None, walks=True))


# --- a block after the other --------------------------------------------------------------------


def test_invariance_in_blocks():
    target = make_target("prior-8")
    rows = len(target.draws()[0]) // 4
    inner = conditional(target, HMCTransition(target.potential, rows))
    tuning, steps = Tuning(0.9, GaussianKinetic(torch.tensor([0.7, 0.4]))), 4
    blocks = InBlocks(inner, rows)
    check(target, blocks, step=lambda state, *_: blocks.step(state, tuning, steps))


@pytest.mark.parametrize("scale", [None, torch.linspace(0.2, 1.0, 6, dtype=torch.float64)])
def test_a_block_moves_as_it_would_alone(scale):
    target = make_target("prior-8")
    position, noise = (part[:6] for part in target.draws()[:2])
    inner = conditional(target, NUTSTransition(target.potential, 2, DEPTH))
    blocks = InBlocks(inner, 2)
    torch.manual_seed(1)
    tuning = Tuning(0.5, GaussianKinetic(torch.tensor([2.0, 1.2])), scale)
    moved, info = blocks.step(blocks.state_at(position, noise), tuning, MOST_POINTS)
    torch.manual_seed(1)
    states = [inner.state_at(position[i : i + 2], noise[i : i + 2]) for i in (0, 2, 4)]
    for number, state in enumerate(states):
        own = slice(2 * number, 2 * number + 2)
        alone = tuning._replace(step_scale=None if scale is None else scale[own])
        expected, its_info = inner.step(state, alone, MOST_POINTS)
        assert torch.equal(moved.position[own], expected.position)
        assert torch.equal(moved.noise[own], expected.noise)
        assert torch.equal(moved.gradient[own], expected.gradient)
        assert torch.equal(moved.evaluation.local["x"][own], expected.evaluation.local["x"])
        assert torch.equal(info.energy_error[own], its_info.energy_error)
        assert torch.equal(info.further["tree_depth"][own], its_info.further["tree_depth"])


@pytest.mark.parametrize("mass", ["diagonal", "dense"])
@pytest.mark.parametrize("name", HMC_TARGETS)
def test_invariance_of_langevin(name, mass):
    check_known(name, mass, HMCTransition(potential_of(name), CHAINS), 0.8, 1, moves=4)


def test_a_poor_proposal_without_trajectory_is_no_divergence():
    errors, uniform = torch.tensor([-1.0, 0.5, 2000.0, torch.nan]), torch.full((4,), 0.5)
    flown, jumped = metropolis(errors, uniform), metropolis_of_point(errors, uniform)
    assert flown.diverging.tolist() == [False, False, True, True]
    assert not jumped.diverging.any()
    assert jumped.accepted.tolist() == flown.accepted.tolist() == [True, True, False, False]


def skewed_steps(monkeypatch):
    """Steps whose scale depends on where they begin, without the correction for it."""
    honest = RandomWalkTransition.step

    def step(self, state, tuning, num_steps):
        scale = 0.2 + 0.8 * (state.position[:, 0] > 0)
        return honest(self, state, tuning._replace(step_scale=scale), num_steps)

    monkeypatch.setattr(RandomWalkTransition, "step", step)


def shifted_steps(monkeypatch):
    honest = random_walk.times
    monkeypatch.setattr(random_walk, "times", lambda rows, root: honest(rows, root) + 0.3)


def half_the_energy(monkeypatch):
    honest = random_walk.metropolis_of_point
    monkeypatch.setattr(
        random_walk, "metropolis_of_point", lambda error, uniform: honest(0.5 * error, uniform)
    )


@pytest.mark.parametrize("spoil", [skewed_steps, shifted_steps, half_the_energy])
def test_spoilt_random_walk_is_found_out(spoil, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check_known(
            "skewed", "diagonal", RandomWalkTransition(potential_of("skewed")), 1.0, 1, moves=4
        )


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("drift(here, step);\n    evaluate", "drift(here, step), here.z[0] += 0.3;\n    evaluate"),
        ("double(found) - double(value);", "0.5 * (double(found) - double(value));"),
    ],
)
def test_spoilt_walks_in_machine_code_are_found_out(right, wrong, monkeypatch):
    spoil_line("trajectories", right, wrong, monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check_known("skewed", "diagonal", native_walk(potential_of("skewed")), 1.0, 1, moves=4)


# --- moves made of several ----------------------------------------------------------------------


def parts_of(name):
    potential = potential_of(name)
    return {
        "local": NUTSTransition(potential, CHAINS, DEPTH),
        "global": IndependenceTransition(potential, guide_of(name), 2),
        "walk": RandomWalkTransition(potential),
    }


def noisy_parts(target, name):
    inner = NUTSTransition(target.potential, CHAINS, DEPTH)
    return {
        "local": conditional(target, inner),
        "global": IndependenceTransition(target.potential, guide_of(name), 2),
    }


MAKE = {"cycle": CycleTransition, "mixture": lambda p: MixtureTransition(p, [0.4, 0.3, 0.3])}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("name", HMC_TARGETS)
def test_invariance_of_several(name, make):
    check_known(name, "diagonal", make(parts_of(name)), 0.7, MOST_POINTS, moves=4)


@pytest.mark.parametrize("name", long_but(["prior-8"], NOISY))
def test_invariance_of_several_with_noise(name):
    target = make_target(name)
    transition = CycleTransition(noisy_parts(target, name))
    check(target, transition)


def test_invariance_of_joint_moves_and_jumps():
    target = make_target("prior-8")
    parts = {
        "local": JointTransition(target.potential, CHAINS),
        "global": IndependenceTransition(target.potential, guide_of("prior-8")),
    }
    check(target, CycleTransition(parts))


def keep_the_gradient(monkeypatch):
    """As if the gradient after a jump were that of before."""
    honest = mixture._Parts._step

    def step(self, name, state, tuning, num_steps):
        moved, info = honest(self, name, state, tuning, num_steps)
        return moved if name == "local" else moved._replace(gradient=state.gradient), info

    monkeypatch.setattr(mixture._Parts, "_step", step)


def pick_by_the_state(monkeypatch):
    """The jump only of chains whose first coordinate is positive."""
    honest = IndependenceTransition.step

    def step(self, state, tuning=None, num_steps=0):
        moved, info = honest(self, state)
        here = state.position[:, 0] > 0
        info = info._replace(accepted=info.accepted & here)
        return select_state(here, moved, state), info

    monkeypatch.setattr(IndependenceTransition, "step", step)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(keep_the_gradient, None), (pick_by_the_state, "standard errors")],
)
def test_spoilt_cycle_is_found_out(spoil, message, monkeypatch):
    spoil(monkeypatch)
    parts = parts_of("skewed")
    del parts["walk"]
    with pytest.raises(AssertionError, match=message):
        check_known("skewed", "diagonal", CycleTransition(parts), 0.7, MOST_POINTS, moves=4)


def test_statistics_of_parts():
    parts = parts_of("skewed")
    position = HMC_TARGETS["skewed"][2](CHAINS)
    from_draws = {}
    for name, make in MAKE.items():
        transition = make(parts)
        state = transition.state_at(position, position[:, :0])
        infos = []
        for _ in range(3):
            before = state
            state, info = transition.step(state, TUNING, MOST_POINTS)
            jumped = info.further["global_accepted"]
            moved = (state.position != before.position).any(1)
            assert bool((moved | ~jumped).all())
            infos.append(info)
        from_draws[name] = infos
    for info in from_draws["cycle"]:
        assert torch.equal(info.acceptance_rate, info.further["local_acceptance_rate"])
        assert "tree_depth" in info.further
        assert bool((info.n_gradients == info.n_steps + 2).all())  # once after each jump
    rates = torch.stack([i.further["local_acceptance_rate"] for i in from_draws["mixture"]])
    made = ~rates.isnan()
    assert bool((made.all(1) | ~made.any(1)).all()), "one part is picked for all chains"


# --- kernels ------------------------------------------------------------------------------------


def conjugate(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean + 0.0 * scale.sum(), 1.0), obs=y)


Y = torch.tensor([1.2, -0.3, 2.0, 0.4, 0.9], dtype=torch.float64)
PRECISION = 0.25 + len(Y)


@pytest.mark.parametrize(
    ("kernel", "runner"),
    long_but(
        [(RandomWalk, "ours"), (MALA, "Pyro's")],
        itertools.product([RandomWalk, MALA], ["ours", "Pyro's"]),
    ),
)
def test_runs(kernel, runner):
    made = kernel(conjugate)
    if runner == "ours":
        mcmc = MCMC(made, num_samples=1000, num_chains=8, seed=0, disable_progbar=True)
    else:
        torch.manual_seed(0)
        mcmc = pyro.infer.MCMC(made, num_samples=800, warmup_steps=200, disable_progbar=True)
    mcmc.run(Y)
    samples = mcmc.get_samples()
    chains = 8 if runner == "ours" else 1
    mean = samples["mean"].reshape(chains, -1).numpy()
    assert abs(scores(mean, Y.sum() / PRECISION)) < 4.5
    assert abs(scores((mean - mean.mean()) ** 2, 1 / PRECISION)) < 4.5
    if runner == "ours":  # of one step each: of NUTS as many are made by machine code
        assert made.settings["engine_reason"] == "the run is too short for compilation to pay"
    idata = to_inference_data(mcmc)
    rate = float(idata.sample_stats["acceptance_rate"].mean())
    tolerance = 0.1 if runner == "ours" else 0.2  # that of one chain's warm-up
    assert abs(rate - (0.32 if kernel is RandomWalk else 0.574)) < tolerance
    assert not bool(idata.sample_stats["diverging"].any())
    gradients = {0} if kernel is RandomWalk else {1}
    assert set(idata.sample_stats["n_gradients"].to_numpy().ravel()) == gradients


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [RandomWalk, MALA])
def test_local_sites_are_recovered(kernel):
    marginal = marginalize(effects, ["x"], num_particles=8)
    mcmc = MCMC(kernel(marginal), 2000, num_chains=8, seed=0, disable_progbar=True)
    mcmc.run(Y)
    mean = mcmc.get_samples(group_by_chain=True)["mean"].numpy()
    assert abs(scores(mean, Y.sum() / PRECISION)) < 4.5
    idata = to_inference_data(mcmc)
    recovered = idata.posterior["x"].mean(("chain", "draw")).to_numpy()
    expected = 0.36 * Y.sum() / PRECISION + 0.64 * Y
    assert abs(torch.as_tensor(recovered) - expected).max() < 0.1
    assert float(idata.sample_stats["refresh_rate"].mean()) > 0.5


def test_rate_of_random_walk_by_dimension():
    for dimension, rate in {**_BEST_RATES, 7: _BEST_RATE}.items():

        def model(dimension=dimension):
            pyro.sample("x", dist.Normal(torch.zeros(dimension), 1.0).to_event(1))

        kernel = RandomWalk(model)
        kernel.prepare((), {})
        assert kernel.hamiltonian.step_and_mass.target_accept_prob == rate
    kernel = RandomWalk(model, target_accept_prob=0.5)
    kernel.prepare((), {})
    assert kernel.hamiltonian.step_and_mass.target_accept_prob == 0.5


def test_langevin_is_one_leapfrog_step():
    """The energy error is the ratio of the target's densities times that of the proposals'."""
    potential = potential_of("skewed")
    position = HMC_TARGETS["skewed"][2](50)
    transition = HMCTransition(potential, 50)
    state = transition.state_at(position, position[:, :0])
    momentum = torch.randn_like(position)
    mass, size = TUNING.kinetic.inverse_mass, 0.6
    end, after, value, gradient = transition.trajectory(
        state, momentum / mass.sqrt(), mass, torch.full((50, 1), size), 1
    )

    def log_proposal(start, slope, to):
        mean = start - 0.5 * size**2 * mass * slope
        return dist.Normal(mean, size * mass.sqrt()).log_prob(to).sum(-1)

    forward = log_proposal(position, state.gradient, end)
    backward = log_proposal(end, gradient, position)
    ratio = state.evaluation.value - value + backward - forward
    energy = TUNING.kinetic.energy(momentum / mass.sqrt()) - TUNING.kinetic.energy(after)
    assert torch.allclose(ratio, state.evaluation.value - value + energy, atol=1e-9)
