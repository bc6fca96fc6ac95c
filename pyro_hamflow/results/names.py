"""The names under which sites and dimensions come out.

A file, and ArviZ, allow less than Pyro does: a variable and a dimension of one dataset must not
share a name, some names are taken, and ``/`` separates a group from what is in it. The rule is in
:func:`~pyro_hamflow.to_inference_data`; here it is applied.
"""

from __future__ import annotations

import re
from collections.abc import Container, Hashable, Iterable

TAKEN = ("chain", "draw", "sample")
# Dimensions that ArviZ's functions make: they fail where there is one already.
TAKEN_DIMENSIONS = ("__sample__", "ci_bound", "hdi", "label", "metric", "summary", "variable")


def legal(name: str) -> str:
    """A name with what files cannot hold replaced: ``/`` and control characters by dots.

    Example:
        >>> legal("block/weight")
        'block.weight'
    """
    changed = re.sub(r"[/\x00-\x1f]", ".", name).strip()
    return changed if changed.strip(".") else f"_{changed}"


class Names:
    """Different names for different sites and dimensions, the same in every group.

    Arguments:
        sites: The names of a model's sites.
        plates: The names of its plates.

    Example:
        >>> names = Names(["chain", "x", "x_dim_0", "a/b"], ["x", "draw"])
        >>> [names.site(name) for name in ("chain", "x", "x_dim_0", "a/b")]
        ['chain_site', 'x', 'x_dim_0', 'a.b']
        >>> names.dimension("x"), names.dimension("draw"), names.unnamed("x", "dim_0")
        ('x_dim', 'draw_dim', 'x_dim_0_dim')
    """

    def __init__(self, sites: Iterable[str], plates: Iterable[str]) -> None:
        self._sites: dict[Hashable, str] = {}
        self._dimensions: dict[Hashable, str] = {}
        for name in _unchanged_first(sites, TAKEN):
            self.site(name)
        for name in _unchanged_first(plates, self._taken_from_dimensions()):
            self.dimension(name)

    def site(self, *parts: str) -> str:
        """The name of a site, or of several whose values are joined."""
        if parts not in self._sites:
            taken = {*TAKEN, *self._sites.values(), *self._dimensions.values()}
            self._sites[parts] = _free(legal("_".join(parts)), "_site", taken)
        return self._sites[parts]

    def dimension(self, name: str) -> str:
        """The name of a dimension that a plate or the user has named."""
        return self._dimension(name, legal(name))

    def unnamed(self, site: str, part: str) -> str:
        """The name of a dimension that nobody has named, from what it is of its site."""
        return self._dimension((site, part), f"{site}_{part}")

    def _dimension(self, key: Hashable, name: str) -> str:
        if key not in self._dimensions:
            taken = self._taken_from_dimensions()
            self._dimensions[key] = _free(name, "_dim", taken)
        return self._dimensions[key]

    def _taken_from_dimensions(self) -> set[str]:
        known = {*self._sites.values(), *self._dimensions.values()}
        return {*TAKEN, *TAKEN_DIMENSIONS, *known}


def _free(name: str, suffix: str, taken: set[str]) -> str:
    """The name, with the suffix as often as it takes to be nobody else's."""
    while name in taken:
        name += suffix
    return name


def _unchanged_first(names: Iterable[str], taken: Container[str]) -> list[str]:
    """Names that stay as they are before those that might be changed into them."""
    return sorted(dict.fromkeys(names), key=lambda name: name in taken or legal(name) != name)
