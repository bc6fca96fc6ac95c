"""Chains in other processes: the same draws wherever they are made, and workers that are lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from contextlib import suppress

import loky
import pyro
import pyro.distributions as dist
import pytest
import torch
from distributed import LocalCluster

from pyro_hamflow import (
    HMC,
    HNNHMC,
    MCMC,
    NUTS,
    FlowNUTS,
    ess_above,
    progress,
    time_over,
    to_inference_data,
)
from pyro_hamflow.mcmc.adaptation import transport_learning
from pyro_hamflow.mcmc.groups import seeds
from pyro_hamflow.process import undisturbed
from tests.helpers.groups import (
    Inline,
    Killer,
    Y,
    draws_of_groups,
    forked,
    marginal,
    model,
    run,
    short_segments,
)


@pytest.fixture(scope="module")
def pool():
    with forked(1) as executor:
        yield executor


@pytest.fixture(scope="module")
def expected():
    return draws_of_groups(24)


# --- wherever they are made ---------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.03, 100.0])
def test_draws_are_those_of_runs_of_the_groups(expected, seconds):
    with short_segments(seconds):
        mcmc = run(Inline())
    assert torch.equal(mcmc.draws.position, expected)
    assert mcmc.messages == [m for m in mcmc.messages if "worker" not in m]
    assert mcmc.warmup_steps == 16
    assert mcmc.kernel.step_size > 0.0
    assert dict(to_inference_data(mcmc).posterior.sizes)["chain"] == 3


def test_threads_give_the_same_draws(expected):
    with ThreadPoolExecutor(3) as executor, short_segments():
        assert torch.equal(run(executor).draws.position, expected)


def test_a_spawned_pool_gives_the_same_draws(expected):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor, short_segments(0.2):
        assert torch.equal(run(executor).draws.position, expected)


@pytest.mark.slow
def test_loky_gives_the_same_draws(expected):
    with loky.ProcessPoolExecutor(1) as executor, short_segments(0.2):
        assert torch.equal(run(executor).draws.position, expected)


@pytest.fixture(scope="module")
def cluster(request):
    """Of processes with ``--slow``, of which each takes ten seconds to begin, or of one thread."""
    apart = request.config.getoption("--slow")
    settings = {"processes": apart, "protocol": "tcp://", "dashboard_address": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with LocalCluster(1 + apart, threads_per_worker=1, **settings) as cluster:
            yield cluster


@pytest.mark.filterwarnings("ignore")
def test_dask_gives_the_same_draws(cluster, expected):
    with cluster.get_client() as client, short_segments(0.2):
        assert torch.equal(run(client.get_executor()).draws.position, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_dask_loses_a_worker(cluster, expected, tmp_path):
    with cluster.get_client() as client, short_segments(0.2):
        mcmc = run(client.get_executor(), hook_fn=Killer(tmp_path / "flag", 10))
    assert (tmp_path / "flag").exists()
    assert torch.equal(mcmc.draws.position, expected)


@pytest.mark.slow
def test_loky_loses_a_worker(expected, tmp_path):
    executor = loky.get_reusable_executor(2)
    with short_segments(0.2):
        mcmc = run(executor, hook_fn=Killer(tmp_path / "flag", 10))
    assert torch.equal(mcmc.draws.position, expected)
    assert any("made again" in message for message in mcmc.messages)


@pytest.mark.parametrize(
    "kernel", [lambda: HMC(model), pytest.param(marginal, marks=pytest.mark.slow)]
)
def test_segments_of_other_kernels(kernel):
    def draws(seconds):
        with short_segments(seconds):
            return run(Inline(), 6, kernel=kernel(), num_warm=20, save_warmup=True)

    whole, cut = draws(1000.0), draws(0.2)
    assert torch.equal(whole.draws.position, cut.draws.position)
    assert torch.equal(whole.warmup_draws.position, cut.warmup_draws.position)
    for name, stat in whole.draws.stats.items():
        assert torch.equal(stat, cut.draws.stats[name]), name
    for name, part in whole.draws.local.items():
        assert torch.equal(part, cut.draws.local[name]), name


def signs(y):
    x = pyro.sample("x", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x.square(), 1.0).to_event(1), obs=y)


LEARNING = {
    "HNN": (lambda: HNNHMC(model, fallback=False, training_steps=30), Y),
    "NeuTra": (lambda: NUTS(model, transport="flow", max_tree_depth=3), Y),
    "FlowNUTS": (lambda: FlowNUTS(signs, num_particles=100), torch.tensor([4.0, 4.0])),
}


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.slow
def test_segments_of_kernels_that_learn(name, monkeypatch):
    """A network, a map and a flow, each cut off while it learns, and after it."""
    monkeypatch.setattr(transport_learning, "_STEPS", 20)  # of each fit of a map, to take less long
    monkeypatch.setattr(transport_learning, "_LAST_STEPS", 20)
    make, data = LEARNING[name]

    def draws(seconds):
        with short_segments(seconds):
            return run(Inline(), 12, kernel=make(), num_warm=60, data=data).draws.position

    assert torch.equal(draws(0.05), draws(1000.0))


def test_run_without_a_seed_takes_torchs():
    def draws():
        return run(Inline(), 5, seed=None, num_warm=5).draws.position

    torch.manual_seed(4)
    first, second = draws(), draws()
    torch.manual_seed(4)
    assert torch.equal(draws(), first)
    assert not torch.equal(second, first)
    before = torch.get_rng_state()
    run(Inline(), 5, num_warm=5)
    assert torch.equal(torch.get_rng_state(), before)


def located():
    where = pyro.param("where", torch.tensor(0.0))
    pyro.sample("x", dist.Normal(where, torch.tensor(1e-3)))


def shape_of_process():
    """A model that tells in its parameter what process it runs in."""
    assert torch.get_default_dtype() == torch.float32
    pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.slow
def test_workers_have_the_parameters_and_the_precision_of_this_process(pool):
    pyro.param("where", torch.tensor(50.0))
    mcmc = MCMC(NUTS(located), 20, 20, executor=pool, seed=1)
    mcmc.run()
    assert abs(float(mcmc.get_samples()["x"].mean()) - 50.0) < 0.1
    torch.set_default_dtype(torch.float32)
    mcmc = MCMC(NUTS(shape_of_process), 5, 5, executor=pool, seed=1)
    mcmc.run()
    assert mcmc.draws.position.dtype == torch.float32
    assert list(pyro.get_param_store()) == ["where"]


def test_starting_values_are_those_of_each_chain():
    start = {"mean": torch.arange(6.0).reshape(3, 2)}
    still = HMC(model, step_size=1e-12, adapt_step_size=False, adapt_mass_matrix=False)
    mcmc = run(Inline(), 1, kernel=still, num_warm=0, initial_params=start)
    torch.testing.assert_close(mcmc.draws.position[:, 0], start["mean"], atol=1e-6, rtol=0.0)


class Unstorable(NUTS):
    """A kernel of a class that no file may name."""


def test_a_kernel_whose_state_cannot_be_stored_is_one_segment(expected):
    with short_segments():
        mcmc = run(Inline(), kernel=Unstorable(model))
    assert torch.equal(mcmc.draws.position, expected)


def test_one_bar_is_of_all_groups(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    with short_segments(0.05):
        run(Inline(), disable_progbar=False)
    shown = capsys.readouterr().err
    assert "80/80" in shown and "groups=2 of 2 done" in shown


# --- when it ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", pytest.param("native", marks=pytest.mark.slow)])
def test_spread_run_stops_at_effective_draws(engine):
    """After the same draws, however long segments are, and however many one call makes."""

    def draws(seconds):
        settings = {"kernel": NUTS(model, engine=engine), "stop_when": ess_above(200)}
        with short_segments(seconds):
            return run(Inline(), 3000, num_warm=60, **settings).draws.position

    first = draws(0.3)
    assert 50 < first.shape[1] < 1500
    assert torch.equal(draws(100.0), first)


def test_spread_run_stops_in_time():
    with short_segments(0.2):
        mcmc = run(Inline(), 10**6, stop_when=time_over(0.3))
    assert 50 <= mcmc.draws.position.shape[1] < 10**5


# --- faults -------------------------------------------------------------------------------------


def test_a_worker_killed_once_costs_its_segment(expected, tmp_path):
    killer = Killer(tmp_path / "flag", 10)
    with forked() as executor, short_segments():
        mcmc = run(executor, hook_fn=killer)
    assert killer.flag.exists()
    assert torch.equal(mcmc.draws.position, expected)
    assert [m for m in mcmc.messages if "BrokenProcessPool" in m and "made again" in m]
    assert not mcmc.ended_early


class Tired(Inline):
    """Does two things, and breaks."""

    def __init__(self):
        self.done, self.is_over = 0, False

    def shutdown(self, wait=True):  # as loky's and dask's
        self.is_over = True

    def submit(self, function, /, *args):
        self.done += 1
        if self.done > 2:
            raise BrokenExecutor
        return super().submit(function, *args)


def test_a_function_makes_an_executor_for_each_that_breaks(expected):
    made = []

    def make():
        made.append(Tired())
        return made[-1]

    with short_segments(0.05):
        assert torch.equal(run(make).draws.position, expected)
    assert len(made) > 1 and all(executor.is_over for executor in made)


@pytest.mark.slow
def test_a_worker_killed_for_ever_costs_its_chains(expected, tmp_path):
    killer = Killer(tmp_path / "flag", 10, seed=seeds(3, 2)[1])
    with forked() as executor, short_segments():
        mcmc = run(executor, hook_fn=killer)
    assert torch.equal(mcmc.draws.position, expected[:2])
    (early,) = mcmc.ended_early.values()
    made = early.position.shape[1]
    assert 0 < made <= 10
    assert torch.equal(early.position, expected[2:, :made])
    told = f"Chain 2 ended after {made} of 24 draws, which `ended_early` has: its worker was lost 3"
    assert any(message.startswith(told) for message in mcmc.messages)
    assert len(killer.flag.read_text().split()) >= 3


@pytest.mark.slow
def test_a_worker_that_stops_is_not_waited_for(expected, tmp_path):
    """Stopped by SIGSTOP, it neither ends nor answers, nor do those that take its place."""
    killer = Killer(tmp_path / "flag", 10, seed=seeds(3, 2)[1], number=signal.SIGSTOP)
    executor, began = forked(1), time.monotonic()
    try:
        with short_segments():
            mcmc = run(executor, hook_fn=killer, worker_timeout=15.0)
    finally:
        for number in killer.flag.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
        executor.shutdown()
    assert time.monotonic() - began < 180.0
    assert torch.equal(mcmc.draws.position, expected[:2])
    assert any("nothing came back for 15 seconds" in message for message in mcmc.messages)


class Failing:
    def __init__(self, *error):
        self.kind, *self.words = error

    def __call__(self, kernel, params, stage, i):
        if stage == "Sample" and i == 10:
            raise self.kind(*self.words)


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ([ZeroDivisionError, "mine"], ZeroDivisionError),
        ([Unpicklable, "this", "that"], RuntimeError),
    ],
)
def test_exception_in_a_worker_keeps_draws(expected, error, kind):
    mcmc = MCMC(NUTS(model), 24, 16, num_chains=3, executor=Inline(), chains_per_worker=2, seed=3)
    mcmc.hook_fn = Failing(*error)
    with short_segments(100.0), pytest.raises(kind, match="mine|this and that") as caught:
        mcmc.run(Y)
    assert any("raised in a worker" in note for note in caught.value.__notes__)
    assert caught.value.__notes__[-1] == "interrupted: 11 of 24 draws were made and are kept"
    assert torch.equal(mcmc.draws.position, expected[:, :11])


class Touching:
    """Leaves a file of each group, once it has come to a draw."""

    def __init__(self, folder, draw):
        self.folder, self.draw = folder, draw

    def __call__(self, kernel, params, stage, i):
        if i == self.draw:
            (self.folder / str(torch.initial_seed())).touch()


def test_interrupted_spread_run_keeps_draws(tmp_path):
    """By a signal, which reaches this process alone."""

    def interrupt():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    mcmc = MCMC(NUTS(model), 10**6, 16, num_chains=3, chains_per_worker=2, seed=3)
    mcmc.hook_fn = Touching(tmp_path, 40)
    with forked() as executor, short_segments(0.2):
        mcmc.executor = executor
        threading.Thread(target=interrupt).start()
        with pytest.warns(RuntimeWarning, match="interrupted: .* draws were made and are kept"):
            mcmc.run(Y)
    assert mcmc.interrupted
    num_chains = len(mcmc.draws.position)  # another may have made many fewer
    assert num_chains + sum(len(part.position) for part in mcmc.ended_early.values()) == 3
    first = 2 if "Chains 0 to 1" in mcmc.ended_early else 0
    # Of a run of as many draws, for a kernel may plan by their number.
    expected = draws_of_groups(10**6, stop_when=lambda run: run.num_draws == 24)
    assert torch.equal(mcmc.draws.position[:, :24], expected[first : first + num_chains])


def test_interrupted_before_the_first_draw():
    class Interrupted(Executor):
        def submit(self, function, /, *args):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted())


def test_faults_of_the_model_are_found_before_any_worker_is_asked():
    class Never(Executor):
        def submit(self, function, /, *args):
            raise AssertionError

    with pytest.raises(ValueError, match="`initial_params` of site 'mean' has shape"):
        run(Never(), initial_params={"mean": torch.zeros(7, 2)})
    with pytest.raises(ValueError, match="names .'other'."):
        run(Never(), save_params=["other"])


class Refusing(Executor):
    """An executor with a fault of some kind."""

    def __init__(self, fault):
        self.fault = fault

    def submit(self, function, /, *args):
        if isinstance(self.fault, Exception):
            raise self.fault
        future = Future()
        if self.fault == "cancelled":
            future.cancel()
            future.set_running_or_notify_cancel()
        elif self.fault == "failed":
            future.set_exception(MemoryError("no room"))
        elif self.fault == "foreign":
            future.set_result("what is this")
        return future


class Hanging(Executor):
    """It never answers; another one that is made in its place does, for one that is made so."""

    made = 0

    def __init__(self):
        Hanging.made += 1
        self.number = Hanging.made

    def submit(self, function, /, *args):
        return Future() if self.number < 3 else Inline().submit(function, *args)


def test_executors_that_hang_are_made_again(expected):
    assert torch.equal(run(Hanging, worker_timeout=0.2).draws.position, expected)
    assert Hanging.made == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (RuntimeError("closed"), "takes no more work .RuntimeError: closed"),
        ("cancelled", "was lost 3 times .CancelledError"),
        ("failed", "was lost 3 times .MemoryError: no room"),
        ("silent", "nothing came back for 0.2 seconds"),
        ("foreign", "was lost 3 times"),
    ],
)
def test_executors_that_do_nothing_are_told(fault, words):
    with pytest.raises(RuntimeError, match=f"no draw was made.*{words}"):
        run(Refusing(fault), worker_timeout=0.2)


class Leaving:
    def __init__(self, how):
        self.how = how

    def __call__(self, kernel, params, stage, i):
        if stage == "Sample" and i == 10:
            sys.exit("enough") if self.how == "exit" else params["mean"].nonsense


@pytest.mark.parametrize(("how", "kind"), [("exit", SystemExit), ("nonsense", AttributeError)])
def test_faults_of_a_hook_in_a_worker_end_the_run(expected, how, kind):
    mcmc = MCMC(NUTS(model), 24, 16, num_chains=3, chains_per_worker=2, seed=3)
    mcmc.executor, mcmc.hook_fn = Inline(), Leaving(how)
    with short_segments(100.0), pytest.raises(kind):
        mcmc.run(Y)
    assert torch.equal(mcmc.draws.position, expected[:, :11])


class FailingElsewhere:
    """A model that needs what workers do not have."""

    def __init__(self):
        self.home = os.getpid()

    def __call__(self, y):
        if os.getpid() != self.home:
            raise FileNotFoundError("data.csv")
        model(y)


def test_a_model_that_fails_in_workers_is_told(pool):
    mcmc = MCMC(NUTS(FailingElsewhere()), 5, 5, executor=pool)
    with pytest.raises(Exception, match="data.csv") as caught:
        mcmc.run(Y)
    assert any("raised in a worker" in note for note in caught.value.__notes__)


def test_two_runs_share_an_executor(expected):
    found = []

    def work(executor):
        found.append(run(executor).draws.position)

    with ThreadPoolExecutor(2) as executor, short_segments():
        threads = [threading.Thread(target=work, args=(executor,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 2
    assert all(torch.equal(position, expected) for position in found)


def test_a_forked_worker_is_free_while_another_thread_runs(expected):
    """The lock that its parent's other thread held when it was forked is not held in it."""
    inside, over = threading.Event(), threading.Event()

    def hold():
        with undisturbed():
            inside.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with undisturbed():
            os.write(writer, b"free")
        os._exit(0)
    began = time.monotonic()
    while os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() - began < 20:
        time.sleep(0.05)
    else:
        over.set()
    thread.join(60)
    os.set_blocking(reader, False)
    assert os.read(reader, 4) == b"free"


def test_shut_down_pools_are_made_again(expected):
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    assert torch.equal(run(executor).draws.position, expected)


def test_what_cannot_be_sent_is_told():
    lock = threading.Lock()

    def local(y):
        with lock:
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(TypeError, match="cannot be sent to workers.*lock"):
        run(Inline(), kernel=NUTS(local))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"executor": 3}, TypeError, "`executor` is 3: expected a concurrent.futures.Executor"),
        ({"chains_per_worker": 0}, ValueError, "`chains_per_worker` is 0: expected 1 or more"),
        ({"worker_timeout": 0.0}, ValueError, "`worker_timeout` is 0.0: expected a positive"),
        (
            {"executor": Inline(), "chain_method": "sequential"},
            ValueError,
            "`executor` is given with `chain_method='sequential'`",
        ),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        MCMC(NUTS(model), 5, 5, **settings)
