"""The runner: seeds, shapes, interruptions, hooks, progress, and what it refuses."""

from __future__ import annotations

import itertools
import re
import sys
from functools import cache

import arviz
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch

from pyro_hamflow import (
    HMC,
    MCMC,
    CorrelatedRefresh,
    PseudoMarginalHMC,
    ess_above,
    marginalize,
    progress,
    rhat_below,
    time_over,
    to_inference_data,
)
from pyro_hamflow.mcmc import stopping
from pyro_hamflow.model.potential import Potential
from tests.helpers.groups import latent


def model():
    pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("scale", dist.LogNormal(0.0, 0.5).expand([2]).to_event(1))


def funnel():
    width = pyro.sample("width", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (2.0 * width).exp()).expand([5]).to_event(1))


@cache
def _captured():
    return Potential(model)


def _kernel(**settings):
    """A kernel whose model is captured once for all tests."""
    kernel = HMC(model, **settings)
    kernel.source._potential = _captured()
    return kernel


def _run(num_samples=10, warmup_steps=10, *, kernel=None, **settings):
    mcmc = MCMC(kernel or _kernel(), num_samples, warmup_steps, disable_progbar=True, **settings)
    mcmc.run()
    return mcmc


# --- seeds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_seed_repeats_run(chain_method):
    def draws(seed):
        mcmc = _run(num_chains=2, seed=seed, chain_method=chain_method)
        return mcmc.draws.position

    first = draws(3)
    torch.rand(7)
    assert torch.equal(draws(3), first)
    assert not torch.equal(draws(4), first)


def test_seed_repeats_run_of_same_object():
    """Also where the second run finds the model captured."""
    mcmc = MCMC(HMC(model), 6, 6, num_chains=2, seed=3, disable_progbar=True)
    mcmc.run()
    first = mcmc.draws.position
    mcmc.run()
    assert torch.equal(mcmc.draws.position, first)


def test_seed_repeats_pseudo_marginal_run():
    y = torch.tensor([0.5, -1.0, 2.0])
    kernel = PseudoMarginalHMC(marginalize(latent, ["x"], num_particles=2))
    mcmc = MCMC(kernel, 5, 5, num_chains=2, seed=3, disable_progbar=True)
    mcmc.run(y)
    first = mcmc.draws
    mcmc.run(y)
    assert torch.equal(mcmc.draws.position, first.position)
    assert torch.equal(mcmc.draws.local["x"], first.local["x"])


def test_chains_differ():
    for chain_method in ("vectorized", "sequential"):
        position = _run(num_chains=2, chain_method=chain_method).draws.position
        assert not torch.equal(position[0], position[1])


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
@pytest.mark.parametrize("num_chains", [1, 3])
def test_shapes_of_draws(chain_method, num_chains):
    mcmc = _run(num_chains=num_chains, chain_method=chain_method)
    grouped = mcmc.get_samples(group_by_chain=True)
    assert grouped["mean"].shape == (num_chains, 10)
    assert grouped["scale"].shape == (num_chains, 10, 2)
    flat = mcmc.get_samples()
    assert torch.equal(flat["scale"], grouped["scale"].reshape(-1, 2))
    assert mcmc.get_samples(7)["scale"].shape == (7, 2)
    assert mcmc.get_samples(7, group_by_chain=True)["scale"].shape == (num_chains, 7, 2)
    for name, stat in mcmc.draws.stats.items():
        assert stat.shape == (num_chains, 10), name
    assert mcmc.warmup_draws is None
    diagnostics = mcmc.diagnostics()
    assert diagnostics["scale"]["n_eff"].shape == (2,)
    assert set(diagnostics["acceptance rate"]) == {f"chain {i}" for i in range(num_chains)}
    assert list(mcmc.summary().index) == ["mean", "scale[0]", "scale[1]"]


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_saved_warmup(chain_method):
    mcmc = _run(6, 9, num_chains=2, save_warmup=True, chain_method=chain_method)
    assert mcmc.warmup_draws.position.shape == (2, 9, 3)
    assert mcmc.draws.position.shape == (2, 6, 3)
    assert len(mcmc.warmup_draws.stats["step_size"].unique()) > 1


