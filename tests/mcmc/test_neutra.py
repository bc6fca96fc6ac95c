"""Runs in the coordinates of a map: results are the model's own, and as exact as any."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
import zuko
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.reparam import NeuTraReparam
from torch.distributions import AffineTransform

from pyro_hamflow import (
    HMC,
    MCMC,
    NUTS,
    AutoFlow,
    AutoNeuralHamiltonianFlow,
    fit_guide,
    marginalize,
    to_inference_data,
)
from pyro_hamflow.flows.transports import as_transport
from pyro_hamflow.mcmc.adaptation import transport_learning
from tests.helpers.laws import LIMIT, scores
from tests.helpers.targets import effects
from tests.helpers.transports import funnel, funnel_draws, random_flow

Y = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def gamma_model(y):
    """Conjugate: the posterior of the rate is Gamma(2 + 3, 1 + sum y)."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


EXACT = dist.Gamma(5.0, 1.0 + float(Y.sum()))


def trained_guide(kind=AutoIAFNormal, model=gamma_model, args=(Y,), steps=150):
    guide = kind(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return guide


def assert_gamma(rate):
    """First and second moments, and both tails."""
    mean, variance = float(EXACT.mean), float(EXACT.variance)
    assert abs(scores(rate, mean)) < LIMIT
    assert abs(scores((rate - mean) ** 2, variance)) < LIMIT
    for edge in (0.5, 2.0):
        exact = torch.special.gammainc(torch.tensor(5.0), edge * EXACT.rate)
        assert abs(scores((rate < edge) * 1.0, float(exact))) < LIMIT


def run(kernel, *args, **settings):
    defaults = {"num_samples": 400, "warmup_steps": 100, "num_chains": 4, "seed": 1}
    mcmc = MCMC(kernel, **defaults | settings)
    mcmc.run(*args)
    return mcmc


@pytest.mark.parametrize(
    "kind", [AutoIAFNormal, AutoMultivariateNormal, AutoDiagonalNormal], ids=lambda k: k.__name__
)
def test_guides_of_pyro(kind):
    if kind is AutoIAFNormal:  # of two dimensions and more

        def model(y):
            gamma_model(y)
            pyro.sample("other", dist.Normal(0.0, 1.0))
    else:
        model = gamma_model
    mcmc = run(HMC(model, transport=trained_guide(kind, model)), Y)
    assert_gamma(mcmc.get_samples(group_by_chain=True)["rate"].numpy())


@pytest.mark.parametrize(
    "flow",
    [zuko.flows.MAF, pytest.param(zuko.flows.NSF, marks=pytest.mark.slow)],
    ids=lambda flow: flow.__name__,
)
def test_flows_of_zuko(flow):
    def model(y):
        gamma_model(y)
        pyro.sample("other", dist.Normal(0.0, 1.0))

    guide = AutoFlow(model, partial(flow, transforms=2, hidden_features=(8,)))
    fit_guide(model, guide, Y, num_steps=50, disable_progbar=True)
    mcmc = run(HMC(model, transport=guide), Y, num_samples=150, warmup_steps=60)
    assert_gamma(mcmc.get_samples(group_by_chain=True)["rate"].numpy())


@pytest.mark.parametrize("kernel", [HMC, NUTS])
def test_map_of_ones_own(kernel):
    """However bad it is; a torch transform is one too."""
    mcmc = run(kernel(gamma_model, transport=AffineTransform(0.7, -2.5)), Y)
    assert mcmc.kernel.transport.transform.loc == 0.7
    assert_gamma(mcmc.get_samples(group_by_chain=True)["rate"].numpy())


def test_results_are_the_models_own():
    """Statistics, log-likelihood and settings beside the draws."""
    mcmc = run(NUTS(gamma_model, transport=random_flow([1])), Y, num_samples=50, save_warmup=True)
    rate = mcmc.get_samples(group_by_chain=True)["rate"]
    log_density = dist.Gamma(2.0, 1.0).log_prob(rate) + rate.log()
    log_density = log_density + dist.Exponential(rate[..., None]).log_prob(Y).sum(-1)
    assert torch.allclose(mcmc.draws.stats["lp"], log_density, atol=1e-8)
    idata = to_inference_data(mcmc)
    expected = dist.Exponential(rate[..., None]).log_prob(Y)
    assert np.allclose(idata.log_likelihood["y"].values, expected)
    assert json.loads(idata.attrs["kernel_settings"])["transport"] == "TransportFlow"
    assert (idata.warmup_posterior["rate"].values > 0.0).all()


def test_starting_values_and_hooks():
    """Both are of positions, not of the map's coordinates."""
    seen = []
    start = torch.tensor([0.3, -0.4])
    mcmc = run(
        NUTS(gamma_model, step_size=1e-8, adapt_step_size=False, transport=random_flow([1])),
        Y,
        num_samples=1,
        warmup_steps=0,
        num_chains=2,
        initial_params={"rate": start},
        hook_fn=lambda kernel, params, stage, i: seen.append(params["rate"]),
    )
    assert torch.allclose(seen[0], start, atol=1e-3)
    assert torch.allclose(mcmc.get_samples()["rate"], start.exp(), atol=1e-3)


def test_in_pyros_runner():
    pyro.set_rng_seed(2)
    kernel = HMC(gamma_model, transport=random_flow([1]))
    mcmc = pyro.infer.MCMC(kernel, num_samples=500, warmup_steps=100, disable_progbar=True)
    mcmc.run(Y)
    assert_gamma(mcmc.get_samples(group_by_chain=True)["rate"].numpy())
    assert to_inference_data(mcmc).posterior["rate"].shape == (1, 500)


def short_run_of_funnel():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport_learning, "_STEPS", 50)
        patch.setattr(transport_learning, "_LAST_STEPS", 50)
        return run(NUTS(funnel, transport="flow"), num_samples=20, warmup_steps=60)


