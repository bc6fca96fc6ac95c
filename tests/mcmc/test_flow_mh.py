"""Independence Metropolis from a guide keeps its target, noise included; spoilt, it does not."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MCMC, AutoNeuralHamiltonianFlow, FlowMH, marginalize, to_inference_data
from pyro_hamflow.mcmc.transitions.independence import FlowMHTransition
from tests.helpers.exact_draws import (
    HMC_TARGETS,
    check,
    check_known,
    make_target,
    potential_of,
)
from tests.helpers.targets import effects


def untrained(model, args, **settings):
    """A guide that covers the target and is far from it: its parameters are random."""
    torch.manual_seed(2)
    guide = AutoNeuralHamiltonianFlow(model, hidden=(16, 16), num_steps=3, **settings)
    guide.prepare(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.08 * torch.randn_like(parameter)
    return guide


@cache
def guide_of(name, settings=()):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    if name in HMC_TARGETS:
        model, args = HMC_TARGETS[name][:2]
    else:
        model, args = make_target(name).model, make_target(name).potential.args
    guide = untrained(model, args, **dict(settings))
    torch.set_default_dtype(before)
    return guide


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


SETTINGS = {"plain": (), "reverse encoder": (("reverse_encoder", True),)}


def without_steps(transition):
    """The transition as one that is given a tuning and a number of steps, and needs neither."""
    return SimpleNamespace(
        target=transition.target,
        state_at=transition.state_at,
        step=lambda state, tuning, num_steps: transition.step(state),
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", HMC_TARGETS)
def test_invariance(name, settings):
    transition = without_steps(FlowMHTransition(potential_of(name), guide_of(name, settings)))
    check_known(name, "diagonal", transition, 1.0, 1, moves=3)


@pytest.mark.parametrize("name", ["prior-8", "laplace-2", "function-8", "rqmc-8", "by_hand-1"])
def test_invariance_with_noise(name):
    target = make_target(name)
    check(target, without_steps(FlowMHTransition(target.potential, guide_of(name))))


@pytest.mark.parametrize("how", ["momenta forgotten", "other flow", "base alone"])
def test_spoilt_guides_are_noticed(how):
    transition = without_steps(
        FlowMHTransition(potential_of("skewed"), Spoilt(guide_of("skewed"), how))
    )
    with pytest.raises(AssertionError, match="standard errors"):
        check_known("skewed", "diagonal", transition, 1.0, 1, moves=3)


@pytest.mark.parametrize("how", ["noise held", "judged by parameters alone"])
def test_spoilt_noise_is_noticed(how, monkeypatch):
    target = make_target("prior-8")
    transition = without_steps(FlowMHTransition(target.potential, guide_of("prior-8")))
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
    with pytest.raises(TypeError, match="`guide` is a AutoNormal: expected"):
        FlowMH(conjugate, pyro.infer.autoguide.AutoNormal(conjugate))
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
