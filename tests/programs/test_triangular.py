"""Triangular systems have torch's solutions and derivatives, of many right sides in one."""

from __future__ import annotations

import itertools
import pickle
from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vmap

from pyro_hamflow.programs import functions, graph_recorder
from pyro_hamflow.programs.capture import capture, largest_tensor
from pyro_hamflow.programs.triangular import linalg_solve_triangular

SHAPES = [
    ((4, 4), (4, 2)),
    ((3, 4, 4), (4, 2)),
    ((4, 4), (3, 4, 2)),
    ((3, 4, 4), (3, 4, 2)),
    ((1, 4, 4), (3, 4, 2)),
]


@pytest.fixture(params=SHAPES, ids=str)
def operands(request):
    torch.manual_seed(0)
    triangle, right = (torch.randn(5, *shape, dtype=torch.float64) for shape in request.param)
    return triangle + 3.0 * torch.eye(4), right


def sides(upper, left, unitriangular):
    """What is made of both solvers, ours and torch's."""
    settings = {"upper": upper, "left": left, "unitriangular": unitriangular}

    def make(solve, triangle, right):
        turned = right if left else right.mT
        solved = solve(triangle, turned, **settings)
        return solved.sin().sum() + solve(triangle, turned.cos(), **settings).square().sum()

    return [partial(make, solve) for solve in (linalg_solve_triangular, torch_solve)]


torch_solve = torch.linalg.solve_triangular


def agree(way, pair):
    ours, known = (way(make) for make in pair)
    torch.testing.assert_close(ours, known, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", list(itertools.product((False, True), repeat=3)), ids=str)
def test_derivatives_are_those_of_torch(operands, settings):
    pair, (triangles, rights) = sides(*settings), operands
    both, here = (0, 1), (triangles[0], rights[0])
    agree(lambda make: grad(make, argnums=both)(*here), pair)
    for dims in ((0, 0), (None, 0), (0, None)):
        given = [part if dim == 0 else part[0] for part, dim in zip(operands, dims, strict=True)]
        agree(lambda make, d=dims, g=given: vmap(grad(make, argnums=both), in_dims=d)(*g), pair)
    for index in both:

        def slopes(make, index=index):
            """From directions to slopes of the slope along each, reverse and forward."""

            def back(direction):
                def along(*given):
                    return (grad(make, argnums=index)(*given) * direction).sum()

                return grad(along, argnums=both)(*here)

            def ahead(direction):
                moved = tuple(direction if i == index else torch.zeros_like(here[i]) for i in both)
                return jvp(grad(make, argnums=index), here, moved)[1]

            return vmap(back)(operands[index]), vmap(ahead)(operands[index])

        agree(slopes, pair)


def by_root(root, x):
    return torch.linalg.solve_triangular(root, x[:, None], upper=False).square().sum()


def by_factor(root, x):
    return x @ torch.cholesky_solve(x[:, None], root)[:, 0]


def by_upper_factor(root, x):
    return x @ x[:, None].cholesky_solve(root.mT, upper=True)[:, 0]


SQUARES = pytest.mark.parametrize("squares", [by_root, by_factor, by_upper_factor])


def moved_by_curvature(squares, root):
    """The gradient of a function of the curvatures of a Gaussian vector's density."""

    def density(x):
        return -(squares(root_of(scale), x) + x.cos().sum())

    def root_of(scale):
        return torch.eye(len(root), dtype=root.dtype) * scale + root

    def curvature(direction):
        return grad(lambda x: (grad(density)(x) * direction).sum())(torch.ones_like(root[0]))

    scale = torch.tensor(2.0, dtype=root.dtype, requires_grad=True)
    found = vmap(curvature)(torch.eye(len(root), dtype=root.dtype)).square().sum()
    return torch.autograd.grad(found, scale)[0]


@SQUARES
def test_directions_of_one_matrix_take_no_matrix_each(squares):
    torch.manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64).tril(-1)
    moved = partial(moved_by_curvature, squares)
    graph = capture(moved, root)
    torch.testing.assert_close(graph(root), moved(root))
    assert largest_tensor(graph) == root.numel()


@SQUARES
def test_by_torch_alone_they_would(squares, monkeypatch):
    monkeypatch.setattr(functions, "_WORDS", {})
    monkeypatch.setattr(graph_recorder, "_CALLED", {})
    root = torch.zeros(12, 12, dtype=torch.float64)
    assert largest_tensor(capture(partial(moved_by_curvature, squares), root)) == 12 * root.numel()


def test_a_captured_density_keeps_it():
    root = torch.eye(12, dtype=torch.float64)
    density = capture(
        lambda root, x: -torch_solve(root, x[:, None], upper=False).square().sum(), root, root[0]
    )

    def curvatures(root):
        slope = grad(density, argnums=1)
        along = lambda d: grad(lambda x: (slope(root, x) * d).sum())(root[0])  # noqa: E731
        return torch.func.grad(lambda root: vmap(along)(root.detach()).square().sum())(root)

    assert largest_tensor(capture(curvatures, root)) == root.numel()


@SQUARES
def test_a_live_graph_keeps_its_gradients(squares):
    """A recorder takes the gradient of a function with a rule of its own for stopped."""
    root = torch.eye(4, dtype=torch.float64) + torch.ones(4, 4, dtype=torch.float64).tril(-1)

    def value(root, x):
        root = root.tril()  # whose other triangle torch gives slopes that mean nothing
        slope = grad(lambda x: squares(root, x))(x)
        return squares(root, x).sin() + slope.square().sum()

    inputs = [root.requires_grad_(), torch.arange(4.0, dtype=torch.float64).requires_grad_()]
    graph = capture(value, *inputs, live=True)
    found, known = (torch.autograd.grad(f(*inputs), inputs) for f in (graph, value))
    torch.testing.assert_close(found, known)
    again = capture(lambda *given: graph(*given), *inputs, live=True)
    torch.testing.assert_close(torch.autograd.grad(again(*inputs), inputs), known)


def test_a_graph_can_be_pickled():
    root, x = torch.eye(4, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    graph = pickle.loads(pickle.dumps(capture(by_root, root, x)))
    torch.testing.assert_close(graph(2.0 * root, x), 0.25 * x.square().sum())
