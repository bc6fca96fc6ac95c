"""Groups that share what their warm-ups find: as if all chains were tuned together."""

from __future__ import annotations

from concurrent.futures import Future

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, HNNHMC, MCMC, NUTS, FlowNUTS
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.window import Findings, WarmUp
from pyro_hamflow.mcmc.groups import seeds
from pyro_hamflow.mcmc.transitions.base import Info, State
from pyro_hamflow.model.recovery import Evaluation
from tests.helpers.broken_off import Ended, assert_same, ended_at
from tests.helpers.groups import Inline, Y, marginal, model, run, short_segments

TUNED = {}  # what each group draws with, by its seed


def note_tuning(kernel, params, stage, i):
    if (stage, i) == ("Sample", 0):
        tuning = kernel.phase.tuning
        TUNED[torch.initial_seed()] = (tuning.step_size, tuning.kinetic.inverse_mass.tolist())


@pytest.mark.parametrize("pools", [True, False])
def test_groups_draw_with_the_same_step_size_and_mass(pools):
    run(Inline(), 1, num_warm=60, hook_fn=note_tuning, pool_warmup=pools)
    first, second = (TUNED.pop(seed) for seed in seeds(3, 2))
    assert (first == second) == pools


@pytest.mark.parametrize(
    "kernel",
    [NUTS(model), *(pytest.param(k, marks=pytest.mark.slow) for k in (HMC(model), marginal()))],
)
def test_one_group_has_nothing_to_share(kernel):
    pooled = run(Inline(), 10, kernel=kernel, num_warm=30, chains_per_worker=3, pool_warmup=True)
    settings = {"seed": seeds(3, 1)[0], "num_chains": 3, "disable_progbar": True}
    alone = MCMC(kernel, 10, 30, **settings)
    alone.run(Y)
    assert torch.equal(pooled.draws.position, alone.draws.position)


def state_of(position, gradient):
    value = torch.zeros(len(position))
    return State(position, position[:, :0], gradient, Evaluation(value, {}, {}))


def told(num_chains):
    zeros = torch.zeros(num_chains)
    return Info(zeros.bool(), zeros + 0.8, zeros, zeros.bool(), zeros, 1, 1, 0)


@pytest.mark.parametrize("dense", [True, False])
def test_what_is_joined_is_what_one_warmup_of_all_chains_would_find(dense):
    torch.manual_seed(1)
    sizes, steps = [3, 1, 2], 30
    path = torch.randn(steps, sum(sizes), 2).cumsum(0)
    slopes = torch.randn(steps, sum(sizes), 2)
    start = GaussianKinetic(torch.eye(2) if dense else torch.ones(2))
    settings = {"target": 0.8, "adapt_step_size": True, "adapt_mass": True}

    def moved(chains, **how):
        """After each window; whether it went on, and how it is tuned."""
        warmup = WarmUp(0.5, start, steps, most_steps=4 * steps, **settings, **how)
        for position, slope in zip(path[:, chains], slopes[:, chains], strict=True):
            warmup.update(state_of(position, slope), told(len(position)))
            yield warmup

    every = moved(range(6))
    parts = [range(3), range(3, 4), range(4, 6)]
    for whole, *each in zip(every, *(moved(part, pools=True) for part in parts), strict=True):
        assert len({warmup.waits for warmup in each}) == 1
        if each[0].waits:
            findings = zip(each, sizes, strict=True)
            shared = Findings.joined([warmup.found(size) for warmup, size in findings])
            for warmup in each:
                warmup.take_in(shared)
        for warmup in each:
            found = warmup.tuning.kinetic.inverse_mass
            torch.testing.assert_close(found, whole.tuning.kinetic.inverse_mass)
            assert warmup.finished == whole.finished
    assert whole.doubts and whole.has_gone_on
    for warmup in each:
        assert warmup.doubts == whole.doubts
        assert (warmup.warmup_steps, warmup.has_gone_on) == (whole.warmup_steps, True)
        assert warmup.tuning.step_size == pytest.approx(whole.tuning.step_size)


def two_modes():
    weights = dist.Categorical(torch.tensor([0.5, 0.5]))
    modes = dist.Normal(torch.tensor([-100.0, 100.0]), 1.0)
    pyro.sample("x", dist.MixtureSameFamily(weights, modes))


