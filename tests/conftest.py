"""Settings of the test suite."""

from __future__ import annotations

import os

import pyro
import pytest
import torch

from pyro_hamflow.model.potential import Potential


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
    monkeypatch.setattr(Potential, "accelerate", lambda self, name, function, *_, **__: function)


@pytest.fixture(autouse=True)
def _clean_state():
    os.environ.setdefault("CI", "true")  # no progress bars
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
