"""Independence Metropolis from a guide keeps its target, noise included; spoilt, it does not."""

from __future__ import annotations

import itertools
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value

from pyro_hamflow import (
    MCMC,
    AutoFlow,
    AutoNeuralHamiltonianFlow,
    FlowMH,
    ForwardKL,
    fit_guide,
    marginalize,
    to_inference_data,
)
from pyro_hamflow.mcmc.transitions import independence
from pyro_hamflow.mcmc.transitions.base import metropolis
from pyro_hamflow.mcmc.transitions.independence import IndependenceTransition
from tests.helpers.exact_draws import (
    CHAINS,
    HMC_TARGETS,
    check,
    check_known,
    make_target,
    potential_of,
)
from tests.helpers.guides import guide_of, untrained
from tests.helpers.kinds import long_but
from tests.helpers.laws import assert_invariant
from tests.helpers.targets import effects
from tests.helpers.zuko_flows import FLOWS


class Spoilt:
    """A guide that tells its densities wrongly."""

    def __init__(self, guide, how):
        self.guide, self.how = guide, how

    def prepare(self, *args):
        self.guide.prepare(*args)

    def draw(self, count):
        flow = self.guide.flow
        if self.how == "momenta forgotten":
            q, p, log_density = flow.draw_phase((count,))
            return self.guide.to_position(q).detach(), log_density.detach()
        return self.guide.draw(count)

    def log_ratio(self, position):
        value = self.guide.log_ratio(position)
        if self.how == "other flow":
            return value + position[:, 0]
        if self.how == "base alone":
            return self.guide.flow.base.log_prob(position)
        return value


COUNTS = [1, 5]  # proposals of each chain
SETTINGS = {"plain": (), "reverse encoder": (("reverse_encoder", True),)}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", HMC_TARGETS)
@pytest.mark.parametrize("count", COUNTS)
def test_invariance(name, settings, count):
    transition = IndependenceTransition(potential_of(name), guide_of(name, settings), count)
    check_known(name, "diagonal", transition, 1.0, 1, moves=3)


@cache
def frozen_flow(quality):
    """Of zuko: fitted to the target, narrow and beside it, or anything at all."""
    model, args, draw, _ = HMC_TARGETS["skewed"]
    torch.manual_seed(5)
    away = dist.Normal(torch.tensor([1.0, 3.5, 0.5]), 0.8).to_event(1)
    guide = AutoFlow(model, FLOWS["NSF"], start=away if quality == "bad" else "laplace")
    guide.prepare(*args)
    if quality == "good":
        log_rate, shift, logit = draw(4000).unbind(-1)
        draws = {"rate": log_rate.exp(), "shift": shift, "share": logit.sigmoid()}
        loss = ForwardKL(draws)
        fit_guide(model, guide, *args, loss=loss, num_steps=150, disable_progbar=True)
    elif quality == "random":
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return guide.requires_grad_(False)


ACCEPTED = {"good": (0.7, 1.0), "bad": (0.002, 0.2), "random": (0.05, 0.7)}


def jump(guide, count, moves=2):
    """Exact draws of the target before and after jumps, and how many these are accepted."""
    potential, draw = potential_of("skewed"), HMC_TARGETS["skewed"][2]
    transition = IndependenceTransition(potential, guide, count)
    position = draw(CHAINS)
    state = transition.state_at(position, position.new_zeros(CHAINS, 0))
    with torch.no_grad():
        for _ in range(moves):
            state, info = transition.step(state)
    assert_invariant({"theta": position}, {"theta": state.position})
    return float(info.accepted.double().mean())


@pytest.mark.parametrize(
    ("quality", "count"),
    long_but(
        [("good", 1), ("bad", 5), ("random", 1)],
        itertools.product(ACCEPTED, COUNTS),
    ),
)
def test_invariance_by_flows_good_bad_and_random(quality, count):
    low, high = ACCEPTED[quality]
    rate = jump(frozen_flow(quality), count)
    assert low < rate and (count > 1 or rate < high)


@pytest.mark.parametrize("quality", long_but(["good"], ACCEPTED))
def test_densities_of_another_flow_are_noticed(quality):
    with pytest.raises(AssertionError, match="standard errors"):
        jump(Spoilt(frozen_flow(quality), "other flow"), 1, moves=10)