def test_chains_that_are_tuned_together_share_the_warmup():
    assert MCMC(_kernel(), 17).warmup_steps == 700
    assert MCMC(_kernel(), 17, num_chains=4).warmup_steps == 250
    assert MCMC(_kernel(), 17, num_chains=4, chain_method="sequential").warmup_steps == 700


def test_float32_end_to_end():
    y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float32)
    torch.set_default_dtype(torch.float32)
    for method in ("joint", "conditional"):
        kernel = PseudoMarginalHMC(marginalize(latent, ["x"], num_particles=2), method=method)
        mcmc = MCMC(kernel, 10, 10, num_chains=2, disable_progbar=True)
        mcmc.run(y)
        assert mcmc.draws.position.dtype == torch.float32
        assert mcmc.draws.stats["energy_error"].dtype == torch.float64
        assert len(mcmc.draws.position.unique()) > 4
        posterior = to_inference_data(mcmc).posterior
        assert posterior["x"].shape == (2, 10, 3)


def without_plate(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(mean, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)


@pytest.mark.parametrize("method", ["joint", "conditional"])
def test_estimate_without_plate(method):
    """One element, whose estimate has no dimension but that of the chains."""
    kernel = PseudoMarginalHMC(marginalize(without_plate, ["x"], num_particles=2), method=method)
    mcmc = MCMC(kernel, 4, 4, num_chains=2, disable_progbar=True)
    mcmc.run(torch.tensor(0.7))
    estimate = mcmc.draws.stats["log_likelihood_estimate"]
    assert estimate.shape == (2, 4)
    assert len(estimate.unique()) > 2
    assert mcmc.draws.local["x"].shape == (2, 4, 2)


# --- starting values ----------------------------------------------------------------------------

STILL = {"step_size": 1e-9, "adapt_step_size": False, "max_num_steps": 1}


@pytest.mark.parametrize(("num_chains", "lead"), [(1, ()), (1, (1,)), (3, (3,))])
@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_initial_params_are_honoured(num_chains, lead, chain_method):
    start = {"mean": torch.rand(lead), "scale": torch.rand(*lead, 2)}
    mcmc = _run(
        1,
        0,
        kernel=_kernel(**STILL),
        num_chains=num_chains,
        initial_params=start,
        chain_method=chain_method,
    )
    samples = mcmc.get_samples(group_by_chain=True)
    assert torch.allclose(samples["mean"].flatten(), start["mean"].flatten(), atol=1e-6)
    assert torch.allclose(samples["scale"].log().flatten(), start["scale"].flatten(), atol=1e-6)


@pytest.mark.parametrize(
    ("num_chains", "start", "message"),
    [
        (2, {"mean": torch.zeros(3), "scale": torch.zeros(2, 2)}, "site 'mean' has shape .3,."),
        (2, {"mean": torch.tensor(0.0), "scale": torch.zeros(2, 2)}, "first dimension of 2"),
        (2, {"mean": torch.zeros(2), "scale": torch.zeros(2, 3)}, "site 'scale' has shape .2, 3."),
        (1, {"mean": torch.zeros(4), "scale": torch.zeros(2)}, "site 'mean' has shape .4,."),
        (2, {"mean": torch.zeros(2)}, "lacks a value for site 'scale'"),
        (2, {"mean": torch.zeros(2), "scales": torch.zeros(2, 2)}, "names 'scales'"),
    ],
)
def test_bad_initial_params_are_refused(num_chains, start, message):
    with pytest.raises(ValueError, match=message):
        _run(1, 0, num_chains=num_chains, initial_params=start)


# --- interruptions and hooks --------------------------------------------------------------------


def _interrupt(stage, iteration):
    def hook(kernel, params, where, i):
        if where == stage and i == iteration:
            raise KeyboardInterrupt

    return hook


def test_interrupted_sampling_keeps_draws():
    mcmc = MCMC(_kernel(), 10, 5, num_chains=2, hook_fn=_interrupt("Sample", 3), seed=1)
    with pytest.warns(RuntimeWarning, match="interrupted: 4 of 10 draws were made and are kept"):
        mcmc.run()
    assert mcmc.interrupted
    whole = _run(10, 5, num_chains=2, seed=1)
    assert torch.equal(mcmc.draws.position, whole.draws.position[:, :4])
    assert mcmc.get_samples(group_by_chain=True)["scale"].shape == (2, 4, 2)
    data = to_inference_data(mcmc)
    assert dict(data.posterior.sizes)["draw"] == 4
    mcmc.hook_fn = None
    mcmc.run()
    assert not mcmc.interrupted
    assert mcmc.draws.position.shape == (2, 10, 3)


def test_interrupted_sequential_run_keeps_finished_chains():
    """A chain that has hardly begun does not cost the others their draws."""
    hook = _interrupt("Sample [1]", 0)
    mcmc = MCMC(_kernel(), 10, 5, num_chains=3, chain_method="sequential", hook_fn=hook)
    with pytest.warns(RuntimeWarning, match="interrupted: 1 of 10"):
        mcmc.run()
    assert mcmc.draws.position.shape == (1, 10, 3)
    assert dict(to_inference_data(mcmc).posterior.sizes)["draw"] == 10


def test_interrupted_before_the_first_iteration_raises(monkeypatch):
    def begin(*args):
        raise KeyboardInterrupt

    kernel = _kernel()
    monkeypatch.setattr(kernel, "begin", begin)
    mcmc = MCMC(kernel, 10, 5)
    with pytest.raises(KeyboardInterrupt, match="before the first draw$"):
        mcmc.run()
    with pytest.raises(RuntimeError, match="no draws yet"):
        mcmc.get_samples()


@pytest.mark.parametrize("save_warmup", [False, True])
@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_interrupted_warmup_goes_on(save_warmup, chain_method):
    """Interrupted between two iterations, it leads to the draws of a run that was not."""
    label = "" if chain_method == "vectorized" else " [0]"
    settings = {"save_warmup": save_warmup, "chain_method": chain_method, "num_chains": 2}
    mcmc = MCMC(_kernel(), 10, 8, seed=4, hook_fn=_interrupt("Warmup" + label, 3), **settings)
    with pytest.raises(KeyboardInterrupt, match="after 4 iterations of warm-up: `run` goes on"):
        mcmc.run()
    with pytest.raises(RuntimeError, match="no draws yet"):
        mcmc.get_samples()
    if save_warmup:
        assert mcmc.warmup_draws.position.shape[1:] == (4, 3)
    mcmc.hook_fn = None
    mcmc.run()
    whole = _run(10, 8, seed=4, **settings)
    assert torch.equal(mcmc.draws.position, whole.draws.position)
    assert not mcmc.interrupted
    assert mcmc.warmup_steps == 8
    if save_warmup:
        assert torch.equal(mcmc.warmup_draws.position, whole.warmup_draws.position)


def test_interrupted_warmup_starts_anew_with_other_data():
    def shifted(y):
        pyro.sample("x", dist.Normal(y, 1.0))

    mcmc = MCMC(HMC(shifted), 4, 30, seed=4, hook_fn=_interrupt("Warmup", 20), disable_progbar=True)
    with pytest.raises(KeyboardInterrupt):
        mcmc.run(torch.tensor(0.0))
    mcmc.hook_fn = None
    mcmc.run(torch.tensor(1000.0))
    fresh = MCMC(HMC(shifted), 4, 30, seed=4, disable_progbar=True)
    fresh.run(torch.tensor(1000.0))
    assert torch.equal(mcmc.draws.position, fresh.draws.position)


def test_warmup_interrupted_within_an_iteration_goes_on(monkeypatch):
    """Draws are right whatever was half done; here trajectories break off at their third step."""
    kernel = _kernel()
    mcmc = MCMC(kernel, 400, 100, num_chains=20, seed=5)
    advance, calls = kernel.advance, []

    def broken(state):
        calls.append(state)
        if len(calls) == 50:
            kernel.phase.transition.step(state, kernel.phase.tuning, 3)
            raise KeyboardInterrupt
        return advance(state)

    monkeypatch.setattr(kernel, "advance", broken)
    with pytest.raises(KeyboardInterrupt, match="after 49 iterations"):
        mcmc.run()
    mcmc.run()
    mean = mcmc.get_samples()["mean"]
    assert mcmc.warmup_steps == 100
    assert abs(float(mean.mean())) < 0.06
    assert abs(float(mean.std()) - 1.0) < 0.05


@pytest.mark.parametrize("fault", ["hook", "model"])
def test_exception_keeps_draws(fault, monkeypatch):
    kernel = _kernel()
    mcmc = MCMC(kernel, 10, 5, num_chains=2, seed=1)
    if fault == "hook":

        def hook(kernel, params, stage, i):
            if stage == "Sample" and i == 3:
                raise ZeroDivisionError("mine")

        mcmc.hook_fn = hook
    else:
        advance, calls = kernel.advance, []

        def failing(state):
            calls.append(state)
            if len(calls) == 10:
                raise ZeroDivisionError("mine")
            return advance(state)

        monkeypatch.setattr(kernel, "advance", failing)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        mcmc.run()
    assert caught.value.__notes__ == ["interrupted: 4 of 10 draws were made and are kept"]
    assert mcmc.interrupted
    whole = _run(10, 5, num_chains=2, seed=1)
    assert torch.equal(mcmc.draws.position, whole.draws.position[:, :4])
    assert mcmc.get_samples()["scale"].shape == (8, 2)


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_hook_sees_every_iteration(chain_method):
    calls = []

    def hook(kernel, params, stage, i):
        calls.append((stage, i))
        assert params["scale"].shape == ((2, 2) if chain_method == "vectorized" else (2,))

    _run(3, 2, num_chains=2, chain_method=chain_method, hook_fn=hook)
    once = [("Warmup", 0), ("Warmup", 1), ("Sample", 0), ("Sample", 1), ("Sample", 2)]
    if chain_method == "vectorized":
        assert calls == once
    else:
        assert calls == [(f"{s} [{c}]", i) for c in (0, 1) for s, i in once]


# --- what the user sees -------------------------------------------------------------------------


@pytest.fixture
def on_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    return capsys


def test_progress_bar(on_terminal):
    MCMC(_kernel(), 5, 5).run()
    shown = on_terminal.readouterr().err
    for word in ("Warmup", "Sample", "step size=", "acc. prob=", "divergences=0"):
        assert word in shown


@pytest.mark.parametrize("hide", ["CI", "disable_progbar", "file"])
def test_no_progress_is_shown_of_a_short_run(hide, monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # as other tests leave it
    if hide == "CI":
        monkeypatch.setenv("CI", "true")
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    MCMC(_kernel(), 5, 5, disable_progbar=hide == "disable_progbar").run()
    assert capsys.readouterr().err == ""


def test_lines_where_nobody_watches(monkeypatch, capsys):
    """A line each half minute, and at the end, if there was any."""
    monkeypatch.setenv("CI", "true")
    seconds = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))
    MCMC(_kernel(), 40, 40).run()
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 4
    assert re.match(r"Warmup: \d\d of 80 \(..%\), 3\d s, step size .*, divergences 0$", lines[0])
    assert re.match(r"Sample: 80 of 80 \(100%\), ", lines[-1])


