"""Loops that Python wrote out are few operations, and the same functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_hamflow.programs.capture import batch, capture
from pyro_hamflow.programs.validation import no_validation
from tests.helpers.kinds import long_but

STEPS = 40


@pytest.fixture(autouse=True)
def without_validation():
    """Which asks for values."""
    with no_validation():
        yield


def random_walk(x: Tensor) -> Tensor:
    scale, before, total = (
        x[0].exp(),
        torch.zeros((), dtype=x.dtype),
        torch.zeros((), dtype=x.dtype),
    )
    for t in range(1, len(x)):
        total = total + dist.Normal(before, scale).log_prob(x[t])
        if t % 3:  # some steps have no data
            total = total + dist.Poisson(x[t].exp()).log_prob(x.new_tensor(t % 5))
        before = x[t]
    return total


def of_two_states(x: Tensor) -> Tensor:
    states, total = x.reshape(-1, 2), x.new_zeros(())
    turn = torch.tensor([[0.8, 0.3], [-0.3, 0.8]], dtype=x.dtype)
    for t in range(1, len(states)):
        lower = torch.stack([x[0].exp() + 1.0, x[1], x.new_zeros(()), x[1].exp()]).reshape(2, 2)
        fn = dist.MultivariateNormal(turn @ states[t - 1], scale_tril=lower @ lower.mT)
        total = total + fn.log_prob(states[t]) + states[t].max()
    return total


def of_overlapping_slices(x: Tensor) -> Tensor:
    total = x.new_zeros(())
    for t in range(len(x) - 3):
        window = x[t : t + 3]
        total = total + window.logsumexp(0) * window.norm() - (x[t] * x[-1]).sin()
    return total


def joined_again(x: Tensor) -> Tensor:
    parts = [x[t].exp().reshape(1) for t in range(len(x))]
    parts.insert(7, torch.stack([x[0], x[1].cos()]))
    whole = torch.cat(parts)
    rows = torch.stack([whole[t] * whole[t + 1] for t in range(len(x))], -1)
    return (whole * whole.flip(0)).sum() + (rows.cumsum(-1) * x).sum()


def recursion(x: Tensor) -> Tensor:
    """What has to be done one step after the other, with a density of each."""
    level, total = torch.ones((), dtype=x.dtype), torch.zeros((), dtype=x.dtype)
    for t in range(len(x)):
        level = 0.5 * level + x[t].sigmoid()
        total = total + dist.Poisson(level).log_prob(x.new_tensor(t % 4))
    return total


def of_factors(x: Tensor) -> Tensor:
    """A factorisation in each step, which fails for some arguments."""
    total = x.new_zeros(())
    for t in range(1, len(x)):
        matrix = torch.stack([x[t].exp() + 1.0, x[0], x[0], x[t - 1].exp()]).reshape(2, 2)
        total = total + torch.linalg.cholesky(matrix).diagonal().log().sum()
    return total


FUNCTIONS = [
    random_walk,
    of_two_states,
    of_overlapping_slices,
    joined_again,
    recursion,
    of_factors,
]


def value_and_gradient(
    function: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x)
            return value.detach(), *torch.autograd.grad(value, x)

    return run


def point(steps: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(2 * (steps // 2), generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_joined_operations_are_the_function(function):
    run = value_and_gradient(function)
    graph = capture(run, point(STEPS, 0))
    places = [point(STEPS, seed) for seed in range(1, 5)]
    for place in places:
        for found, expected in zip(graph(place), run(place), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    rows = torch.stack(places)
    for found, row in zip(zip(*batch(graph, rows)(rows), strict=True), places, strict=True):
        for part, expected in zip(found, run(row), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "function",
    long_but([of_factors, joined_again], [f for f in FUNCTIONS if f is not recursion]),
)
def test_number_of_operations_is_that_of_a_step(function):
    sizes = [
        len(capture(value_and_gradient(function), point(steps, 0)).graph.nodes)
        for steps in (STEPS, 3 * STEPS)
    ]
    assert sizes[1] <= 1.1 * sizes[0] + 5, sizes


def test_second_derivatives_and_single_precision():
    graph = capture(value_and_gradient(random_walk), point(STEPS, 0, torch.float32))
    place = point(STEPS, 3, torch.float32)
    for found, expected in zip(graph(place), value_and_gradient(random_walk)(place), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def hessian(x: Tensor) -> tuple[Tensor]:
        return (torch.func.hessian(random_walk)(x),)

    place = point(STEPS, 3)
    (found,), (expected,) = capture(hessian, point(STEPS, 0))(place), hessian(place)
    torch.testing.assert_close(found, expected)


def test_a_factorisation_that_fails_is_none_of_the_others():
    graph = capture(lambda x: of_factors(x), point(STEPS, 0))
    place = point(STEPS, 1)
    assert graph(place).isfinite()
    place[0] = 5.0  # no matrix is positive definite
    assert math.isnan(float(graph(place)))
    assert graph.meta["fallible"]


def test_random_numbers_are_each_their_own():
    def noisy(x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for t in range(len(x)):
            total = total + x[t] * torch.randn(()).exp() + x[t].sin() * x[t].cos() - x[t].exp()
        return total

    graph = capture(noisy, point(STEPS, 0))
    torch.manual_seed(0)
    found = graph(point(STEPS, 1))
    torch.manual_seed(0)
    torch.testing.assert_close(found, noisy(point(STEPS, 1)))


def of_log_sigmoids(x: Tensor) -> Tensor:
    total = x.new_zeros(())
    for t in range(len(x) - 1):
        total = total + torch.nn.functional.logsigmoid((x[t : t + 2] * x[0]).exp()).sum()
    return total


def test_slopes_that_rows_share_are_given_to_each(capfd):
    """Of log sigmoids torch takes the slope's shape for the result's, and warns for each call."""
    run = value_and_gradient(of_log_sigmoids)
    graph = capture(run, point(STEPS, 0))
    place = point(STEPS, 1)
    for found, expected in zip(graph(place), run(place), strict=True):
        torch.testing.assert_close(found, expected)
    assert "resized" not in capfd.readouterr().err
