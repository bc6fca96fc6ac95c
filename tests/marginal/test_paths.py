"""Latent paths: what is a path, exact estimates of Gaussian ones, unbiased ones of others."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_hamflow import MCMC, PseudoMarginalNUTS, marginalize, to_inference_data, whiten
from pyro_hamflow.marginal import path_bands, refit, settle
from pyro_hamflow.marginal.proposals.path import PathProposal
from pyro_hamflow.marginal.refit import refit_at
from pyro_hamflow.marginal.settle import repeated_estimates
from pyro_hamflow.mcmc.adaptation import estimator
from pyro_hamflow.mcmc.adaptation.spread_of_estimates import places_beyond, variance_at
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.model.potential import Potential
from tests.helpers.paths import (
    Autoregression,
    Y,
    filtered,
    kalman,
    one_by_one,
    parameters,
    returns,
    vector,
    volatility,
)

PILOT = {"phi": 0.8, "s": 0.5, "r": 0.6}
AT = {"phi": 0.5, "s": 0.3, "r": 0.9}


def at(values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def chain(y):
    phi, s, r = parameters()
    x = None
    for t in pyro.markov(range(len(y))):
        prior = dist.Normal(phi * x, s) if t else dist.Normal(0.0, s / (1 - phi**2).sqrt())
        x = pyro.sample(f"x_{t}", prior)
        pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


def dense_vector(y):
    phi, s, r = parameters()
    times = torch.arange(len(y))
    matrix = s**2 / (1 - phi**2) * phi ** (times[:, None] - times).abs()
    x = pyro.sample("x", dist.MultivariateNormal(y.new_zeros(len(y)), matrix))
    pyro.sample("y", dist.Normal(x, r).to_event(1), obs=y)


def steps_in_a_plate(y):
    phi, s, r = parameters()
    with pyro.plate("time", len(y)):
        step = pyro.sample("x", dist.Normal(y.new_zeros(()), s))
        pyro.sample("y", dist.Normal(step.cumsum(-1), r), obs=y)


def standard_steps(y):
    phi, s, r = parameters()
    step = pyro.sample("x", dist.Normal(y.new_zeros(len(y)), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(s * step.cumsum(-1), r).to_event(1), obs=y)


def levels_and_slopes(y):
    phi, s, r = parameters()
    level, slope = y.new_zeros(()), y.new_zeros(())
    for t in range(len(y)):
        level = pyro.sample(f"level_{t}", dist.Normal(level + slope, s))
        slope = pyro.sample(f"slope_{t}", dist.Normal(phi * slope, 0.1))
        pyro.sample(f"y_{t}", dist.Normal(level, r), obs=y[t])


def vectors_of_two_lengths(y):
    """The second begins a time later."""
    phi, s, r = parameters()
    x = pyro.sample("x", Autoregression(0.0, phi, s, len(y)))
    extra = pyro.sample("extra", dist.Normal(y.new_zeros(len(y) - 1), 0.5).to_event(1))
    mean = torch.cat([x[..., :1], x[..., 1:] + extra], -1)
    pyro.sample("y", dist.Normal(mean, r).to_event(1), obs=y)


def exact(model, y) -> Tensor:
    phi, s, r = AT.values()
    one = torch.ones(1, dtype=torch.float64)
    if model is vectors_of_two_lengths:
        times = torch.arange(len(y), dtype=torch.float64)
        matrix = s**2 / (1 - phi**2) * phi ** (times[:, None] - times).abs()
        own = torch.full_like(times, r**2 + 0.25).index_fill(0, torch.tensor(0), r**2)
        return dist.MultivariateNormal(torch.zeros_like(y), matrix + own.diag()).log_prob(y)
    if model in (steps_in_a_plate, standard_steps):
        return kalman(y, one_by_one(1.0), one_by_one(s**2), one_by_one(s**2), one, r)
    if model is levels_and_slopes:
        move = torch.tensor([[1.0, 1.0], [0.0, phi]], dtype=torch.float64)
        noise = torch.diag(torch.tensor([s**2, 0.01], dtype=torch.float64))
        return kalman(y, move, noise, noise, torch.tensor([1.0, 0.0]).double(), r)
    stationary = one_by_one(s**2 / (1 - phi**2))
    return kalman(y, one_by_one(phi), one_by_one(s**2), stationary, one, r)


FORMS = {
    "a loop of sites": (chain, ["x"], (2, 1)),
    "one vector": (vector, ["x"], (2, 1)),
    "a dense vector": (dense_vector, ["x"], (2, 1)),
    "steps in a plate": (steps_in_a_plate, ["x"], (2, 1)),
    "standard steps": (standard_steps, ["x"], (2, 1)),
    "two states": (levels_and_slopes, ["level", "slope"], (3, 1)),
    "vectors of two lengths": (vectors_of_two_lengths, ["x", "extra"], (3, 2)),
}


@pytest.mark.parametrize(("model", "sites", "widths"), FORMS.values(), ids=FORMS)
def test_one_particle_is_exact_where_all_is_gaussian(model, sites, widths):
    marginal = marginalize(model, sites, num_particles=1)
    marginal.fit(Y, pilot=at(PILOT))
    found = repeated_estimates(marginal, at(AT), 3, Arguments((Y,), {}))[:, 0]
    assert (found - exact(model, Y)).abs().max() < 1e-9
    (fit,) = marginal.proposal.fitted.values()
    assert fit.bands[1:] == widths


@pytest.mark.slow
def test_posterior_of_a_volatility_is_that_of_a_grid():
    y = returns(25)
    mcmc = MCMC(
        PseudoMarginalNUTS(marginalize(volatility, ["x"])),
        num_samples=400,
        num_chains=4,
        seed=0,
        disable_progbar=True,
    )
    mcmc.run(y)
    draws = mcmc.get_samples(group_by_chain=True)
    phi = torch.linspace(-0.99, 0.99, 24, dtype=torch.float64)
    s = torch.linspace(0.03, 3.0, 24, dtype=torch.float64)
    logs = torch.stack(
        [torch.stack([filtered(y, float(a), float(b), 121) for b in s]) for a in phi]
    )
    weights = (logs - 0.5 * s.square()).flatten().softmax(0).reshape(logs.shape)
    for name, grid, weight in (("phi", phi, weights.sum(1)), ("s", s, weights.sum(0))):
        for power in (1, 2):
            truth = float((weight * grid**power).sum())
            values = draws[name].double() ** power
            error = float(values.std()) / math.sqrt(float(arviz.ess(values.numpy())))
            assert abs(float(values.mean()) - truth) < 4 * error, (name, power)
    paths = to_inference_data(mcmc, log_likelihood=False).posterior["x"]
    assert paths.shape == (4, 400, 25)  # whole paths come back


@pytest.mark.parametrize("length", [2, 5, 12])
def test_a_few_states_of_which_a_density_alone_is_known_are_a_path(length):
    """They were asked for a transform of noise, which longer ones were not."""
    y, values = returns(length), at({"phi": 0.5, "s": 0.4})
    marginal = marginalize(volatility, ["x"], num_particles=64)
    marginal.fit(y, pilot=values)
    assert isinstance(marginal.proposal, PathProposal)
    found = repeated_estimates(marginal, values, 30, Arguments((y,), {}))[:, 0].exp()
    truth = math.exp(filtered(y, 0.5, 0.4))
    assert abs(float(found.mean()) - truth) < 4 * float(found.std()) / math.sqrt(30)


def test_states_that_a_parameter_parts_at_the_pilot_are_still_a_path():
    marginal = marginalize(vector, ["x"], num_particles=1)
    marginal.fit(Y, pilot=at(PILOT | {"phi": 0.0}))
    assert marginal.proposal.fitted["x"].bands.prior == 2


def panel(y, mask):
    phi, s, _ = parameters()
    with pyro.plate("series", len(y)):
        x = torch.zeros((), dtype=torch.float64)
        for t in range(y.shape[1]):
            with pyro.poutine.mask(mask=mask[:, t]):
                x = pyro.sample(f"x_{t}", dist.Normal(phi * x, s))
                pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[:, t])


def test_each_series_of_a_panel_is_one_estimate():
    y, lengths = torch.stack([Y, Y.flip(0), -Y])[:, :16], torch.tensor([16, 5, 9])
    marginal = marginalize(panel, ["x"], num_particles=1)
    data = y, torch.arange(16) < lengths[:, None]
    marginal.fit(*data, pilot=at(PILOT))
    found = repeated_estimates(marginal, at(AT), 1, Arguments(data, {}))[0]
    phi, s, _ = AT.values()
    one = torch.ones(1, dtype=torch.float64)
    exact = [
        kalman(row[:n], one_by_one(phi), one_by_one(s**2), one_by_one(s**2), one, 0.5)
        for row, n in zip(y, lengths.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(exact))


def squares(y):
    phi, s, _ = parameters()
    x = pyro.sample("x", Autoregression(0.0, phi, s, len(y)))
    pyro.sample("y", dist.Normal(x.square(), 0.3).to_event(1), obs=y)


def test_other_modes_of_a_path_are_told():
    marginal = marginalize(squares, ["x"])
    marginal.fit(Y.square(), pilot=at({"phi": 0.5, "s": 1.0, "r": 1.0}))
    assert "can lie about several modes" in marginal.proposal.remark
    marginal = marginalize(volatility, ["x"])
    marginal.fit(Y, pilot=at({"phi": 0.5, "s": 1.0}))
    assert marginal.proposal.remark is None


def noise_of_a_path(y):
    """Stan's way: each standard normal number is part of all later states."""
    phi, s, _ = parameters()
    noise = pyro.sample("noise", dist.Normal(y.new_zeros(len(y)), 1.0).to_event(1))
    x = [s * noise[..., 0]]
    for t in range(1, len(y)):
        x.append(phi * x[-1] + s * noise[..., t])
    path = torch.stack(x, -1)
    pyro.sample("y", dist.Normal(y.new_zeros(()), (path / 2).exp()).to_event(1), obs=y)


