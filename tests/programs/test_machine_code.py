"""Machine code: kept on disk, checked when it is loaded, made anew, or told why there is none."""

from __future__ import annotations

import os
import threading

import pytest

import pyro_hamflow
from pyro_hamflow.programs import banded_source
from pyro_hamflow.programs.engines import model_library
from pyro_hamflow.programs.machine_code import compiler
from pyro_hamflow.programs.machine_code.libraries import library
from pyro_hamflow.programs.machine_code.store import Store

SEVEN = 'extern "C" int seven() { return 7; }'


def seven():
    return compiler.compiled(SEVEN)


def test_a_library_is_made_once(tmp_path):
    store, made = Store(tmp_path), []
    for _ in range(2):
        found = library("key", lambda: made.append(1) or seven(), store)
        assert found.seven() == 7
    assert made == [1]


def test_a_kept_library_that_does_not_load_is_made_anew(tmp_path):
    store = Store(tmp_path)
    store.keep("key", ".so", b"of another machine")
    assert library("key", seven, store).seven() == 7


def test_what_no_machine_loads_is_told(tmp_path):
    with pytest.raises(compiler.NotCompiled, match="a library cannot be loaded"):
        library("key", lambda: b"no library", Store(tmp_path))


def test_the_compiler_is_quoted():
    with pytest.raises(compiler.NotCompiled, match="the compiler said: .*error"):
        compiler.compiled("int f( {")


def test_a_compiler_that_does_not_end_is_ended(monkeypatch, tmp_path):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(compiler, "compiler", lambda: str(slow))
    monkeypatch.setattr(compiler, "_SECONDS", 0.1)
    with pytest.raises(compiler.NotCompiled, match="more than 0.1 seconds"):
        seven()


def test_a_temporary_folder_that_cannot_be_written_to_is_told(monkeypatch):
    monkeypatch.setattr(compiler.tempfile, "tempdir", "/nonexistent")
    with pytest.raises(compiler.NotCompiled, match="No such file"):
        seven()


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A store that is empty, which banded loops are made for."""
    monkeypatch.setenv("PYRO_HAMFLOW_CACHE", str(tmp_path))
    banded_source.library.cache_clear()
    yield tmp_path
    banded_source.library.cache_clear()


def test_banded_loops_are_kept_and_cleared(kept):
    assert banded_source.library() is not None
    assert len(list(kept.iterdir())) == 1
    pyro_hamflow.clear_cache()
    assert not list(kept.iterdir())


def test_banded_loops_are_made_on_systems_that_the_engine_does_not_know(kept, monkeypatch):
    monkeypatch.setattr(model_library, "_PLATFORMS", [])
    assert banded_source.library() is not None


def test_without_a_compiler_there_are_no_banded_loops(kept, monkeypatch):
    monkeypatch.setattr(compiler, "compiler", lambda: None)
    assert banded_source.library() is None


def test_a_store_is_bounded_and_cleared(tmp_path, monkeypatch):
    store = Store(tmp_path, most_bytes=25)
    for number in range(4):
        path = store.keep(f"key{number}", ".so", b"0123456789")
        os.utime(path, (number, number))
    assert store.find("key0", ".so") is None
    assert store.find("key3", ".so").read_bytes() == b"0123456789"
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setenv("PYRO_HAMFLOW_CACHE", str(tmp_path))
    pyro_hamflow.clear_cache()
    assert not list(tmp_path.iterdir())


def test_writers_at_the_same_time_do_not_meet(tmp_path):
    store, content = Store(tmp_path), bytes(200_000)
    seen = []

    def write():
        for _ in range(20):
            store.keep("key", ".so", content)
            seen.append(store.find("key", ".so"))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80 and all(seen)
    assert len(list(tmp_path.iterdir())) == 1
