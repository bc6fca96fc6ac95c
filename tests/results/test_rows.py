"""Functions of one draw, run at many."""

from __future__ import annotations

import torch

from pyro_hamflow.results.rows import Replicates, Rows

X = torch.linspace(-1.0, 1.0, 7, dtype=torch.float64)


def test_rows_are_those_of_the_function():
    rows = Rows(lambda x, y: (x * y, x > 0.1, torch.ones(2)), X, X.flip(0), count=3)
    product, flag, constant = rows(X, X.flip(0))
    assert rows.graph is not None
    torch.testing.assert_close(product, X * X.flip(0))
    assert torch.equal(flag, X > 0.1) and torch.equal(constant, torch.ones(7, 2))


def test_the_graph_tells_what_a_result_is_made_from():
    rows = Rows(lambda x, y: (x + y, 2 * x, y.exp(), torch.ones(2)), X, X, count=3)
    assert rows.readers(0) == {0, 1} and rows.readers(1) == {0, 2}
    assert Rows(lambda x: (x if x > 0 else -x,), X, count=3).readers(0) is None


def test_control_flow_and_numbers_taken_out_are_followed():
    rows = Rows(lambda x: (x if x > 0 else -x,), X, count=3)
    torch.testing.assert_close(rows(X)[0], X.abs())
    rows = Rows(lambda x: (torch.as_tensor(2.0 * x.detach().numpy()),), X, count=3)
    torch.testing.assert_close(rows(X)[0], 2.0 * X)


def test_rows_at_which_the_function_raises_are_nan():
    def factor(x):
        matrix = torch.eye(2) + 1.5 * x * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        if not bool((torch.linalg.eigvalsh(matrix) > 0).all()):
            raise ValueError("not positive definite")
        return torch.linalg.cholesky(matrix), (x > 0).long()

    rows = Rows(factor, X, count=3)
    found, sign = rows(X)
    bad = (1.5 * X).abs() >= 1
    assert rows.failures == int(bad.sum()) > 0
    assert torch.equal(found.isnan().all(-1).all(-1), bad)
    assert torch.equal(sign.isnan(), bad)


def test_results_without_one_shape_are_left_out():
    rows = Rows(lambda x: (torch.ones(3)[: 1 + int(x > 0)], x), X, count=3)
    assert rows(X)[0] is None and torch.equal(rows(X)[1], X)


def test_many_noises_of_a_draw_are_worked_out_from_what_it_says_once():
    """As one by one, to rounding; and where a function cannot be captured, one by one indeed."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(5, 3, generator=generator, dtype=torch.float64) + 0.5
    noises = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)

    def function(draw, noise):
        root = torch.linalg.cholesky(torch.eye(3) * 4 + draw[:, None] * draw)
        return (root @ noise).exp().sum(), draw

    def stubborn(draw, noise):
        return function(draw, torch.as_tensor(noise.detach().numpy()))

    for own, known in ((function, True), (stubborn, False)):
        over = Replicates(own, draws, noises[:, 0])
        assert (over._graph is not None) == known
        found, same = Rows(over, draws, noises, count=2)(draws, noises)
        for i in range(5):
            for j in range(4):
                torch.testing.assert_close(found[i, j], function(draws[i], noises[i, j])[0])
                torch.testing.assert_close(same[i, j], draws[i])
