"""Pyro's own guides, corrected as ours are."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions.transforms import planar
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)

from pyro_hamflow import (
    MCMC,
    AutoFlow,
    FlowMH,
    FlowNUTS,
    ForwardKL,
    SymmetrisedGuide,
    fit_guide,
    importance_sample,
    marginalize,
)
from pyro_hamflow.flows.pyro_guides import PyroGuide
from pyro_hamflow.mcmc.adaptation.flow_training import can_learn
from pyro_hamflow.model.potential import Potential
from tests.helpers.guided import Y, conjugate, evidence, mixed, posterior
from tests.helpers.targets import effects
from tests.helpers.zuko_flows import FLOWS


def in_parts(model):
    """Sites of two guides, whose order is not the model's."""
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(poutine.block(model, hide=["scale", "share"])))
    guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
    guide.append(AutoFlow(poutine.block(model, expose=["share"]), FLOWS["RealNVP"], start="prior"))
    return guide


def structured(model):
    """Each site given others, as well by a function that is not linear."""
    conditionals = {"scale": "normal", "share": "mvn", "x": "mvn"}
    dependencies = {"share": {"scale": torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Tanh())}}
    dependencies["x"] = {"scale": "linear", "share": "linear"}
    return AutoStructured(model, conditionals=conditionals, dependencies=dependencies)


GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[9], num_transforms=2),
    "AutoGuideList": in_parts,
    "AutoStructured": structured,
}


