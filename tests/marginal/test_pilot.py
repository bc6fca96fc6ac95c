"""The pilot is where the marginal posterior is highest, known here without any estimate."""

from __future__ import annotations

import itertools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf
from pyro_hamflow.marginal import pilot as pilot_module
from pyro_hamflow.marginal.even_noise import _symmetric_points
from pyro_hamflow.marginal.other_modes import other_modes, told_of_modes
from pyro_hamflow.marginal.proposals.laplace import LaplaceProposal
from tests.helpers.kinds import long_but


def counts(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("subject", len(y), dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, s))
        with pyro.plate("visit", y.shape[1], dim=-1):
            rate = (beta[0] + beta[1] * x + u).exp()
            pyro.sample("y", dist.Poisson(rate), obs=y)


def count_data(level):
    x = torch.linspace(-1.0, 1.0, 30)[:, None]
    u = 0.6 * torch.randn(30, 1)
    return x, dist.Poisson((level + x + u).exp()).sample(torch.Size([4])).squeeze(-1).mT


def count_posterior(x, y):
    """Minus the log posterior of (beta, log s), by quadrature about each subject's own mode."""
    nodes = torch.linspace(-10.0, 10.0, 401)

    def potential(point):
        beta, log_s = point[:2], point[2]
        eta, s, total = beta[0] + beta[1] * x[:, 0], log_s.exp(), y.sum(1)
        u = torch.zeros(len(y))
        for _ in range(100):
            rate = y.shape[1] * (eta + u).exp()
            u = u + ((total - rate - u / s**2) / (rate + 1 / s**2)).clamp(-1.0, 1.0)
        width = (y.shape[1] * (eta + u).exp() + 1 / s**2).rsqrt()
        u, width = u.detach(), width.detach()
        at = u[:, None] + width[:, None] * nodes
        log_rate = eta[:, None] + at
        term = (y[:, None] * log_rate[..., None]).sum(-1) - y.shape[1] * log_rate.exp()
        joint = dist.Normal(0.0, s).log_prob(at) + term
        value = (joint.logsumexp(1) + width.log()).sum()
        prior = dist.Normal(0.0, 10.0).log_prob(beta).sum() + dist.HalfCauchy(1.0).log_prob(s)
        return -(value + prior + log_s)

    return potential


def distance_from_top(potential, point):
    """Of a point from the lowest potential, in posterior standard deviations, by Newton's step."""
    slope = torch.autograd.functional.jacobian(potential, point)
    curvature = torch.autograd.functional.hessian(potential, point)
    return float((slope @ torch.linalg.solve(curvature, slope)).sqrt())


@pytest.mark.parametrize(
    ("level", "seed"),  # some counts, and thousands
    long_but([(1.5, 1), (7.0, 0)], itertools.product([1.5, 7.0], [0, 1])),
)
def test_pilot_of_counts_is_the_top_by_quadrature(level, seed):
    pyro.set_rng_seed(seed)
    x, y = count_data(level)
    marginal = phf.marginalize(counts, ["u"])
    pilot = marginal.pilot((x, y), {})
    point = torch.cat([pilot["beta"], pilot["s"].log()[None]])
    assert distance_from_top(count_posterior(x, y), point) < 0.15
    assert marginal.prepared.distance < 0.1


@pytest.mark.parametrize("seed", long_but([1], [1, 2]))
def test_pilot_of_counts_in_single_precision_is_as_near(seed):
    """Slopes of counts of thousands are rounding there, and the search is made in double."""
    pyro.set_rng_seed(seed)
    x, y = count_data(9.0)
    before = torch.get_default_dtype()
    marginal = phf.marginalize(counts, ["u"])
    try:
        torch.set_default_dtype(torch.float32)
        pilot = marginal.pilot((x.float(), y.float()), {})
        assert {value.dtype for value in pilot.values()} == {torch.float32}
    finally:
        torch.set_default_dtype(before)
    point = torch.cat([pilot["beta"], pilot["s"].log()[None]]).double()
    assert distance_from_top(count_posterior(x, y), point) < 0.05
    assert marginal.prepared.distance < 0.1