@pytest.fixture(scope="module")
def of_funnel():
    """A run whose map has been learned."""
    torch.set_default_dtype(torch.float64)
    return short_run_of_funnel()


def test_same_seed_same_draws(of_funnel):
    assert torch.equal(of_funnel.draws.position, short_run_of_funnel().draws.position)


def test_noise_is_not_transported():
    """Of a model with an estimated likelihood the parameters are; the posterior is normal."""
    y = torch.tensor([0.5, 1.5])
    marginal = marginalize(effects, ["x"], num_particles=4)
    mcmc = run(HMC(marginal, transport=random_flow([1])), y, num_samples=300)
    mean = mcmc.get_samples(group_by_chain=True)["mean"].numpy()
    precision = 0.25 + 2.0
    assert abs(scores(mean, 2.0 / precision)) < LIMIT
    assert abs(scores((mean - 2.0 / precision) ** 2, 1.0 / precision)) < LIMIT


def test_neutra_reparam():
    """Pyro's own way, by a model that samples in the guide's coordinates."""
    guide = trained_guide(AutoMultivariateNormal)
    neutra = NeuTraReparam(guide)
    mcmc = run(HMC(poutine.reparam(gamma_model, config=lambda _: neutra)), Y)
    (name,) = mcmc.get_samples()
    latent = mcmc.get_samples(group_by_chain=True)[name]
    rate = neutra.transform_sample(latent.flatten(0, 1))["rate"].reshape(latent.shape[:2])
    assert_gamma(rate.detach().numpy())


# --- maps that are learned ------------------------------------------------------------------------


@pytest.mark.slow
def test_learned_map_of_funnel():
    """Moments and tails of the scale, in few steps; plain coordinates need many."""
    mcmc = run(NUTS(lambda: funnel(4), transport="flow"), num_samples=1000, warmup_steps=200)
    log_scale = mcmc.get_samples(group_by_chain=True)["log_scale"].numpy()
    assert abs(scores(log_scale, 0.0)) < LIMIT
    assert abs(scores(log_scale**2, 1.0)) < LIMIT
    for sign in (-1.0, 1.0):
        assert abs(scores((sign * log_scale > 1.644854) * 1.0, 0.05)) < LIMIT
    assert mcmc.kernel.transport is not None
    assert mcmc.diagnostics()["log_scale"]["n_eff"] > 1500
    assert mcmc.draws.stats["n_steps"].double().mean() < 10
    straight, _ = mcmc.kernel.transport.inverse(funnel_draws(5000, 4))
    assert (straight.T.cov() - torch.eye(5)).abs().max() < 0.15


@pytest.mark.slow
def test_map_of_wide_funnel_takes_no_steps():
    """Least squares find it, though it lies about a line; its tails are reached."""

    def model():
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(3.0 * level, level.exp()).expand([5]).to_event(1))

    mcmc = run(NUTS(model, transport="flow"), num_samples=200)
    assert not any(layer.skew.any() for layer in mcmc.kernel.transport.layers[::7])
    level = mcmc.get_samples(group_by_chain=True)["level"].numpy()
    assert abs(scores(level, 0.0)) < LIMIT
    assert abs(scores(level**2, 4.0)) < LIMIT
    assert mcmc.diagnostics()["level"]["n_eff"] > 400


SPREAD = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])  # of eight schools
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def centred_schools():
    """Effects in the model's own coordinates: of small levels, they hardly move."""
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(mean, level.exp()))
        pyro.sample("y", dist.Normal(effect, SPREAD), obs=EFFECTS)