def shaken(guide, *args):
    guide(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return guide


@pytest.mark.parametrize("name", GUIDES)
def test_density_is_that_of_its_traces(name):
    """Sites in supports by Pyro, moved to the real line by hand."""
    guide = shaken(GUIDES[name](mixed), Y)
    potential, adapted = Potential(mixed, (Y,)), PyroGuide(guide)
    adapted.prepare(Y)
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(Y)
        expected = trace.log_prob_sum()
        values = {site.name: trace.nodes[site.name]["value"] for site in potential.sites}
        for site in potential.sites:
            free = site.transform.inv(values[site.name])
            expected = expected + site.transform.log_abs_det_jacobian(free, values[site.name]).sum()
        found = adapted.log_ratio(potential.flatten(values)[None])[0]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", GUIDES)
def test_density_of_draws_is_the_same_by_two_routes(name):
    adapted = PyroGuide(shaken(GUIDES[name](mixed), Y))
    adapted.prepare(Y)
    with torch.no_grad():
        position, log_density = adapted.draw(300)
        again = adapted.log_ratio(position.clone())
    torch.testing.assert_close(again, log_density, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDiagonalNormal", "AutoLaplaceApproximation"])
def test_the_posterior_itself_has_weights_alike(name):
    exact = posterior(Y)
    if name == "AutoLaplaceApproximation":
        guide = AutoLaplaceApproximation(conjugate)
        guide(Y)
        guide.loc.data.fill_(float(exact.mean))
    else:
        guide = GUIDES[name](conjugate)
        guide(Y)
        loc, scale = (
            (guide.locs.mean, guide.scales.mean)
            if name == "AutoNormal"
            else (guide.loc, guide.scale)
        )
        loc.data.fill_(float(exact.mean))
        (guide.scales if name == "AutoNormal" else guide).__setattr__(
            "mean" if name == "AutoNormal" else "scale", scale * 0 + exact.stddev
        )
    found = importance_sample(conjugate, guide, Y, num_samples=500, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 1e-6
    assert found.ess > 499.0 and found.pareto_k < 0.7 and found.log_evidence_error < 1e-6


# --- trained ------------------------------------------------------------------------------------


TRAINED = {
    "AutoNormal": AutoNormal,
    "AutoLowRankMultivariateNormal": partial(AutoLowRankMultivariateNormal, rank=1),
    "AutoStructured": partial(AutoStructured, conditionals="mvn", dependencies={}),
    "AutoGuideList": lambda model: _list_of(model, AutoMultivariateNormal(model)),
}


def _list_of(model, *parts):
    guide = AutoGuideList(model)
    for part in parts:
        guide.append(part)
    return guide


@pytest.mark.parametrize("name", TRAINED)
def test_training_finds_the_posterior(name):
    guide = TRAINED[name](conjugate)
    fit = fit_guide(conjugate, guide, Y, num_steps=300, learning_rate=0.05, seed=0)
    assert fit.num_skipped == 0
    found = importance_sample(conjugate, guide, Y, num_samples=2000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 1e-2 and found.ess > 1950.0


def test_guides_of_a_class_are_trained_apart():
    def shifted(y):
        conjugate(y - 5.0)

    first, second = AutoNormal(conjugate), AutoNormal(shifted)
    settings = {"num_steps": 200, "learning_rate": 0.05, "seed": 0}
    fit_guide(conjugate, first, Y, **settings)
    before = first.median()["mean"].clone()
    fit_guide(shifted, second, Y, **settings)
    assert torch.equal(first.median()["mean"], before)
    assert float(before - second.median()["mean"]) > 4.0
    assert not list(pyro.get_param_store().keys())


def test_training_follows_what_has_changed():
    adapted = PyroGuide(AutoNormal(conjugate))
    adapted.prepare(Y)
    with torch.no_grad():
        place = torch.zeros(1, 1)
        before = adapted.log_ratio(place)
        adapted.load_state_dict({k: v + 1.0 for k, v in adapted.state_dict().items()})
        assert abs(adapted.log_ratio(place) - before) > 1.0
    assert adapted.log_ratio(place).requires_grad


def test_what_can_learn():
    mirrored = SymmetrisedGuide(AutoNormal(conjugate), [dist.transforms.AffineTransform(0.0, -1.0)])
    mirrored.prepare(Y)
    assert can_learn(mirrored)
    listed = AutoGuideList(conjugate)
    listed.append(AutoLaplaceApproximation(conjugate))
    assert not can_learn(PyroGuide(listed))
    with pytest.raises(TypeError, match=r"`guide` AutoGuideList[\s\S]* nothing to train"):
        fit_guide(conjugate, listed, Y)


def test_the_mode_of_a_laplace_approximation_is_found():
    """The Gaussian about it is the posterior, as is the guide that Pyro makes of it."""
    guide, exact = AutoLaplaceApproximation(conjugate), posterior(Y)
    fit_guide(conjugate, guide, Y, num_steps=1500, learning_rate=0.05, disable_progbar=True)
    torch.testing.assert_close(guide.loc[0], exact.mean.reshape(()), rtol=0.0, atol=1e-4)
    for one in (guide, guide.laplace_approximation(Y)):
        found = importance_sample(conjugate, one, Y, num_samples=500, seed=0)
        assert abs(found.log_evidence - evidence(Y)) < 1e-4 and found.ess > 499.0
    fresh, draws = AutoLaplaceApproximation(conjugate), {"mean": torch.zeros(3)}
    with pytest.raises(
        ValueError, match="trains as a point .* then: expected the loss `ReverseKL`"
    ):
        fit_guide(conjugate, fresh, Y, loss=ForwardKL(draws), num_steps=2)


def test_noise_stays_at_its_prior():
    """0.8^2 + 0.6^2 = 1: the marginal model is the conjugate one."""
    model = marginalize(effects, ["x"], num_particles=4)
    with pytest.raises(ValueError, match=r"of the noise \['x_noise'\] too, .*hide=\['x_noise'\]"):
        fit_guide(model, AutoNormal(model), Y)
    guide = AutoNormal(poutine.block(model, hide=["x_noise"]))
    fit_guide(model, guide, Y, num_steps=300, learning_rate=0.05, seed=0)
    found = importance_sample(model, guide, Y, num_samples=10_000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 3 * found.log_evidence_error < 0.15


# --- in chains ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [FlowMH, FlowNUTS])
def test_chains_take_it(kernel):
    guide = AutoMultivariateNormal(conjugate, init_scale=1.5)
    settings = {} if kernel is FlowMH else {"adapt_flow": False}
    mcmc = MCMC(kernel(conjugate, guide, **settings), 1000, 50, disable_progbar=True)
    mcmc.run(Y)
    mean, exact = mcmc.get_samples()["mean"], posterior(Y)
    assert abs(mean.mean() - exact.mean) < 4 * exact.stddev / math.sqrt(300)


def test_a_map_without_an_inverse_gives_weights_alone():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(2))

    guide = AutoNormalizingFlow(model, planar)
    torch.manual_seed(0)
    found = importance_sample(model, guide, num_samples=4000, seed=0)
    truth = 2 * float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.0)))
    assert abs(found.log_evidence - truth) < 4 * found.log_evidence_error < 0.5
    with pytest.raises(ValueError, match="an AutoNormalizingFlow whose map has no inverse"):
        MCMC(FlowMH(model, guide), 10, 0, disable_progbar=True).run()


def test_guides_without_a_density_are_refused():
    in_list = AutoGuideList(mixed)
    in_list.append(AutoDelta(mixed))
    for guide in (AutoDelta(mixed), in_list):
        for refused in (lambda g: importance_sample(mixed, g, Y), lambda g: FlowMH(mixed, g)):
            with pytest.raises(TypeError, match="`guide` is an AutoDelta, whose density"):
                refused(guide)
    with pytest.raises(TypeError, match="`flow` is an AutoDelta, whose density"):
        FlowNUTS(mixed, AutoDelta(mixed))
    with pytest.raises(TypeError, match="a str: expected a DensityGuide"):
        FlowMH(mixed, "guide")


def test_sites_without_a_density_are_refused():
    for conditionals in ("delta", {"scale": "normal", "share": "delta", "x": "normal"}):
        guide = AutoStructured(mixed, conditionals=conditionals, dependencies={})
        with pytest.raises(TypeError, match="AutoStructured with sites whose density is not known"):
            importance_sample(mixed, guide, Y)


def test_a_mode_that_is_none_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wells", -((x.square() - 1.0) ** 2) * 9.0)  # begins at their top

    with pytest.raises(ValueError, match="curvature at the mode .* is not positive"):
        importance_sample(model, AutoLaplaceApproximation(model))


def test_guides_of_other_sites_are_refused():
    guide = AutoNormal(poutine.block(mixed, hide=["x"]))
    with pytest.raises(ValueError, match=r"draws positions of shape \(\d+, 3\): expected \(\d+, 8"):
        importance_sample(mixed, guide, Y)
