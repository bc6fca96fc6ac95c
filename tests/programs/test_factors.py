"""Slopes in Cholesky factors: recognised where torch's formula stands, and those of torch."""

from __future__ import annotations

import pytest
import torch

from pyro_hamflow.model.gradients import gradient_functions
from pyro_hamflow.programs.capture import capture
from pyro_hamflow.programs.engines.factors import formula, slope_in_factor
from pyro_hamflow.programs.engines.native import NativeProgram
from pyro_hamflow.programs.machine_code import compiler
from tests.helpers.kinds import long_but
from tests.helpers.native import spoil_line

pytestmark = pytest.mark.skipif(compiler.compiler() is None, reason="no C++ compiler")


def kernel(x):
    gaps = (x[:, None] - x).square()
    return (-gaps * x[0].exp()).exp() + torch.eye(len(x), dtype=x.dtype)


def two_factors(x):
    """Of a process, and of what its factor makes; all numbers of both have a slope."""
    root = torch.linalg.cholesky(kernel(x))
    other = torch.linalg.cholesky(root.mT @ (root * x.exp()[:, None]) + root @ root.mT)
    return (root.sin() @ other.mT + other.cos()).square().sum() + other.diagonal().log().sum()


def program_of(function, x):
    both = gradient_functions(lambda x, noise: function(x))["gradient"]
    graph = capture(both, x, x[:0])
    return both, graph, NativeProgram(graph, (x, x[:0]))


def number_recognised(graph):
    return sum(slope_in_factor(node) is not None for node in graph.graph.nodes)


@pytest.mark.parametrize(
    ("count", "dtype"),
    long_but(
        [(7, torch.float64)],
        [(1, torch.float64), (7, torch.float64), (30, torch.float32)],
    ),
)
def test_slopes_are_those_of_torch(count, dtype):
    torch.manual_seed(count)
    x = torch.randn(count, dtype=dtype)
    both, graph, program = program_of(two_factors, x)
    assert number_recognised(graph) == 2
    value, gradient = program.gradient(x[None], x[None, :0])
    expected = both(x, x[:0])
    tolerance = 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(value[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient[0], expected[1], rtol=tolerance, atol=10 * tolerance)


def test_a_spoilt_slope_is_found_out(monkeypatch):
    spoil_line("matrices", "own -= found * column[i];", "own += found * column[i];", monkeypatch)
    x = torch.randn(7, dtype=torch.float64)
    both, _, program = program_of(two_factors, x)
    gradient = program.gradient(x[None], x[None, :0])[1][0]
    assert not torch.allclose(gradient, both(x, x[:0])[1], rtol=1e-3)


def test_where_there_is_no_factor_there_is_no_slope():
    def function(x):
        return torch.linalg.cholesky(kernel(x) - 2.0 * x[1].square() * torch.eye(len(x))).sum()

    x = torch.tensor([0.3, 0.1, -0.5, 0.2], dtype=torch.float64)
    _, graph, program = program_of(function, x)
    assert number_recognised(graph) == 1
    rows = torch.stack([x, x + torch.tensor([0.0, 3.0, 0.0, 0.0], dtype=torch.float64)])
    value, gradient = program.gradient(rows, rows[:, :0])
    assert value.isnan().tolist() == [False, True]
    assert gradient[0].isfinite().all() and gradient[1].isnan().any()


def test_only_that_of_a_factor_is_recognised():
    """The formula tells nothing of a triangle that has numbers above its diagonal."""

    def by_hand(x):
        root = torch.linalg.cholesky(kernel(x))
        return formula(root, root.sin()).sum() + formula(root + x[0] / 9, root.cos()).sum()

    x = torch.tensor([0.3, 0.1, -0.5], dtype=torch.float64)
    graph = capture(lambda x, noise: (by_hand(x), x), x, x[:0])
    assert number_recognised(graph) <= 1
    program = NativeProgram(graph, (x, x[:0]))
    torch.testing.assert_close(program.gradient(x[None], x[None, :0])[0][0], by_hand(x))