def level_probabilities(limits):
    """That the level lies below each, by quadrature; effects and mean integrated out."""
    level = torch.linspace(-14.0, 8.0, 4001).double()[:, None]
    variance = (2.0 * level).exp() + SPREAD.double() ** 2
    precision = 1.0 / variance
    total = precision.sum(-1) + 1.0 / 25.0
    fit = (precision * EFFECTS).sum(-1) ** 2 / total - (precision * EFFECTS**2).sum(-1)
    log_density = 0.5 * (fit + precision.log().sum(-1) - total.log()) - level[:, 0] ** 2 / 8.0
    share = (log_density - log_density.max()).exp()
    below = share.cumsum(0) / share.sum()
    return [float(below[(level[:, 0] < limit).sum() - 1]) for limit in limits]


@pytest.mark.slow
def test_neck_of_weak_effects_is_entered():
    """The centred form's neck has its share of the draws, and few of them diverge."""
    mcmc = run(NUTS(centred_schools, transport="flow"), num_samples=500, warmup_steps=150)
    assert mcmc.kernel.transport is not None
    level = mcmc.get_samples(group_by_chain=True)["level"].numpy()
    limits = [-4.0, -3.0, -2.0, 0.0, 2.0]
    for limit, probability in zip(limits, level_probabilities(limits), strict=True):
        assert abs(scores((level < limit) * 1.0, probability)) < LIMIT
    assert level.min() < -5.0  # as seven of a thousand draws should be
    assert mcmc.draws.stats["diverging"].sum() < 10
    locals_layer = mcmc.kernel.transport.layers[-2]
    logs = locals_layer.prior_slopes[8:] / mcmc.kernel.transport.scale[:2]
    assert torch.allclose(logs, torch.tensor([1.0, 0.0]).to(logs).expand(8, 2), atol=0.01)


def test_learned_map_is_frozen(of_funnel):
    """Draws follow the map that the last fit left."""
    kernel = of_funnel.kernel
    before = [part.clone() for part in kernel.transport.state_dict().values()]
    state = kernel.phase.transition.state_at(torch.zeros(4, 3), torch.zeros(4, 0))
    kernel.advance(state)
    after = kernel.transport.state_dict().values()
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert not any(part.requires_grad for part in kernel.transport.parameters())


def test_map_that_gains_nothing_is_dropped():
    def model():
        pyro.sample(
            "x", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.1, 3.0])).to_event(1)
        )

    mcmc = run(NUTS(model, transport="flow"), num_samples=100)
    assert mcmc.kernel.transport is None
    assert any("no map is followed: " in message for message in mcmc.messages)
    x = mcmc.get_samples(group_by_chain=True)["x"].numpy()
    assert (abs(scores(x, [1.0, -2.0])) < LIMIT).all()


def test_short_warmup_learns_nothing():
    mcmc = run(NUTS(funnel, transport="flow"), num_samples=10, warmup_steps=20)
    assert mcmc.kernel.transport is None
    assert any("no map is followed: maps are learned in 50" in m for m in mcmc.messages)


def test_learned_map_that_is_no_good(monkeypatch):
    """A map that was never trained is dropped, for it is no nearer to a normal density."""
    monkeypatch.setattr(transport_learning, "_STEPS", 1)
    monkeypatch.setattr(transport_learning, "_LAST_STEPS", 1)
    monkeypatch.setattr(transport_learning, "begin", lambda *points, **seen: None)
    mcmc = run(NUTS(funnel, transport="flow"), num_samples=10)
    assert mcmc.kernel.transport is None
    assert any("hardly nearer" in message for message in mcmc.messages)


# --- what is refused ------------------------------------------------------------------------------


def refused(transport, error, match):
    with pytest.raises(error, match=match):
        run(NUTS(gamma_model, transport=transport), Y, num_samples=1)


def test_refusals():
    refused("neural", ValueError, "`transport` is 'neural': expected")
    refused(AutoNeuralHamiltonianFlow(gamma_model), TypeError, "no map of positions alone")
    refused(AutoMultivariateNormal(gamma_model), ValueError, "has not been trained")
    refused(trained_guide(AutoNormal, steps=1), TypeError, "is a AutoNormal: expected a Transport")
    refused(trained_guide(AutoDelta, steps=1), TypeError, "is a AutoDelta: expected a Transport")
    refused(random_flow([2]), ValueError, "gives positions of shape")
    refused(3.0, TypeError, "`transport` is a float")


class Broken:
    """A map whose inverse is none, or whose log determinants have a shape of their own."""

    def __init__(self, factor, shape):
        self.factor, self.shape = factor, shape

    def forward(self, z):
        return 2.0 * z, z.new_zeros(self.shape)

    def inverse(self, x):
        return self.factor * x, x.new_zeros(self.shape)


def test_maps_that_are_none():
    with pytest.raises(ValueError, match="does not lead back"):
        as_transport(Broken(0.3, (2,)), Y, (), {})
    with pytest.raises(ValueError, match="gives log determinants of shape"):
        as_transport(Broken(0.5, (2, 3)), Y, (), {})
