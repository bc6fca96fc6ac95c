"""Settings of the test suite."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

import pyro
import pytest
import torch

from pyro_hamflow.model import start
from pyro_hamflow.programs import compilation
from pyro_hamflow.programs.program_cache import ProgramCache

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # numbers of settings in <malloc.h>


def pytest_configure():
    """Ctrl-C interrupts, also in a process that was begun in the background, where it does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """What is imported by now stays: garbage is looked for elsewhere, and memory is kept.

    Memory of large tensors goes back to the system when they do, and comes again page by page: a
    third of the time of steps of ten thousand chains.
    """
    gc.freeze()
    allocator = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(allocator, "mallopt"):  # of glibc
        for setting in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            allocator.mallopt(setting, 2**30)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long checks too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        long = pytest.mark.skip(reason="long check: pass --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(long)


@pytest.fixture
def uncaptured(monkeypatch):
    """Transitions run as they are written, so that parts of them can be spoilt."""

    def as_written(self, owner, name, function, *examples):
        return function

    monkeypatch.setattr(ProgramCache, "accelerate", as_written)


@pytest.fixture
def far_starts_stay(monkeypatch):
    """Chains start where the box of starts has them."""
    monkeypatch.setattr(start, "come_down", lambda gradient, position, noise: position)


@pytest.fixture
def compiled_at_once(monkeypatch):
    """Programs compile themselves at their first call, where that is asked for."""
    monkeypatch.setattr(compilation, "_PATIENCE", 0.0)


@pytest.fixture(autouse=True)
def _clean_state():
    os.environ.setdefault("CI", "true")  # no progress bars
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