def test_noise_that_a_path_is_made_of_is_told():
    marginal = marginalize(noise_of_a_path, ["noise"], num_particles=1)
    marginal.fit(returns(40), pilot=at({"phi": 0.5, "s": 0.5, "r": 1.0}))
    assert "the 40 numbers of 'noise' meets all others" in marginal.proposal.remark
    marginal = marginalize(volatility, ["x"], num_particles=1)
    marginal.fit(returns(40), pilot=at({"phi": 0.5, "s": 0.5}))
    assert marginal.proposal.remark is None


def all_meet(y):
    _, s, r = parameters()
    mixing = torch.linspace(0.0, 3.0, len(y) ** 2, dtype=torch.float64).sin()
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.Normal(y.new_zeros(()), s))
        mean = mixing.reshape(len(y), -1) @ x.exp()
        pyro.sample("y", dist.Normal(mean, r), obs=y)


def reads_its_state(y):
    _, s, r = parameters()
    x = y.new_zeros(())
    for t in range(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(x if x > 0 else -x, s))
        pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


def masked_in_the_middle(y):
    _, s, r = parameters()
    x = y.new_zeros(())
    for t in range(len(y)):
        with pyro.poutine.mask(mask=torch.tensor(t != 3)):
            x = pyro.sample(f"x_{t}", dist.Normal(x, s))
            pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (all_meet, "'subject' are not independent .* no path"),
        (reads_its_state, "'x_0' cannot be"),
        (masked_in_the_middle, "site 'x_3' is masked: 1 of its 1 values have no prior"),
    ],
)
def test_what_is_no_path_is_refused(model, match):
    with pytest.raises(ValueError, match=match):
        marginalize(model, ["x"]).fit(Y, pilot=at(PILOT))


