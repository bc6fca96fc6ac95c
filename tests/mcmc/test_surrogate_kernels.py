"""Kernels that learn: what they learn, tell, keep, refuse, and when they give up."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from functools import partial
from types import SimpleNamespace

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch

from pyro_hamflow import (
    HMC,
    HNNHMC,
    HNNNUTS,
    MCMC,
    NUTS,
    GradientMatching,
    PotentialNetwork,
    PseudoMarginalNUTS,
    TrajectoryMatching,
    marginalize,
)
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation import estimator as estimator_module
from pyro_hamflow.mcmc.adaptation import verdict
from pyro_hamflow.mcmc.adaptation.gather import Gather
from pyro_hamflow.mcmc.adaptation.verdict import Costs, Trial, Verdict
from pyro_hamflow.mcmc.transitions.base import Info, Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, CorrelatedRefresh
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.results.inference_data import to_inference_data
from pyro_hamflow.surrogates import learner as learning
from pyro_hamflow.surrogates.costs import COMPILED
from pyro_hamflow.surrogates.fit import fit_energy
from pyro_hamflow.surrogates.gradient_log import GradientLog, LeapfrogSettings
from pyro_hamflow.surrogates.losses import Points
from tests.helpers.exact_draws import SLOPE, Y, latent, make_target
from tests.helpers.kinds import long_but
from tests.helpers.laws import assert_invariant, scores
from tests.helpers.learned import endpoint, per_leaf

KERNELS = [HNNHMC, HNNNUTS]
BEGIN = {"x": torch.tensor([[0.0, 3.0]] * 4)}


def bowl():
    pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.5])).to_event(1))


def rosenbrock(dimension):
    """The chain of valleys of the literature on learned Hamiltonians."""
    flat = dist.Normal(torch.zeros(dimension), 1.0).mask(False).to_event(1)
    x = pyro.sample("x", flat)
    bends = 100.0 * (x[1:] - x[:-1].square()).square() + (1.0 - x[:-1]).square()
    pyro.factor("energy", -bends.sum() / 20.0)


def run(kernel, *args, draws=30, warmup=80, chains=4, **settings):
    mcmc = MCMC(kernel, draws, warmup, num_chains=chains, seed=0, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc


def learner(kind, model=bowl, **settings):
    return kind(model, **({"fallback": False, "training_steps": 200} | settings))


@pytest.mark.parametrize("kind", KERNELS)
def test_what_a_run_tells(kind):
    kernel = learner(kind, rounds=2)
    mcmc = run(kernel, draws=60)
    stats = mcmc.draws.stats
    followed = ~stats["surrogate_error"].isnan()
    assert stats["surrogate_error"].shape == (4, 60)
    assert 0.9 < followed.double().mean() <= 1.0
    assert (stats["n_densities"][followed] == 1).all()
    assert (stats["n_gradients"][followed] == 0).all()
    assert (stats["n_gradients"][~followed] > 0).all()
    assert (stats["surrogate_accepted"] <= followed).all()
    assert stats["surrogate_accepted"].double().mean() > 0.8
    report = kernel.report
    assert len(report.trainings) == 3
    assert report.n_gradients >= report.trainings[-1].points > report.trainings[0].points
    assert report.trainings[-1].budget == 200
    assert report.acceptance > 0.8
    assert "the surrogate is followed" in kernel.messages[-1]
    assert to_inference_data(mcmc).sample_stats["surrogate_accepted"].shape == (4, 60)


@pytest.mark.parametrize(
    "loss",
    long_but([TrajectoryMatching(3)], [GradientMatching(0.0), TrajectoryMatching(3)]),
    ids=repr,
)
def test_losses_to_choose(loss):
    kernel = learner(HNNNUTS, loss=loss, training_steps=400)
    run(kernel)
    assert kernel.report.acceptance > 0.7
    assert kernel.report.trainings[-1].best_loss < 0.05


def test_per_leaf_run():
    kernel = learner(HNNNUTS, correction="per leaf")
    stats = run(kernel).draws.stats
    assert (stats["n_densities"] == stats["n_steps"]).all()
    assert stats["n_gradients"].double().mean() < 0.2 * stats["n_steps"].double().mean()


@pytest.mark.parametrize(
    ("kind", "correction"),
    long_but([(HNNNUTS, "endpoint")], itertools.product(KERNELS, ["endpoint", "per leaf"])),
)
def test_pseudo_marginal_run(kind, correction):
    kernel = learner(kind, marginalize(latent, ["x"], num_particles=4), correction=correction)
    mcmc = run(kernel, Y)
    assert mcmc.draws.local["x"].shape == (4, 30, 3)
    stats = mcmc.draws.stats
    refreshed = stats["n_densities"] > 1
    assert stats["refresh_rate"][refreshed].double().mean() > 0.3
    assert mcmc.draws.stats["acceptance_rate"].mean() > 0.3


def fit_anew_at(iterations, monkeypatch):
    """Has a kernel's estimator fitted anew at the end of windows, whatever its variance."""
    calls = itertools.count()

    def refit(model, *rest, **settings):
        return copy.copy(model) if next(calls) in iterations else None

    monkeypatch.setattr(estimator_module, "wanted_variance", lambda *given, **settings: -1.0)
    monkeypatch.setattr(estimator_module, "_WANTED_FACTORISED_VARIANCE", -1.0)
    monkeypatch.setattr(estimator_module, "refit_at", refit)
    monkeypatch.setattr(estimator_module, "mend_proposal", lambda *arguments: None)


