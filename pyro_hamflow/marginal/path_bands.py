"""In which order a path's coordinates meet their neighbours only, and how many of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.marginal.noise_layout import Layout
from pyro_hamflow.marginal.path_density import Density, Parts, expand, products
from pyro_hamflow.programs import banded

_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 25, 32, 40, 53)
_SHARE = 0.25  # of the length, from which on bands are no gain over all of the matrix
_ROUNDING = 1e-7  # relative, in double precision
_ASIDE = 0.1  # by which paths are moved that are looked at
_LONGEST = 2_000  # of a path without bands, whose matrix is dense


class Bands(NamedTuple):
    """The order of a path's coordinates, and how many lower bands its log densities have in it.

    Attributes:
        order: The numbers of the layout's coordinates.
        prior: Lower bands of the prior, the diagonal included; all if there are none.
        likelihood: The same of the likelihood.
    """

    order: Tensor
    prior: int
    likelihood: int


def orders(layout: Layout) -> Iterator[Tensor]:
    """Orders in which states that belong together may lie: as they come, or time by time."""
    natural = torch.arange(layout.dimension)
    yield natural
    lengths = {block.stop - block.start for block in layout.blocks.values()}
    if len(layout.blocks) > 1 and len(lengths) == 1:  # vectors of several paths, side by side
        yield natural.reshape(len(layout.blocks), -1).T.reshape(-1)
    events = [[*block.event] for block in layout.blocks.values()]
    if len(events) == 1 and len(events[0]) > 1:  # time last
        yield natural.reshape(events[0]).movedim(-1, 0).reshape(-1)
    for dim in range(1, len(events[0]) if len(events) == 1 else 0):
        yield natural.reshape(events[0]).movedim(dim, 0).reshape(-1)


def find_bands(looks: Sequence[tuple[Parts, Tensor]], layout: Layout) -> Bands:
    """Finds the order with the fewest bands.

    That a matrix has no others is confirmed by its products with random vectors, at every place
    that is given and beside it. A parameter may be zero where it lets states depend on each other:
    so there should be more than one value of the parameters.

    Arguments:
        looks: The log densities for some parameter values, of paths in the layout's order, and a
            path for each.
        layout: The path's coordinates.

    Raises:
        ValueError: If there are no bands, and the path is too long to go without.
    """
    best: Bands | None = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for order in orders(layout):
            order = order.to(layout.example.device)
            seen = [_seen(parts, x, order) for parts, x in looks]
            widths = [_width([places[i] for places in seen], layout.dimension) for i in range(2)]
            found = Bands(order, *widths)
            if best is None or max(found[1:]) < max(best[1:]):
                best = found
    assert best is not None
    if max(best[1:]) == layout.dimension > _LONGEST:
        raise ValueError(
            f"the {layout.dimension} numbers of {_names(layout)} depend on each other without "
            "order: expected a path, each of whose states meets a few states before it in one "
            f"term, or at most {_LONGEST} numbers; write the path itself as the site, not noise "
            "that is summed up to it"
        )
    return best


class _Sight(NamedTuple):
    """Minus a log density's Hessian at a place: its products with some directions."""

    density: Density
    place: Tensor
    directions: Tensor
    products: Tensor


def _seen(parts: Parts, x: Tensor, order: Tensor) -> list[list[_Sight]]:
    """The curvature of the prior and of the likelihood at a path and beside it, in an order."""
    back, sights = order.argsort(), []
    for density in parts:

        def moved(x: Tensor, density: Density = density) -> Tensor:
            return density(x[..., back])

        both = []
        for place in (x[..., order], x[..., order] + _ASIDE * torch.randn_like(x)):
            directions = torch.randn(2, *x.shape).to(x)
            found = products(moved, place, directions)
            if bool(found.isfinite().all()):
                both.append(_Sight(moved, place, directions, found))
        sights.append(both)
    return sights


def _width(seen: list[list[_Sight]], n: int) -> int:
    """How many lower bands minus a log density's Hessian has, the diagonal included."""
    sights = [sight for both in seen for sight in both]
    for width in _WIDTHS:
        if width > max(1.0, _SHARE * n):
            break
        if all(_agrees(sight, width) for sight in sights):
            return width
    return n


def _agrees(sight: _Sight, width: int) -> bool:
    bands = expand(sight.density, sight.place, width).bands
    gap = banded.multiply(bands, sight.directions) - sight.products
    rounding = max(_ROUNDING, 1e3 * torch.finfo(gap.dtype).eps)
    return float(gap.abs().max()) <= rounding * max(float(sight.products.abs().max()), 1e-30)


def _names(layout: Layout) -> str:
    first, *others = layout.blocks
    return f"sites '{first}' to '{others[-1]}'" if others else f"site '{first}'"