def all_meet_in_a_vector(y):
    mixing = torch.linspace(0.0, 3.0, len(y) ** 2, dtype=torch.float64).sin()
    x = pyro.sample("x", dist.Normal(y.new_zeros(len(y)), 1.0).to_event(1))
    mean = mixing.reshape(len(y), -1) @ x.exp()
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def all_meet_in_a_loop(y):
    """Each state depends on all before it."""
    before = []
    for t in range(len(y)):
        mean = sum((math.sin(t * k) * x.tanh() for k, x in enumerate(before)), y.new_zeros(()))
        before.append(pyro.sample(f"x_{t}", dist.Normal(mean, 1.0)))
        pyro.sample(f"y_{t}", dist.Normal(before[-1], 1.0), obs=y[t])


@pytest.mark.parametrize(
    ("model", "sites"),
    [
        (all_meet_in_a_vector, "site 'x'"),
        pytest.param(all_meet_in_a_loop, "sites 'x_0' to 'x_19'", marks=pytest.mark.slow),
    ],
)
def test_a_path_without_order_may_not_be_long(model, sites, monkeypatch):
    monkeypatch.setattr(path_bands, "_LONGEST", 10)
    with pytest.raises(ValueError, match=f"20 numbers of {sites} depend on each other without"):
        marginalize(model, ["x"]).fit(Y, pilot={})


