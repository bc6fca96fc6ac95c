"""What a process shares is left as it was found: by runs, trainings, faults and interruptions."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import settings
from pyro.poutine.runtime import _PYRO_STACK

from pyro_hamflow import (
    HMC,
    HNNHMC,
    MCMC,
    NUTS,
    AnnealedSampler,
    AutoNeuralHamiltonianFlow,
    FlowNUTS,
    fit_flow,
    fit_guide,
    importance_sample,
    learn_surrogate,
    to_inference_data,
)
from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow
from pyro_hamflow.process import undisturbed

DATA = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def model(y):
    scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), scale).to_event(1))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(mean.sum(), 1.0), obs=y)


def _random_states():
    return [hash(repr(part)) for part in (_torch_state(), _numpy_state(), random.getstate())]


def _torch_state():
    return torch.get_rng_state().tolist()


def _numpy_state():
    return [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()]


def _shared():
    store = pyro.get_param_store()
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "settings": settings.get(),
        "handlers": list(_PYRO_STACK),
        "parameters": {n: (id(p), p.tolist()) for n, p in store._params.items()},
    }


def _mcmc(kernel):
    def run(seed, hook=None):
        mcmc = MCMC(kernel(model), 20, 20, num_chains=2, seed=seed, hook_fn=hook)
        mcmc.run(DATA)
        to_inference_data(mcmc)

    return run


def _guide(seed):
    with torch.random.fork_rng():
        guide = AutoNeuralHamiltonianFlow(model, hidden=(4,))
        guide.prepare(DATA)
    fit_guide(model, guide, DATA, num_steps=5, seed=seed)
    importance_sample(model, guide, DATA, num_samples=20, seed=seed)


def _flow(seed):
    with torch.random.fork_rng():
        flow, samples = NeuralHamiltonianFlow(2, hidden=(4,)), torch.randn(10, 2)
    fit_flow(flow, samples, num_steps=3, seed=seed)


WORK = {
    "HMC": _mcmc(HMC),
    "NUTS": _mcmc(NUTS),
    "FlowNUTS": _mcmc(FlowNUTS),
    "HNNHMC": _mcmc(HNNHMC),
    "fit_guide": _guide,
    "fit_flow": _flow,
    "AnnealedSampler": lambda seed: AnnealedSampler(model, num_particles=40, seed=seed).run(DATA),
}


@pytest.fixture(autouse=True)
def _unusual():
    """Settings that nobody has by default, and a parameter that the model finds in the store."""
    pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
    np.random.seed(7)
    random.seed(8)
    with torch.no_grad(), pyro.validation_enabled(True):
        yield


@pytest.mark.parametrize("name", WORK)
def test_seeded_work_leaves_all_as_it_was(name):
    before, states = _shared(), _random_states()
    WORK[name](3)
    assert _shared() == before
    assert _random_states() == states


def test_unseeded_run_moves_on():
    states = _random_states()
    WORK["HMC"](None)
    assert _random_states()[0] != states[0]


def test_learning_of_surrogates_leaves_all_as_it_was():
    before = _shared()
    learn_surrogate(model, DATA, num_sets=64, training_steps=5, disable_progbar=True)
    assert _shared() == before


def test_model_that_changes_settings_leaves_no_trace():
    def careless():
        torch.set_default_dtype(torch.float32)
        pyro.enable_validation(False)
        torch.set_grad_enabled(True)
        pyro.sample("x", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))

    before = _shared()
    MCMC(HMC(careless), 5, 5).run()
    assert _shared() == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("stage", ["Warmup", "Sample"])
def test_interrupted_run_leaves_all_as_it_was(fault, stage):
    def hook(kernel, params, where, i):
        torch.set_default_dtype(torch.float16)
        if where == stage:
            raise fault

    before, states = _shared(), _random_states()
    if fault is KeyboardInterrupt and stage == "Sample":
        with pytest.warns(RuntimeWarning, match="interrupted"):
            WORK["HMC"](3, hook)
    else:
        with pytest.raises(fault):
            WORK["HMC"](3, hook)
    assert _shared() == before
    assert _random_states() == states


def _signalled(work, seconds):
    """Does work that a real Ctrl-C interrupts."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        work()
        timer.join()
        time.sleep(1.0)  # the signal comes now, if it came too late
    except KeyboardInterrupt:
        pass
    finally:
        timer.cancel()


# Python swallows a Ctrl-C that strikes within a finaliser, and says so; the work then goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["NUTS", "fit_guide"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_signals_leave_all_as_it_was(name, share):
    began = time.perf_counter()
    WORK[name](3)
    seconds = time.perf_counter() - began
    before, states = _shared(), _random_states()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it was interrupted
        _signalled(lambda: WORK[name](3), share * seconds)
    assert _shared() == before
    assert _random_states() == states


def test_runs_in_threads_take_turns():
    def draws(seed):
        mcmc = MCMC(NUTS(model), 20, 20, num_chains=2, seed=seed)
        mcmc.run(DATA)
        return mcmc.draws.position

    alone = [draws(seed) for seed in range(3)]
    found, faults = {}, []

    def work(seed):
        try:
            found[seed] = draws(seed)
        except BaseException as error:  # noqa: BLE001
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    for seed in range(3):
        assert torch.equal(found[seed], alone[seed])


def test_run_within_a_run():
    inner = MCMC(HMC(model), 3, 3, seed=1)

    def hook(kernel, params, stage, i):
        if stage == "Sample" and i == 0:
            inner.run(DATA)

    outer = MCMC(HMC(model), 6, 6, seed=2, hook_fn=hook)
    outer.run(DATA)
    plain = MCMC(HMC(model), 6, 6, seed=2)
    plain.run(DATA)
    assert torch.equal(outer.draws.position, plain.draws.position)


def test_blocks_nest():
    with undisturbed(seed=1):
        first = torch.rand(3)
        with undisturbed(seed=1):
            assert torch.equal(torch.rand(3), first)
        second = torch.rand(3)
    with undisturbed(seed=1):
        assert torch.equal(torch.rand(6), torch.cat([first, second]))