@pytest.mark.slow
def test_what_is_known_of_another_estimate_is_forgotten(monkeypatch):
    """An estimator is fitted anew in warm-up: only what follows is learned from."""
    fit_anew_at({0, 1}, monkeypatch)
    marginal = marginalize(latent, ["x"], num_particles=4)
    kernel = learner(HNNNUTS, marginal, training_steps=60)
    state = kernel.begin(4, 120, (Y,))
    pupil, begun = kernel.phase.learning.learner, [0]
    while kernel.warming:
        state, _ = kernel.advance(state)
        if pupil.begun != begun[-1]:
            begun.append(pupil.begun)
            assert pupil.log.num_gradients == 0
            assert not kernel.report.trainings
        assert pupil.potential is kernel.potential
        assert kernel.surrogate is not None or isinstance(kernel.phase, Gather)
    assert begun == [0, 10, 20]
    budgets = [training.points for training in kernel.report.trainings]
    assert min(budgets) >= 100
    assert kernel.report.following == "surrogate"
    assert math.isfinite(kernel.settings["max_pareto_k"])


@pytest.mark.slow
def test_true_gradients_stay_chosen_when_the_estimator_is_fitted_anew(monkeypatch):
    fit_anew_at({0, 1}, monkeypatch)
    kernel = HNNNUTS(marginalize(latent, ["x"], num_particles=4))
    run(kernel, Y, draws=5, warmup=100)
    assert kernel.report.following == "true gradients"
    assert sum("true gradients are followed" in message for message in kernel.messages) == 1


def test_energies_are_learned_unless_they_are_noisy():
    """The noise of an estimate is shared by a whole trajectory: energies would teach it."""
    torch.manual_seed(0)
    settings = learning.TrainingSettings((4,), 1, None, None, 60, 0)
    for model, args, noisy in ((bowl, (), False), (marginalize(latent, ["x"]), (Y,), True)):
        potential = Potential(model, args, separate_noise=True)
        learner = learning.Learner(potential, settings, 100)
        position, noise = potential.vectors(40)
        learner.log.add(position, *potential.gradients(position, noise)[:2])
        learned = []
        for shift in (0.0, torch.linspace(-1.0, 1.0, 40)):
            entry = learner.log.entries[0]
            learner.log.entries[0] = entry._replace(value=entry.value + shift)
            learner.network = None
            torch.manual_seed(1)
            learner.fit(passing=False)
            learned.append(learner.network.linear.detach().clone())
        assert torch.equal(*learned) == noisy


def test_same_seed_same_draws():
    settings = {"training_steps": 50, "rounds": 1}
    first, second = (run(learner(HNNNUTS, **settings), draws=5).draws.position for _ in "ab")
    assert torch.equal(first, second)