@pytest.mark.parametrize("level", long_but([9.0], [7.0, 9.0]))
def test_rounding_is_told_where_the_model_runs_in_single_precision_alone(level):
    """Thousands leave the search near, and it says how near; of more it finds no way, and why."""

    def single_counts(x, y):
        if y.dtype == torch.float64:
            raise TypeError("single precision, please")
        counts(x, y)

    pyro.set_rng_seed(1)
    x, y = count_data(level)
    before = torch.get_default_dtype()
    marginal = phf.marginalize(single_counts, ["u"])
    try:
        torch.set_default_dtype(torch.float32)
        pilot = marginal.pilot((x.float(), y.float()), {})
    finally:
        torch.set_default_dtype(before)
    said, told = marginal.prepared.distance, marginal.prepared.remark
    if level > 8.0:
        assert said > 1.0
        assert "single precision, please" in told
    else:
        point = torch.cat([pilot["beta"], pilot["s"].log()[None]]).double()
        true = distance_from_top(count_posterior(x, y), point)
        assert 0.25 * true < said < 0.1
        assert true < 0.2
        assert told is None


def test_models_that_do_not_run_in_double_have_a_pilot():
    covariates = torch.randn(6, 2).float()

    def model(y):
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("subject", 6):
            u = pyro.sample("u", dist.Normal(covariates @ beta, 1.0))
            pyro.sample("y", dist.Normal(u, 1.0), obs=y)

    before = torch.get_default_dtype()
    marginal = phf.marginalize(model, ["u"])
    try:
        torch.set_default_dtype(torch.float32)
        pilot = marginal.pilot((torch.ones(6),), {})
    finally:
        torch.set_default_dtype(before)
    assert pilot["beta"].dtype == torch.float32
    assert marginal.prepared.distance < 0.1


@pytest.mark.parametrize(("proposal", "noise"), [("laplace", 0.01), ("prior", 1.0)])
def test_pilot_far_from_zero(proposal, noise):
    """Effects around 40, in one case known to a hundredth: the marginal has a closed form."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("subject", len(y), dim=-2):
            x = pyro.sample("x", dist.Normal(mean, s))
            with pyro.plate("visit", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(x, noise), obs=y)

    y = 40.0 + torch.randn(12, 1) + noise * torch.randn(12, 3)
    marginal = phf.marginalize(model, ["x"], proposal=proposal)
    pilot = marginal.pilot((y,), {})

    def potential(point):
        mean, log_s = point
        covariance = noise**2 * torch.eye(3) + (2 * log_s).exp()
        value = dist.MultivariateNormal(mean.expand(3), covariance).log_prob(y).sum()
        prior = dist.Normal(0.0, 10.0).log_prob(mean) + dist.Normal(0.0, 1.0).log_prob(log_s)
        return -value - prior

    point = torch.stack([pilot["mean"], pilot["s"].log()])
    assert distance_from_top(potential, point) < 0.5, pilot


@pytest.mark.parametrize("count", [2, 5, 6, 16, 33])
def test_points_of_the_search_have_a_normal_s_moments(count):
    points = _symmetric_points(count)
    torch.testing.assert_close(points, -points.flip(0))
    assert float(points.square().mean()) == pytest.approx(1.0)
    if count >= 8:
        assert float(points.pow(4).mean()) == pytest.approx(3.0)


def test_a_point_of_the_prior_near_a_mode_would_mislead(monkeypatch):
    """It came to rest a fifth of a posterior deviation off; now its own check tells of it."""
    pyro.set_rng_seed(0)
    x, y = count_data(7.0)
    monkeypatch.setattr(LaplaceProposal, "undefended", lambda self: self)
    marginal = phf.marginalize(counts, ["u"])
    pilot = marginal.pilot((x, y), {})
    point = torch.cat([pilot["beta"], pilot["s"].log()[None]])
    assert distance_from_top(count_posterior(x, y), point) > 0.1
    assert marginal.prepared.distance > 0.1


def test_rest_is_worth_a_little_height():
    """The estimate's slope is that of the posterior, and only nearly its own."""
    rested = pilot_module.Top(torch.zeros(1), 1.02, 0.01)
    stuck = pilot_module.Top(torch.ones(1), 1.0, 1.5)
    higher = pilot_module.Top(torch.ones(1), -1.0, 1.5)
    assert min([stuck, rested], key=pilot_module._height) is rested
    assert min([higher, rested], key=pilot_module._height) is higher


