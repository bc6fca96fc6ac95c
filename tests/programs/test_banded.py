"""Banded matrices against dense ones: values, gradients, batches, recorded programs, time."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from pyro_hamflow.programs import banded, banded_source
from pyro_hamflow.programs.capture import batch, capture

SIZES = [(1, 0), (7, 0), (7, 1), (41, 1), (9, 2), (6, 3), (5, 4), (3, 5), (24, 20)]


def some_bands(n: int, p: int, *shape: int) -> Tensor:
    """Bands of positive definite matrices, zero where there is no entry."""
    torch.manual_seed(n + 10 * p)
    bands = 0.4 * torch.randn(*shape, n, p + 1, dtype=torch.float64)
    bands[..., 0] = 3.0 + p + torch.rand(*shape, n, dtype=torch.float64)
    return bands * (torch.arange(n)[:, None] >= torch.arange(p + 1))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=["machine code", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(banded_source, "library", lambda: None)
    elif banded_source.library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def by_bands(bands: Tensor, linear: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    root = banded.cholesky(bands)
    return banded.draw(root, linear, noise), banded.log_det(root), banded.solve(root, linear)


def by_dense(bands: Tensor, linear: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    matrix = banded.dense(bands)
    root = torch.linalg.cholesky(matrix)
    mean = torch.cholesky_solve(linear[..., None], root)[..., 0]
    apart = torch.linalg.solve_triangular(root.mT, noise.mT, upper=True).mT
    lower = torch.linalg.solve_triangular(root, linear[..., None], upper=False)[..., 0]
    return mean.unsqueeze(-2) + apart, torch.logdet(matrix), lower


@pytest.mark.parametrize(("n", "p"), SIZES)
def test_values_and_gradients_are_those_of_dense_matrices(way, n, p):
    given = some_bands(n, p, 2), random(2, n), random(2, 3, n)
    weights = random(2, 3, n), random(2), random(2, n)

    def run(function):
        inputs = [tensor.clone().requires_grad_() for tensor in given]
        results = function(*inputs)
        total = sum((w * r).sum() for w, r in zip(weights, results, strict=True))
        return [*results, *torch.autograd.grad(total, inputs)]

    for ours, exact in zip(run(by_bands), run(by_dense), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_products_are_those_of_dense_matrices():
    bands, vector = some_bands(8, 3, 2), random(2, 8)
    matrix, root = banded.dense(bands), banded.cholesky(bands)
    torch.testing.assert_close(banded.bands_of(matrix, 4), bands)
    torch.testing.assert_close(banded.multiply(bands, vector), (matrix @ vector[..., None])[..., 0])
    lower = torch.linalg.cholesky(matrix)
    for transposed, factor in ((False, lower), (True, lower.mT)):
        product = banded.multiply_root(root, vector, transposed=transposed)
        torch.testing.assert_close(product, (factor @ vector[..., None])[..., 0])


@pytest.mark.parametrize(("n", "p"), [(8, 3), (6, 5), (3, 5)])
def test_products_and_their_second_derivatives_are_those_of_dense_matrices(way, n, p):
    bands, vector, scale = some_bands(n, p), random(n), random(n)

    def by_bands(bands: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
        bands = bands * banded.outer(scale, scale.exp(), p + 1)
        lower = banded.multiply_root(bands, vector)
        return lower @ banded.multiply_root(bands, vector.sin(), transposed=True) + (
            banded.multiply(bands, vector).cos().sum()
        )

    def by_dense(bands: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
        whole = banded.dense(bands).tril() * scale[:, None] * scale.exp()
        symmetric = whole + whole.tril(-1).mT
        return (whole @ vector) @ (whole.mT @ vector.sin()) + (symmetric @ vector).cos().sum()

    found = []
    for function in (by_bands, by_dense):
        inputs = [part.clone().requires_grad_() for part in (bands, vector, scale)]
        value = function(*inputs)
        slopes = torch.autograd.grad(value, inputs, create_graph=True)
        total = sum((slope.sin() * slope).sum() for slope in slopes)
        found.append([value, *slopes, *torch.autograd.grad(total, inputs)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_products_of_many_matrices_and_of_many_vectors(way):
    bands, vectors = some_bands(7, 4, 3), random(3, 7)
    for root, given in ((bands, vectors), (bands[0], vectors), (bands, vectors[0])):
        rows = zip(root.expand(3, 7, 5), given.expand(3, 7), strict=True)
        exact = torch.stack([banded.dense(one) @ vector for one, vector in rows])
        torch.testing.assert_close(banded.multiply(root, given), exact)
        dims = tuple(0 if part.dim() == full else None for part, full in ((root, 3), (given, 2)))
        batched = torch.func.vmap(banded.multiply, in_dims=dims)(root, given)
        torch.testing.assert_close(batched, exact)


def test_recorded_batched_and_differentiated(way):
    bands, linear, noise = some_bands(6, 2, 4), random(4, 6), random(4, 3, 6)

    def total(bands: Tensor, linear: Tensor, noise: Tensor) -> Tensor:
        root = banded.cholesky(bands)
        draws = torch.func.vmap(lambda z: banded.draw(root, linear, z))(noise)
        return draws.sin().sum() + banded.log_det(root)

    def slopes(bands: Tensor, linear: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (bands, linear, noise)]
            return torch.autograd.grad(total(*inputs), inputs)

    inputs = bands, linear, noise
    exact = [torch.stack(rows) for rows in zip(*map(slopes, *inputs), strict=True)]
    recorded = capture(slopes, *(tensor[0] for tensor in inputs))
    batched = batch(recorded, *inputs)(*inputs)
    for one, other in zip(exact, batched, strict=True):
        torch.testing.assert_close(one, other)


def test_a_matrix_that_is_not_positive_definite_has_no_root(way):
    bands = some_bands(5, 1, 2)
    bands[1, 3, 0] = -1.0
    found = banded.log_det(banded.cholesky(bands))
    assert found[0].isfinite() and found[1].isnan()


@pytest.mark.parametrize(("n", "p"), [(7, 1), (9, 2), (12, 10)])
def test_where_there_is_no_root_it_is_that_of_a_dominated_matrix(way, n, p):
    bands, weights = some_bands(n, p, 3), random(3, n, p + 1)
    bands[1, n // 2, 0], bands[1, 1, 0], bands[1, 2:, 0] = -2.0, 1e-9, bands[1, 2:, 0] - 3.0
    bands = bands.requires_grad_()
    root = banded.nearest_root(bands)
    (slope,) = torch.autograd.grad((weights * root).sum(), bands)
    rows = []
    for row in bands:
        lower = banded.cholesky(row)
        if not banded.log_det(lower).isfinite():
            lower = banded.cholesky(banded_source.dominated(row))
        rows.append(lower)
    exact = torch.stack(rows)
    assert [banded.log_det(banded.cholesky(row)).isfinite() for row in bands] == [True, False, True]
    torch.testing.assert_close(root, exact)
    torch.testing.assert_close(slope, torch.autograd.grad((weights * exact).sum(), bands)[0])
    matrix = banded.dense(banded_source.dominated(bands[1]))
    beside = (matrix - torch.diag(matrix.diagonal())).abs()
    scale = bands[1, :, 0].abs().clamp(min=1e-6 * bands[1, :, 0].abs().max()).sqrt()
    assert bool((matrix.diagonal() > scale * (beside @ (1.0 / scale))).all())


def test_many_vectors_of_two_bands_at_once(way):
    bands, vectors = some_bands(9, 1), random(6, 9)
    root = banded.cholesky(bands)
    for transposed in (False, True):
        found = banded.solve(root, vectors, transposed=transposed)
        back = banded.multiply_root(root, found, transposed=transposed)
        torch.testing.assert_close(back, vectors)


def test_single_precision(way):
    bands = some_bands(6, 1)
    root = banded.cholesky(bands.float())
    assert root.dtype == torch.float32
    torch.testing.assert_close(root.double(), banded.cholesky(bands), rtol=1e-5, atol=1e-5)


def test_vectors_of_another_precision_than_the_root(way):
    """The loops know one type of number: read as another, memory would be written past its end."""
    bands, vectors = some_bands(40, 2), random(40)
    exact = banded.solve(banded.cholesky(bands), vectors)
    for root, given in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        found = banded.solve(banded.cholesky(bands.to(root)), vectors.to(given))
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_roots_of_two_bands_are_true_to_every_entry(way, dtype):
    """Whatever the sizes of entries, and where the matrix is next to singular."""
    n = 203 if way == "torch" else 5003
    torch.manual_seed(0)
    walk = torch.tensor([2.0 + 1e-6, -1.0], dtype=torch.float64).repeat(n, 1)
    root = torch.stack([0.5 + torch.rand(n), torch.randn(n)], -1).double()
    root[0, 1] = walk[0, 1] = 0.0
    product = torch.stack([root.square().sum(-1), root[:, 1] * root[:, 0].roll(1)], -1)
    size = 10.0 ** torch.randn(n, dtype=torch.float64).mul(4.0).clamp(-9.0, 9.0)
    uneven = product * torch.stack([size.square(), size * size.roll(1)], -1)
    eps = torch.finfo(dtype).eps
    for bands in (walk.to(dtype), uneven.to(dtype)):
        found = banded.cholesky(bands)
        diagonal = found.square().sum(-1)
        beside = found[1:, 1] * found[:-1, 0]
        assert ((diagonal - bands[:, 0]).abs() <= 8 * eps * bands[:, 0]).all()
        largest = (bands[1:, 0] * bands[:-1, 0]).sqrt()
        assert ((beside - bands[1:, 1]).abs() <= 8 * eps * largest).all()


def test_the_first_pivot_that_is_not_positive_is_seen(way):
    for low in (0.3, 0.0, -1.0):
        bands = torch.tensor([2.0, -1.0], dtype=torch.float64).repeat(50, 1)
        bands[0, 1], bands[20, 0] = 0.0, low
        assert not bool(banded.cholesky(bands)[20, 0] > 0)
        assert bool((banded.cholesky(bands)[:20, 0] > 0).all())


def test_time_is_in_proportion_to_length():
    if banded_source.library() is None:
        pytest.skip("no C++ compiler")

    def seconds(n: int) -> float:
        bands, linear = some_bands(n, 2, 4).requires_grad_(), random(4, n)
        start = time.process_time()
        root = banded.cholesky(bands)
        torch.autograd.grad(banded.draw(root, linear, linear).sum(), bands)
        return time.process_time() - start

    # In turns, so that what else the machine does slows both; the best of them, of each.
    times = [(seconds(20_000), seconds(80_000)) for _ in range(6)]
    short, long = map(min, zip(*times, strict=True))
    assert long < 8.0 * short  # a square law would take sixteen times as long


@pytest.mark.parametrize(("n", "p"), SIZES)
def test_bands_are_seen_by_products(n, p):
    bands = some_bands(n, p, 2)
    probes = banded.probes(bands[..., 0], p + 1)
    assert len(probes) == min(2 * p + 1, n)
    products = torch.stack([banded.multiply(bands, probe.expand(2, n)) for probe in probes])
    torch.testing.assert_close(banded.bands_seen(products, p + 1), bands, rtol=0.0, atol=0.0)


def test_gradients_of_a_mended_root_are_recorded(way):
    bands = some_bands(6, 1)
    bands[3, 0] = -1.0  # it has no root, and is made dominated by its diagonal

    def slope(bands: Tensor) -> Tensor:
        bands = bands.detach().requires_grad_()
        (found,) = torch.autograd.grad(banded.log_det(banded.nearest_root(bands)).sum(), bands)
        return found

    torch.testing.assert_close(capture(slope, bands)(bands), slope(bands))
    mended = slope(banded_source.dominated(bands))
    exact = torch.func.vjp(banded_source.dominated, bands)[1](mended)[0]
    torch.testing.assert_close(slope(bands)[:, 0], exact[:, 0])
    torch.testing.assert_close(slope(bands)[1:, 1], exact[1:, 1])