@pytest.mark.parametrize("chains", long_but([4], [1, 4]))
def test_what_is_held_out_is_so_in_every_training(chains, monkeypatch):
    """A network does not forget at once what it has learned: tested on that, it would look good."""
    seen, honest = [], learning.fit_energy

    def fit(network, points, *, held_out, **settings):
        seen.append((points.position.clone(), held_out.clone()))
        return honest(network, points, held_out=held_out, **settings)

    monkeypatch.setattr(learning, "fit_energy", fit)
    run(learner(HNNHMC, rounds=3), warmup=300 if chains > 1 else 900, chains=chains)
    assert len(seen) == 4
    for (before, out_before), (after, out_after) in itertools.pairwise(seen):
        assert 0.03 < out_after.double().mean() < 0.3
        known = dict(zip(map(tuple, before.tolist()), out_before.tolist(), strict=True))
        again = zip(map(tuple, after.tolist()), out_after.tolist(), strict=True)
        shared = [known[row] == out for row, out in again if row in known]
        assert len(shared) > 0.5 * len(known)
        assert all(shared)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize(
    "make", [HMCTransition, lambda target, chains, see: NUTSTransition(target, chains, 10, see)]
)
def test_observing_changes_no_trajectory(make, captured):
    potential = Potential(bowl)
    if not captured:
        potential.programs.fallback_reason = "as a model may have one"
    log = GradientLog()
    position, tuning = torch.randn(4, 2), Tuning(0.3, GaussianKinetic(torch.ones(2)))
    ends, steps = [], []
    for observe in (None, log.observe):
        torch.manual_seed(0)
        inner = make(potential, 4, observe)
        state = inner.state_at(position, position[:, :0])
        for _ in range(3):
            state, info = inner.step(state, tuning, 7)
            steps.append(torch.as_tensor(info.n_steps))
        ends.append(state)
    assert torch.equal(ends[0].position, ends[1].position)
    assert torch.equal(ends[0].gradient, ends[1].gradient)
    for entry in log.entries:
        value, slope, _ = potential.gradients(entry.position, position[:, :0])
        torch.testing.assert_close((entry.value, entry.gradient), (value, slope))
    assert len(log.entries) == sum(int(count.max()) for count in steps[3:]) > 4
    wanted = torch.stack([entry.wanted for entry in log.entries]).sum(0)
    assert (wanted == sum(count + torch.zeros(4) for count in steps[3:])).all()


@pytest.mark.parametrize("kind", ["hmc", "nuts"])
def test_observed_neighbours_are_a_step_apart(kind):
    """Three of them tell each other: the second difference of positions is the kick between."""
    potential, log = Potential(bowl), GradientLog()
    position = torch.randn(4, 2)
    tuning = Tuning(0.2, GaussianKinetic(torch.tensor([1.0, 0.3])))
    nuts = kind == "nuts"
    inner = NUTSTransition(potential, 4, 10, log.observe) if nuts else None
    inner = inner or HMCTransition(potential, 4, log.observe)
    log.motion = LeapfrogSettings(tuning.step_sizes(position), tuning.kinetic.inverse_mass)
    state = inner.state_at(position, position[:, :0])
    for _ in range(5):
        state, _ = inner.step(state, tuning, 1023 if nuts else 7)
    rows, sizes, mass = log.trajectories(3, 10_000)
    assert len(rows) >= 20 and rows.shape[1:] == (4, 2)
    for n in (1, 2):
        second = rows[:, n + 1] - 2.0 * rows[:, n] + rows[:, n - 1]
        slope = potential.gradients(rows[:, n], rows[:, n, :0])[1]
        kick = sizes[:, None].square() * (slope[:, None] @ mass)[:, 0]
        torch.testing.assert_close(second, -kick, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("far_starts_stay")
def test_hmc_gathers_by_trajectories_that_turn_back():
    """No length suits them before a scale is known: here it is a thousandth of the usual."""

    def narrow():
        pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0]) / 1000.0).to_event(1))

    kernel = learner(HNNHMC, narrow, rounds=1)
    mcmc = run(kernel, save_warmup=True)
    gathered = mcmc.warmup_draws.stats["n_steps"][:, 4:12]
    assert (gathered != gathered[:1]).any()
    assert kernel.report.acceptance > 0.8
    steps = mcmc.draws.stats["n_steps"]
    assert (steps == steps[:1]).all()  # the draws' own have the same length in all chains


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    mcmc = run(learner(HNNNUTS))
    assert mcmc.draws.position.dtype == torch.float32
    assert mcmc.draws.stats["energy_error"].dtype == torch.float64


