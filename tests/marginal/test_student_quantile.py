"""Student's t beside scipy's, for few and many degrees of freedom and far into both tails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from pyro_hamflow.marginal.student_quantile import log_tails, solve, student_quantile

DEGREES = torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0, 7.0, 15.0, 100.0, 1e4], dtype=torch.float64)
NOISE = torch.linspace(-8.0, 8.0, 160, dtype=torch.float64)  # without zero
PLACES = torch.logspace(-3, 3, 200, dtype=torch.float64)


def quantile(df, u):
    """scipy's, each side of the median by the tail there."""
    x = special.stdtrit(df, special.ndtr(-abs(u)))
    return -np.sign(u) * x


def test_tails_are_scipys_on_both_sides():
    x = torch.cat([-PLACES, PLACES])
    lower, upper = (tail.numpy() for tail in log_tails(DEGREES[:, None], x))
    for found, exact in ((lower, stats.t.logcdf), (upper, stats.t.logsf)):
        expected = exact(x.numpy(), DEGREES[:, None].numpy())
        seen = expected > -700.0  # below, scipy's are no numbers
        assert np.abs(found - expected)[seen].max() < 5e-9
    few = log_tails(torch.tensor(0.5).double(), x)[1].numpy()
    assert np.abs(few - stats.t.logsf(x.numpy(), 0.5)).max() < 1e-6


def test_quantile_is_scipys():
    exact = quantile(DEGREES[:, None].numpy(), NOISE.numpy())
    x = student_quantile(DEGREES[:, None], NOISE).numpy()
    assert np.abs(x / exact - 1.0).max() < 1e-8
    single = student_quantile(DEGREES[:, None].float(), NOISE.float())
    assert single.dtype == torch.float32
    assert np.abs(single.double().numpy() / exact - 1.0).max() < 1e-5


@pytest.mark.parametrize("u", [-30.0, 15.0, 30.0])
def test_quantile_solves_its_equation_where_probabilities_are_next_to_none(u):
    x = solve(DEGREES[3:], torch.full_like(DEGREES[3:], u))
    assert bool((x.sign() == np.sign(u)).all()) and bool(x.isfinite().all())
    smaller = log_tails(DEGREES[3:], x)[0 if u < 0 else 1]
    level = torch.special.log_ndtr(torch.tensor(-abs(u), dtype=torch.float64))
    assert bool(((smaller - level).abs() < 1e-8 * level.abs()).all())


@pytest.mark.parametrize("df", [1.0, 2.5, 8.0, 60.0])
def test_derivatives_are_those_of_differences(df):
    df, u = torch.tensor(df).double(), torch.tensor([-5.0, -1.2, 0.3, 2.6]).double()
    df.requires_grad_()
    u.requires_grad_()
    x = student_quantile(df.expand(4), u)
    (first,) = torch.autograd.grad(x.sum(), u, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), u, retain_graph=True)

    def at(change_df, change_u):
        return torch.tensor(quantile((df + change_df).item(), (u + change_u).detach().numpy()))

    h = 1e-4
    assert torch.allclose(first, (at(0.0, h) - at(0.0, -h)) / (2 * h), rtol=1e-6)
    bend = (at(0.0, h) - 2 * at(0.0, 0.0) + at(0.0, -h)) / h**2
    assert torch.allclose(second, bend, rtol=1e-3, atol=1e-5)
    for i in range(4):
        (slope,) = torch.autograd.grad(x[i], df, retain_graph=True)
        expected = (at(h, 0.0) - at(-h, 0.0))[i] / (2 * h)
        assert torch.allclose(slope, expected, rtol=1e-5, atol=1e-9)