# --- when it ends -------------------------------------------------------------------------------


def test_run_stops_when_told():
    seen = []

    def stop_when(run):
        seen.append((run.num_draws, run.min_ess, run.max_rhat))
        return run.num_draws == 7

    mcmc = _run(20, 5, num_chains=3, stop_when=stop_when, seed=1)
    assert [count for count, *_ in seen] == list(range(1, 8))
    assert seen[-1][1:] == (0.0, float("inf"))  # so few are not judged
    whole = _run(20, 5, num_chains=3, seed=1)
    assert torch.equal(mcmc.draws.position, whole.draws.position[:, :7])
    assert not mcmc.interrupted
    assert dict(to_inference_data(mcmc).posterior.sizes)["draw"] == 7


def test_run_stops_at_effective_draws_and_mixing():
    """The numbers are ArviZ's at the draw where it stopped."""
    mcmc = _run(2000, 200, num_chains=4, seed=1, stop_when=ess_above(500))
    draws = mcmc.draws.position
    ess = arviz.ess(arviz.convert_to_dataset({"x": draws.numpy()}), method="bulk")["x"].values
    assert draws.shape[1] < 1000
    assert ess.min() >= 500
    before = draws[:, : int(draws.shape[1] / 1.2)]
    ess = arviz.ess(arviz.convert_to_dataset({"x": before.numpy()}), method="bulk")["x"].values
    assert ess.min() < 500
    mcmc = _run(2000, 200, num_chains=4, seed=1, stop_when=rhat_below(1.02))
    draws = mcmc.draws.position
    rhat = arviz.rhat(arviz.convert_to_dataset({"x": draws.numpy()}))["x"].values
    assert 50 <= draws.shape[1] < 1000
    assert rhat.max() < 1.02


