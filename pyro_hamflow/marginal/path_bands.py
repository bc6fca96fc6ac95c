"""In which order a path's coordinates meet their neighbours only, and how many of these."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.marginal.grouping import describe_plates
from pyro_hamflow.marginal.noise_layout import Layout
from pyro_hamflow.marginal.path_density import (
    Density,
    Order,
    Parts,
    expand,
    gradient,
    products,
)
from pyro_hamflow.marginal.path_kinks import differ_without_curvature, elsewhere, reaches
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs import banded

# Every width of a few states, and seasons of a week and a year; then a quarter more each time.
_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 25, 32, 40, 53)
_SHARE = 0.25  # of the length, from which on bands are no gain over all of the matrix
_ROUNDING = 1e-7  # relative, in double precision
_UNEVEN = 30.0  # times what sums of directions say of rounding
_ASIDE = 0.1  # by which paths are moved that are looked at
_PLACES = 3  # at which paths are looked at: the last is the first's mirror image
_LONGEST = 2_000  # of a path without bands, whose matrix is dense
_MANY_SITES = 30  # of a path without bands, from which on it is warned of
# Seconds for each gradient and chain of a vector of 1,000 numbers without bands, on one core: .18
# to .2 where the model gives its covariance and the likelihood looks at each number alone, else
# .75. All that comes before sampling took 68, of which 17 were the search for a pilot, in 2.1 GiB.
_SECONDS, _ALONE_SECONDS, _BEFORE = 0.75, 0.2, 70.0
_WHITENED = "`NUTS(whiten(model, ...))` takes half of that. "
_COSTLY = 500  # numbers without bands, from which on it is said how long they take
_CLEAR = 1e-3  # of the largest entries, from which on one is there whatever rounding does


class Bands(NamedTuple):
    """The order of a path's coordinates, and how many lower bands its log densities have in it.

    Attributes:
        order: How the path comes from the sites' coordinates.
        prior: Lower bands of the prior, the diagonal included; all if there are none.
        likelihood: The same of the likelihood.
    """

    order: Order
    prior: int
    likelihood: int


def orders(group: Group, layout: Layout) -> Iterator[Order]:
    """Ways in which states that belong together may lie close together.

    As they come; time by time, where time comes last, or several vectors lie side by side, which
    may begin or end at different times; and all of these summed up, but for different lengths, for
    sites that are the steps of a path, or the steps of its steps.
    """
    natural = torch.arange(layout.dimension, device=layout.example.device)
    blocks = list(layout.blocks.values())
    found = {1: natural}
    lengths = [block.stop - block.start for block in blocks]
    if len(blocks) > 1 and len(set(lengths)) == 1:
        found[len(blocks)] = natural.reshape(len(blocks), -1).T.reshape(-1)
    inner = [frame.size for frame in blocks[0].frames if frame not in group.frames]
    shape = torch.Size([*inner, *blocks[0].event])
    if len(blocks) == 1 and len(shape) > 1:
        found[shape[1:].numel()] = natural
        for dim in range(1, len(shape)):
            found[layout.dimension // shape[dim]] = natural.reshape(shape).movedim(dim, 0).flatten()
    for times in (0, 1, 2):
        for states, index in found.items():
            if not times or states < layout.dimension:
                yield Order(index, states if times else 0, times)
        if not times and len(set(lengths)) > 1:
            for late in (0, 1):  # side by side from the first time on, or up to the last
                own = [torch.arange(n) + late * (max(lengths) - n) for n in lengths]
                yield Order(natural[torch.cat(own).argsort(stable=True).to(natural.device)])


def find_bands(
    looks: Sequence[tuple[Parts, Tensor]],
    group: Group,
    layout: Layout,
    known: Bands | None = None,
) -> Bands:
    """Finds the order with the fewest bands.

    That a matrix has no others is confirmed by its products with random vectors, at every place
    that is given and beside it. A parameter may be zero where it lets states depend on each other:
    so there should be more than one value of the parameters.

    Arguments:
        looks: The log densities for some parameter values, of paths in the layout's order, and a
            path for each.
        group: The group of local sites.
        layout: Its coordinates.
        known: Those that were found by an earlier look, taken again if the first of these agrees.

    Raises:
        ValueError: If there are no bands, and the path is too long to go without.
    """
    best: Bands | None = None
    with random_state_kept():
        torch.manual_seed(0)
        if known is not None and _hold(known, *looks[0]):
            return known
        for order in orders(group, layout):
            if order.lag and best is not None and max(best[1:]) < layout.dimension:
                break
            seen = [_seen(parts, x, order) for parts, x in looks]
            widths = [
                _width([at[i] for at in seen], layout.dimension, is_doubtful=best is not None)
                for i in range(2)
            ]
            found = Bands(order, *widths)
            if best is None or max(found[1:]) < max(best[1:]):
                best = found
    assert best is not None
    if max(best[1:]) < layout.dimension:
        return best
    if group.joined:
        raise ValueError(
            f"the elements of {describe_plates(group.joined)} are not independent given the "
            f"parameters: those of '{group.sites[0]}' meet, and each meets more than a few before "
            "it, so that they are no path; expected independent elements, or a path"
        )
    if layout.dimension > _LONGEST:
        raise ValueError(
            f"the {layout.dimension} numbers of {_names(layout)} depend on each other without "
            "order: expected a path, each of whose states meets a few states before it in one "
            f"term, or at most {_LONGEST} numbers; write the path itself as the site, not noise "
            "that is summed up to it"
        )
    if len(layout.blocks) >= _MANY_SITES:
        warnings.warn(
            f"{_names(layout)} depend on each other without order, so that they count as one "
            "vector, and every estimate takes long: expected a path, each of whose states meets a "
            "few states before it in one term",
            RuntimeWarning,
            stacklevel=2,
        )
    alone = best.likelihood == 1
    seconds, instead = (_ALONE_SECONDS, "") if alone else (_SECONDS, _WHITENED)
    tell_of_cube(_names(layout), layout.dimension, seconds, _BEFORE, instead)
    return best


def tell_of_cube(names: str, count: int, seconds: float, before: float, instead: str = "") -> None:
    """Warns of a vector without bands that is so long that its factors take most of the time.

    Arguments:
        names: Its sites, in words.
        count: How many numbers it has.
        seconds: What a gradient for one chain takes of 1,000 numbers.
        before: What all that comes before sampling takes of them.
        instead: A sentence of what takes less.
    """
    if count < _COSTLY:
        return
    times = (count / 1000) ** 3
    warnings.warn(
        f"the {count} numbers of {names} depend on each other without order, so that time grows "
        f"with the cube of their number: about {seconds * times:.1g} seconds for each gradient and "
        f"chain, and {before * times:.1g} before sampling. {instead}A process along one axis takes "
        "far less as a Markov path, one over places by way of inducing points.",
        RuntimeWarning,
        stacklevel=3,
    )


def _hold(bands: Bands, parts: Parts, x: Tensor) -> bool:
    """Whether log densities have no other bands at a path than those."""
    both = zip(_seen(parts, x, bands.order), bands[1:], strict=True)
    n = x.shape[-1]
    return all(width == n or _agrees(sight, width) for seen, width in both for sight in seen)


class _Sight(NamedTuple):
    """Minus a log density's Hessian at a place: its products with some directions.

    Where it has kinks it says nothing: another place tells which states meet, by gradients.

    Products add up as directions do, up to rounding: that of large terms that cancel, as in the
    density of large counts, is much more than the products' own size says.

    The middle column tells at once how many bands there are at least.
    """

    density: Density
    place: Tensor
    directions: Tensor
    products: Tensor
    rounding: Tensor
    least: int
    beyond_kinks: Tensor | None


def _seen(parts: Parts, x: Tensor, order: Order) -> list[list[_Sight]]:
    """The curvature of the prior and of the likelihood at a path and beside it, in an order."""
    sights, path = [], order.from_sites(x)
    for density in parts:

        def moved(x: Tensor, density: Density = density) -> Tensor:
            return density(order.to_sites(x))

        both: list[_Sight] = []
        mirrored = -path
        for place in (path, path + _ASIDE * torch.randn_like(path), mirrored):
            directions = torch.randn(2, *x.shape).to(x)
            unit = torch.zeros_like(place)
            unit[..., x.shape[-1] // 2] = 1.0
            *both_ways, whole, column = products(
                moved, place, torch.stack([*directions, directions.sum(0), unit])
            )
            found = torch.stack(both_ways)
            if bool(found.isfinite().all()):
                rounding, least = (whole - found.sum(0)).abs().amax(), _least(column, found)
                both.append(_Sight(moved, place, directions, found, rounding, least, None))
        if len(both) == _PLACES:
            first, *_, last = both
            slopes = torch.stack([gradient(moved, sight.place) for sight in (first, last)])
            curvatures = torch.cat([first.products, last.products])
            size = (first.place - last.place).abs().amax()
            if differ_without_curvature(slopes, curvatures, size):
                both[0] = first._replace(beyond_kinks=elsewhere(path))
        sights.append(both)
    return sights


def _width(seen: list[list[_Sight]], n: int, *, is_doubtful: bool) -> int:
    """How many lower bands minus a log density's Hessian has, the diagonal included.

    Arguments:
        seen: What was seen of it.
        n: How many coordinates there are.
        is_doubtful: Whether there may well be none, so that the widest are tried first.
    """
    sights = [sight for both in seen for sight in both]
    least = max((sight.least for sight in sights), default=1)
    widths = [width for width in _WIDTHS if least <= width <= max(1.0, _SHARE * n)]
    if is_doubtful and sights and widths and not _agrees(sights[0], widths[-1]):
        return n  # nor do fewer bands
    for width in widths:
        if all(_agrees(sight, width) for sight in sights):
            return width
    return n


def _least(column: Tensor, products: Tensor) -> int:
    """How many bands there are at least, by the middle column and products of a matrix."""
    sizes = torch.maximum(products.abs().amax(0), column.abs().amax(-1, keepdim=True))
    away = (torch.arange(column.shape[-1]) - column.shape[-1] // 2).abs().to(column.device)
    is_there = column.abs() > _CLEAR * sizes
    return int((away * is_there).amax()) + 1


def _agrees(sight: _Sight, width: int) -> bool:
    bands = expand(sight.density, sight.place, width).bands
    gap = (banded.multiply(bands, sight.directions) - sight.products).abs().amax(0)
    eps = torch.finfo(gap.dtype).eps
    # Row by row: curvatures may differ by many orders of magnitude, as those of exponentials do.
    size = sight.products.abs().amax(0) + bands[..., 0].abs()
    allowed = max(_ROUNDING, 1e3 * eps) * size + 1e3 * eps * size.amax(-1, keepdim=True)
    allowed = allowed + _UNEVEN * sight.rounding
    if not bool((gap <= allowed + torch.finfo(gap.dtype).tiny).all()):
        return False
    other = sight.beyond_kinks
    return other is None or not reaches(partial(gradient, sight.density), sight.place, other, width)


def _names(layout: Layout) -> str:
    first, *others = layout.blocks
    return f"sites '{first}' to '{others[-1]}'" if others else f"site '{first}'"
