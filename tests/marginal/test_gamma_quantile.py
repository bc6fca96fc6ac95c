"""The gamma quantile at normal noise, against scipy's, over all shapes and far into both tails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special

from pyro_hamflow.marginal import gamma_quantile as module
from pyro_hamflow.marginal.gamma_quantile import gamma_quantile, solve

SHAPES = torch.logspace(-3, 6, 91, dtype=torch.float64)[:, None]
NOISE = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)


def quantile(shape, u):
    lower = special.gammaincinv(shape, special.ndtr(u))
    return np.where(u < 0, lower, special.gammainccinv(shape, special.ndtr(-u)))


def worst(x):
    """The largest relative error; numbers that are hardly ones aside."""
    exact = quantile(SHAPES.numpy(), NOISE.numpy())
    error = np.abs(x.double().numpy() / np.maximum(exact, 1e-290) - 1.0)
    return float(error[exact > 1e-290].max())


def test_quantile_is_scipys_in_both_tails():
    # torch's incomplete gamma functions themselves err by 4e-10 about shape 25.
    assert worst(gamma_quantile(SHAPES, NOISE)) < 1e-9
    smaller = SHAPES[:43]  # to 16
    exact = quantile(smaller.numpy(), NOISE.numpy())
    x = gamma_quantile(smaller, NOISE).numpy()
    seen = exact > 1e-290
    assert np.abs(x / np.maximum(exact, 1e-290) - 1.0)[seen].max() < 1e-10


def test_single_precision_has_its_own_digits():
    shape, u = SHAPES[10:].float(), NOISE.float()  # from .01: below, half of them underflow
    exact = quantile(shape.double().numpy(), u.double().numpy())
    x = gamma_quantile(shape, u)
    assert x.dtype == torch.float32
    seen = exact > 1e-37
    assert np.abs(x.double().numpy() / np.maximum(exact, 1e-37) - 1.0)[seen].max() < 1e-6


@pytest.mark.parametrize("u", [-30.0, -15.0, 15.0, 30.0])
def test_quantile_solves_its_equation_where_probabilities_are_next_to_none(u):
    shape = SHAPES[40:, 0]  # from 10: the others' are below all numbers at -30
    shape = shape if u < 0 else SHAPES[:, 0]
    x = solve(shape, torch.full_like(shape, u), shape.lgamma())
    tail = torch.special.gammainc if u < 0 else torch.special.gammaincc
    level = torch.special.log_ndtr(torch.tensor(-abs(u), dtype=torch.float64))
    found = tail(shape, x).log()
    steepness = (shape.sqrt() + abs(u)) * abs(u)  # by what errors in log x are multiplied
    assert bool(((found - level).abs() < 1e-9 * (1 + steepness)).all())


def test_draws_stay_numbers_and_in_order():
    u = torch.linspace(-12.0, 12.0, 400, dtype=torch.float64)
    x = gamma_quantile(SHAPES, u)
    assert bool(x.isfinite().all() and (x > 0).all())
    assert bool((x.diff(dim=-1) >= 0).all())


def test_too_few_steps_would_not_do(monkeypatch):
    monkeypatch.setattr(module, "_STEPS", 1)
    assert worst(gamma_quantile(SHAPES, NOISE)) > 1e-4


@pytest.mark.parametrize("shape", [0.1, 0.3, 1.0, 2.7, 40.0, 3e3, 1e6])
@pytest.mark.parametrize("u", [-5.0, -1.0, 0.3, 2.0, 5.0])
def test_derivatives_are_those_of_the_quantile(shape, u):
    """Of first order in both, and of second order in the noise."""
    point = torch.tensor([shape, u], dtype=torch.float64, requires_grad=True)

    def draw(point):
        return gamma_quantile(point[0], point[1])

    x = draw(point)
    (slopes,) = torch.autograd.grad(x, point, create_graph=True)
    (bends,) = torch.autograd.grad(slopes[1], point)

    def central(function, width):
        up, near, back, down = (function(k * width) for k in (2, 1, -1, -2))
        return (8 * (near - back) - (up - down)) / (12 * width)

    def at(a, noise):
        return float(quantile(np.float64(a), np.float64(noise)))

    width = 0.01 * min(1.0, shape) ** 0.5
    assert slopes[1].item() == pytest.approx(central(lambda h: at(shape, u + h), width), rel=1e-4)
    by_shape = central(lambda h: at(shape + h, u), 1e-4 * shape / (1 + shape) ** 0.5)
    assert slopes[0].item() == pytest.approx(by_shape, rel=1e-4, abs=1e-290)

    def slope(h):
        moved = torch.tensor([shape, u + h], dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(draw(moved), moved)[0][1].item()

    assert bends[1].item() == pytest.approx(central(slope, width), rel=1e-4, abs=1e-6 * x.item())
