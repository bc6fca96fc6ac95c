"""Runs in workers that are written as they go: whatever ends, and whatever goes on with them."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from pyro_hamflow import MCMC, NUTS, ess_above, to_inference_data
from pyro_hamflow.mcmc.groups import seeds
from pyro_hamflow.mcmc.packing import CheckpointError, DamagedCheckpoint
from pyro_hamflow.mcmc.resume import OtherData, OtherModel
from pyro_hamflow.mcmc.store import Store
from pyro_hamflow.process import HeldSignals
from tests.helpers.broken_off import FORK, Ended, assert_same, ended_at
from tests.helpers.groups import (
    Inline,
    Killer,
    Y,
    draws_of_groups,
    forked,
    latent,
    marginal,
    model,
    run,
    short_segments,
)


def written(path, executor=None, num_samples=24, **settings):
    """A run of short segments, with a checkpoint after each."""
    settings = {"checkpoint": path, "checkpoint_every": 0.2} | settings
    with short_segments(0.2):
        return run(executor or Inline(), num_samples, **settings)


def broken_off(path, stage, number, **settings):
    with pytest.raises(Ended):
        written(path, hook_fn=ended_at(stage, number), **settings)
    return path


def resumed(path, of=model, data=Y, **how):
    with short_segments(0.2):
        return MCMC.resume(path, of, data, disable_progbar=True, **how)


@pytest.fixture(scope="module")
def expected():
    return draws_of_groups(24)


def test_draws_are_those_of_a_run_that_is_not_written(tmp_path):
    found = written(tmp_path / "run.zarr", save_warmup=True, thin=2)
    plain = run(Inline(), save_warmup=True, thin=2)
    assert_same(found, plain)
    assert torch.equal(found.warmup_draws.position, plain.warmup_draws.position)
    for data in (to_inference_data(tmp_path / "run.zarr"), to_inference_data(found)):
        mean = torch.as_tensor(data.posterior["mean"].values)
        assert torch.equal(mean, plain.get_samples(group_by_chain=True)["mean"])


@pytest.mark.parametrize(("stage", "number"), [("Warmup", 7), ("Sample", 10)])
def test_a_run_goes_on_bit_for_bit(tmp_path, expected, stage, number):
    path = broken_off(tmp_path / "run.zarr", stage, number, save_warmup=True)
    before = torch.get_rng_state(), torch.get_default_dtype()
    found = resumed(path)
    assert torch.equal(found.draws.position, expected)
    assert found.warmup_draws.position.shape == (3, 16, 2)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_default_dtype() == before[1]
    longer = resumed(path, num_samples=30, executor=Inline())
    assert torch.equal(longer.draws.position, draws_of_groups(30))


@pytest.mark.slow
def test_recovered_sites_go_on(tmp_path):
    settings = {"kernel": marginal(), "num_samples": 12, "num_warm": 12}
    path = broken_off(tmp_path / "run.zarr", "Sample", 5, **settings)
    again = marginal()
    assert_same(resumed(path, again), run(Inline(), 12, kernel=marginal(), num_warm=12))
    assert list(to_inference_data(path).posterior.data_vars) == ["mean", "x"]
    with pytest.raises(OtherModel):
        resumed(path, latent)


@pytest.mark.slow
def test_a_run_that_stops_when_it_is_enough_goes_on_to_the_same_number(tmp_path):
    settings = {"stop_when": ess_above(200), "num_samples": 3000, "num_warm": 60}
    whole = written(tmp_path / "whole.zarr", **settings)
    assert 50 < whole.draws.position.shape[1] < 1500
    path = broken_off(tmp_path / "run.zarr", "Sample", 52, **settings)
    found = resumed(path, stop_when=ess_above(200))
    assert torch.equal(found.draws.position, whole.draws.position)


def in_process(work, *args):
    process = FORK.Process(target=work, args=args)
    process.start()
    process.join(300.0)
    assert not process.is_alive()
    return process.exitcode


def killed(path, flag):
    torch.set_default_dtype(torch.float64)
    written(path, hook_fn=Killer(flag, 10))


def test_a_run_whose_own_process_is_killed_goes_on(tmp_path, expected):
    code = in_process(killed, tmp_path / "run.zarr", tmp_path / "flag")
    assert code == -signal.SIGKILL
    assert torch.equal(resumed(tmp_path / "run.zarr").draws.position, expected)


class Signalling:
    """Sends a signal to a process at one draw of one group."""

    def __init__(self, number, process):
        self.number, self.process = number, process

    def __call__(self, kernel, params, stage, i):
        if stage == "Sample" and i == 10:
            os.kill(self.process, self.number)


def signalled(path, number):
    torch.set_default_dtype(torch.float64)
    written(path, hook_fn=Signalling(number, os.getpid()))


def test_sigterm_writes_what_there_is_and_ends_the_process(tmp_path, expected):
    assert in_process(signalled, tmp_path / "run.zarr", signal.SIGTERM) == -signal.SIGTERM
    assert torch.equal(resumed(tmp_path / "run.zarr").draws.position, expected)


def test_ctrl_c_writes_all_draws(tmp_path, expected):
    """In whatever process it comes to, it ends a segment after a whole iteration."""
    hook = Signalling(signal.SIGINT, os.getpid())
    with pytest.warns(RuntimeWarning, match="interrupted: 11 of 24 draws were made"):
        found = written(tmp_path / "run.zarr", hook_fn=hook, num_chains=2)
    assert torch.equal(found.draws.position, expected[:2, :11])
    assert to_inference_data(tmp_path / "run.zarr").posterior.sizes["draw"] == 11
    assert torch.equal(resumed(tmp_path / "run.zarr").draws.position, expected[:2])


def test_signals_are_not_held_back_in_forked_processes():
    """Or pools could not end their workers."""
    with HeldSignals() as held:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not held.came


@pytest.mark.slow
def test_what_a_worker_that_is_killed_for_ever_leaves_is_written(tmp_path, expected):
    path, killer = tmp_path / "run.zarr", Killer(tmp_path / "flag", 10, seed=seeds(3, 2)[1])
    with forked() as executor:
        mcmc = written(path, executor, hook_fn=killer, checkpoint_every=0.01)
    assert torch.equal(mcmc.draws.position, expected[:2])
    (early,) = mcmc.ended_early.values()
    made = early.position.shape[1]
    assert torch.equal(early.position, expected[2:, :made])
    assert any("its worker was lost 3 times" in message for message in mcmc.messages)
    assert to_inference_data(path).posterior.sizes["chain"] == 2
    state = next(Store(path, writes=False).states())[1]
    assert [group["written"][""] for group in state.words["groups"]] == [24, made]
    with forked() as executor:
        assert torch.equal(resumed(path, executor=executor).draws.position, expected)


def test_what_does_not_fit_is_refused(tmp_path):
    path = broken_off(tmp_path / "run.zarr", "Sample", 10)
    with pytest.raises(OtherData):
        resumed(path, data=Y + 1.0)
    with pytest.raises(OtherModel, match="other settings"):
        resumed(path, NUTS(model, max_tree_depth=3))
    with pytest.raises(ValueError, match="`num_samples` is 3: expected "):
        resumed(path, num_samples=3)
    mcmc = MCMC(NUTS(model), 5, 5, checkpoint=tmp_path / "plain.zarr", disable_progbar=True)
    mcmc.run(Y)
    with pytest.raises(CheckpointError, match="tuned together in one process"):
        resumed(tmp_path / "plain.zarr", executor=Inline())
    with pytest.raises(FileExistsError, match=r"go on with `MCMC.resume`"):
        written(path)


def test_of_damaged_draws_the_beginning_is_offered(tmp_path, expected):
    path = broken_off(tmp_path / "run.zarr", "Sample", 20)
    chunk = path / "unconstrained_posterior" / "position" / "c" / "1" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"`at=\d+` goes on from the last whole one"):
        resumed(path)
    assert torch.equal(resumed(path, at=1).draws.position, expected)
