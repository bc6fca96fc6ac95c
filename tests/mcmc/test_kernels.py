"""Both kernels in Pyro's own MCMC."""

from __future__ import annotations

import pickle
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, Predictive

from pyro_hamflow import HMC, CorrelatedRefresh, PseudoMarginalHMC, marginalize, to_inference_data
from pyro_hamflow.model.potential import Potential

Y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("group", 3):
        x = pyro.sample("x", dist.Normal(mean, scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def plain_model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("group", 3):
        pyro.sample("y", dist.Normal(mean, (1.0 + scale.square()).sqrt()), obs=y)


MARGINAL = marginalize(model, ["x"], num_particles=4)


@cache
def _captured(kernel):
    """The model's potential, captured once for all tests."""
    if kernel is HMC:
        return Potential(plain_model, (Y,))
    return Potential(MARGINAL, (Y,), separate_noise=True)


def hmc(**settings):
    kernel = HMC(plain_model, **settings)
    kernel.source._potential = _captured(HMC)
    return kernel


def pseudo_marginal(**settings):
    kernel = PseudoMarginalHMC(MARGINAL, **settings)
    kernel.source._potential = _captured(PseudoMarginalHMC)
    return kernel


def joint(**settings):
    return pseudo_marginal(method="joint", **settings)


START = {"mean": torch.tensor(0.7).double(), "scale": torch.tensor(-0.4).double()}


def _start(num_chains):
    return {n: v.expand(num_chains) if num_chains > 1 else v for n, v in START.items()}


def _run(kernel, num_chains=1, **settings):
    settings = {"num_samples": 12, "warmup_steps": 8, "disable_progbar": True} | settings
    mcmc = MCMC(kernel, num_chains=num_chains, initial_params=_start(num_chains), **settings)
    mcmc.run(Y)
    return mcmc


@pytest.fixture(params=[hmc, pseudo_marginal])
def make(request):
    return request.param


@pytest.mark.parametrize(
    ("make", "num_chains"), [(hmc, 1), (hmc, 2), (pseudo_marginal, 2), (joint, 1)]
)
def test_run_in_pyro(make, num_chains, capsys):
    mcmc = _run(make(), num_chains)
    samples = mcmc.get_samples(group_by_chain=True)
    assert set(samples) == {"mean", "scale"}
    for values in samples.values():
        assert values.shape == (num_chains, 12)
        assert values.dtype == torch.float64
        assert len(values.unique()) > 2
    assert bool((samples["scale"] > 0).all())
    assert mcmc.get_samples()["mean"].shape == (12 * num_chains,)
    diagnostics = mcmc.diagnostics()
    assert set(diagnostics["mean"]) == {"n_eff", "r_hat"}
    assert set(diagnostics["divergences"]) == {f"chain {i}" for i in range(num_chains)}
    assert 0 < diagnostics["acceptance rate"]["chain 0"] <= 1
    mcmc.summary()
    out = capsys.readouterr().out
    assert "mean" in out
    assert "Number of divergences: 0" in out
    if num_chains == 2:
        assert not torch.equal(samples["mean"][0], samples["mean"][1])
    posterior = to_inference_data(mcmc).posterior
    assert torch.equal(torch.tensor(posterior["mean"].values), samples["mean"])


def test_parallel_chains_in_pyro(make, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 8)
    mcmc = MCMC(
        make(),
        num_samples=5,
        warmup_steps=3,
        num_chains=2,
        initial_params=_start(2),
        mp_context="fork",
        disable_progbar=True,
    )
    mcmc.run(Y)
    samples = mcmc.get_samples(group_by_chain=True)
    assert samples["mean"].shape == (2, 5)
    assert not torch.equal(samples["mean"][0], samples["mean"][1])
    assert bool((samples["scale"] > 0).all())
    assert set(mcmc.diagnostics()["divergences"]) == {"chain 0", "chain 1"}
    posterior = to_inference_data(mcmc).posterior
    assert torch.equal(torch.tensor(posterior["mean"].values), samples["mean"])


def test_initial_params_are_honoured(make):
    kernel = make(step_size=1e-9, adapt_step_size=False, max_num_steps=2)
    samples = _run(kernel, num_samples=2, warmup_steps=0).get_samples()
    assert abs(samples["mean"][0].item() - START["mean"].item()) < 1e-6
    assert abs(samples["scale"][0].log().item() - START["scale"].item()) < 1e-6


def test_start_without_initial_params():
    mcmc = MCMC(hmc(), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(Y)
    assert mcmc.get_samples()["mean"].shape == (3,)


def test_predictive_after_run(make):
    """From the original model, whose local sites are drawn anew."""
    original = plain_model if make is hmc else model
    samples = _run(make()).get_samples()
    predicted = Predictive(original, samples)(None)
    assert predicted["y"].shape == (12, 3)
    assert bool(predicted["y"].isfinite().all())


def test_two_runs_in_a_row(make):
    """The second starts afresh: its record holds its own draws only."""
    kernel = make()
    _run(kernel)
    size = kernel.step_size
    again = _run(kernel, num_samples=7)
    assert len(kernel._record) == 7
    assert again.get_samples()["mean"].shape == (7,)
    assert kernel.step_size != size


def test_pickling_after_run(make):
    kernel = make()
    mcmc = _run(kernel)
    copy = pickle.loads(pickle.dumps(kernel))
    assert repr(copy.settings) == repr(kernel.settings)
    samples = _run(copy).get_samples()
    assert samples["mean"].shape == mcmc.get_samples()["mean"].shape


def test_pickling_before_run(make):
    copy = pickle.loads(pickle.dumps(make()))
    assert _run(copy, num_samples=3).get_samples()["mean"].shape == (3,)


def test_position_moved_from_outside(make):
    """As Gibbs moves do: the kernel goes on from the values it is given."""
    kernel = make(step_size=1e-9, adapt_step_size=False, max_num_steps=1)
    kernel.initial_params = START
    kernel.setup(0, Y)
    params = kernel.sample(kernel.initial_params)
    moved = {name: value + 0.5 for name, value in params.items()}
    params = kernel.sample(moved)
    for name, value in moved.items():
        assert abs(params[name].item() - value.item()) < 1e-6
    potential, state = kernel.potential, kernel._state
    value = potential.value(state.position, state.noise)
    assert torch.allclose(state.evaluation.value, value, rtol=1e-12)


def test_position_moved_before_first_sample():
    kernel = hmc(step_size=1e-9, adapt_step_size=False, max_num_steps=1)
    kernel.initial_params = START
    kernel.setup(0, Y)
    moved = {name: value + 0.5 for name, value in START.items()}
    params = kernel.sample(moved)
    assert abs(params["mean"].item() - moved["mean"].item()) < 1e-6


def test_unmoved_params_keep_state(make):
    """Values handed back as they came cost no evaluation, and change nothing."""
    kernel = make()
    kernel.initial_params = START
    kernel.setup(0, Y)
    first = kernel.sample(kernel.initial_params)
    state = kernel._state
    calls = []
    state_at = kernel.phase.transition.state_at
    kernel.phase.transition.state_at = lambda *args: calls.append(args) or state_at(*args)
    kernel.sample({name: value.clone() for name, value in first.items()})
    assert not calls
    assert kernel._state is not state


def test_record_holds_kept_draws_only(make):
    kernel = make()
    mcmc = _run(kernel, num_samples=6, warmup_steps=9)
    record = kernel._record
    assert len(record) == 6
    means = torch.stack(record.position)[:, 0, 0]
    assert torch.equal(means, mcmc.get_samples()["mean"])
    assert len(set(record.stats["step_size"])) == 1


def test_logging_of_kernel(make):
    kernel = make()
    assert kernel.logging() is None
    _run(kernel)
    assert set(kernel.logging()) == {"step size", "acc. prob", "divergences"}


# --- wrong use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"step_size": 0.0}, ValueError, "`step_size` is 0.0: expected a positive number"),
        ({"step_size": -1.0}, ValueError, "`step_size` is -1.0"),
        ({"target_accept_prob": 1.0}, ValueError, "`target_accept_prob` is 1.0"),
        ({"target_accept_prob": 0.0}, ValueError, "`target_accept_prob` is 0.0"),
        ({"trajectory_length": 0.0}, ValueError, "`trajectory_length` is 0.0"),
        ({"jitter": 1.0}, ValueError, "`jitter` is 1.0"),
        ({"jitter": -0.1}, ValueError, "`jitter` is -0.1"),
        ({"full_mass": "full"}, ValueError, "`full_mass` is 'full': expected True, False"),
        ({"max_num_steps": 0}, ValueError, "`max_num_steps` is 0: expected 1 or more"),
        ({"unknown": 0}, TypeError, "unknown"),
    ],
)
@pytest.mark.parametrize("kernel", [hmc, pseudo_marginal])
def test_bad_settings_are_refused(kernel, settings, error, message):
    with pytest.raises(error, match=message):
        kernel(**settings)


@pytest.mark.parametrize("kernel", [HMC, PseudoMarginalHMC])
def test_model_that_is_no_function_is_refused(kernel):
    with pytest.raises(TypeError, match="`model` is 3: expected a Pyro model"):
        kernel(3)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="`method` is 'both': expected one of"):
        pseudo_marginal(method="both")


