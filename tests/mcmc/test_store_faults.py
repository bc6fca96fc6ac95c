"""What may happen to a store and to what a run depends on: the same draws, or a named error."""

from __future__ import annotations

import datetime
import itertools
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MCMC, NUTS, to_inference_data
from pyro_hamflow.mcmc.identity import digest_of
from pyro_hamflow.mcmc.packing import CheckpointError, DamagedCheckpoint, StoreGone
from pyro_hamflow.mcmc.resume import OtherData
from tests.helpers.broken_off import FORK, Ended, assert_same, ended_at
from tests.helpers.kinds import long_but

DATA = torch.tensor([0.5, -1.0, 2.0])
OFTEN = 1e-9  # seconds


def model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def run_of(path=None, of=model, **changes):
    settings = {"num_samples": 25, "warmup_steps": 15, "num_chains": 2, "seed": 5}
    kernel = NUTS(of, max_tree_depth=3)
    return MCMC(kernel, **settings | changes, checkpoint=path, disable_progbar=True)


def finished(data=DATA, **changes):
    mcmc = run_of(**changes)
    mcmc.run(data)
    return mcmc


def resumed(path, of=model, data=DATA, **how):
    return MCMC.resume(path, of, data, disable_progbar=True, **how)


def broken_off(path, data=DATA, **changes):
    with pytest.raises(Ended):
        run_of(path, hook_fn=ended_at("Sample", 12), **changes).run(data)
    return path


def at_tenth(do):
    """A function for ``hook_fn`` that does something once."""

    def hook(kernel, params, stage, i):
        if (stage, i) == ("Sample", 10):
            do()

    return hook


# --- while the run goes on ------------------------------------------------------------------------


def test_a_store_that_is_moved_ends_the_run_and_goes_on_elsewhere(tmp_path):
    here, there = tmp_path / "run.zarr", tmp_path / "other.zarr"
    mcmc = run_of(here, checkpoint_every=OFTEN, hook_fn=at_tenth(lambda: os.rename(here, there)))
    with pytest.raises(StoreGone, match=r"run.zarr was moved or removed while a run wrote to it"):
        mcmc.run(DATA)
    assert_same(resumed(there), finished())


def test_a_process_that_changes_its_directory_writes_to_the_same_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    hook = at_tenth(lambda: os.chdir("other"))
    mcmc = run_of("run.zarr", checkpoint_every=OFTEN, hook_fn=hook)
    mcmc.run(DATA)
    assert_same(mcmc, finished())
    assert os.listdir(tmp_path / "other") == []


def test_a_chunk_that_is_damaged_before_it_is_full_is_written_again(tmp_path):
    def damage():
        for file in (tmp_path / "run.zarr" / "posterior" / "mean" / "c").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:10])

    mcmc = run_of(tmp_path / "run.zarr", checkpoint_every=OFTEN, hook_fn=at_tenth(damage))
    mcmc.run(DATA)
    assert_same(mcmc, finished())
    assert_same(resumed(tmp_path / "run.zarr"), mcmc)
    assert not to_inference_data(tmp_path / "run.zarr").posterior["mean"].isnull().any()


def test_states_that_cannot_be_written_for_a_while_cost_nothing(tmp_path):
    """The disk is waited for by another thread: what went wrong there is told, and made good."""
    place = tmp_path / "run.zarr" / "checkpoints"

    def hook(kernel, params, stage, i):
        if (stage, i) == ("Sample", 5):
            while place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            place.write_text("in the way")
        if (stage, i) == ("Sample", 15):
            place.unlink()

    mcmc = run_of(tmp_path / "run.zarr", checkpoint_every=OFTEN, hook_fn=hook)
    with pytest.warns(RuntimeWarning, match="cannot be written: .*the run goes on") as told:
        mcmc.run(DATA)
    assert sum("cannot be written" in str(warning.message) for warning in told) == 1
    assert_same(mcmc, finished())
    assert_same(resumed(tmp_path / "run.zarr"), mcmc)


# --- before it goes on ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.set_default_dtype(torch.float64)
    return broken_off(tmp_path_factory.mktemp("written") / "run.zarr")


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run.zarr")


FAULTS = ["gone", "one gone", "empty", "foreign"]
GROUPS = ["posterior", "sample_stats", "unconstrained_posterior"]


@pytest.mark.parametrize(
    ("fault", "group"),
    long_but(
        lambda case: GROUPS.index(case[1]) == FAULTS.index(case[0]) % 3,
        itertools.product(FAULTS, GROUPS),
    ),
)
def test_draws_whose_description_is_damaged_are_made_again(copied, group, fault):
    place = copied / group
    if fault == "gone":
        shutil.rmtree(place)
    elif fault == "one gone":
        shutil.rmtree(next(child for child in place.iterdir() if child.is_dir()))
    else:
        (place / "zarr.json").write_text("" if fault == "empty" else '{"node_type": "array"}')
    with pytest.raises(DamagedCheckpoint, match=rf"in the group {group}; `at=2` goes on from"):
        resumed(copied)
    assert_same(resumed(copied, at=2), finished())
    assert not to_inference_data(copied).posterior["mean"].isnull().any()