@pytest.mark.parametrize("kind", KERNELS)
def test_in_pyros_runner(kind):
    kernel = learner(kind, rounds=1)
    mcmc = pyro.infer.MCMC(kernel, num_samples=50, warmup_steps=90, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (50, 2)
    record = mcmc.diagnostics()["acceptance rate"]
    assert record["chain 0"] > 0.5
    assert pickle.loads(pickle.dumps(kernel)).surrogate.dimension == 2


def test_trained_surrogate_is_saved_and_passed_in(tmp_path):
    first = learner(HNNNUTS)
    run(first)
    path = tmp_path / "surrogate.pt"
    first.surrogate.save(path)
    again = PotentialNetwork.load(path)
    z = torch.randn(5, 2)
    assert torch.equal(again(z), first.surrogate(z))
    kernel = HNNNUTS(bowl, surrogate=again, fallback=False, true_share=0.0)
    mcmc = run(kernel, warmup=30)
    assert kernel.report.n_gradients == 0 and not kernel.report.trainings
    assert mcmc.draws.stats["n_gradients"].sum() == 0
    assert mcmc.draws.stats["acceptance_rate"].mean() > 0.8
    assert torch.equal(again(z), first.surrogate(z)), "sampling has changed the network"
    fixed = {"step_size": 0.5, "adapt_step_size": False}
    mcmc = run(HNNHMC(bowl, surrogate=again, **fixed), warmup=0, initial_params=BEGIN)
    assert "without a trial" in mcmc.messages[0]
    assert mcmc.draws.stats["acceptance_rate"].mean() > 0.8


# --- giving up ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "plain"), [(HNNHMC, HMC), (HNNNUTS, NUTS)])
def test_cheap_gradients_are_followed(kind, plain):
    kernel = kind(bowl)
    mcmc = run(kernel)
    assert "true gradients are followed: the draws' gradients will take" in mcmc.messages[0]
    assert kernel.settings["following"] == "true gradients"
    stats = mcmc.draws.stats
    assert not stats["surrogate_accepted"].any()
    assert (stats["n_gradients"] == stats["n_steps"]).all()
    assert torch.equal(mcmc.draws.position, run(plain(bowl)).draws.position)


def spoil(monkeypatch, slope):
    """Networks that err, and are tried all the same."""
    monkeypatch.setattr(learning.Learner, "too_costly", lambda *_: None)
    honest = learning.fit_energy

    def fit(network, *inputs, **settings):
        training = honest(network, *inputs, **settings)
        with torch.no_grad():
            network.linear += slope
        return training

    monkeypatch.setattr(learning, "fit_energy", fit)


def test_surrogate_that_errs_is_given_up(monkeypatch):
    spoil(monkeypatch, 4.0)
    mcmc = run(HNNNUTS(bowl, training_steps=100))
    assert "of the surrogate's proposals were accepted" in mcmc.kernel.messages[-1]
    assert "true gradients are followed" in mcmc.kernel.messages[-1]
    assert mcmc.draws.stats["n_gradients"].min() > 0
    assert mcmc.draws.stats["acceptance_rate"].mean() > 0.6


def test_steps_refused_at_the_leaves_are_not_those_of_true_gradients(monkeypatch):
    """A wrong force is refused however small its steps: they must not shrink for that."""
    spoil(monkeypatch, 1.5)
    kernel = HNNHMC(bowl, training_steps=100)

    def costs(*_, **__):
        dear = kernel.report.correction == "per leaf"
        return Costs(surrogate=100.0 if dear else 5.0, per_leaf=1.0, true=30.0)

    monkeypatch.setattr(verdict, "costs_of", costs)
    stats = run(kernel, warmup=240).draws.stats
    assert kernel.report.correction == "per leaf"
    assert kernel.report.following == "true gradients"
    assert kernel.step_size > 0.3, kernel.step_size
    assert stats["acceptance_rate"].mean() > 0.6


@pytest.mark.parametrize(
    ("slope", "chosen"), long_but([(0.0, "endpoint")], [(0.0, "endpoint"), (1.0, "per leaf")])
)
def test_correction_is_chosen_by_what_it_costs(slope, chosen, monkeypatch):
    """Points are judged one by one where endpoints are refused too often to be worth their cost."""
    spoil(monkeypatch, slope)
    kernel = HNNNUTS(bowl, training_steps=100, true_share=0.0)

    def costs(*_, **__):
        refused = slope > 0.0 and kernel.report.correction == "endpoint"
        return Costs(surrogate=30.0 if refused else 8.0, per_leaf=1.0, true=90.0)

    monkeypatch.setattr(verdict, "costs_of", costs)
    stats = run(kernel, draws=20, warmup=160).draws.stats
    assert kernel.settings["correction"] == kernel.report.correction == chosen
    per_draw = stats["n_steps"] if chosen == "per leaf" else 1
    assert (stats["n_densities"] == per_draw).all()


def test_efficiency_is_that_of_the_chain():
    """Stays of known lengths; then chains that forget all when they move, beside their variance."""
    trial = Trial()
    for moved in [1, 1, 0, 0, 1, 1]:  # stays of 1, 3, 1, 1
        trial.note(record_of(torch.tensor([moved == 1])), 0.0)
    assert trial.efficiency == pytest.approx(6 / 12)
    length, chains = 400, 500
    rate = torch.where(torch.rand(chains) < 0.8, 0.9, 0.2)  # drawn anew with every move
    x, path, trial = torch.randn(chains), [], Trial()
    for _ in range(length):
        moved = torch.rand(chains) < rate
        x = torch.where(moved, torch.randn(chains), x)
        # Where a chain stays longer, it is found more often: moves lead there in proportion.
        rate = torch.where(moved, torch.where(torch.rand(chains) < 0.8, 0.9, 0.2), rate)
        trial.note(record_of(moved), 0.0)
        path.append(x)
    variance = torch.stack(path).mean(0).var() * length
    assert trial.efficiency == pytest.approx(1 / float(variance), rel=0.2)
    assert trial.efficiency < 0.8 * trial.rate / (2 - trial.rate)


def record_of(moved):
    values = torch.zeros(len(moved))
    rate = moved.double()
    return Info(moved, rate, values, ~moved, values, 1, 0, 1)


@pytest.mark.parametrize(("compiled", "mine"), [(False, 0.1), (True, 0.02 + 8 * COMPILED * 0.01)])
def test_a_trial_costs_what_draws_will(compiled, mine):
    """Eight densities of 10 milliseconds in each iteration, that a compiler will make faster."""
    later = COMPILED if compiled else 1.0
    programs = SimpleNamespace(compile_graphs=compiled)
    clock = SimpleNamespace(
        potential=SimpleNamespace(programs=programs, noise_dimension=0),
        seconds=lambda kind, chains: 0.01,
        seconds_of_judging=lambda rows: 0.01,
        true_seconds=lambda chains, steps: 1.0,
        seconds_later=lambda kind, chains: 1.0 if kind == "gradient" else later * 0.01,
    )
    trial = Trial(known_steps=8.0)
    for seconds in (0.01, 0.1, 2.0):
        trial.note(record_of(torch.ones(4) > 0)._replace(n_densities=8), seconds)
    costs = verdict.costs_of(trial, clock)
    assert costs.surrogate == pytest.approx(mine)
    assert costs.true == 8.0 + later * 0.02


def test_a_surrogate_has_to_promise_twice_its_cost():
    def found(true, per_leaf=1.0):
        return Verdict(0.9, 0.5, Costs(surrogate=1.0, per_leaf=per_leaf, true=true))

    assert found(5.0).objection() is None and not found(5.0).is_for_leaves
    assert found(3.0).objection().startswith("90% of the surrogate's proposals")
    assert found(3.0).objection(hope=2.0) is None
    assert found(3.0).is_for_leaves and not found(3.0, per_leaf=2.0).is_for_leaves


@pytest.mark.slow
def test_verdict_is_kept_in_the_report():
    kernel = learner(HNNNUTS, rounds=1)
    run(kernel)
    report = kernel.report
    assert report.verdict.acceptance == report.acceptance > 0.5
    assert report.surrogate_seconds == report.verdict.costs.surrogate > 0.0
    assert report.true_seconds == report.verdict.costs.true > 0.0


def test_where_nothing_can_be_learned_true_gradients_are_followed():
    def edge():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(x.abs() > 1e-6, torch.nan, 0.0) * x)

    start = {"x": torch.zeros(2)}
    kernel = learner(HNNHMC, edge, step_size=0.5, adapt_step_size=False, adapt_mass_matrix=False)
    mcmc = run(kernel, chains=2, draws=10, initial_params=start)
    assert "nothing could be learned: 0 finite gradients were found" in mcmc.messages[0]
    assert (mcmc.draws.position.abs() <= 1e-6).all()


