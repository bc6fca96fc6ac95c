"""Discrete sites, summed out over all their values at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro_hamflow.model.kinds import Node
from pyro_hamflow.model.trace import is_latent


def sum_out(site: Node) -> dict[str, Any]:
    """How a latent site is to be enumerated: over all its values at once, if it is discrete.

    Whatever a model says otherwise, a sum over some values, or over draws of them, is noisy.
    """
    if not is_latent(site):
        return {}
    discrete = getattr(site["fn"], "has_enumerate_support", False)
    expand = site["infer"].get("expand", False)
    return {"enumerate": "parallel" if discrete else None, "num_samples": None, "expand": expand}


@contextmanager
def refuse_branches(discrete: list[str]) -> Iterator[None]:
    """Raises a ValueError in place of what a model raises when discrete sites have all values."""
    try:
        yield
    except RuntimeError as error:
        if not discrete:
            raise
        raise ValueError(
            f"the model cannot be run with all values of the discrete sites {discrete} at once "
            f"({str(error).splitlines()[0]}): expected tensors of them, as in `torch.where`, in "
            "place of branches"
        ) from error
