"""Log-likelihoods of elements: right by closed form, from noise that the chain has not seen."""

from __future__ import annotations

import itertools
import math
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

import pyro_hamflow as phf
from pyro_hamflow.results import pointwise as pointwise_module
from pyro_hamflow.results.pointwise import WANTED_ERROR
from tests.helpers.arviz_versions import TREES
from tests.helpers.kinds import long_but

GROUPS, VISITS = 25, 4


def gaussian(y):
    """Effects and observations are normal: the likelihood has a closed form."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("group", GROUPS, dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        with pyro.plate("visit", VISITS, dim=-1):
            pyro.sample("y", dist.Normal(effect, 0.5), obs=y)


def exact(posterior, y):
    """The log densities of the groups at all draws."""
    mean, spread = (torch.tensor(posterior[name].to_numpy()) for name in ("mean", "spread"))
    loc = mean[..., None, None].expand(*mean.shape, GROUPS, VISITS)
    factor = spread[..., None, None, None].expand(*mean.shape, GROUPS, VISITS, 1)
    noise = torch.full(loc.shape, 0.25)
    return dist.LowRankMultivariateNormal(loc, factor, noise).log_prob(y).numpy()


def loo(values):
    """The expected log predictive density, and the effective number of parameters."""
    groups = {"posterior": {"x": np.zeros(values.shape[:2])}, "log_likelihood": {"y": values}}
    data = arviz.from_dict(groups) if TREES else arviz.from_dict(**groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = arviz.loo(data)
    return (found.elpd, found.p) if TREES else (found.elpd_loo, found.p_loo)


@pytest.fixture(scope="module")
def y():
    generator = torch.Generator().manual_seed(1)
    effect = 1.0 + 0.8 * torch.randn(GROUPS, 1, generator=generator, dtype=torch.float64)
    return effect + 0.5 * torch.randn(GROUPS, VISITS, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def run(y):
    """A noisy run, and the estimates that the chain has accepted."""
    torch.set_default_dtype(torch.float64)
    kernel = phf.PseudoMarginalHMC(
        phf.marginalize(gaussian, ["effect"], num_particles=6, proposal="prior")
    )
    accepted = []
    advance = kernel.advance

    def watched(state):
        state, info = advance(state)
        accepted.append(state.evaluation.log_likelihoods["effect"])
        return state, info

    kernel.advance = watched
    mcmc = phf.MCMC(kernel, 250, 100, num_chains=4, seed=3, disable_progbar=True)
    mcmc.run(y)
    return mcmc, phf.to_inference_data(mcmc), torch.stack(accepted[-250:], 1).numpy()


def test_log_likelihoods_of_elements_are_those_of_the_closed_form(run, y):
    _, idata, accepted = run
    found, truth = idata.log_likelihood, exact(idata.posterior, y)
    assert found["y"].dims == ("chain", "draw", "group")
    error = found["y"].to_numpy() - truth
    assert found.attrs["log_likelihood_error"] <= WANTED_ERROR
    assert worst_element(found["y"], truth) < 1.3 * WANTED_ERROR
    assert abs(error.mean()) < 0.002
    # What the chain has accepted is far off, and too high.
    assert (accepted - truth).mean() > 0.1


def test_leaving_out_elements_needs_fresh_noise(run, y):
    _, idata, accepted = run
    true, true_count = loo(exact(idata.posterior, y))
    found, found_count = loo(idata.log_likelihood["y"].to_numpy())
    old, old_count = loo(accepted)
    assert abs(found - true) < 0.1
    assert abs(found_count - true_count) < 0.1
    assert old_count > 2 * true_count
    assert abs(old - true) > 2.0


def test_entries_repeat_themselves_and_leave_the_random_state_alone():
    marginal = phf.marginalize(poisson, ["x"], num_particles=3, proposal="prior")
    mcmc = phf.MCMC(phf.PseudoMarginalHMC(marginal), 20, 20, seed=0)
    mcmc.run(COUNTS.double())
    before = torch.get_rng_state()
    first, again = (phf.to_inference_data(mcmc).log_likelihood for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    xarray.testing.assert_identical(first, again)


def test_sampler_s_own_estimates_stay_among_its_statistics(run):
    mcmc, idata, accepted = run
    kept = idata.sample_stats["log_likelihood_estimate"]
    np.testing.assert_allclose(kept, accepted.reshape(4, 250, -1).sum(-1), rtol=1e-9)
    assert not hasattr(mcmc.draws, "log_likelihood")


def poisson(y):
    """Counts, whose likelihood is known by quadrature."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Poisson(x.exp()), obs=y)


COUNTS = torch.tensor([0.0, 1.0, 6.0, 2.0, 9.0])


