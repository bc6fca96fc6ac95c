"""The bands of Hessians, found by few products, and the orders of variables that make them few."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_hamflow.marginal.path_kinks import differ_without_curvature, elsewhere, reaches
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs import banded

_TRIED = (0, 1, 2, 3, 5, 7, 11)  # numbers of bands
_SPARE = 0.5  # of the variables: with more bands, a matrix is as good as full
_ZERO = 1e-4  # of the largest entry, in the square root of the rounding error
_SMALL = 64  # variables of a block, up to which its eigenvalues are looked at


def gradient_and_bands(value: Tensor, u: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The gradient of a function, and the lower bands of minus its Hessian.

    Arguments:
        value: The function's value, a scalar.
        u: Where, of shape ``(n,)``; it requires a gradient.
        width: How many bands, the diagonal included.

    Returns:
        Tensors of shape ``(n,)`` and ``(n, width)``, which depend on all that the value does.
    """
    gradient = _gradient(value, u)
    n = len(u)
    if width == n:
        products = -_products(gradient, u, torch.eye(n, dtype=u.dtype, device=u.device))
        return gradient, banded.bands_of(products, width)
    products = -_products(gradient, u, banded.probes(u.detach(), width))
    return gradient, banded.bands_seen(products, width)


def _gradient(value: Tensor, u: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(u)
    (gradient,) = torch.autograd.grad(
        value, u, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradient


def _products(gradient: Tensor, u: Tensor, vectors: Tensor) -> Tensor:
    """The Hessian's products with each of some vectors, ``(count, n)``."""
    if not gradient.requires_grad:
        return torch.zeros_like(vectors)
    (slope,) = torch.func.vmap(
        lambda vector: torch.autograd.grad(
            gradient, u, vector, create_graph=True, allow_unused=True, materialize_grads=True
        )
    )(vectors)
    return slope


def find_width(function: Callable[[Tensor], Tensor], u: Tensor) -> int:
    """How many lower bands the Hessian of a function has; all of them where these are many.

    Whether so many are enough is told by a product with a random vector; and by gradients where
    there are kinks, which have no second derivative.

    Arguments:
        function: From variables to a scalar.
        u: Where to look, of shape ``(n,)``.
    """
    n = len(u)
    u = u.detach().requires_grad_()
    value = function(u)
    vector = torch.randn(n, generator=torch.Generator().manual_seed(0), device="cpu").to(u)
    product = -_products(_gradient(value, u), u, vector[None])[0]
    tolerance = _tolerance(u) * float(product.detach().abs().max())
    reaches_beyond = _kinks_of(function, u.detach(), vector)
    for width in (count + 1 for count in _TRIED if count + 1 <= max(1, int(_SPARE * n))):
        _, bands = gradient_and_bands(value, u, width)
        if float((banded.multiply(bands, vector) - product).detach().abs().max()) <= tolerance:
            if not reaches_beyond(width):
                return width
    return n


def _kinks_of(
    function: Callable[[Tensor], Tensor], u: Tensor, vector: Tensor
) -> Callable[[int], bool]:
    """Whether variables meet others in kinks that lie so many places from them, or more."""

    def slope(v: Tensor) -> Tensor:
        v = v.detach().requires_grad_()
        return _gradient(function(v), v).detach()

    def curvature(v: Tensor) -> Tensor:
        v = v.detach().requires_grad_()
        return _products(_gradient(function(v), v), v, vector[None]).detach()

    places = u, -u
    slopes, products = (torch.stack([f(v) for v in places]) for f in (slope, curvature))
    if not differ_without_curvature(slopes, products[:, 0], 2.0 * u.abs().max()):
        return lambda width: False
    with random_state_kept():
        torch.manual_seed(0)
        other = elsewhere(u)

    def reaches_beyond(width: int) -> bool:
        with random_state_kept():
            torch.manual_seed(0)
            return reaches(slope, u, other, width)

    return reaches_beyond


def full_pattern(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Which entries of a function's Hessian are not zero, of shape ``(n, n)``."""
    u = u.detach().requires_grad_()
    _, bands = gradient_and_bands(function(u), u, len(u))
    matrix = banded.dense(bands).abs()
    return matrix > _tolerance(u) * matrix.max()


def _tolerance(u: Tensor) -> float:
    return _ZERO * torch.finfo(u.dtype).eps ** 0.5


def narrow_order(pattern: Tensor) -> Tensor:
    """An order of variables in which those that meet in a matrix are close (Cuthill and McKee)."""
    neighbours = [row.nonzero()[:, 0].tolist() for row in pattern.cpu()]
    degree = [len(others) for others in neighbours]
    waiting, order, seen = sorted(range(len(degree)), key=degree.__getitem__), [], set[int]()
    for first in waiting:
        level = [first] if first not in seen else []
        seen.update(level)
        while level:
            order += level
            found = []
            for place in level:
                new = [other for other in neighbours[place] if other not in seen]
                seen.update(new)
                found += sorted(new, key=degree.__getitem__)
            level = found
    return torch.tensor(order[::-1], device=pattern.device)


def raised(bands: Tensor) -> Tensor:
    """A symmetric matrix raised until it has no negative eigenvalue, band for band.

    Small blocks, such as the states of one time, lose theirs alone. In longer ones each row's
    diagonal is raised to the sum of the others' sizes where it is below.
    """
    if bands.shape[-1] == 1:
        return bands.clamp(min=0.0)
    n, width = bands.shape
    met = (bands[:, 1:] != 0.0).any(-1)
    reach = torch.arange(width, device=bands.device) * (bands != 0.0)
    first = torch.arange(n, device=bands.device) - reach.max(-1).values
    # A block begins where nothing from there on reaches back beyond.
    starts = [0]
    least = first.flip(0).cummin(0).values.flip(0)
    starts += [i for i in range(1, n) if int(least[i]) >= i]
    sizes = torch.diff(torch.tensor([*starts, n]))
    if not bool(met.any()):
        return torch.cat([bands[:, :1].clamp(min=0.0), bands[:, 1:]], -1)
    if width == n or int(sizes.max()) <= _SMALL:
        blocks = zip(starts, sizes.tolist(), strict=True)
        return torch.cat([_raised_block(bands[i : i + size]) for i, size in blocks])
    return dominant(bands)


def dominant(bands: Tensor) -> Tensor:
    """A symmetric matrix with the diagonal raised where it is below the sum of the row's others."""
    plain = torch.cat([torch.zeros_like(bands[..., :1]), bands[..., 1:].abs()], -1)
    others = banded.multiply(plain, torch.ones_like(bands[..., 0]))
    diagonal = bands[..., :1]
    return torch.cat([diagonal + (others[..., None] - diagonal).clamp(min=0.0), bands[..., 1:]], -1)


def _raised_block(bands: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(banded.dense(bands))
    matrix = vectors @ (values.clamp(min=0.0)[:, None] * vectors.mT)
    return banded.bands_of(matrix, bands.shape[-1])
