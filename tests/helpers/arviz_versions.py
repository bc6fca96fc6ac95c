"""Where ArviZ 0.x and 1.x differ in what tests ask of them."""

from __future__ import annotations

from typing import Any

import arviz
import xarray

TREES = int(arviz.__version__.split(".")[0]) >= 1


def datasets(result: Any) -> dict[str, xarray.Dataset]:
    """The groups of a result."""
    if TREES:
        return {name: node.to_dataset() for name, node in result.children.items()}
    return {name: result[name] for name in result.groups()}