def test_run_stops_in_time(monkeypatch):
    """By a clock that goes on by a hundredth of a second whenever it is looked at."""
    seconds = itertools.count()
    monkeypatch.setattr(stopping.time, "monotonic", lambda: 0.01 * next(seconds))
    mcmc = _run(10**7, 10, stop_when=time_over(0.505))
    assert 40 < len(mcmc.get_samples()["mean"]) <= 51


def test_draws_survive_a_fault_of_the_criterion():
    with pytest.raises(ZeroDivisionError) as caught:
        _run(20, 5, stop_when=lambda run: 0 / (run.num_draws - 3))
    assert caught.value.__notes__ == ["interrupted: 3 of 20 draws were made and are kept"]


def test_divergences_are_counted():
    """A funnel with steps too long for its neck: rejected, counted, told, and no crash."""
    kernel = HMC(funnel, step_size=1.0, adapt_step_size=False, adapt_mass_matrix=False)
    start = {"width": torch.full((4,), -3.0), "x": torch.full((4, 5), 0.01)}
    mcmc = MCMC(kernel, 50, 0, num_chains=4, initial_params=start, seed=0, disable_progbar=True)
    mcmc.run()
    stats = mcmc.draws.stats
    count = int(stats["diverging"].sum())
    assert count > 0
    assert bool((stats["energy_error"][stats["diverging"]] > 1000).all())
    assert not bool(stats["accepted"][stats["diverging"]].any())
    assert bool(mcmc.draws.position.isfinite().all())
    assert any(message.startswith(f"{count} of 200") for message in mcmc.messages)
    told = mcmc.diagnostics()["divergences"]
    assert sum(len(part) for part in told.values()) == count
    assert int(to_inference_data(mcmc).sample_stats["diverging"].sum()) == count