@pytest.mark.parametrize("transformed", [marginalize, whiten])
def test_it_is_said_before_sampling_how_long_many_numbers_without_bands_take(
    transformed, monkeypatch
):
    monkeypatch.setattr(path_bands, "_COSTLY", 20)
    places = torch.linspace(0.0, 3.0, 20, dtype=torch.float64).sin()
    kernel = (-(places[:, None] - places).abs()).exp() + 0.1 * torch.eye(20).double()

    def model(y, covariance):
        x = pyro.sample("x", dist.MultivariateNormal(torch.zeros_like(places), covariance))
        pyro.sample("y", dist.Bernoulli(logits=x[: len(y)]).to_event(1), obs=y)

    y = torch.ones(20, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="20 numbers of site 'x' .* cube .* inducing points"):
        transformed(model, ["x"])(y, kernel)
    monkeypatch.setattr(path_bands, "_COSTLY", 21)
    transformed(model, ["x"])(y, kernel)


def test_warm_up_takes_a_proposal_that_follows_more_closely(monkeypatch):
    y = returns(200)
    pilot, away = at({"phi": 0.5, "s": 1.2}), at({"phi": 0.97, "s": 0.15})  # as chains may arrive
    marginal = marginalize(volatility, ["x"], num_particles=1)
    marginal.fit(y, pilot=pilot)
    data = Arguments((y,), {})
    found = refit_at(marginal, pilot, [away], data)
    assert found is not None and found.proposal.steps == 1
    before, after = (repeated_estimates(m, away, 60, data).var() for m in (marginal, found))
    assert after < 0.5 * before
    monkeypatch.setattr(PathProposal, "closer", lambda proposal: None)
    assert refit_at(marginal, pilot, [away], data) is None


@pytest.mark.parametrize(
    ("variances", "steps"),
    [((4.0, 3.0, 2.2), None), ((60.0, 50.0, 0.5), 2), ((30.0, 0.4, 0.3), 1)],
)
def test_a_proposal_that_follows_more_closely_is_worth_its_time(variances, steps, monkeypatch):
    """A step takes twice the time, two do four times."""
    y = returns(100)
    marginal = marginalize(volatility, ["x"], num_particles=1)
    marginal.fit(y, pilot=at({"phi": 0.95, "s": 0.2}))
    places = [at({"phi": phi, "s": 0.2}) for phi in (0.9, 0.95)]

    def look(model, parameters, data):
        return SimpleNamespace(variance=lambda count: variances[model.proposal.steps])

    monkeypatch.setattr(refit, "look", look)
    found = refit_at(marginal, places[1], places, Arguments((y,), {}), beyond=True)
    assert (found and found.proposal.steps) == steps


def test_particles_beyond_the_chains_are_as_many_as_before(monkeypatch):
    """Far more for a closer proposal would be taken back by the next look: programs made twice."""
    marginal = marginalize(volatility, ["x"])
    marginal.fit(returns(100), pilot=at({"phi": 0.95, "s": 0.2}))
    marginal.settle(2)
    places = [at({"phi": phi, "s": 0.2}) for phi in (0.9, 0.95)]

    def look(model, parameters, data):
        return SimpleNamespace(variance=lambda count: 60.0 if model.proposal.steps == 0 else 0.5)

    monkeypatch.setattr(refit, "look", look)
    found = refit_at(marginal, places[1], places, Arguments((returns(100),), {}), beyond=True)
    assert (found.proposal.steps, found.settled_particles) == (1, 2)


@pytest.mark.parametrize(
    ("variances", "moves", "count"),
    [
        ((3.6, 2.1, 1.2, 0.9), True, 2),
        ((3.6, 2.1, 1.2, 0.9), False, 8),
        ((2.9, 1.4, 0.7), True, 1),
        ((2.9, 1.4, 0.7), False, 4),
        ((90.0, 60.0, 40.0, 30.0, 20.0), True, None),
    ],
)
def test_fewer_particles_do_where_the_noise_of_a_path_moves(variances, moves, count, monkeypatch):
    y, pilot = returns(100), at({"phi": 0.95, "s": 0.2})
    marginal = marginalize(volatility, ["x"])
    marginal.fit(y, pilot=pilot)

    def estimates(model, parameters, number, data):
        variance = variances[int(math.log2(model.settled_particles))]
        ends = torch.tensor([-1.0, 1.0]).repeat(50)
        return (ends * math.sqrt(0.99 * variance))[:, None]

    monkeypatch.setattr(settle, "repeated_estimates", estimates)
    settle.settle_particles(marginal, Arguments((y,), {}), moves=moves)
    assert marginal.settled_particles == count


