"""Cholesky factors of large matrices: their slopes, taken back by blocks, are torch's own."""

from __future__ import annotations

import pytest
import torch

from pyro_hamflow.programs import large_factors
from pyro_hamflow.programs.capture import capture
from pyro_hamflow.programs.large_factors import Factor, slope_in_matrix, weighted_square


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(large_factors, "BLOCK", 3)


def matrices(*shape):
    torch.manual_seed(0)
    a = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return a @ a.mT + shape[-1] * torch.eye(shape[-1], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7,), (2, 12)])
def test_slope_is_that_of_torch(shape):
    matrix = matrices(*shape).requires_grad_()
    factor = torch.linalg.cholesky(matrix)
    slope = torch.randn_like(factor)
    (expected,) = torch.autograd.grad(factor, matrix, slope)
    assert (slope_in_matrix(factor, slope) - expected).abs().max() < 1e-12
    large_factors.BLOCK = shape[-1]
    assert (slope_in_matrix(factor, slope) - expected).abs().max() < 1e-12


def test_it_has_second_derivatives_and_those_in_a_direction():
    def factor(a):
        return Factor.apply(a @ a.mT + torch.eye(7, dtype=torch.float64))

    torch.manual_seed(0)
    a = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(factor, a)
    assert torch.autograd.gradgradcheck(factor, a)
    change = torch.randn_like(a)
    _, along = torch.func.jvp(factor, (a.detach(),), (change,))
    ahead, behind = (factor(a.detach() + step * change) for step in (1e-6, -1e-6))
    assert (along - (ahead - behind) / 2e-6).abs().max() < 1e-8


def test_programs_take_slopes_back_by_blocks(monkeypatch):
    """For many rows at once, with a row that has no factor."""
    used = []
    slope = large_factors.slope_in_matrix
    monkeypatch.setattr(
        large_factors, "slope_in_matrix", lambda *given: used.append(1) or slope(*given)
    )

    def total(matrix):
        root = torch.linalg.cholesky(matrix)
        return (root * torch.arange(64.0).reshape(8, 8).sin()).sum()

    gradient = torch.func.grad(total)
    program, many = capture(gradient, matrices(8)), matrices(3, 8)
    assert used
    found = torch.func.vmap(program)(many)
    for row, expected in zip(found, map(gradient, many), strict=True):
        assert (row - expected).abs().max() < 1e-12
    assert not bool(program(-many[0]).isfinite().any())


@pytest.mark.parametrize("n", [4, 6, 11])
def test_weighted_square_is_the_product(n):
    torch.manual_seed(0)
    given = torch.randn(n, n).double().tril().requires_grad_(), torch.rand(n, 1).double()
    factor, weights = given[0], given[1].requires_grad_()
    found, expected = weighted_square(factor, weights), factor.mT @ (weights * factor)
    assert (found - expected).abs().max() < 1e-12
    slope = torch.randn(n, n).double()
    slope = slope + slope.mT
    slopes = [torch.autograd.grad(m, (factor, weights), slope) for m in (found, expected)]
    for ours, own in zip(*slopes, strict=True):
        assert (ours.tril() - own.tril()).abs().max() < 1e-12
