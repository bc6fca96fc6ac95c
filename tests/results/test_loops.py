"""Paths that are written as loops come out as variables with a dimension of time."""

from __future__ import annotations

import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

import pyro_hamflow as phf
from pyro_hamflow.results import loops
from tests.helpers.arviz_versions import TREES, datasets

LEAD = ("chain", "draw")
Y = torch.tensor([0.0, 2.0, 1.0, 3.0, 4.0], dtype=torch.float64)


def counts(y):
    step = pyro.sample("step", dist.LogNormal(-1.0, 0.5))
    x = torch.zeros(())
    for t in pyro.markov(range(1, 1 + len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, step))
        rate = pyro.deterministic(f"rate_{t}", x.exp())
        pyro.sample(f"y_{t}", dist.Poisson(rate), obs=y[t - 1])


def panel(y):
    """Two series, whose states have three numbers each."""
    step = pyro.sample("step", dist.LogNormal(-1.0, 0.5))
    x = torch.zeros(2, 3)
    with pyro.plate("series", 2, dim=-1):
        for t in range(len(y)):
            x = pyro.sample(f"x{t}", dist.Normal(x, step).to_event(1))
            pyro.sample(f"y{t}", dist.Normal(x, 1.0).to_event(1), obs=y[t])


def run(kernel, *args, **settings):
    mcmc = phf.MCMC(kernel, 20, 20, num_chains=2, seed=0, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc


KERNELS = {
    "plain": lambda: phf.NUTS(counts),
    "whitened": lambda: phf.NUTS(phf.whiten(counts, ["x"])),
    "marginalised": lambda: phf.PseudoMarginalNUTS(phf.marginalize(counts, ["x"])),
}


@pytest.fixture(scope="module", params=KERNELS)
def found(request):
    torch.set_default_dtype(torch.float64)
    mcmc = run(KERNELS[request.param](), Y, save_warmup=True)
    return request.param, mcmc, phf.to_inference_data(mcmc)


def test_sites_of_a_loop_are_one_variable(found):
    name, mcmc, idata = found
    groups = datasets(idata)
    for group in ("posterior", "warmup_posterior"):
        for site in ("x", "rate"):
            assert groups[group][site].dims == (*LEAD, f"{site}_time")
            assert list(groups[group][f"{site}_time"]) == [1, 2, 3, 4, 5]
    x = groups["posterior"]["x"]
    assert "x_1" not in groups["posterior"]
    np.testing.assert_allclose(groups["posterior"]["rate"], np.exp(x), rtol=1e-12)
    assert groups["observed_data"]["y"].dims == ("y_time",)
    np.testing.assert_array_equal(groups["observed_data"]["y"], Y)
    density = groups["log_likelihood"]["y"]
    if name == "marginalised":  # one for the whole path
        assert density.dims == LEAD
    else:
        expected = dist.Poisson(torch.tensor(x.values).exp()).log_prob(Y)
        assert density.dims == (*LEAD, "y_time")
        np.testing.assert_allclose(density, expected, rtol=1e-9)
    samples = mcmc.get_samples(group_by_chain=True)
    if "x_3" in samples:  # by their own names, as Pyro's
        np.testing.assert_array_equal(x.sel(x_time=3), samples["x_3"])


def test_arviz_and_files_take_them(found, tmp_path):
    name, _, idata = found
    assert list(arviz.summary(idata, var_names=["x"]).index) == [f"x[{t}]" for t in range(1, 6)]
    if name == "plain":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
            loo = arviz.loo(idata, pointwise=True)
        assert np.isfinite((loo.elpd_i if TREES else loo.loo_i).sel(y_time=5))
    idata.to_netcdf(tmp_path / "run.nc")
    back = datasets(arviz.from_netcdf(tmp_path / "run.nc"))
    for group, dataset in datasets(idata).items():
        xarray.testing.assert_identical(back[group].load(), dataset.load())


def test_draws_of_the_prior_and_predictions_have_the_same_dimensions():
    mcmc = run(phf.NUTS(counts), Y)
    samples = mcmc.get_samples()
    predicted = {f"y_{t}": torch.full((40,), float(t)) for t in range(1, 6)}
    prior = {name: value[:7] for name, value in samples.items()} | {"y_1": torch.zeros(7)}
    with_dates = phf.to_inference_data(
        mcmc,
        dims={"x": ["day"], "y": ["day"]},
        coords={"day": ["a", "b", "c", "d", "e"], "rate_time": [0.1, 0.2, 0.3, 0.4, 0.5]},
        prior=prior,
        posterior_predictive=predicted,
    )
    assert with_dates.posterior["x"].dims == (*LEAD, "day")
    assert list(with_dates.posterior["day"]) == ["a", "b", "c", "d", "e"]
    assert list(with_dates.posterior["rate_time"]) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert with_dates.log_likelihood["y"].dims == (*LEAD, "day")
    assert with_dates.prior["x"].dims == (*LEAD, "day")
    assert with_dates.prior["y_1"].dims == LEAD  # alone, it is no path
    assert (with_dates.posterior_predictive["y"].sel(day="c") == 3.0).all()


def test_states_of_several_numbers_in_plates():
    y = torch.arange(24.0).reshape(4, 2, 3) / 10
    idata = phf.to_inference_data(run(phf.NUTS(panel), y))
    assert idata.posterior["x"].dims == (*LEAD, "series", "x_time", "x_dim_1")
    assert idata.log_likelihood["y"].dims == (*LEAD, "series", "y_time")
    assert idata.observed_data["y"].dims == ("series", "y_time", "y_dim_1")
    np.testing.assert_array_equal(idata.observed_data["y"].transpose("y_time", ...), y)
    named = phf.to_inference_data(run(phf.NUTS(panel), y), dims={"x": ["day", "factor"]})
    assert named.posterior["x"].dims == (*LEAD, "series", "day", "factor")


def test_what_is_no_path_keeps_its_names():
    y = torch.tensor(0.0)

    def model():
        for name in (
            "pair_0",
            "pair_1",
            "gap_0",
            "gap_1",
            "gap_3",
            "own",
            "own_0",
            "own_1",
            "own_2",
        ):
            pyro.sample(name, dist.Normal(0.0, 1.0))
        for name in ("twice_0", "twice0", "twice_1", "uneven_0", "uneven_1"):
            pyro.sample(name, dist.Normal(0.0, 1.0))
        pyro.sample("uneven_2", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        for i in pyro.plate("element", 3):
            pyro.sample(f"element_{i}", dist.Normal(0.0, 1.0))
        for t in range(3):
            pyro.sample(f"seen_{t}", dist.Normal(0.0, 1.0), obs=None if t == 1 else y)

    found = phf.to_inference_data(run(phf.NUTS(model)))
    names = {*found.posterior.data_vars, *found.observed_data.data_vars}
    assert not names & {"pair", "gap", "twice", "uneven", "element", "seen"}
    assert {"own", "own_0", "pair_1", "gap_3", "twice0", "uneven_2", "element_2"} <= names


def regression(y):
    """Coefficients by number, of which each datum reads all; a third reads the one before it."""
    beta = [pyro.sample(f"beta_{i}", dist.Normal(0.0, 1.0)) for i in range(3)]
    group = [pyro.sample("effect_0", dist.Normal(0.0, 1.0))]
    group += [pyro.sample(f"effect_{i}", dist.Normal(group[0], 1.0)) for i in (1, 2, 3)]
    for i in range(3):
        pyro.sample(f"mean_{i}", dist.Normal(beta[i], 1.0))
    for i in range(len(y)):
        pyro.sample(f"y_{i}", dist.Normal(beta[0] + beta[1] * i + beta[2], 1.0), obs=y[i])


def test_numbered_sites_without_a_path_keep_their_names():
    idata = phf.to_inference_data(run(phf.NUTS(regression), Y))
    expected = {*(f"beta_{i}" for i in range(3)), *(f"effect_{i}" for i in range(4))}
    assert {*idata.posterior.data_vars} == expected | {f"mean_{i}" for i in range(3)}
    assert {*idata.log_likelihood.data_vars} == {f"y_{i}" for i in range(5)}
    assert list(arviz.summary(idata, var_names=["beta_1"]).index) == ["beta_1"]


def test_what_moves_along_with_a_path_is_stacked_as_well():
    """Innovations, a path of two lags made of them, what is foretold, and data in a second loop."""

    def model(y):
        phi = [pyro.sample(f"phi_{i}", dist.Normal(0.0, 0.3)) for i in range(3)]
        x = [torch.zeros(()), torch.zeros(())]
        for t in range(1, 1 + len(y)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
            x.append(pyro.deterministic(f"x_{t}", phi[0] * x[-1] + phi[1] * x[-2] + phi[2] + z))
        held = torch.zeros(len(y))
        for t in range(len(y)):
            held[t] = x[t + 2]  # written in place
            pyro.sample(f"y_{t}", dist.Normal(held[t], 1.0), obs=y[t])
        pyro.sample("alone", dist.Normal(0.0, 1.0))

    idata = phf.to_inference_data(run(phf.NUTS(model), Y))
    assert {*idata.posterior.data_vars} == {"phi_0", "phi_1", "phi_2", "z", "x", "alone"}
    assert idata.posterior["z"].dims == (*LEAD, "z_time")
    assert idata.log_likelihood["y"].dims == (*LEAD, "y_time")
    assert list(idata.posterior["x_time"]) == [1, 2, 3, 4, 5]
    assert list(idata.observed_data["y_time"]) == [0, 1, 2, 3, 4]


def backwards(y):
    """From the last day to the first; what is seen of a day follows from it and the next."""
    step = pyro.sample("step", dist.LogNormal(-1.0, 0.5))
    x, after = torch.zeros(()), torch.zeros(())
    for t in reversed(range(len(y))):
        x, after = pyro.sample(f"x_{t}", dist.Normal(x - 0.3 * after, step)), x
        pyro.sample(f"y_{t}", dist.Normal(x + 0.1 * after, 1.0), obs=y[t])


@pytest.mark.parametrize("sites", [[], ["x"]])
def test_a_path_may_run_backwards(sites):
    model = phf.marginalize(backwards, sites) if sites else backwards
    kernel = phf.PseudoMarginalNUTS(model) if sites else phf.NUTS(model)
    mcmc = run(kernel, Y)
    idata = phf.to_inference_data(mcmc)
    assert {*idata.posterior.data_vars} == {"step", "x"}
    assert {*idata.log_likelihood.data_vars} == {"y"}
    assert list(idata.posterior["x_time"]) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(idata.observed_data["y"], Y)
    if not sites:
        last = mcmc.get_samples(group_by_chain=True)["x_4"]
        np.testing.assert_array_equal(idata.posterior["x"].sel(x_time=4), last)


def test_a_model_that_cannot_be_followed_keeps_its_names(monkeypatch):
    mcmc = run(phf.NUTS(counts), Y)

    def fail(*args):
        raise RuntimeError("an operation that cannot be followed")

    monkeypatch.setattr(loops, "run_with", fail)
    idata = phf.to_inference_data(mcmc)
    assert {"x_1", "rate_5"} < {*idata.posterior.data_vars}
    assert {*idata.log_likelihood.data_vars} == {f"y_{t}" for t in range(1, 6)}


def test_a_name_of_a_single_site_keeps_its_loop_apart():
    mcmc = run(phf.NUTS(panel), torch.zeros(3, 2, 3))
    posterior = phf.to_inference_data(mcmc, dims={"x1": ["factor"]}).posterior
    assert posterior["x1"].dims == (*LEAD, "series", "factor")
    assert posterior["x0"].dims == (*LEAD, "series", "x0_dim_0") and "x" not in posterior


def test_loops_of_other_numbers_along_one_dimension_are_refused():
    def model():
        x = 0.0
        for t in range(3):
            x = pyro.sample(f"x_{t}", dist.Normal(x, 1.0))
            pyro.sample(f"z_{t + 1}", dist.Normal(x, 1.0))

    mcmc, dims = run(phf.NUTS(model)), {"x": ["day"], "z": ["day"]}
    with pytest.raises(ValueError, match=r"'day' has numbers 0 to 2 at site 'x' and 1 to 3 at sit"):
        phf.to_inference_data(mcmc, dims=dims)
    given = phf.to_inference_data(mcmc, dims=dims, coords={"day": [5, 6, 7]}).posterior
    assert list(given["day"]) == [5, 6, 7]