def test_short_warmup_is_told():
    mcmc = run(HNNNUTS(bowl), warmup=20)
    assert "nothing can be learned in 20 iterations of warm-up, below 60" in mcmc.messages[0]
    with pytest.raises(ValueError, match="`warmup_steps` is 20: expected 60 or more"):
        run(HNNNUTS(bowl, fallback=False), warmup=20)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"surrogate": "net"}, TypeError, "`surrogate` is a str: expected a PotentialNetwork"),
        ({"correction": "none"}, ValueError, "`correction` is 'none': expected one of"),
        ({"num_transitions": 0}, ValueError, "`num_transitions` is 0: expected 1 or more"),
        ({"num_proposals": 2.5}, TypeError, "`num_proposals` is 2.5: expected an integer"),
        ({"rounds": 1.5}, TypeError, "`rounds` is 1.5: expected an integer"),
        ({"true_share": 2.0}, ValueError, "`true_share` is 2.0: expected 0 <="),
        ({"trust_radius": 0.0}, ValueError, "`trust_radius` is 0.0: expected a positive"),
        ({"hidden": ()}, ValueError, "`hidden` is empty"),
        ({"hidden": (8, 0)}, ValueError, r"`hidden\[1\]` is 0: expected 1 or more"),
    ],
)
def test_bad_settings_are_refused(settings, error, match):
    with pytest.raises(error, match=match):
        HNNNUTS(bowl, **settings)