def test_what_chains_do_not_reach_is_not_looked_at():
    y = returns(100, 0.97, 0.2)
    marginal = marginalize(volatility, ["x"], num_particles=1)
    marginal.fit(y, pilot=at({"phi": 0.95, "s": 0.2}))
    potential = Potential(marginal, (y,), separate_noise=True)
    centre = potential.flatten(at({"phi": 0.95, "s": 0.2}))
    sides = torch.tensor([[0.1, 0.1], [0.1, -0.1], [20.0, 0.0]]).to(centre)
    torch.manual_seed(0)
    places, variances = places_beyond(potential, centre + sides, centre)
    assert len(places) == len(variances) == 4  # of six
    assert float((places - centre).abs().max()) < 1.0


def intensity(x, y):
    """Counts along a line, by a process whose noise is the site."""
    one = torch.ones((), dtype=torch.float64)
    length = pyro.sample("length", dist.InverseGamma(3.0 * one, 3.0))
    height = pyro.sample("height", dist.HalfNormal(one))
    z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    kernel = height**2 * (-0.5 * ((x[:, None] - x) / length).square()).exp()
    root = torch.linalg.cholesky(kernel + 1e-6 * torch.eye(len(x)).to(x))
    pyro.sample("y", dist.Poisson((1.0 + root @ z).exp()).to_event(1), obs=y)


@pytest.fixture
def tuned():
    """An estimate of counts along a line, its tuning, and where chains are."""
    x = torch.linspace(0.0, 5.0, 30, dtype=torch.float64)
    data = x, (1.0 + (2.0 * x).sin()).exp().round()
    marginal = marginalize(intensity, ["z"], num_particles=1)
    marginal.fit(*data, pilot=at({"length": 1.0, "height": 1.2}))
    kernel = PseudoMarginalNUTS(marginal)
    kernel.prepare(data, {})
    tuning, potential = kernel._hamiltonian.estimator, kernel.source.potential
    tuning.start_over(kernel.source, kernel.plan, kernel._engine)
    places = [{"length": 0.9 * math.exp(side), "height": 0.9} for side in (-0.4, 0.4)]
    state = SimpleNamespace(position=torch.stack([potential.flatten(at(v)) for v in places * 2]))
    torch.manual_seed(0)
    return marginal, tuning, state


def test_warm_up_looks_beyond_the_chains(tuned, monkeypatch):
    """Estimates are quiet where chains are; those that are not hardly ever let them go there."""
    marginal, tuning, state = tuned
    assert variance_at(tuning.source.potential, state.position) < 1.0
    monkeypatch.setattr(PathProposal, "fades", False)
    tuning.note(state)
    assert tuning.retuned(state) is None
    monkeypatch.undo()
    tuning.note(state)
    assert tuning.retuned(state) is not None
    assert marginal.proposal.steps == 2


def test_what_was_not_worth_it_is_tried_again_where_it_matters_more(tuned, monkeypatch):
    """Each window of warm-up fitted all proposals anew: 14 of 25 CPU seconds for 2,000 returns."""
    _, tuning, state = tuned
    tries, variance = [], 4.0

    def beyond(potential, position, centre):
        return position, torch.full((len(position),), variance)

    def refit(*given, **settings):
        tries.append(variance)

    monkeypatch.setattr(estimator, "places_beyond", beyond)
    monkeypatch.setattr(estimator, "refit_at", refit)
    for variance in (4.0, 3.5, 5.9, 6.1, 8.0):  # noqa: B007  # the function above reads it
        tuning.note(state)
        assert tuning.retuned(state) is None
    assert tries == [4.0, 6.1]


def test_many_estimates_at_once_are_those_of_one_after_the_other(tuned):
    _, tuning, state = tuned
    potential = tuning.source.potential
    torch.manual_seed(0)
    found = variance_at(potential, state.position)
    torch.manual_seed(0)
    draws = [potential.value(state.position, potential.draw_noise(4)) for _ in range(32)]
    expected = torch.stack(draws).var(0).median()
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