def by_quadrature(mean):
    """Log densities of the counts, means in rows."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    x = torch.tensor(mean)[..., None, None] + torch.tensor(nodes)
    terms = dist.Poisson(x.exp()).log_prob(COUNTS[:, None].double())
    return (terms + torch.tensor(weights).log()).logsumexp(-1).numpy() - 0.5 * math.log(2 * math.pi)


def worst_element(found, truth):
    """The largest error of an element, as a root mean square over the draws."""
    return np.sqrt(np.square(found.to_numpy() - truth).mean((0, 1))).max()


@pytest.mark.slow
def test_errors_are_as_small_as_they_are_said_to_be(monkeypatch):
    """Over ten noises: draws kept for an error that is small by chance alone have a larger one."""
    marginal = phf.marginalize(poisson, ["x"], num_particles=3, proposal="prior")
    mcmc = phf.MCMC(phf.PseudoMarginalHMC(marginal), 30, 40, num_chains=2, seed=0)
    mcmc.run(COUNTS.double())
    first, errors, said = pointwise_module._STREAM, [], []
    for stream in range(10):
        monkeypatch.setattr(pointwise_module, "_STREAM", first + stream)
        found = phf.to_inference_data(mcmc)
        truth = by_quadrature(found.posterior["mean"].to_numpy())
        errors.append(worst_element(found.log_likelihood["y"], truth))
        said.append(found.log_likelihood.attrs["log_likelihood_error"])
    assert np.square(errors).mean() < 1.3**2 * np.square(said).mean()


@pytest.mark.parametrize(
    ("proposal", "points"),
    long_but(
        [("prior", "iid"), ("laplace", "rqmc")],
        itertools.product(["prior", "laplace"], ["iid", "rqmc"]),
    ),
)
def test_counts_agree_with_quadrature(proposal, points):
    marginal = phf.marginalize(poisson, ["x"], num_particles=4, proposal=proposal, points=points)
    mcmc = phf.MCMC(phf.PseudoMarginalHMC(marginal), 60, 40, num_chains=2, seed=0)
    mcmc.run(COUNTS.double())
    found = phf.to_inference_data(mcmc)
    truth = by_quadrature(found.posterior["mean"].to_numpy())
    assert worst_element(found.log_likelihood["y"], truth) < 1.3 * WANTED_ERROR


def one_vector(y):
    """Forty counts whose effects are one vector: one estimate of more coordinates than points."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1))
    pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)


def test_many_coordinates_are_averaged_from_more_points(monkeypatch):
    """And a few draws at a time, where noise is long; 1,024 points leave an error, and tell it."""
    monkeypatch.setattr("pyro_hamflow.results.pointwise._NUMBERS", 300_000)
    y = COUNTS.double().repeat(8)
    mcmc = phf.MCMC(phf.PseudoMarginalNUTS(phf.marginalize(one_vector, ["x"])), 30, 30, seed=0)
    with warnings.catch_warnings():  # such a short run has faults to tell of
        warnings.simplefilter("ignore")
        mcmc.run(y)
        found = phf.to_inference_data(mcmc)
    truth = 8 * by_quadrature(found.posterior["mean"].to_numpy()).sum(-1)
    error = np.square(found.log_likelihood["y"].to_numpy() - truth).mean() ** 0.5
    stated = found.log_likelihood.attrs["log_likelihood_error"]
    assert error < 1.5 * max(stated, WANTED_ERROR) and stated < 0.12


@pytest.mark.slow
def test_importance_samples_and_pyros_runner_get_fresh_estimates():
    marginal = phf.marginalize(poisson, ["x"], num_particles=3, proposal="prior")
    guide = phf.AutoNeuralHamiltonianFlow(marginal, hidden=(8, 8))
    drawn = phf.importance_sample(marginal, guide, COUNTS.double(), num_samples=500, seed=0)
    stock = pyro.infer.MCMC(phf.PseudoMarginalHMC(marginal), 30, 30, disable_progbar=True)
    stock.run(COUNTS.double())
    # Under a plain kernel the noise is a site like others.
    plain = phf.MCMC(phf.NUTS(marginal), 30, 60, num_chains=2, seed=0)
    plain.run(COUNTS.double())
    for result in (drawn, stock, plain):
        with warnings.catch_warnings():  # only pseudo-marginal kernels recover local sites
            warnings.filterwarnings("ignore", message=r"The posterior lacks \['x'\]")
            found = phf.to_inference_data(result)
        truth = by_quadrature(found.posterior["mean"].to_numpy())
        assert worst_element(found.log_likelihood["y"], truth) < 1.3 * WANTED_ERROR