def test_surrogate_of_another_model_is_refused():
    kernel = HNNNUTS(bowl, surrogate=PotentialNetwork(3))
    with pytest.raises(
        ValueError, match=r"has dimension 3: expected 2, as the model's sites \['x'"
    ):
        run(kernel)


# --- truths -------------------------------------------------------------------------------------

# Means of some coordinates, by quadrature along the chain.
ROSENBROCK = {
    3: ([0, 1, 2], [0.1658, 1.6711, 5.9787]),
    10: ([0, 1, 8, 9], [0.0363, 0.3178, 0.2343, 0.4125]),
    100: ([0, 1, 98, 99], [0.0358, 0.3124, 0.2173, 0.3549]),
}


def rosenbrock_draws(dimension, count, particles=400_000):
    """Draws by a particle filter: given one coordinate, the next is normal about its square."""
    torch.manual_seed(0)
    x = torch.empty(particles, 1).uniform_(-7.0, 7.0)
    for i in range(dimension):
        if i < dimension - 1:
            weight = torch.exp(-(1.0 - x[:, -1]).square() / 20.0)
            x = x[torch.multinomial(weight, particles, replacement=True)]
            x = torch.cat([x, x[:, -1:].square() + 0.1**0.5 * torch.randn(particles, 1)], 1)
    return x[torch.randperm(particles)[:count]]


@pytest.mark.parametrize(
    ("dimension", "correction"),
    long_but(
        [(3, "endpoint")],
        itertools.product([3, 10, 100], ["endpoint", "per leaf"]),
    ),
)
def test_moments_of_rosenbrock(dimension, correction):
    """Chains begun at draws of the density keep the moments that quadrature gives.

    Its valley is far too long and thin to be seen whole by chains that begin in one place. Of a
    hundred dimensions, a network this small knows so little that its trajectories must be short.
    """
    chains = 4000
    position = rosenbrock_draws(dimension, chains)
    places, truth = ROSENBROCK[dimension]
    potential = Potential(rosenbrock, (dimension,))
    value, slope, _ = potential.gradients(position, position[:, :0])
    points = Points(position, value, slope, position[:, :0])
    network = PotentialNetwork(dimension)
    network.whiten_by(position)
    fit_energy(network, points, num_steps=600, learning_rate=1e-2)
    make = endpoint if correction == "endpoint" else per_leaf
    transition = make(potential, network, "nuts", chains)
    state = transition.state_at(position, position[:, :0])
    step_size, most = (0.15, 31) if dimension < 100 else (0.02, 3)
    tuning = Tuning(step_size, GaussianKinetic(torch.ones(dimension)))
    for _ in range(3):
        state, info = transition.step(state, tuning, most)
    assert (state.position != position).any(-1).double().mean() > 0.5
    assert_invariant({"x": position[:, places]}, {"x": state.position[:, places]})
    spread = state.position[:, places].std(0) / chains**0.5
    score = (state.position[:, places].mean(0) - torch.tensor(truth)) / spread
    assert score.abs().max() < 4.0