def test_a_fit_that_is_no_number_where_a_chain_is_is_not_kept(tuned, monkeypatch):
    """A mode that follows the parameters may be carried off where they are far from the fit."""
    marginal, tuning, state = tuned
    before = marginal.prepared

    def spoilt(model, *given, **settings):
        (name, fit), *_ = model.proposal.fitted.items()
        candidate = copy.copy(model)
        lost = replace(fit, mode=torch.full_like(fit.mode, math.nan))
        candidate.take(replace(model.proposal, fitted={name: lost}))
        return candidate

    monkeypatch.setattr(estimator, "refit_at", spoilt)
    monkeypatch.setattr(estimator, "wanted_variance", lambda *given, **settings: 0.0)
    tuning.note(state)
    potential, position, noise = tuning.retuned(state)
    assert marginal.prepared is before
    assert torch.equal(position, state.position)
    assert bool(potential.value(position, noise).isfinite().all())


def process(y):
    length = pyro.sample("length", dist.LogNormal(torch.zeros((), dtype=y.dtype), 0.5))
    x = torch.linspace(0.0, 5.0, len(y), dtype=y.dtype)
    kernel = (-0.5 * ((x[:, None] - x) / length).square()).exp()
    kernel = kernel + 1e-6 * torch.eye(len(y), dtype=y.dtype)
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros_like(y), kernel))
    pyro.sample("y", dist.Bernoulli(logits=f).to_event(1), obs=y)


def test_short_paths_and_noisy_ones_have_another_way():
    marginal = marginalize(volatility, ["x"], num_particles=1)
    marginal.fit(Y, pilot=at({"phi": 0.5, "s": 1.0}))
    said = marginal.proposal.alternative(marginal.sites, 0.1)
    assert said is not None and "['x'] is short: `NUTS(whiten(model, ['x']))`" in said
    marginal.fit(returns(120), pilot=at({"phi": 0.5, "s": 1.0}))
    assert marginal.proposal.alternative(marginal.sites, 0.1) is None
    assert "variance 5:" in str(marginal.proposal.alternative(marginal.sites, 5.0))
    marginal = marginalize(vector, ["x"])
    marginal.fit(Y, pilot=at(PILOT))
    assert marginal.proposal.alternative(marginal.sites, 0.0) is None  # one particle is exact
    marginal = marginalize(process, ["f"], num_particles=1)
    marginal.fit(Y.repeat(6).sign().clamp(min=0.0), pilot=at({"length": 1.0}))
    said = marginal.proposal.alternative(marginal.sites, 0.1)
    assert "has no bands: `NUTS(whiten(model, ['f']))`" in str(said)  # at 120 places, too


@pytest.mark.parametrize("length", [500, 2000])
def test_four_particles_are_enough_for_long_paths(length):
    """At parameters about two posterior deviations to either side, too."""
    y, settled = returns(length, 0.97, 0.2), {"phi": 0.97, "s": 0.2}
    marginal = marginalize(volatility, ["x"], num_particles=4)
    marginal.fit(y, pilot=at(settled))
    for values in (settled, {"phi": 0.96, "s": 0.23}, {"phi": 0.98, "s": 0.17}):
        found = repeated_estimates(marginal, at(values), 60, Arguments((y,), {}))
        assert found.var() < 1.0


def path_beside_effects(y, z):
    phi, s, r = parameters()
    x = pyro.sample("x", Autoregression(0.0, phi, s, len(y)))
    pyro.sample("y", dist.Normal(x, r).to_event(1), obs=y)
    with pyro.plate("group", len(z)):
        effect = pyro.sample("effect", dist.Normal(y.new_zeros(()), s))
        pyro.sample("z", dist.Normal(effect, r), obs=z)


def test_a_path_may_stand_beside_single_numbers():
    """Each group's elements are paths then, of one number where they have no more."""
    z = torch.tensor([0.3, -1.0, 0.6]).double()
    marginal = marginalize(path_beside_effects, ["x", "effect"], num_particles=1)
    marginal.fit(Y, z, pilot=at(PILOT))
    found = repeated_estimates(marginal, at(AT), 2, Arguments((Y, z), {})).sum(-1)
    spread = (AT["s"] ** 2 + AT["r"] ** 2) ** 0.5
    expected = exact(vector, Y) + dist.Normal(0.0, spread).log_prob(z).sum()
    assert (found - expected).abs().max() < 1e-9


