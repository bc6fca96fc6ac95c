"""That warm-up finds scales and correlations, knows when it has not, and then goes on."""

from __future__ import annotations

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, MCMC, NUTS
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.metric import Metric, first_scales
from pyro_hamflow.mcmc.adaptation.watch import Watch
from pyro_hamflow.mcmc.adaptation.window import WarmUp
from pyro_hamflow.model.potential import Potential
from tests.helpers.kinds import long_but
from tests.helpers.outcomes import outcome


def normal(location, scale):
    def model():
        pyro.sample("x", dist.Normal(location, scale).to_event(1))

    return model


def equicorrelated(dimension, correlation):
    covariance = torch.full((dimension, dimension), correlation)
    covariance.fill_diagonal_(1.0)

    def model():
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(dimension), covariance))

    return model


def _agree(mcmc, mean, spread, site="x"):
    """Whether draws have these means and standard deviations, within 4 standard errors."""
    draws = mcmc.get_samples(group_by_chain=True)[site].numpy() / np.asarray(spread)
    draws = draws.reshape(2 * len(draws), -1, *draws.shape[2:])  # one chain is compared with itself
    data = arviz.convert_to_dataset({"x": draws, "square": (draws - mean / spread) ** 2})
    assert float(arviz.rhat(data).to_array().max()) < 1.02
    error = arviz.mcse(data)
    assert (abs(data["x"].mean(("chain", "draw")) - mean / spread) < 4.0 * error["x"]).all()
    assert (abs(data["square"].mean(("chain", "draw")) - 1.0) < 4.0 * error["square"]).all()


# --- the mass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
def test_metric_of_a_normal_needs_no_mixing(dense):
    """Positions that cover a thousandth of it, drifting, are enough; their covariance is not."""
    torch.manual_seed(0)
    scale = torch.logspace(-9, 9, 6)
    mixed = torch.randn(6, 6) @ torch.diag(torch.logspace(-1, 1, 6)) if dense else torch.eye(6)
    covariance = scale[:, None] * (mixed @ mixed.mT) * scale
    precision = (mixed @ mixed.mT).inverse() / torch.outer(scale, scale)
    metric = Metric(6, dense=dense)
    for i in range(30):
        z = (torch.randn(4, 6) + i) / 1e3 * scale
        metric.update(z, z @ precision)
    old = torch.eye(6) if dense else torch.ones(6)
    unit = torch.outer(scale, scale) if dense else scale.square()
    found = metric.inverse_mass(old) / unit
    wanted = (covariance if dense else covariance.diag()) / unit
    assert torch.allclose(found, wanted, rtol=1e-2, atol=1e-2)
    by_draws = metric.positions.inverse_mass(old) / unit
    assert not torch.allclose(by_draws, wanted, rtol=0.5)


def test_metric_of_few_positions_is_a_diagonal_or_what_it_was():
    torch.manual_seed(0)
    metric = Metric(20, dense=True)
    for _ in range(8):
        z = torch.randn(4, 20)
        metric.update(z, 4.0 * z)
    assert torch.allclose(metric.inverse_mass(torch.eye(20)), 0.25 * torch.eye(20))
    old = torch.eye(20) + 0.5
    assert torch.equal(metric.inverse_mass(old), old)


@pytest.mark.parametrize("dense", [False, True])
def test_coordinates_without_slope_or_movement_keep_their_mass(dense):
    torch.manual_seed(0)
    metric = Metric(3, dense=dense)
    for _ in range(20):
        z = torch.randn(4, 3)
        metric.update(z * torch.tensor([1.0, 0.0, 1.0]), z * torch.tensor([0.0, 1.0, 4.0]))
    old, expected = torch.tensor([7.0, 8.0, 9.0]), torch.tensor([7.0, 8.0, 0.25])
    if dense:
        old, expected = torch.diag(old), torch.diag(expected)
    assert torch.allclose(metric.inverse_mass(old), expected)


def test_moves_that_keep_no_gradient_leave_the_covariance():
    torch.manual_seed(0)
    metric = Metric(2, dense=True)
    for _ in range(200):
        z = torch.randn(4, 2)
        metric.update(z, torch.zeros(4, 2))
    old = torch.eye(2)
    assert torch.equal(metric.inverse_mass(old), metric.positions.inverse_mass(old))