def test_model_without_noise_is_refused():
    with pytest.raises(ValueError, match="the model has no noise sites.*use `HMC`"):
        _run(PseudoMarginalHMC(plain_model))


def test_correlation_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`correlation` is 1.0"):
        pseudo_marginal(refresh=CorrelatedRefresh(1.0))


@pytest.mark.parametrize(("full_mass", "shape"), [(False, (3,)), (True, (2,))])
def test_inverse_mass_of_wrong_shape_is_refused(full_mass, shape):
    with pytest.raises(ValueError, match="`inverse_mass_matrix` has shape .*: expected"):
        _run(hmc(full_mass=full_mass, inverse_mass_matrix=torch.ones(shape)))


@pytest.mark.parametrize("name", ["potential", "step_size", "inverse_mass_matrix"])
def test_kernel_before_its_run(name):
    with pytest.raises(RuntimeError, match="run it first"):
        getattr(HMC(plain_model), name)


def test_sample_before_setup():
    with pytest.raises(RuntimeError, match="call `setup` first"):
        hmc().sample({})


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"mean": torch.tensor(0.0)}, "lacks a value for site 'scale'"),
        ({**START, "other": torch.tensor(0.0)}, "`initial_params` names 'other'"),
        ({**START, "mean": torch.zeros(2)}, "site 'mean' has shape"),
    ],
)
@pytest.mark.parametrize("make", [HMC, lambda m: PseudoMarginalHMC(marginalize(model, ["x"]))])
def test_bad_initial_params_are_refused(make, start, message):
    kernel = make(plain_model)
    kernel.initial_params = start
    with pytest.raises(ValueError, match=message):
        kernel.setup(0, Y)
