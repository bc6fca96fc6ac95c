"""Runs that are ended at any moment, by any means, go on to the draws that they would have made."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from zarr.storage import LocalStore

from pyro_hamflow import HMC, MCMC, NUTS, PseudoMarginalHMC, marginalize
from pyro_hamflow.mcmc import draws, store
from pyro_hamflow.mcmc.packing import CheckpointError, DamagedCheckpoint, OtherVersion
from pyro_hamflow.mcmc.resume import OtherData, OtherModel
from pyro_hamflow.mcmc.writer import GROUPS
from tests.helpers.broken_off import FORK, Ended, assert_same, ended_at
from tests.helpers.kinds import long_but

DATA = torch.tensor([0.5, -1.0, 2.0])


def model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def run_of(path=None, kernel=None, **changes):
    settings = {"num_samples": 40, "warmup_steps": 30, "num_chains": 2, "seed": 5}
    kernel = kernel or NUTS(model, max_tree_depth=4)
    return MCMC(kernel, **settings | changes, checkpoint=path, disable_progbar=True)


def finished(**changes):
    mcmc = run_of(**changes)
    mcmc.run(DATA)
    return mcmc


def break_off(path, stage, number, **changes):
    with pytest.raises(Ended):
        run_of(path, hook_fn=ended_at(stage, number), **changes).run(DATA)


# --- the same draws -----------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "number"), [("Warmup", 12), ("Sample", 0)])
def test_a_run_goes_on_bit_for_bit(tmp_path, stage, number):
    break_off(tmp_path / "run.zarr", stage, number, save_warmup=True)
    before = torch.get_rng_state()
    found = MCMC.resume(tmp_path / "run.zarr", model, DATA, disable_progbar=True)
    assert torch.equal(torch.get_rng_state(), before)
    whole = finished(save_warmup=True)
    assert_same(found, whole)
    assert torch.equal(found.warmup_draws.position, whole.warmup_draws.position)
    assert torch.equal(found.get_samples()["x"], whole.get_samples()["x"])


@pytest.mark.parametrize(("stage", "number"), [("Warmup [0]", 12), ("Sample [1]", 9)])
def test_chains_that_move_one_after_the_other_go_on(tmp_path, stage, number):
    settings = {"chain_method": "sequential", "num_chains": 3, "num_samples": 15, "thin": 3}
    break_off(tmp_path / "run.zarr", stage, number, **settings)
    found = MCMC.resume(tmp_path / "run.zarr", model, DATA, disable_progbar=True)
    assert_same(found, finished(**settings))


def test_recovered_sites_and_a_tuned_estimator_go_on(tmp_path):
    def kernel():
        return PseudoMarginalHMC(marginalize(model, ["x"], num_particles=4), max_num_steps=5)

    path, short = tmp_path / "run.zarr", {"num_samples": 20, "warmup_steps": 15}
    break_off(path, "Sample", 10, kernel=kernel(), **short)
    again = marginalize(model, ["x"], num_particles=4)
    found = MCMC.resume(path, again, DATA, disable_progbar=True)
    assert_same(found, finished(kernel=kernel(), **short))
    assert found.draws.local["x"].shape == (2, 20, 3)


def test_a_run_that_is_over_draws_more(tmp_path):
    run_of(tmp_path / "run.zarr").run(DATA)
    found = MCMC.resume(tmp_path / "run.zarr", model, DATA, num_samples=60, disable_progbar=True)
    assert_same(found, finished(num_samples=60))
    with pytest.raises(ValueError, match="`num_samples` is 50: expected 60 or more"):
        MCMC.resume(tmp_path / "run.zarr", model, DATA, num_samples=50)


def test_a_run_that_is_over_is_read_without_drawing(tmp_path):
    whole = run_of(tmp_path / "run.zarr")
    whole.run(DATA)

    def never(*args):
        raise AssertionError("it drew")

    found = MCMC.resume(tmp_path / "run.zarr", model, DATA, hook_fn=never, disable_progbar=True)
    assert_same(found, whole)


def test_a_kernel_with_functions_is_given_again(tmp_path):
    def kernel():
        return HMC(model, max_num_steps=5, init_strategy=pyro.infer.autoguide.init_to_median)

    break_off(tmp_path / "run.zarr", "Sample", 5, kernel=kernel())
    with pytest.raises(OtherModel, match=r"needs the kernel, .*init_strategy'\]` is <function"):
        MCMC.resume(tmp_path / "run.zarr", model, DATA)
    found = MCMC.resume(tmp_path / "run.zarr", kernel(), DATA, disable_progbar=True)
    assert_same(found, finished(kernel=kernel()))


def test_precision_is_taken_from_the_run(tmp_path):
    break_off(tmp_path / "run.zarr", "Sample", 5)
    torch.set_default_dtype(torch.float32)
    found = MCMC.resume(tmp_path / "run.zarr", model, DATA, disable_progbar=True)
    assert torch.get_default_dtype() == torch.float32
    torch.set_default_dtype(torch.float64)
    assert_same(found, finished())


# --- real processes, real signals ---------------------------------------------------------------


def in_process(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that forks and threads do not go together
        process = FORK.Process(target=function, args=args)
        process.start()
    return process


def slowly(path, count):
    """A run that writes a checkpoint after each iteration, and is not over soon after so many."""
    iterations = itertools.count()

    def wait(*args):
        time.sleep(0.01 if next(iterations) < count + 5 else 1.0)

    run_of(path, hook_fn=wait, checkpoint_every=0.001).run(DATA)


def await_states(path, count):
    """Waits until a run has written so many states."""
    limit = time.monotonic() + 300.0
    while time.monotonic() < limit:
        states = Path(path, "checkpoints")
        if any(int(state.parent.parent.name) >= count for state in states.glob("0*/c/0")):
            return
        time.sleep(0.002)
    raise AssertionError("the run has not come so far")


def killed(path, count, number, delay=0.0):
    """A run that a signal ends after so many states; its exit code."""
    process = in_process(slowly, path, count)
    await_states(path, count)
    time.sleep(delay)
    os.kill(process.pid, number)
    process.join(300.0)
    return process.exitcode


@pytest.mark.parametrize(
    ("count", "delay"), [pytest.param(10, 0.003, marks=pytest.mark.slow), (45, 0.007)]
)
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, count, delay):
    assert killed(tmp_path / "run.zarr", count, signal.SIGKILL, delay) == -signal.SIGKILL
    found = MCMC.resume(tmp_path / "run.zarr", model, DATA, disable_progbar=True)
    assert_same(found, finished())


@pytest.mark.slow
def test_runs_that_are_killed_a_hundred_times_go_on_bit_for_bit(tmp_path):
    whole = finished()
    generator = torch.Generator().manual_seed(0)
    for i in range(100):
        path = tmp_path / f"{i}.zarr"
        count = int(torch.randint(1, 65, (), generator=generator))
        delay = 0.03 * float(torch.rand((), generator=generator))
        killed(path, count, signal.SIGKILL, delay)
        assert_same(MCMC.resume(path, model, DATA, disable_progbar=True), whole)
        shutil.rmtree(path)


def test_sigterm_writes_a_checkpoint_and_ends_the_process(tmp_path):
    assert killed(tmp_path / "run.zarr", 40, signal.SIGTERM) == -signal.SIGTERM
    found = MCMC.resume(tmp_path / "run.zarr", model, DATA, disable_progbar=True)
    assert_same(found, finished())


def interrupting(path):
    """A run that is interrupted between checkpoints; tells what it has kept."""

    def hook(kernel, params, stage, i):
        if (stage, i) == ("Sample", 20):
            os.kill(os.getpid(), signal.SIGINT)

    mcmc = run_of(path, hook_fn=hook)
    with pytest.warns(RuntimeWarning, match="interrupted: 21 of 40 draws were made and are kept"):
        mcmc.run(DATA)
    return mcmc


def test_ctrl_c_writes_a_checkpoint_and_keeps_all_draws(tmp_path):
    interrupted = interrupting(tmp_path / "run.zarr")
    whole = finished()
    assert interrupted.interrupted
    assert torch.equal(interrupted.draws.position, whole.draws.position[:, :21])
    found = MCMC.resume(tmp_path / "run.zarr", model, DATA, disable_progbar=True)
    assert_same(found, whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run that was broken off, to be copied and spoilt."""
    torch.set_default_dtype(torch.float64)
    path = tmp_path_factory.mktemp("written") / "run.zarr"
    break_off(path, "Sample", 25)
    return path


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run.zarr")