def test_strange_files_in_a_store_do_not_matter(copied):
    (copied / "checkpoints" / "0abc" / "c").mkdir(parents=True)
    (copied / "checkpoints" / "0abc" / "c" / "0").write_text("something")
    (copied / ".DS_Store").write_text("something")
    assert_same(resumed(copied), finished())


def read_only(path, result):
    os.seteuid(65534)
    try:
        resumed(path)
    except OSError as error:
        result.put((type(error).__name__, str(error)))


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user")
def test_a_store_that_cannot_be_written_is_told_before_sampling(written):
    with tempfile.TemporaryDirectory() as folder:  # that others may enter
        os.chmod(folder, 0o755)
        path = shutil.copytree(written, Path(folder) / "run.zarr")
        path.chmod(0o555)
        result = FORK.Queue()
        process = FORK.Process(target=read_only, args=(path, result))
        process.start()
        kind, text = result.get(timeout=100.0)
        process.join(60.0)
    assert kind == "PermissionError" and "the checkpoint cannot be written" in text


@pytest.mark.slow
def test_a_run_of_machine_code_is_not_gone_on_with_without_a_compiler(tmp_path, monkeypatch):
    kernel = NUTS(model, max_tree_depth=3, engine="native")
    with pytest.raises(Ended):
        MCMC(
            kernel,
            25,
            15,
            hook_fn=ended_at("Sample", 5),
            checkpoint=tmp_path / "run.zarr",
            disable_progbar=True,
        ).run(DATA)
    no_compiler = {"CXX": "/none", "PATH": "/none", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name, value in no_compiler.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CheckpointError, match="a run that machine code moved, of which there is"):
        resumed(tmp_path / "run.zarr", lambda y: model(y))


@pytest.mark.parametrize("name", ["..", "zarr.json", "a\\b", "a/../../b", "x" * 300, "θ"])
def test_sites_may_have_any_names(tmp_path, name):
    def named(y):
        site = pyro.sample(name, dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(site, 1.0).expand([3]).to_event(1), obs=y)

    broken_off(tmp_path / "run.zarr", of=named)
    assert_same(resumed(tmp_path / "run.zarr", named), finished(of=named))
    assert os.listdir(tmp_path) == ["run.zarr"]
    assert to_inference_data(tmp_path / "run.zarr").posterior.sizes["draw"] == 25


# --- other data -----------------------------------------------------------------------------------


class Box:
    def __init__(self, content, more=0):
        self.content, self.more = content, more
        self.lock, self._cache = threading.Lock(), object()
        self.itself = self


def table(**columns):
    kinds = pd.Categorical(["a", "b", "a"])
    return pd.DataFrame({"y": DATA.numpy(), "kind": kinds} | columns)


@pytest.mark.parametrize(
    ("value", "others"),
    [
        (
            table,
            [
                lambda: table(kind=pd.Categorical(["a", "a", "b"])),
                lambda: table(more=1.0),
                lambda: table().rename(columns={"y": "z"}),
            ],
        ),
        (lambda: pd.Series([1.0, 2.0]), [lambda: pd.Series([1.0, 3.0])]),
        (lambda: {"a", "b", 10**400}, [lambda: {"a", "c", 10**400}]),
        (lambda: Box(DATA), [lambda: Box(DATA + 1e-6), lambda: Box(DATA, 1)]),
        (lambda: np.array(["x", None], object), [lambda: np.array(["y", None], object)]),
        (lambda: [{"a": (DATA, torch.nan)}], [lambda: [{"a": (DATA, 1.0)}], lambda: [{"b": ()}]]),
        (lambda: range(3), [lambda: range(4)]),
        (lambda: datetime.date(2020, 1, 1), [lambda: datetime.date(2020, 1, 2)]),
        (lambda: torch.eye(2).to_sparse(), [lambda: 2.0 * torch.eye(2).to_sparse()]),
    ],
)
def test_digests_of_data_tell_them_apart(value, others):
    kernel = NUTS(model)
    potential = kernel.prepare((DATA,), {})
    of = [digest_of(potential, (made(),), {}) for made in (value, value, *others)]
    assert of[0] == of[1]
    assert len(set(of)) == 1 + len(others)


def test_another_table_is_refused(tmp_path):
    def of_table(rows):
        site = pyro.sample("site", dist.Normal(0.0, 1.0))
        y = torch.tensor(rows["y"].to_numpy())
        pyro.sample("y", dist.Normal(site, 1.0).expand([3]).to_event(1), obs=y)

    path = broken_off(tmp_path / "run.zarr", table(), of=of_table)
    with pytest.raises(OtherData, match="is of other data"):
        resumed(path, of_table, table(more=1.0))
    assert_same(resumed(path, of_table, table()), finished(table(), of=of_table))