# --- wrong use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "`num_samples` is 0: expected 1 or more"),
        ({"num_samples": 2.5}, TypeError, "`num_samples` is 2.5: expected an integer"),
        ({"num_samples": True}, TypeError, "`num_samples` is True: expected an integer"),
        ({"warmup_steps": -1}, ValueError, "`warmup_steps` is -1: expected 0 or more"),
        ({"num_chains": 0}, ValueError, "`num_chains` is 0: expected 1 or more"),
        ({"initial_params": 4}, TypeError, "`initial_params` is 4: expected values of each site"),
        (
            {"chain_method": "parallel"},
            ValueError,
            "`chain_method` is 'parallel': expected one of",
        ),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        MCMC(_kernel(), **({"num_samples": 5} | settings))


def test_kernel_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="`kernel` is a NUTS: expected a kernel of pyro_hamflow"):
        MCMC(pyro.infer.NUTS(model), 5)


@pytest.mark.parametrize("ask", ["get_samples", "diagnostics", "summary"])
def test_results_before_run_are_refused(ask):
    with pytest.raises(RuntimeError, match="call `run` first"):
        getattr(MCMC(_kernel(), 5), ask)()


def test_chains_that_disagree_are_told():
    """Two particles far from where they matter, and chains that hardly move."""

    def wide(parameters, y):
        with pyro.plate("group", len(y)):
            pyro.sample("x", dist.Normal(0.0, 30.0).expand([len(y)]))

    marginal = marginalize(latent, ["x"], num_particles=2, proposal=wide)
    kernel = PseudoMarginalHMC(
        marginal, refresh=CorrelatedRefresh(0.9999), method="conditional", **STILL
    )
    y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    mcmc = MCMC(kernel, 60, 0, num_chains=4, seed=0, disable_progbar=True)
    mcmc.run(y)
    assert any("disagree about the log-likelihood (R-hat" in text for text in mcmc.messages)