def resumed(path, of=model, data=DATA, **how):
    return MCMC.resume(path, of, data, disable_progbar=True, **how)


def other_sites(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def other_prior(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.001))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_another_model_is_refused(copied):
    with pytest.raises(OtherModel, match="site 'x' was .*, and is absent"):
        resumed(copied, other_sites)
    with pytest.raises(OtherModel, match=r"site 'x' was \[\[3\], .*, and is \[\[2\]"):
        resumed(copied, data=DATA[:2])
    with pytest.raises(OtherModel, match="minus the log density at the chains' positions was"):
        resumed(copied, other_prior)


def test_another_kernel_is_refused(copied):
    with pytest.raises(OtherModel, match="is of a kernel NUTS: got one of kind HMC"):
        resumed(copied, HMC(model))
    with pytest.raises(OtherModel, match="with other settings"):
        resumed(copied, NUTS(model, max_tree_depth=5))


def test_other_data_are_refused(copied):
    with pytest.raises(OtherData, match="is of other data"):
        resumed(copied, data=DATA + torch.tensor([0.0, 1e-15, 0.0]))


def test_another_version_and_foreign_places_are_refused(copied, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("something")
    for place in ("empty", "file"):
        with pytest.raises(OtherVersion, match=f"{place} is no checkpoint of a run"):
            resumed(tmp_path / place)
    with pytest.raises(FileNotFoundError, match="there is no .*none"):
        resumed(tmp_path / "none")
    head = json.loads((copied / "zarr.json").read_text())
    head["attributes"]["version"] = 99
    (copied / "zarr.json").write_text(json.dumps(head))
    with pytest.raises(OtherVersion, match="version 99: expected .*version 1"):
        resumed(copied)


def states(path):
    return sorted(s for s in (path / "checkpoints").iterdir() if s.name.isdigit())


def spoil(file, place=0.5):
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("place", [0.0, 0.999])
def test_of_a_damaged_state_the_last_whole_one_is_offered(copied, place):
    *_, last_but_one, last = states(copied)
    spoil(last / "c" / "0", place)
    number = int(last_but_one.name)
    with pytest.raises(DamagedCheckpoint, match=f"state .* is damaged; `at={number}` goes on"):
        resumed(copied)
    assert_same(resumed(copied, at=number), finished())


@pytest.mark.parametrize(
    ("group", "how"),
    [
        ("unconstrained_posterior/position", spoil),
        ("sample_stats/diverging", Path.unlink),
        ("posterior/x", lambda file: file.write_bytes(b"")),
    ],
)
def test_damaged_draws_are_made_again_from_the_end_of_warmup(copied, group, how):
    how(next(file for file in (copied / group / "c").rglob("*") if file.is_file()))
    with pytest.raises(DamagedCheckpoint, match="draws from 0 on are damaged in the group"):
        resumed(copied)
    lasting = int(states(copied)[0].name)
    assert_same(resumed(copied, at=lasting), finished())


def test_a_state_that_was_cut_off_while_it_was_written_is_as_none(copied):
    last = states(copied)[-1]
    shutil.copytree(last, copied / "checkpoints" / "999999")
    os.remove(copied / "checkpoints" / "999999" / "c" / "0")
    (copied / "checkpoints" / "999999" / "c" / "0.abc.partial").write_bytes(b"half")
    assert_same(resumed(copied), finished())
    assert not list(copied.rglob("*.partial"))


def test_a_place_that_is_taken_is_left_alone(tmp_path, copied):
    with pytest.raises(FileExistsError, match="exists already: go on with `MCMC.resume`"):
        run_of(copied).run(DATA)
    assert_same(resumed(copied), finished())


def test_a_run_that_ended_before_its_first_state_is_in_nobodys_way(copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no state yet: .*start anew"):
        resumed(copied)
    run_of(copied, num_samples=5).run(DATA)
    (copied.parent / "empty").mkdir()
    run_of(copied.parent / "empty", num_samples=5).run(DATA)


def test_two_runs_do_not_write_to_one_place(copied):
    def other(*args):
        with pytest.raises(CheckpointError, match="another run is writing to"):
            resumed(copied)
        raise Ended

    with pytest.raises(Ended):
        resumed(copied, hook_fn=other)
    assert_same(resumed(copied), finished())


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        run_of(tmp_path / "run.zarr").run(DATA * torch.nan)
    assert not (tmp_path / "run.zarr").exists()


# --- disks --------------------------------------------------------------------------------------


def with_full_disk(path, result):
    """A run whose files may not grow beyond some bytes: all draws are kept in memory."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mcmc = run_of(
            path,
            num_samples=2000,
            kernel=HMC(model, num_steps=1, engine="torch"),
            checkpoint_every=0.1,
        )
        mcmc.run(DATA)
    result.put((mcmc.draws.position.numpy(), [str(w.message) for w in told]))


def test_a_full_disk_costs_no_draws_and_is_told_once(tmp_path):
    result = FORK.Queue()
    process = in_process(with_full_disk, tmp_path / "run.zarr", result)
    position, told = result.get(timeout=100.0)
    process.join(60.0)
    whole = finished(num_samples=2000, kernel=HMC(model, num_steps=1, engine="torch"))
    assert torch.equal(torch.from_numpy(position), whole.draws.position)
    assert len(told) == 1
    assert "File too large" in told[0] and "the run goes on" in told[0]
    found = resumed(tmp_path / "run.zarr")
    assert torch.equal(found.draws.position, whole.draws.position)


def in_read_only(path, result):
    if os.geteuid() == 0:
        os.seteuid(65534)  # whom a directory can be closed to
    try:
        run_of(path).run(DATA)
    except OSError as error:
        result.put((type(error).__name__, str(error)))


def test_a_read_only_directory_is_told_before_sampling(tmp_path):
    tmp_path.chmod(0o555)
    result = FORK.Queue()
    process = in_process(in_read_only, tmp_path / "run.zarr", result)
    kind, text = result.get(timeout=100.0)
    process.join(60.0)
    tmp_path.chmod(0o755)
    assert kind == "PermissionError"
    assert "the checkpoint cannot be written: Permission denied" in text and "run.zarr" in text


# --- what is kept -------------------------------------------------------------------------------


def local_run(path=None, **changes):
    kernel = PseudoMarginalHMC(marginalize(model, ["x"], num_particles=4), max_num_steps=5)
    return run_of(path, kernel, **{"num_samples": 20, "warmup_steps": 15} | changes)


def test_a_run_that_ends_early_looks_for_no_draws_that_it_might_have_made(tmp_path, monkeypatch):
    """There was room for ten million."""
    sought = []
    monkeypatch.setattr(LocalStore, "delete", lambda self, key: sought.append(key))
    mcmc = run_of(tmp_path / "run.zarr", num_samples=10**7, stop_when=lambda run: True)
    mcmc.run(DATA)
    assert len(sought) < 20
    assert mcmc.draws.position.shape[1] == 1
    arrays = store.Store(mcmc.checkpoint).group(GROUPS[0]).values()
    lengths = {chunks.array.shape[1] for chunks in arrays}
    assert lengths == {1}


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_the_end_of_a_run_reads_a_few_draws_at_a_time(tmp_path, monkeypatch, chain_method):
    """Of positions, too, so that memory does not grow with their number."""
    monkeypatch.setattr(store, "_CHUNK_BYTES", 10 * 2 * 4 * 8)
    read, at_once = store.Store.read, []

    def watched(self, group, name, chains, draws):
        if name == "position":
            at_once.append(draws.stop - (draws.start or 0))
        return read(self, group, name, chains, draws)

    monkeypatch.setattr(store.Store, "read", watched)
    mcmc = run_of(tmp_path / "run.zarr", num_samples=70, chain_method=chain_method)
    mcmc.run(DATA)
    assert at_once and max(at_once) <= (20 if chain_method == "sequential" else 10)
    plain = run_of(num_samples=70, chain_method=chain_method)
    plain.run(DATA)
    assert mcmc.report == plain.report
    assert_same(mcmc, plain)


def test_thinned_draws_are_every_third(tmp_path):
    plain, thinned = finished(), run_of(tmp_path / "run.zarr", thin=3)
    thinned.run(DATA)
    assert torch.equal(thinned.draws.position, plain.draws.position[:, 2::3])
    assert thinned.draws.position.shape[1] == 13


@pytest.mark.parametrize("streams", long_but([True], [False, True]))
def test_recovered_sites_are_kept_as_asked(tmp_path, streams, monkeypatch):
    def kept(name, **changes):
        mcmc = local_run(tmp_path / name if streams else None, **changes)
        mcmc.run(DATA)
        return mcmc

    assert list(kept("all").draws.local) == ["x"]
    assert list(kept("none", keep=[]).draws.local) == []
    monkeypatch.setattr(draws, "MOST_LOCAL_BYTES", 20 * 2 * 3 * 8 - 1)
    cut = kept("cut")
    assert list(cut.draws.local) == []
    assert any("recovered sites were not kept" in message for message in cut.messages)
    assert list(kept("named", keep=["x"]).draws.local) == ["x"]
    with pytest.raises(ValueError, match=r"`keep` names \['z'\]: expected names of the sites"):
        kept("wrong", keep=["z"])
