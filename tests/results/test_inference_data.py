"""Results: the groups, their dimensions and values, and files."""

from __future__ import annotations

import json
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
import xarray
from pyro.infer.reparam import LocScaleReparam, TransformReparam

import pyro_hamflow as phf
from pyro_hamflow.mcmc.adaptation.estimator import EstimatorTuning
from pyro_hamflow.results.inference_data import build_groups, to_datatree
from pyro_hamflow.results.run import plain
from tests.helpers.arviz_versions import TREES, datasets


def clinics(covariate, outcome):
    """Patients in clinics; the clinics' effects are local."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    pyro.deterministic("odds", mean.exp())
    with pyro.plate("clinic", 5, dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.deterministic("total", effect + 1.0)
        with pyro.plate("patient", 3, dim=-1):
            logits = effect + covariate @ slope
            pyro.sample("outcome", dist.Bernoulli(logits=logits), obs=outcome)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(3)
    covariate = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)
    outcome = (torch.rand(5, 3, generator=generator, dtype=torch.float64) < 0.6).double()
    return covariate, outcome


def run(data, **settings):
    marginal = phf.marginalize(clinics, ["effect"], num_particles=4)
    mcmc = phf.MCMC(
        phf.PseudoMarginalHMC(marginal),
        40,
        20,
        num_chains=2,
        seed=5,
        save_warmup=True,
        **settings,
    )
    mcmc.run(*data)
    return mcmc


@pytest.fixture(scope="module")
def mcmc(data):
    torch.set_default_dtype(torch.float64)
    return run(data)


def test_groups_and_dimensions_of_a_marginalised_model(mcmc):
    idata = phf.to_inference_data(mcmc, dims={"slope": ["covariate"]})
    assert set(datasets(idata)) == {
        "posterior",
        "warmup_posterior",
        "sample_stats",
        "warmup_sample_stats",
        "log_likelihood",
        "observed_data",
    }
    dims = {name: value.dims for name, value in idata.posterior.items()}
    lead = ("chain", "draw")
    assert dims == {
        "mean": lead,
        "slope": (*lead, "covariate"),
        "spread": lead,
        "effect": (*lead, "clinic"),
        "odds": lead,
        "total": (*lead, "clinic"),
    }
    assert idata.log_likelihood["outcome"].dims == (*lead, "clinic")
    assert idata.observed_data["outcome"].dims == ("clinic", "patient")
    assert idata.posterior.sizes["draw"] == 40
    assert idata.warmup_posterior.sizes["draw"] == 20


def test_values_agree_with_the_draws(mcmc, data):
    idata = phf.to_inference_data(mcmc)
    samples = mcmc.get_samples(group_by_chain=True)
    for name, value in samples.items():
        np.testing.assert_array_equal(idata.posterior[name], value)
    np.testing.assert_allclose(idata.posterior["odds"], samples["mean"].exp(), rtol=1e-12)
    np.testing.assert_allclose(
        idata.posterior["total"], idata.posterior["effect"] + 1.0, rtol=1e-12
    )
    np.testing.assert_array_equal(idata.observed_data["outcome"], data[1])
    estimate = mcmc.draws.stats["log_likelihood_estimate"]
    np.testing.assert_array_equal(idata.sample_stats["log_likelihood_estimate"], estimate)


def test_statistics_use_the_names_of_the_schema(mcmc):
    stats = phf.to_inference_data(mcmc).sample_stats
    assert {
        "lp",
        "energy",
        "energy_error",
        "acceptance_rate",
        "step_size",
        "n_steps",
        "diverging",
        "n_gradients",
        "n_densities",
        "log_likelihood_estimate",
    } <= set(stats)
    assert stats["diverging"].dtype == bool
    assert np.isfinite(stats["energy"]).all()
    assert stats.attrs["tuning_steps"] == 20 and stats.attrs["seed"] == 5
    assert stats.attrs["sampling_time"] > 0
    assert json.loads(stats.attrs["kernel_settings"])["kernel"] == "PseudoMarginalHMC"


def test_arviz_diagnostics_take_the_result(mcmc):
    idata = phf.to_inference_data(mcmc)
    summary = arviz.summary(idata, var_names=["mean", "effect"])
    assert len(summary) == 6
    bfmi = arviz.bfmi(idata)
    assert np.isfinite(bfmi["energy"] if TREES else bfmi).all()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
        loo = arviz.loo(idata, var_name="outcome", pointwise=True)
    assert (loo.elpd_i if TREES else loo.loo_i).dims == ("clinic",)


def test_files_round_trip(mcmc, tmp_path):
    idata = phf.to_inference_data(mcmc)
    idata.to_netcdf(tmp_path / "run.nc")
    back = datasets(arviz.from_netcdf(tmp_path / "run.nc"))
    for name, group in datasets(idata).items():
        xarray.testing.assert_identical(back[name].load(), group.load())


def test_datatree_serves_the_tools_of_arviz_one(mcmc, tmp_path):
    arviz_base = pytest.importorskip("arviz_base")
    arviz_stats = pytest.importorskip("arviz_stats")
    groups, attributes = build_groups(
        mcmc, coords=None, dims=None, log_likelihood=True, prior=None, posterior_predictive=None
    )
    tree = to_datatree(groups, attributes)
    assert isinstance(arviz_base.convert_to_datatree(tree), xarray.DataTree)
    assert np.isfinite(tree.posterior.dataset.azstats.ess()["mean"])
    assert len(arviz_stats.summary(tree, var_names=["mean"])) == 1
    tree.to_netcdf(tmp_path / "tree.nc")
    with xarray.open_datatree(tmp_path / "tree.nc") as back:
        assert set(back.children) == set(groups)


def test_version_one_of_arviz_gets_a_datatree(mcmc, monkeypatch):
    monkeypatch.setattr(arviz, "__version__", "1.3.0")
    assert isinstance(phf.to_inference_data(mcmc), xarray.DataTree)


def test_coordinates_name_the_elements_of_plates(mcmc):
    idata = phf.to_inference_data(mcmc, coords={"clinic": list("abcde")})
    assert idata.posterior["effect"].sel(clinic="c").shape == (2, 40)
    with pytest.raises(ValueError, match="'clinic' has 2 values: expected 5"):
        phf.to_inference_data(mcmc, coords={"clinic": ["a", "b"]})


def test_predictions_join_the_result(mcmc, data):
    samples = mcmc.get_samples()
    predictive = pyro.infer.Predictive(clinics, samples, return_sites=["outcome"])
    drawn = predictive(data[0], None)
    idata = phf.to_inference_data(mcmc, posterior_predictive=drawn, prior=samples)
    assert idata.posterior_predictive["outcome"].shape == (2, 40, 5, 3)
    assert idata.prior["mean"].shape == (1, 80)
    with pytest.raises(ValueError, match="`prior` of site 'spread' has 3 draws: expected 80"):
        phf.to_inference_data(mcmc, prior=samples | {"spread": torch.ones(3)})
    with pytest.raises(ValueError, match="`prior` of site 'mean' has 1 draw: expected draws first"):
        phf.to_inference_data(mcmc, prior={"mean": torch.tensor(0.0)})
    with pytest.raises(ValueError, match="'outcome' has 3 draws: expected 80"):
        phf.to_inference_data(mcmc, posterior_predictive={"outcome": drawn["outcome"][:3]})


def test_runs_of_pyros_runner_convert(data):
    marginal = phf.marginalize(clinics, ["effect"], num_particles=4)
    mcmc = pyro.infer.MCMC(phf.PseudoMarginalHMC(marginal), 20, 10, num_chains=2)
    mcmc.run(*data)
    idata = phf.to_inference_data(mcmc)
    assert idata.posterior["effect"].dims == ("chain", "draw", "clinic")
    assert idata.posterior["effect"].shape == (2, 20, 5)
    np.testing.assert_allclose(
        idata.posterior["mean"], mcmc.get_samples(group_by_chain=True)["mean"], rtol=1e-12
    )


def test_a_loop_named_by_its_stem_is_said_to_be_recovered():
    def walk(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        x = torch.zeros(())
        for t in range(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(x, scale))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])

    mcmc = phf.MCMC(
        phf.PseudoMarginalNUTS(phf.marginalize(walk, ["x"], num_particles=1), method="joint"),
        2,
        2,
        disable_progbar=True,
    )
    mcmc.run(torch.tensor([0.3, -0.2, 0.8]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = phf.to_inference_data(mcmc).posterior
    assert not [warning for warning in told if "lacks" in str(warning.message)]
    assert found["x"].dims == ("chain", "draw", "x_time")


def test_plain_models_report_every_observation(data):
    mcmc = phf.MCMC(phf.HMC(clinics), 30, 10, num_chains=2, seed=1)
    mcmc.run(*data)
    idata = phf.to_inference_data(mcmc)
    assert idata.log_likelihood["outcome"].dims == ("chain", "draw", "clinic", "patient")
    posterior = idata.posterior
    logits = posterior["effect"].to_numpy()[..., None] + np.einsum(
        "cpk,ijk->ijcp", data[0], posterior["slope"]
    )
    expected = dist.Bernoulli(logits=torch.tensor(logits)).log_prob(data[1])
    np.testing.assert_allclose(idata.log_likelihood["outcome"], expected, rtol=1e-10)


def reparametrised(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 3):
        x = pyro.sample("x", dist.Normal(mean, 2.0))
        scale = dist.TransformedDistribution(
            dist.Normal(mean, 1.0), [dist.transforms.ExpTransform()]
        )
        pyro.sample("y", dist.Normal(x * pyro.sample("scale", scale), 1.0), obs=y)


def test_reparametrised_sites_come_out_as_themselves():
    """They are observed in the trace, as what follows from others is."""
    config = {"x": LocScaleReparam(0.0), "scale": TransformReparam()}
    model = pyro.poutine.reparam(reparametrised, config)
    local = ["x_decentered", "scale_base"]
    y = torch.tensor([0.1, 0.5, -0.3])
    kernels = [phf.HMC(model), phf.PseudoMarginalHMC(phf.marginalize(model, local))]
    for kernel in kernels:
        mcmc = phf.MCMC(kernel, 10, 10, seed=0)
        mcmc.run(y)
        idata = phf.to_inference_data(mcmc)
        posterior = idata.posterior
        assert posterior["x"].dims == posterior["scale"].dims == ("chain", "draw", "group")
        np.testing.assert_allclose(
            posterior["x"], posterior["mean"] + 2.0 * posterior["x_decentered"]
        )
        np.testing.assert_allclose(posterior["scale"], np.exp(posterior["scale_base"]))
        assert list(idata.log_likelihood) == list(idata.observed_data) == ["y"]


def test_other_results_are_refused():
    with pytest.raises(TypeError, match="expected an MCMC object"):
        phf.to_inference_data(object())


def test_chains_with_methods_of_their_own_are_joined(data, monkeypatch):
    """The second chain, unlike the first, refreshes the noise on its own."""
    methods = iter(["joint", "conditional"])
    monkeypatch.setattr(EstimatorTuning, "_choose", lambda *_: next(methods))
    kernel = phf.PseudoMarginalNUTS(phf.marginalize(clinics, ["effect"], num_particles=2))
    mcmc = phf.MCMC(kernel, 5, 5, num_chains=2, chain_method="sequential", seed=0)
    mcmc.run(*data)
    stats = phf.to_inference_data(mcmc).sample_stats
    assert np.isnan(stats["refresh_rate"][0]).all() and np.isfinite(stats["refresh_rate"][1]).all()
    assert stats["diverging"].dtype == bool and stats["n_steps"].dtype == np.int64


def test_settings_are_valid_json(mcmc):
    mcmc.kernel.hamiltonian.estimator.variance = float("nan")
    settings = phf.to_inference_data(mcmc, log_likelihood=False).attrs["kernel_settings"]

    def refuse(constant):
        raise ValueError(constant)

    assert json.loads(settings, parse_constant=refuse)["log_likelihood_variance"] is None
    odd = {"a": float("inf"), 1: torch.tensor([1.0, float("nan")]), "c": {"d": object}}
    assert plain(odd) == {"a": None, "1": [1.0, None], "c": {"d": repr(object)}}


@pytest.mark.parametrize("runner", [phf.MCMC, pyro.infer.MCMC])
def test_shortest_runs_convert_and_unfinished_ones_are_refused(runner, data):
    mcmc = runner(phf.HMC(clinics), 1, 0, num_chains=1)
    with pytest.raises(ValueError, match="no draws yet"):
        phf.to_inference_data(mcmc)
    mcmc.run(*data)
    assert dict(phf.to_inference_data(mcmc).posterior["effect"].sizes) == {
        "chain": 1,
        "draw": 1,
        "clinic": 5,
    }


def test_two_models_are_compared(data):
    def without_effects(covariate, outcome):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("clinic", 5, dim=-2), pyro.plate("patient", 3, dim=-1):
            pyro.sample("outcome", dist.Bernoulli(logits=covariate @ slope), obs=outcome)

    runs = {}
    for model in (clinics, without_effects):
        mcmc = phf.MCMC(phf.HMC(model), 60, 40, num_chains=2, seed=0)
        mcmc.run(*data)
        runs[model.__name__] = phf.to_inference_data(mcmc)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert set(arviz.compare(runs).index) == set(runs)
        assert TREES or np.isfinite(arviz.waic(runs["clinics"]).elpd_waic)
    drawn = arviz.extract(runs["clinics"], var_names=["effect"])
    assert drawn.sizes == {"clinic": 5, "sample": 120}