@pytest.mark.slow
def test_draws_are_those_of_nuts():
    """Means of a skewed posterior, beside those along true gradients."""
    marginal = marginalize(latent, ["x"], num_particles=8)
    found = {}
    for name, kernel in {
        "learned": HNNNUTS(marginal, fallback=False, training_steps=300),
        "true": PseudoMarginalNUTS(marginal),
    }.items():
        mcmc = run(kernel, Y, draws=400, warmup=150, chains=16)
        found[name] = mcmc.draws.position[..., :2].numpy()
    a, b = found["learned"], found["true"]
    error = arviz.mcse(arviz.convert_to_dataset({"v": b}))["v"].to_numpy()
    assert abs(scores(a, b.mean((0, 1)), error)).max() < 4.0


@pytest.mark.slow
def test_few_trajectories_in_many_dimensions_are_no_plane_to_stay_in():
    def normals():
        pyro.sample("x", dist.Normal(torch.zeros(60), 1.0).to_event(1))

    settings = {"rounds": 0, "num_proposals": 4, "training_steps": 50, "max_num_steps": 50}
    kernel = learner(HNNHMC, normals, **settings)
    mcmc = run(kernel, draws=20, warmup=100, chains=1)
    assert mcmc.draws.position.isfinite().all()


def test_true_share_is_of_stars():
    kernel = learner(HNNHMC, num_proposals=4, true_share=1.0)
    stats = run(kernel, draws=60).draws.stats
    followed = (~stats["surrogate_error"].isnan())[0].long()
    assert 0.7 < followed.double().mean() < 0.9  # after each set of four, one true transition


def test_noise_suits_the_positions_that_are_learned_from(monkeypatch):
    """Gradients looked at away from draws are about the marginal density's, on average."""
    torch.manual_seed(0)
    target = make_target("prior-2")
    position, noise, _ = target.draws()
    monkeypatch.setattr(learning, "_ABOUT", 1.0)
    settings = HNNHMC(target.model).choices.training
    pupil = learning.Learner(target.potential, settings, warmup_steps=100)
    pupil.network = PotentialNetwork(2)
    blocks = Blocks(target.potential)

    def bias(refresh):
        def at(position, noise):
            evaluate = partial(target.potential.evaluate, position)
            noise, *_, count = refresh(blocks, noise, evaluate(noise), evaluate)
            return noise, count

        count = pupil.gather_around(position, noise, at)
        entry = pupil.log.entries[-1]
        seen = entry.position.clone().requires_grad_()
        (slope,) = torch.autograd.grad(exact_energy(seen).sum(), seen)
        return count, (entry.gradient - slope).mean(0).abs().max()

    count, refreshed = bias(CorrelatedRefresh())
    _, held = bias(lambda blocks, noise, current, evaluate: (noise, current, None, 0))
    assert count == 1
    assert refreshed < 0.3 * held, (refreshed, held)


def exact_energy(position):
    """The marginal model's potential, by quadrature over each local effect."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    mean, log_scale = position.unbind(-1)
    x = mean[:, None] + log_scale.exp()[:, None] * torch.tensor(nodes)
    answers = torch.sigmoid(SLOPE * x[..., None] * (2 * Y - 1))
    shares = torch.tensor(weights / weights.sum())
    likelihood = (answers * shares[:, None]).sum(1).log().sum(-1)
    return 0.5 * mean.square() + 0.5 * (log_scale / 0.7).square() - likelihood
