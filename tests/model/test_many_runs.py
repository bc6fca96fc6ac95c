"""Many runs of what draws random numbers, made as one, draw from the same distributions."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_hamflow.model.many_runs import many_runs

RUNS = 4000


@pytest.mark.parametrize(
    ("distribution", "cdf"),
    [
        (dist.HalfCauchy(2.0), stats.halfcauchy(scale=2.0).cdf),
        (dist.StudentT(3.0, 1.0, 2.0), stats.t(3.0, 1.0, 2.0).cdf),
        (dist.Exponential(0.5), stats.expon(scale=2.0).cdf),
        (dist.Laplace(1.0, 2.0), stats.laplace(1.0, 2.0).cdf),
        (dist.Gamma(2.0, 3.0), stats.gamma(2.0, scale=1 / 3.0).cdf),
        (dist.Normal(1.0, 2.0), stats.norm(1.0, 2.0).cdf),
        (dist.Beta(2.0, 3.0), stats.beta(2.0, 3.0).cdf),
    ],
)
def test_runs_draw_apart(distribution, cdf):
    torch.manual_seed(0)
    found = many_runs(lambda: distribution.sample((2,)), RUNS, torch.zeros(()))
    assert found.shape == (RUNS, 2)
    assert found.unique().numel() > 0.99 * found.numel()
    assert stats.kstest(found.flatten().numpy(), cdf).pvalue > 1e-3
    assert abs(stats.spearmanr(found[:, 0], found[:, 1]).statistic) < 4.0 / RUNS**0.5


def test_dirichlet_and_lkj_are_drawn_at_once():
    """Torch draws them by a function that has no batches: such priors were drawn one by one."""

    def run():
        shares = dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).sample()
        return shares, dist.LKJCholesky(2, 2.0).sample()[1, 0]

    torch.manual_seed(0)
    shares, correlation = many_runs(run, RUNS, torch.zeros(()))
    assert stats.kstest(shares[:, 0].numpy(), stats.beta(1.0, 5.0).cdf).pvalue > 1e-3
    assert stats.kstest((0.5 + 0.5 * correlation).numpy(), stats.beta(2.0, 2.0).cdf).pvalue > 1e-3
    concentration = torch.ones(2, requires_grad=True)
    dist.Dirichlet(concentration).rsample()[0].backward()  # torch's own again, with its gradient
    assert concentration.grad is not None


def test_what_is_filled_in_place_is_what_was_filled():
    """Also where the function does not look at what the filling gives back."""

    def run():
        draws = torch.empty(3)
        draws.uniform_(5.0, 6.0)
        more = torch.zeros(2)
        more.normal_()
        return draws, more

    torch.manual_seed(0)
    draws, more = many_runs(run, RUNS, torch.zeros(()))
    assert draws.unique().numel() > 0.99 * draws.numel()
    assert 5.0 <= draws.min() and draws.max() <= 6.0
    assert abs(float(more.mean())) < 4.0 / (2 * RUNS) ** 0.5
    assert abs(float(more.std()) - 1.0) < 4.0 / RUNS**0.5


def test_runs_that_go_the_same_way_are_one():
    calls = []

    def run():
        calls.append(None)
        draw = torch.rand(())
        return draw if draw < 2.0 else -draw

    assert many_runs(run, 10, torch.zeros(())).min() >= 0.0
    assert len(calls) == 1


def test_runs_that_part_are_refused():
    def run():
        draw = torch.rand(())
        return draw if draw < 0.5 else -draw

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="runs answer in different ways"):
        many_runs(run, 100, torch.zeros(()))