@pytest.mark.parametrize(
    ("name", "count"),
    [("prior-8", 1), ("prior-8", 3), ("laplace-2", 1), ("function-8", 1), ("rqmc-8", 1)]
    + [("by_hand-1", 1), ("by_hand-1", 4)],
)
def test_invariance_with_noise(name, count):
    target = make_target(name)
    check(target, IndependenceTransition(target.potential, guide_of(name), count))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("how", ["momenta forgotten", "other flow", "base alone"])
def test_spoilt_guides_are_noticed(how, count):
    guide = Spoilt(guide_of("skewed"), how)
    transition = IndependenceTransition(potential_of("skewed"), guide, count)
    with pytest.raises(AssertionError, match="standard errors"):
        check_known("skewed", "diagonal", transition, 1.0, 1, moves=3)


@pytest.mark.parametrize("how", ["noise held", "judged by parameters alone"])
def test_spoilt_noise_is_noticed(how, monkeypatch):
    target = make_target("prior-8")
    transition = IndependenceTransition(target.potential, guide_of("prior-8"))
    plain = transition.step

    def step(state, tuning, num_steps):
        moved, info = plain(state, tuning, num_steps)
        if how == "noise held":
            return moved._replace(noise=state.noise), info
        fresh = torch.randn_like(moved.noise)
        evaluation = target.potential.evaluate(moved.position, fresh)
        return moved._replace(noise=fresh, evaluation=evaluation), info

    with pytest.raises(AssertionError):
        check(target, transition, step=step)


def forget_where_it_was(monkeypatch):
    """As if one of all N + 1 were picked, but the present one had no part in it."""
    monkeypatch.setattr(
        independence,
        "metropolis_of_point",
        lambda error, uniform: metropolis(torch.zeros_like(error), uniform),
    )


def forget_the_others(monkeypatch):
    """As if the proposal that was picked were the only one."""
    honest = IndependenceTransition._next

    def first_of(self, chains):
        proposals = honest(self, chains)
        weights = proposals.log_weights.reshape(chains, -1)
        best = weights == weights.amax(1, keepdim=True)
        return proposals._replace(log_weights=weights.masked_fill(~best, -torch.inf).flatten())

    monkeypatch.setattr(IndependenceTransition, "_next", first_of)


@pytest.mark.parametrize("spoil", [forget_where_it_was, forget_the_others])
def test_spoilt_choices_are_noticed(spoil, monkeypatch):
    transition = IndependenceTransition(potential_of("skewed"), guide_of("skewed"), 5)
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check_known("skewed", "diagonal", transition, 1.0, 1, moves=3)


class Failing:
    """A guide that loses its numbers where the first coordinate is positive."""

    def __init__(self, guide, value):
        self.guide, self.value = guide, value

    def prepare(self, *args):
        self.guide.prepare(*args)

    def draw(self, count):
        position, log_density = self.guide.draw(count)
        return position, torch.where(position[:, 0] > 0, self.value, log_density)

    def log_ratio(self, position):
        return torch.where(position[:, 0] > 0, self.value, self.guide.log_ratio(position))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
@pytest.mark.parametrize("count", COUNTS)
def test_lost_numbers_are_rejections(value, count):
    """No move leads from where the guide has no density, or there; none is lost on the way."""
    transition = IndependenceTransition(
        potential_of("skewed"), Failing(guide_of("skewed"), value), count
    )
    position = HMC_TARGETS["skewed"][2](2000)
    state = transition.state_at(position, position.new_zeros(2000, 0))
    moved = torch.zeros(2000, dtype=torch.bool)
    for _ in range(3):
        state, info = transition.step(state)
        assert bool(info.acceptance_rate.isfinite().all())
        moved |= info.accepted
    beyond = position[:, 0] > 0
    assert bool(state.position.isfinite().all())
    assert bool((state.position[~beyond, 0] <= 0).all())
    assert bool(moved[~beyond].any())
    assert torch.equal(state.position[beyond], position[beyond])