@pytest.mark.slow
def test_independent_points_would_not_do(monkeypatch):
    """Of effects that the data know well, the score's mean over such points is far off."""
    x, y = count_data(7.0)
    monkeypatch.setattr(pilot_module, "_STARTS", 1)
    monkeypatch.setattr(
        pilot_module, "even_noise", lambda plan, potential: potential.draw_noise(1)[0]
    )
    marginal = phf.marginalize(counts, ["u"])
    marginal.pilot((x, y), {})
    assert marginal.prepared.distance > 1.0


def test_model_without_parameters_needs_no_pilot():
    def model(y):
        with pyro.plate("subject", len(y)):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    assert phf.marginalize(model, ["x"]).pilot((torch.ones(3),), {}) == {}


def effects_with_error(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    error = pyro.sample("error", dist.HalfCauchy(1.0))
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(mean, s))
        with pyro.plate("visit", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(x, error), obs=y)


def test_search_ends_soon_where_the_density_has_no_bound(monkeypatch):
    """Of equal data: the error of an observation goes to zero, and the density to infinity."""
    evaluated, climb = [], pilot_module.climb

    def counted(gradient, start, **settings):
        return climb(lambda at: (evaluated.append(at), gradient(at))[1], start, **settings)

    monkeypatch.setattr(pilot_module, "climb", counted)
    marginal = phf.marginalize(effects_with_error, ["x"])
    kernel = phf.PseudoMarginalNUTS(marginal)
    mcmc = phf.MCMC(kernel, 5, 5, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(torch.full((10, 4), 2.0))
    assert len(evaluated) < 60  # of 550 that climbs without an end take
    assert any("no bound" in said and "'error'" in said for said in mcmc.messages)
    assert "did not come to rest" not in " ".join(mcmc.messages)
    assert 0.1 < float(marginal.prepared.pilot["error"]) < 10.0


def test_tiny_errors_are_found():
    """Scales of 1e-9 lie far from where the search begins, and this side of the end."""
    y = 2.0 + torch.randn(10, 1, dtype=torch.float64)
    y = y + 1e-9 * torch.randn(10, 4, dtype=torch.float64)
    marginal = phf.marginalize(effects_with_error, ["x"])
    pilot = marginal.pilot((y,), {})
    assert marginal.prepared.distance < 0.1 and marginal.prepared.remark is None
    within = float((y - y.mean(1, keepdim=True)).square().sum() / 30.0) ** 0.5
    assert abs(float(pilot["error"]) / within - 1.0) < 0.3


def level_and_log_variance(y):
    """Where steps are wide, the mode is a walk through all observations, without a variance."""
    s, q = pyro.sample("s", dist.HalfNormal(0.5)), pyro.sample("q", dist.HalfNormal(0.3))
    level, log_variance = pyro.sample("level_0", dist.Normal(0.0, 1.0)), None
    for t in range(len(y)):
        before = dist.Normal(log_variance, q) if t else dist.Normal(-1.0, 1.0)
        log_variance = pyro.sample(f"g_{t}", before)
        level = pyro.sample(f"level_{t}", dist.Normal(level, s)) if t else level
        pyro.sample(f"y_{t}", dist.Normal(level, (log_variance / 2).exp()), obs=y[t])


@pytest.mark.slow
def test_a_second_search_leaves_parameters_at_which_paths_are_missed():
    y = [-0.3, 0.3, 0.1, -1.7, 0.4, -1.0, -0.2, -1.7, -1.3, -0.7]
    y = torch.tensor([*y, -1.5, -0.8, -1.4, -1.2, -1.1, -1.5, -0.9, -0.5, -1.1, -2.1])
    marginal = phf.marginalize(level_and_log_variance, ["g", "level"])
    found = marginal.pilot((y,), {})
    assert found["q"] < 1.0
    assert marginal.proposal.remark is None


def squares(y, side):
    """Modes at the roots of 4; the prior's side is 55 times as dense."""
    root = pyro.sample("root", dist.Normal(float(side), 1.0))
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, 0.3))
        pyro.sample("y", dist.Normal(root**2 + x, 0.1), obs=y)