def large_counts(y):
    _, s, _ = parameters()
    x = y.new_zeros(())
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, s))
        pyro.sample(f"y_{t}", dist.Poisson(x.exp()), obs=y[t])


def test_rounding_of_large_terms_is_no_band():
    """That of counts of millions, far from where they are likely, is more than the curvature."""
    marginal = marginalize(large_counts, ["x"], num_particles=1)
    marginal.fit(1e7 + 1e4 * torch.arange(18.0).double(), pilot=at(PILOT | {"s": 2.5}))
    (fit,) = marginal.proposal.fitted.values()
    assert fit.bands[1:] == (2, 1)


def test_pairs_of_opposite_noise_vary_less():
    """What is odd in the noise, as skewness is, cancels."""
    y, settled = returns(500, 0.97, 0.2), at({"phi": 0.97, "s": 0.2})
    variance = {}
    for points in ("iid", "antithetic"):
        marginal = marginalize(volatility, ["x"], num_particles=2, points=points)
        marginal.fit(y, pilot=settled)
        variance[points] = repeated_estimates(marginal, settled, 120, Arguments((y,), {})).var()
    assert variance["antithetic"] < 0.7 * variance["iid"]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_loops_have_the_name_of_long_ones(length):
    marginal = marginalize(chain, ["x"], num_particles=1)
    (group,) = marginal.plan(Y[:length]).structure.groups
    assert group.sites == tuple(f"x_{t}" for t in range(length))


def walk(y):
    """A random walk whose start is a parameter that the likelihood reads."""
    one = torch.ones((), dtype=torch.float64)
    start = pyro.sample("start", dist.Normal(0.0 * one, 3.0))
    s = pyro.sample("s", dist.HalfNormal(one))
    with pyro.plate("time", len(y)):
        step = pyro.sample("step", dist.Normal(0.0 * one, s))
        pyro.sample("y", dist.Normal(0.0 * one, ((start + step.cumsum(-1)) / 2).exp()), obs=y)


def test_a_likelihood_that_reads_parameters_is_followed_from_the_pilot_on():
    """Else chains, which move with the noise held, would not leave it: nothing tells them there."""
    y = returns(200, 0.97, 0.2)
    marginal = marginalize(walk, ["step"], num_particles=1)
    marginal.fit(y, pilot=at({"start": 0.0, "s": 0.15}))
    assert marginal.proposal.steps == 0  # as few as it was made with
    for start in (-0.8, 0.8):
        values = at({"start": start, "s": 0.15})
        assert repeated_estimates(marginal, values, 60, Arguments((y,), {})).var() < 1.0


def test_many_estimates_run_the_model_a_few_times_and_are_the_same(monkeypatch):
    runs = []

    def model(y):
        runs.append(1)
        chain(y)

    marginal = marginalize(model, ["x"], num_particles=2)
    marginal.fit(Y, pilot=at(PILOT))
    found = []
    for least in (20, 100):
        monkeypatch.setattr(settle, "_CAPTURED", least)
        torch.manual_seed(0)
        runs.clear()
        found.append(repeated_estimates(marginal, at(AT), 40, Arguments((Y,), {})))
        assert (len(runs) < 10) == (least == 20)
    torch.testing.assert_close(*found)


def test_sites_that_meet_all_before_them_are_told_of(monkeypatch):
    """They count as one vector, which a user of a loop does not expect."""
    monkeypatch.setattr(path_bands, "_MANY_SITES", 8)
    y = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64)

    def remembering(y):
        scale = pyro.sample("s", dist.HalfNormal(y.new_ones(())))
        past = [y.new_zeros(())]
        for t in range(len(y)):
            ages = torch.arange(1.0, len(past) + 1.0).to(y)
            mean = (torch.stack(past[::-1]) / ages**2).sum()
            past.append(pyro.sample(f"x_{t}", dist.Normal(mean, scale)))
            pyro.sample(f"y_{t}", dist.Normal(past[-1], 1.0), obs=y[t])

    marginal = marginalize(remembering, [f"x_{t}" for t in range(len(y))])
    with pytest.warns(RuntimeWarning, match="sites 'x_0' to 'x_11' depend on each other without"):
        marginal.fit(y, pilot=at({"s": 1.0}))