@pytest.mark.parametrize("pools", [True, False])
def test_groups_that_disagree_are_told(pools):
    """Each alone has converged, in a mode of its own; together they go on, and have not."""
    mcmc = MCMC(
        HMC(two_modes, num_steps=3),
        10,
        num_chains=12,
        chains_per_worker=6,
        initial_params={"x": torch.tensor([-100.0, 100.0]).repeat_interleave(6)},
        executor=Inline(),
        pool_warmup=pools,
        seed=0,
        disable_progbar=True,
    )
    mcmc.run()
    planned = 150 if pools else 200
    assert mcmc.warmup_steps == (4 * planned if pools else planned)
    disagreed = [m for m in mcmc.messages if "in its last window its draws disagree" in m]
    assert len(disagreed) == pools


def pooled(seconds, path=None, **settings):
    with short_segments(seconds):
        return run(Inline(), 12, num_warm=40, checkpoint=path, pool_warmup=True, **settings)


def test_draws_do_not_depend_on_segments(tmp_path):
    whole = pooled(100.0, save_warmup=True)
    cut = pooled(0.1, save_warmup=True)
    assert_same(whole, cut)
    assert torch.equal(whole.warmup_draws.position, cut.warmup_draws.position)
    assert not torch.equal(run(Inline(), 12, num_warm=40).draws.position, whole.draws.position)


@pytest.mark.parametrize("number", [9, pytest.param(39, marks=pytest.mark.slow)])
def test_groups_that_wait_for_each_other_are_taken_up(tmp_path, number):
    """Broken off in the second group, about the end of a window: the first one waits there."""
    path, second = tmp_path / "run.zarr", seeds(3, 2)[1]

    def hook(kernel, params, stage, i):
        if torch.initial_seed() == second:
            ended_at("Warmup", number)(kernel, params, stage, i)

    with pytest.raises(Ended):
        pooled(100.0, path, hook_fn=hook)
    found = MCMC.resume(path, model, Y, disable_progbar=True)
    assert torch.equal(found.draws.position, pooled(100.0).draws.position)


class Losing(Inline):
    """Loses a group's segments, those of some numbers."""

    def __init__(self, group, *numbers):
        self.group, self.numbers, self.tasks = group, numbers, []

    def submit(self, function, /, *args):
        task = function.args[0]
        self.tasks.append(task)
        group = list(dict.fromkeys(self.tasks)).index(task)
        if group == self.group and self.tasks.count(task) in self.numbers:
            future = Future()
            future.set_exception(MemoryError("no room"))
            return future
        return super().submit(function, *args)


def test_groups_wait_for_one_whose_segment_is_made_again():
    with short_segments(100.0):
        found = run(Losing(0, 1), 12, num_warm=40, pool_warmup=True)
    assert torch.equal(found.draws.position, pooled(100.0).draws.position)


@pytest.mark.parametrize("first", [0, 2])
def test_a_group_that_is_lost_is_not_waited_for(first):
    mcmc = run(Losing(1, *range(first + 1, 10)), 12, num_warm=40, pool_warmup=True)
    assert mcmc.draws.position.shape == (2, 12, 2)
    assert any(m.startswith("Chain 2 ended after 0 of 12 draws") for m in mcmc.messages)


def test_a_group_that_was_lost_goes_on_with_what_all_had_found(tmp_path):
    """Lost after the end of warm-up, when the other one had gone on."""
    path = tmp_path / "run.zarr"
    with short_segments(100.0):
        settings = {"num_warm": 40, "pool_warmup": True, "checkpoint": path}
        assert run(Losing(1, 4, 5, 6, 7), 12, **settings).draws.position.shape == (2, 12, 2)
    found = MCMC.resume(path, model, Y, disable_progbar=True)
    assert torch.equal(found.draws.position, pooled(100.0).draws.position)


def test_kernels_that_learn_more_are_refused():
    with pytest.raises(ValueError, match="`pool_warmup` is True without an `executor`"):
        MCMC(NUTS(model), 5, pool_warmup=True)
    for kernel in (HNNHMC(model), FlowNUTS(model), NUTS(model, transport="flow")):
        with pytest.raises(ValueError, match="tunes step size and mass alone"):
            MCMC(kernel, 5, executor=Inline(), pool_warmup=True)
    with pytest.raises(TypeError, match="`pool_warmup` is 1"):
        MCMC(NUTS(model), 5, executor=Inline(), pool_warmup=1)