def conjugate(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


Y = torch.tensor([1.2, -0.3, 2.0, 0.4, 0.9], dtype=torch.float64)


def check_conjugate(samples, effective=1000):
    """At four standard errors, if so many draws are independent."""
    precision = 0.25 + len(Y)
    error = (precision * effective) ** -0.5
    assert abs(samples.mean() - Y.sum() / precision) < 4 * error
    assert abs(samples.std() - precision**-0.5) < 4 * error


@pytest.mark.parametrize("runner", ["ours", "Pyro's"])
def test_runs(runner):
    kernel = FlowMH(conjugate, untrained(conjugate, (Y,)))
    if runner == "ours":
        mcmc = MCMC(kernel, num_samples=500, warmup_steps=0, num_chains=8, seed=0)
    else:
        mcmc = pyro.infer.MCMC(kernel, num_samples=600, warmup_steps=0, disable_progbar=True)
    mcmc.run(Y)
    check_conjugate(mcmc.get_samples()["mean"], 1000 if runner == "ours" else 150)
    idata = to_inference_data(mcmc)
    assert set(idata.sample_stats["n_gradients"].to_numpy().ravel()) == {0}
    assert set(idata.sample_stats["n_densities"].to_numpy().ravel()) == {1}
    assert "step_size" not in idata.sample_stats
    assert kernel.logging() is None or "step size" not in kernel.logging()
    assert "AutoNeuralHamiltonianFlow" in idata.posterior.attrs["kernel_settings"]


def test_seed_repeats_a_run_and_start_values_are_taken():
    kernel = FlowMH(conjugate, untrained(conjugate, (Y,)))
    draws = []
    for _ in range(2):
        mcmc = MCMC(kernel, 5, 0, num_chains=3, seed=4, initial_params={"mean": torch.ones(3)})
        mcmc.run(Y)
        draws.append(mcmc.get_samples()["mean"])
    assert torch.equal(*draws)


def test_local_sites_are_recovered():
    marginal = marginalize(effects, ["x"], num_particles=8)
    mcmc = MCMC(FlowMH(marginal, untrained(marginal, (Y,))), 500, 0, num_chains=8, seed=0)
    mcmc.run(Y)
    check_conjugate(mcmc.get_samples()["mean"])
    recovered = to_inference_data(mcmc).posterior["x"].mean(("chain", "draw")).to_numpy()
    expected = 0.36 * Y.sum() / (0.25 + len(Y)) + 0.64 * Y
    assert abs(torch.as_tensor(recovered) - expected).max() < 0.1


def test_bad_guides_are_refused():
    with pytest.raises(TypeError, match="`guide` is a str: expected"):
        FlowMH(conjugate, "normal")
    with pytest.raises(TypeError, match="`model` is 3"):
        FlowMH(3, AutoNeuralHamiltonianFlow(conjugate))

    def other(y):
        pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    mcmc = MCMC(FlowMH(conjugate, untrained(other, (Y,))), 5, 0)
    with pytest.raises(ValueError, match=r"shape \(1, 2\): expected \(1, 1\), .*'mean'"):
        mcmc.run(Y)


def test_starts_where_the_density_is_finite():
    def half(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.factor("cut", torch.where(mean > 0.5, 0.0, -torch.inf))

    guide = untrained(conjugate, (Y,))
    mcmc = MCMC(FlowMH(half, guide), 20, 0, num_chains=50, seed=0)
    mcmc.run(Y)
    assert (mcmc.get_samples()["mean"] > 0.5).all()

    def nowhere(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.factor("cut", torch.full_like(mean, -torch.inf))

    with pytest.raises(ValueError, match="no point of finite density.*'cut'"):
        MCMC(FlowMH(nowhere, guide), 20, 0).run(Y)


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(x.abs(), 0.3), obs=torch.tensor(2.0))


@pytest.mark.parametrize(("centre", "width", "is_told"), [(2.0, 0.3, True), (0.0, 2.0, False)])
def test_modes_that_no_proposal_leads_to_are_told(centre, width, is_told):
    """All chains start in the mode that the guide has, so that no statistic of theirs tells."""
    where = init_to_value(values={"x": torch.tensor(centre)})
    guide = AutoNormal(two_modes, init_loc_fn=where, init_scale=width)
    mcmc = MCMC(FlowMH(two_modes, guide), 400, num_chains=4, seed=0, disable_progbar=True)
    mcmc.run()
    told = any("lost modes with about 50 % of the posterior" in said for said in mcmc.messages)
    assert told == is_told
    assert bool((mcmc.get_samples()["x"] > 0.0).all()) == is_told
