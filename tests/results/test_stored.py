"""Stores of runs as InferenceData: what the run has, read when it is asked for."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

from pyro_hamflow import MCMC, NUTS, PseudoMarginalHMC, marginalize, to_inference_data
from pyro_hamflow.mcmc.packing import OtherVersion

DATA = torch.tensor([0.5, -1.0, 2.0])


def model(y):
    scale = pyro.sample("a/scale", dist.HalfNormal(1.0))
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("row", len(y), dim=-1):
        x = pyro.sample("x", dist.Normal(weights.sum(), scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def written(path, kernel, **how):
    settings = {"num_samples": 12, "warmup_steps": 10, "num_chains": 2, "seed": 0} | how
    mcmc = MCMC(kernel, **settings, checkpoint=path, disable_progbar=True)
    mcmc.run(DATA)
    return mcmc


def test_a_store_has_what_the_run_has(tmp_path):
    kernel = PseudoMarginalHMC(marginalize(model, ["x"], num_particles=4), max_num_steps=4)
    mcmc = written(tmp_path / "run.zarr", kernel, save_warmup=True)
    found, whole = to_inference_data(tmp_path / "run.zarr"), to_inference_data(mcmc)
    assert set(found.posterior.data_vars) == {"a.scale", "weights", "x"}
    for group in ("posterior", "sample_stats", "warmup_posterior", "warmup_sample_stats"):
        for name, values in found[group].data_vars.items():
            expected = whole[group][name]
            assert values.dims == expected.dims, name
            np.testing.assert_array_equal(values, expected)
    position = found.unconstrained_posterior["position"]
    np.testing.assert_array_equal(position, mcmc.draws.position.numpy())
    assert dict(found.posterior["x"].sizes) == {"chain": 2, "draw": 12, "row": 3}
    assert found.posterior.attrs["tuning_steps"] == 10


def test_draws_are_read_when_they_are_asked_for(tmp_path):
    written(tmp_path / "run.zarr", NUTS(model, max_tree_depth=3))
    found = to_inference_data(tmp_path / "run.zarr")
    variable = found.posterior["x"].variable
    assert not isinstance(variable._data, np.ndarray)  # an index into the store
    assert float(found.posterior["x"][1, 3, 2]) == float(found.posterior["x"].values[1, 3, 2])


def test_a_store_is_read_while_the_run_goes_on(tmp_path):
    """But for the checkpoint that is on its way to the disk."""
    sizes = []

    def hook(kernel, params, stage, i):
        if stage == "Sample" and i == 8:
            sizes.append(to_inference_data(tmp_path / "run.zarr").posterior.sizes["draw"])

    written(
        tmp_path / "run.zarr", NUTS(model, max_tree_depth=3), checkpoint_every=1e-9, hook_fn=hook
    )
    assert sizes in ([7], [8])


def test_a_store_of_a_run_in_its_warm_up_has_no_draws(tmp_path):
    def hook(kernel, params, stage, i):
        if stage == "Warmup" and i == 8:
            to_inference_data(tmp_path / "run.zarr")

    kernel = NUTS(model, max_tree_depth=3)
    with pytest.raises(ValueError, match="run.zarr has no draws yet: the run is in its warm-up"):
        written(tmp_path / "run.zarr", kernel, checkpoint_every=1e-9, hook_fn=hook)


def test_xarray_opens_a_store_by_itself(tmp_path):
    mcmc = written(tmp_path / "run.zarr", NUTS(model, max_tree_depth=3))
    found = xarray.open_zarr(tmp_path / "run.zarr", group="sample_stats", consolidated=False)
    np.testing.assert_array_equal(found["lp"], mcmc.draws.stats["lp"].numpy())


def test_what_is_no_store_is_told(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(OtherVersion, match="other is no checkpoint of a run"):
        to_inference_data(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="there is no"):
        to_inference_data(tmp_path / "none")
    with pytest.raises(ValueError, match="`coords` is given with a path"):
        to_inference_data(tmp_path / "other", coords={"row": [1, 2, 3]})