def test_bad_proposals_are_told_with_the_error_that_is_reached(monkeypatch):
    monkeypatch.setattr("pyro_hamflow.results.pointwise.MOST_POINTS", 32)
    marginal = phf.marginalize(poisson, ["x"], num_particles=4, proposal="prior")
    mcmc = phf.MCMC(phf.PseudoMarginalHMC(marginal), 20, 20, seed=0)
    mcmc.run(COUNTS.double())
    with pytest.warns(RuntimeWarning, match=r"of \d of 5 elements have standard errors above 0.05"):
        idata = phf.to_inference_data(mcmc)
    assert idata.log_likelihood.attrs["log_likelihood_error"] > 0.05
    assert idata.log_likelihood.attrs["log_likelihood_points"] == 32
    phf.to_inference_data(mcmc, log_likelihood=False)  # nothing is asked, nothing is estimated


def by_hand(y):
    """An estimate from noise, written by hand: one entry for all."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.deterministic("double", 2 * scale)
    u = phf.noise("u", (64, 1))
    pyro.deterministic("x", scale * u)
    log_weights = dist.Normal(scale * u, 1.0).log_prob(y).sum(-1)
    pyro.factor("estimate", log_weights.logsumexp(0) - math.log(64))


def test_estimates_by_hand_are_averaged_too():
    y = torch.tensor([1.5], dtype=torch.float64)
    mcmc = phf.MCMC(phf.PseudoMarginalHMC(by_hand), 30, 30, num_chains=2, seed=0)
    mcmc.run(y)
    with pytest.warns(RuntimeWarning, match=r"The posterior lacks \['x'\]"):
        idata = phf.to_inference_data(mcmc)
    scale = torch.tensor(idata.posterior["scale"].to_numpy())
    truth = dist.Normal(0.0, (1 + scale**2).sqrt()).log_prob(y)
    assert worst_element(idata.log_likelihood["estimate"], truth.numpy()) < 1.3 * WANTED_ERROR
    np.testing.assert_allclose(idata.posterior["double"], 2 * scale)
    assert "x" not in idata.posterior


SUBJECT = torch.tensor([0, 0, 1, 2, 2, 2, 1])
CONTROL = torch.tensor([False, False, True, False, True, False, False])


def with_controls(y, z):
    """Rows of controls have no subject's effect; and a site of its own has none either."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("subject", 3):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
    with pyro.plate("row", 7):
        effect = torch.where(CONTROL, mean, x[SUBJECT])
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)
        pyro.sample("z", dist.Normal(2 * mean, 0.5), obs=z)


def test_rows_without_local_sites_are_exact_under_their_own_site_s_name():
    y = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64)
    mcmc = phf.MCMC(
        phf.PseudoMarginalHMC(phf.marginalize(with_controls, ["x"])), 20, 20, num_chains=2, seed=0
    )
    mcmc.run(y, y.flip(0))
    idata = phf.to_inference_data(mcmc)
    found, mean = idata.log_likelihood, torch.tensor(idata.posterior["mean"].to_numpy())[..., None]
    assert set(found) == {"y", "y_x", "z"}
    assert found["y"].dims == ("chain", "draw", "y_dim_0") and list(found["y_dim_0"]) == [2, 4]
    assert found["z"].dims == ("chain", "draw", "row")
    np.testing.assert_allclose(found["y"], dist.Normal(mean, 1.0).log_prob(y[CONTROL]), rtol=1e-9)
    np.testing.assert_allclose(
        found["z"], dist.Normal(2 * mean, 0.5).log_prob(y.flip(0)), rtol=1e-9
    )
    truth = []
    for subject in range(3):
        rows = y[(subject == SUBJECT) & ~CONTROL]
        covariance = torch.eye(len(rows)) + 1.0
        loc = mean.expand(*mean.shape[:-1], len(rows))
        truth.append(dist.MultivariateNormal(loc, covariance).log_prob(rows))
    assert found["y_x"].dims == ("chain", "draw", "subject")
    assert worst_element(found["y_x"], torch.stack(truth, -1).numpy()) < 1.3 * WANTED_ERROR


def long_format(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("subject", 3):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
    with pyro.plate("row", 7):
        pyro.sample("y", dist.Normal(x[SUBJECT], 1.0), obs=y)


def test_entries_of_long_data_are_those_of_subjects():
    y = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64)
    marginal = phf.marginalize(long_format, ["x"])
    mcmc = phf.MCMC(phf.PseudoMarginalHMC(marginal), 20, 20, num_chains=2, seed=0)
    mcmc.run(y)
    idata = phf.to_inference_data(mcmc)
    assert idata.log_likelihood["y"].dims == ("chain", "draw", "subject")
    assert idata.observed_data["y"].dims == ("row",)
    mean = torch.tensor(idata.posterior["mean"].to_numpy())
    truth = []
    for subject in range(3):
        rows = y[subject == SUBJECT]
        covariance = torch.eye(len(rows)) + 1.0
        loc = mean[..., None].expand(*mean.shape, len(rows))
        truth.append(dist.MultivariateNormal(loc, covariance).log_prob(rows))
    found = idata.log_likelihood["y"]
    assert worst_element(found, torch.stack(truth, -1).numpy()) < 1.3 * WANTED_ERROR