def test_positions_without_finite_gradient_are_left_out():
    metric = Metric(1, dense=False)
    metric.update(torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [torch.inf]]))
    metric.update(torch.tensor([[3.0], [7.0]]), torch.tensor([[6.0], [torch.nan]]))
    assert metric.count == 1
    assert metric.inverse_mass(torch.ones(1)).tolist() == [0.5]


@pytest.mark.parametrize("chains", [1, 4])
@pytest.mark.parametrize("power", [4, 12])
def test_first_scales_are_those_of_a_normal(chains, power):
    """Wherever its mean."""
    torch.manual_seed(0)
    scale = torch.logspace(-power, power, 10)
    potential = Potential(normal(3.0 * scale + 1.0, scale))
    start = 4.0 * torch.rand(chains, 10) - 2.0
    found = first_scales(potential, start, start[:, :0]).sqrt() / scale
    assert ((found > 0.5) & (found < 2.0)).all()


# --- whole runs by all defaults -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("power", "chains"), long_but([(12, 1), (12, 4)], [(12, 1), (4, 4), (12, 4)])
)
def test_scales_apart_are_found_by_default(power, chains):
    scale = torch.logspace(-power, power, 10)
    kernel = NUTS(normal(torch.zeros(10), scale))
    mcmc = MCMC(kernel, 2400 // chains, num_chains=chains, seed=0)
    mcmc.run()
    _agree(mcmc, 0.0, scale.numpy())


@pytest.mark.slow
def test_more_than_a_hundred_parameters_are_no_less_right():
    mcmc = MCMC(NUTS(equicorrelated(150, 0.9)), 300, num_chains=4, seed=1)
    mcmc.run()
    draws = mcmc.draws.position
    assert (draws.std((0, 1)) - 1.0).abs().max() < 0.25
    assert (draws.mean(-1).std() - 0.9**0.5).abs() < 0.2
    assert arviz.rhat(draws.mean(-1).numpy()) < 1.02


YEARS = torch.arange(1952.0, 2014.0)


def temperatures():
    torch.manual_seed(0)
    return 9.3 + 0.02 * (YEARS - 1983.0) + 0.9 * torch.randn(62)


def line(y):
    """Years are not centred: level and slope are correlated by 0.99996."""
    alpha = pyro.sample("alpha", dist.Normal(9.3, 100.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 0.0333))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    pyro.sample("y", dist.Normal(alpha + beta * YEARS, sigma).to_event(1), obs=y)


def _line_by_quadrature(y):
    """Mean and standard deviation of each: a normal given sigma, whose density is on a grid."""
    design = torch.stack([torch.ones(62), YEARS], 1)
    prior_mean, prior_sd = torch.tensor([9.3, 0.0]), torch.tensor([100.0, 0.0333])
    grid = torch.linspace(0.5, 2.0, 1500)
    logs, means, squares = [], [], []
    for sigma in grid:
        precision = design.mT @ design / sigma**2 + torch.diag(prior_sd**-2)
        covariance = precision.inverse()
        mean = covariance @ (design.mT @ y / sigma**2 + prior_mean / prior_sd**2)
        rest = y - design @ mean
        log = -0.5 * (rest / sigma).square().sum() - 62.0 * sigma.log() - sigma**2 / 8.0
        log = log - 0.5 * ((mean - prior_mean) / prior_sd).square().sum()
        logs.append(log + 0.5 * covariance.logdet())
        means.append(mean)
        squares.append(covariance.diag() + mean**2)
    weight = torch.stack(logs).softmax(0)[:, None]
    mean = (weight * torch.stack(means)).sum(0)
    spread = ((weight * torch.stack(squares)).sum(0) - mean**2).sqrt()
    centre = (weight[:, 0] * grid).sum()
    width = ((weight[:, 0] * grid**2).sum() - centre**2).sqrt()
    return {
        "alpha": (mean[0], spread[0]),
        "beta": (mean[1], spread[1]),
        "sigma": (centre, width),
    }


@pytest.mark.parametrize("chains", long_but([4], [1, 4]))
def test_line_over_years_not_centred(chains):
    y = temperatures()
    mcmc = MCMC(NUTS(line), 1200 // chains, num_chains=chains, seed=2)
    mcmc.run(y)
    for site, (mean, spread) in _line_by_quadrature(y).items():
        _agree(mcmc, float(mean), float(spread), site)


# --- knowing whether it has converged ------------------------------------------------------------


@pytest.mark.parametrize("chains", [2, 5])
def test_rhat_is_arviz(chains):
    torch.manual_seed(0)
    draws = torch.randn(40, chains, 3) + torch.arange(chains)[:, None] * torch.tensor([0, 0.2, 1])
    watch = Watch(7, 40)
    for row in torch.cat([100.0 + torch.zeros(7, chains, 3), draws]):
        watch.update(row, outcome(row)[1], 0.1)
    expected = [arviz.rhat(draws[..., i].mT.numpy(), method="split") for i in range(3)]
    assert np.allclose(watch.rhat(), expected)


@pytest.mark.parametrize("fault", [None, "rhat", "stuck", "limit", "rises", "falls"])
def test_doubts(fault):
    torch.manual_seed(0)
    watch = Watch(0, 200)
    for i in range(200):
        position = torch.randn(4, 2)
        if fault == "rhat":
            position[2, 1] += 3.0
        if fault == "stuck":
            position[:, 0] = 1.0
        cut = torch.rand(4) < (0.5 if fault == "limit" else 0.01)
        size = 0.1 * {"rises": 1.03, "falls": 0.97}.get(fault, 1.0) ** i
        _, info = outcome(position, reached_max_treedepth=cut)
        watch.update(position, info, size)
    told = {
        None: [],
        "rhat": ["its draws disagree"],
        "stuck": ["its draws disagree"],
        "limit": ["of its trajectories reached `max_tree_depth`"],
        "rises": ["the step size still rises"],
        "falls": ["the step size still falls"],
    }[fault]
    doubts = watch.doubts()
    assert len(doubts) == len(told)
    assert all(part in doubt for part, doubt in zip(told, doubts, strict=True))


def _warmup(meet):
    """Warm-up of chains that are apart until this iteration."""
    torch.manual_seed(0)
    kinetic, apart = GaussianKinetic(torch.ones(1)), torch.tensor([[9.0], [-9.0]])
    warmup = WarmUp(
        0.5, kinetic, 200, target=0.8, adapt_step_size=True, adapt_mass=True, most_steps=700
    )
    count = 0
    while not warmup.finished:
        warmup.update(*outcome(torch.randn(2, 1) + (count < meet) * apart))
        count += 1
    return warmup, count


@pytest.mark.parametrize(("meet", "expected"), [(0, 200), (150, 400), (350, 700)])
def test_warmup_goes_on_until_chains_have_met(meet, expected):
    warmup, count = _warmup(meet)
    assert count == warmup.warmup_steps == expected
    assert warmup.has_gone_on == (expected > 200)
    assert warmup.doubts == []


def test_warmup_ends_at_its_limit():
    warmup, count = _warmup(10**6)
    assert count == 700
    assert "its draws disagree" in warmup.doubts[0]


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 100.0))
    pyro.factor("modes", torch.stack([-0.5 * (x - 30.0) ** 2, -0.5 * (x + 30.0) ** 2]).logsumexp(0))


@pytest.mark.parametrize("warmup_steps", [None, 30])
@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_length_of_warmup(warmup_steps, chain_method):
    """Chains in two modes never agree: to the limit by default, exactly as long as was asked."""
    seen = []
    start = {"x": torch.tensor([30.0, -30.0])}
    mcmc = MCMC(
        HMC(two_modes),
        5,
        warmup_steps,
        num_chains=2,
        initial_params=start,
        chain_method=chain_method,
        save_warmup=True,
        seed=0,
        hook_fn=lambda kernel, params, stage, i: seen.append((stage, i)),
        disable_progbar=True,
    )
    assert mcmc.warmup_steps == (warmup_steps or (400 if chain_method == "vectorized" else 700))
    mcmc.run()
    alone = chain_method == "sequential"
    expected = warmup_steps or (700 if alone else 1600)
    assert mcmc.warmup_steps == mcmc.warmup_draws.position.shape[1] == expected
    label = " [0]" if alone else ""
    stages = [(f"Warmup{label}", i) for i in range(expected)]
    assert seen[: expected + 1] == [*stages, (f"Sample{label}", 0)]
    gone_on = warmup_steps is None and not alone
    assert any("1600 iterations, its limit" in m for m in mcmc.messages) == gone_on