SQUARES = 4.0 + 0.3 * torch.tensor([-1.2, -0.4, 0.0, 0.4, 1.2], dtype=torch.float64)


@pytest.mark.parametrize("side", [-1, 1])
def test_the_higher_of_two_modes_is_taken(side):
    """Whichever is nearer to where a search begins."""
    pilot = phf.marginalize(squares, ["x"]).pilot((SQUARES, side), {})
    assert pilot["root"] * side > 1.9


def test_another_mode_is_told():
    """All chains start at the highest: no diagnostic could tell."""
    marginal = phf.marginalize(squares, ["x"])
    marginal.pilot((SQUARES, -1), {})
    assert marginal.prepared.remark is None
    said = told_of_modes(marginal.prepared.other_modes)
    ratio = float(re.search(r"another mode, whose top is (\S+) times as dense", said)[1])
    assert 0.5 < ratio * math.exp(4.0) < 2.0


def test_signs_of_loadings_are_other_modes_and_are_told_in_a_run():
    def model(y):
        loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("subject", len(y)):
            factor = pyro.sample("factor", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(factor[..., None] * loadings, 0.3).to_event(1), obs=y)

    y = torch.randn(30, 1) * torch.tensor([1.0, 0.8, -0.6]) + 0.3 * torch.randn(30, 3)
    kernel = phf.PseudoMarginalNUTS(phf.marginalize(model, ["factor"]))
    mcmc = phf.MCMC(kernel, 10, warmup_steps=10, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(y)
    assert any("another mode, whose top is 1 times as dense" in said for said in mcmc.messages)


def test_flat_ground_between_tops_makes_them_one():
    """Climbs of one mode may end apart."""

    def flat(position):
        beyond = (position.abs() - 1.0).clamp(min=0.0)
        return float(beyond.square().sum()), 2 * beyond * position.sign()

    def divided(position):
        value, slope = flat(position)
        return value + 5.0 * float(position[0].abs() < 0.5), slope

    tops = [pilot_module.Top(torch.tensor([x]), 0.0, 0.0) for x in (-0.9, 0.9)]
    assert other_modes(flat, tops[0], tops) == ()
    assert other_modes(divided, tops[0], tops) == (1.0,)
    assert other_modes(divided, tops[0]._replace(distance=2.0), tops) == ()


def test_a_climb_ends_where_a_step_leads_to_a_known_top():
    def bowl(position):
        return float((position.cosh() - 1.0).sum()), position.sinh()

    def climbed(tops):
        seen = []
        top = pilot_module.climb(
            lambda position: (seen.append(position), bowl(position))[1],
            torch.tensor([3.0, -2.0]),
            tops=tops,
        )
        return top, len(seen)

    first, number = climbed([])
    again, fewer = climbed([first])
    other, as_many = climbed([first._replace(position=torch.tensor([9.0, 9.0]))])
    assert again is first and fewer < number
    assert torch.equal(other.position, first.position) and as_many == number
