"""Names of sites and dimensions: legal and predictable, and nothing vanishes."""

from __future__ import annotations

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
import xarray
from pyro.contrib.autoname import scope

import pyro_hamflow as phf
from pyro_hamflow.results.inference_data import build_groups, to_datatree
from pyro_hamflow.results.names import TAKEN, TAKEN_DIMENSIONS, Names
from tests.helpers.arviz_versions import TREES, datasets

Normal = dist.Normal
Y = torch.tensor([0.1, 0.5, -0.3], dtype=torch.float64)


def taken_names():
    for name in ("draw", "chain", "sample", "a/b", "a.b", " x ", "ünï côde", ".", "x_dim_0", "lp"):
        pyro.sample(name, Normal(0.0, 1.0))
    pyro.sample("x", Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("p/q", 3):
        pyro.sample("y_log_likelihood", Normal(0.0, 1.0), obs=Y)


def taken_plates():
    for plate, site in (("chain", "x"), ("draw", "v"), ("sample", "w"), ("hdi", "h")):
        with pyro.plate(plate, 3):
            x = pyro.sample(site, Normal(0.0, 1.0))
            pyro.sample(f"{site}_seen", Normal(x, 1.0), obs=Y)


def like_each_other():
    """A plate named like a site of its own, and one like a site elsewhere."""
    pyro.sample("z", Normal(0.0, 1.0))
    plate = pyro.plate("site", 3)
    with scope(prefix="site"), plate:
        pyro.sample("x", Normal(0.0, 1.0))
    with pyro.plate("z_dim", 2):
        pyro.sample("y", Normal(0.0, 1.0))


def without_plates():
    mean = pyro.sample("mean", Normal(0.0, 1.0).expand([2, 3]))
    pyro.sample("one", Normal(torch.zeros(1), 1.0))
    pyro.sample("y", Normal(mean, 1.0), obs=torch.zeros(2, 3))


def events_in_plates():
    with pyro.plate("outer", 2, dim=-3), pyro.plate("inner", 3, dim=-1):
        mean = pyro.sample("mean", Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.deterministic("double", 2.0 * mean, event_dim=1)
        pyro.deterministic("first", mean[..., 0])
        pyro.sample("y", Normal(mean, 1.0).to_event(1), obs=torch.zeros(2, 1, 3, 4))


def many_types():
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    pyro.sample("none", Normal(0.0, 1.0).expand([0]).to_event(1))
    with pyro.plate("datum", 3):
        pyro.sample("y", Normal(mean, 1.0), obs=torch.tensor(1.5))
        with pyro.poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("part", Normal(mean, 1.0), obs=Y)
    pyro.sample("number", Normal(mean, 1.0), obs=1.5)
    pyro.sample("count", dist.Poisson(mean.exp()), obs=torch.tensor([1, 2]))
    pyro.deterministic("flag", mean > 0)
    pyro.deterministic("rounded", (3 * mean).long())
    pyro.deterministic("constant", torch.arange(3.0))
    pyro.deterministic("half", mean.to(torch.float16))
    pyro.deterministic("brain", mean.to(torch.bfloat16).expand(2))
    pyro.factor("penalty", -(mean**2))
    for i in pyro.plate("loop", 2):
        pyro.sample(f"y_{i}", Normal(mean, 1.0), obs=Y[i])
    return {"mean": mean}


CASES = {
    taken_names: {
        "posterior": {
            **{name: () for name in ("draw_site", "chain_site", "sample_site", "a.b_site", "a.b")},
            **{name: () for name in ("x_site", "ünï côde", "_.", "x_dim_0", "lp")},
            "x": ("x_dim_0_dim",),
        },
        "log_likelihood": {"y_log_likelihood": ("p.q",)},
        "observed_data": {"y_log_likelihood": ("p.q",)},
    },
    taken_plates: {
        "posterior": {
            "x": ("chain_dim",),
            "v": ("draw_dim",),
            "w": ("sample_dim",),
            "h": ("hdi_dim",),
        },
        "observed_data": {
            "x_seen": ("chain_dim",),
            "v_seen": ("draw_dim",),
            "w_seen": ("sample_dim",),
            "h_seen": ("hdi_dim",),
        },
    },
    like_each_other: {
        "posterior": {"z": (), "site.x": ("site",), "y": ("z_dim",)},
    },
    without_plates: {
        "posterior": {"mean": ("mean_dim_0", "mean_dim_1"), "one": ("one_dim_0",)},
        "log_likelihood": {"y": ("y_dim_0", "y_dim_1")},
        "observed_data": {"y": ("y_dim_0", "y_dim_1")},
    },
    events_in_plates: {
        "posterior": {
            "mean": ("outer", "inner", "mean_dim_0"),
            "double": ("outer", "inner", "double_dim_0"),
            "first": ("outer", "inner"),
        },
        "log_likelihood": {"y": ("outer", "inner")},
        "observed_data": {"y": ("outer", "inner", "y_dim_0")},
    },
    many_types: {
        "posterior": {
            **{name: () for name in ("mean", "flag", "rounded", "half")},
            **{name: (f"{name}_dim_0",) for name in ("none", "constant", "brain")},
        },
        "log_likelihood": {
            **{name: ("datum",) for name in ("y", "part")},
            **{name: () for name in ("number", "penalty", "y_0", "y_1")},
            "count": ("count_dim_0",),
        },
        "observed_data": {
            **{name: ("datum",) for name in ("y", "part")},
            **{name: () for name in ("number", "y_0", "y_1")},
            "count": ("count_dim_0",),
        },
    },
}


def run(model, *args, draws=6, **settings):
    mcmc = phf.MCMC(phf.HMC(model), draws, 4, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def groups_of(mcmc):
    return build_groups(
        mcmc, coords=None, dims=None, log_likelihood=True, prior=None, posterior_predictive=None
    )


@pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
def test_every_site_comes_out_under_a_legal_name(model, tmp_path):
    mcmc = run(model)
    idata = phf.to_inference_data(mcmc)
    for group, expected in CASES[model].items():
        lead = 0 if group == "observed_data" else 2
        assert {n: v.dims[lead:] for n, v in idata[group].items()} == expected, group
    idata.to_netcdf(tmp_path / "run.nc")
    groups = datasets(idata)
    back = datasets(arviz.from_netcdf(tmp_path / "run.nc"))
    for name, group in groups.items():
        xarray.testing.assert_identical(back[name].load(), group.load())
    tree = to_datatree(*groups_of(mcmc))
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as opened:
        for name, group in groups.items():
            xarray.testing.assert_identical(opened[name].to_dataset().load(), group)


def test_values_stay_with_their_names():
    mcmc = run(taken_names)
    posterior = phf.to_inference_data(mcmc).posterior
    samples = mcmc.get_samples(group_by_chain=True)
    pairs = {"draw": "draw_site", "a/b": "a.b_site", "a.b": "a.b", " x ": "x_site", "x": "x"}
    for name, own in pairs.items():
        np.testing.assert_array_equal(posterior[own], samples[name])


def test_half_precision_is_written_as_single():
    posterior = phf.to_inference_data(run(many_types)).posterior
    assert posterior["half"].dtype == posterior["brain"].dtype == np.float32
    assert posterior["flag"].dtype == bool and posterior["rounded"].dtype == np.int64
    np.testing.assert_array_equal(posterior["flag"], posterior["mean"] > 0)


@pytest.mark.parametrize("name", TAKEN + TAKEN_DIMENSIONS)
def test_arviz_takes_plates_of_any_name(name):
    def model():
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate(name, 3):
            x = pyro.sample("x", Normal(mean, 1.0))
            pyro.sample("y", Normal(x, 1.0), obs=Y)

    mcmc = run(model, draws=20)
    idata = phf.to_inference_data(mcmc)
    assert len(arviz.summary(idata)) == 4
    assert arviz.extract(idata)["x"].sizes["sample"] == 40
    assert arviz.hdi(idata)["x"].sizes["ci_bound" if TREES else "hdi"] == 2


def test_names_do_not_depend_on_their_order():
    for sites in (["a/b", "a.b"], ["a.b", "a/b"]):
        names = Names(sites, [])
        assert names.site("a.b") == "a.b" and names.site("a/b") == "a.b_site"
    names = Names(["x", "y"], ["x", "x/", "x_dim"])
    found = [names.dimension(name) for name in ("x", "x/", "x_dim")]
    assert found == ["x_dim_dim", "x.", "x_dim"]
    assert names.site("x", "y") == "x_y" and names.unnamed("x", "dim_1") == "x_dim_1"


# --- names and coordinates that a user gives ----------------------------------------------------


def two_vectors():
    pyro.sample("a", Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("b", Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("chain", 3):
        pyro.sample("c", Normal(0.0, 1.0))


@pytest.fixture(scope="module")
def vectors():
    torch.set_default_dtype(torch.float64)
    return run(two_vectors)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"dims": {"a": ["k"], "b": ["k"]}}, ValueError, "'k' has size 3 at site 'b' and 2 at"),
        ({"dims": {"a": ["k", "l"]}}, ValueError, "site 'a' has 2 names: expected 1 or fewer"),
        ({"dims": {"d": ["k"]}}, ValueError, "`dims` names site 'd': expected some of"),
        ({"dims": {"a": "k"}}, TypeError, "`dims` of site 'a' is 'k': expected a list of names"),
        ({"coords": {"k": [1, 2]}}, ValueError, "`coords` names dimension 'k': expected some of"),
        ({"coords": {"a_dim_0": [1]}}, ValueError, "'a_dim_0' has 1 values: expected 2, as site"),
        ({"coords": {"chain": [1, 2]}}, ValueError, "'chain' has 2 values: expected 3, as site"),
    ],
)
def test_names_that_do_not_fit_are_refused(vectors, given, error, message):
    with pytest.raises(error, match=message):
        phf.to_inference_data(vectors, **given)


def test_names_and_coordinates_that_fit(vectors):
    given = {"dims": {"a": ["side"], "b": [None]}, "coords": {"side": ["l", "r"]}}
    given["coords"] |= {"chain": list("xyz"), "b_dim_0": [3, 4, 5]}
    posterior = phf.to_inference_data(vectors, **given).posterior
    assert posterior["a"].sel(side="r").shape == (2, 6)
    assert posterior["c"].sel(chain_dim="y").shape == (2, 6)
    assert list(posterior["chain"].to_numpy()) == [0, 1]
    assert posterior["b"].sel(b_dim_0=5).shape == (2, 6)
