"""Whether a model keeps to what its own distributions expect of parameters and data."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_hamflow.model.kinds import Args, Model, Node
from pyro_hamflow.process import random_state_kept

_TRIES = 3  # draws from the prior, at each of which there is to be a fault: one may be far out


def fault_of(model: Model, args: Args, kwargs: dict[str, Any]) -> str | None:
    """What the checks of a model's distributions find at every draw from its prior.

    A scale matrix in place of a covariance, or data outside their support, have a density all the
    same where nobody checks: another than is meant.
    """
    found = None
    given = (part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor))
    if any(part.isnan().any() for part in given):  # gaps, which are looked at elsewhere
        return None
    with random_state_kept():
        for _ in range(_TRIES):
            found = _fault(model, args, kwargs)
            if found is None:
                break
    return found


def _fault(model: Model, args: Args, kwargs: dict[str, Any]) -> str | None:
    try:
        with poutine.block(), pyro.validation_enabled():
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            for site in trace.nodes.values():
                if site["type"] == "sample" and site["is_observed"] and not _is_masked(site):
                    site["fn"].log_prob(site["value"])
    except ValueError as error:
        lines = (line for line in str(error).splitlines() if line.startswith("Expected "))
        told = next(lines, "Real()")
        # What is real is anything but NaN, which is looked at elsewhere.
        return None if "Real()" in told else told.removesuffix(", but found invalid values:")
    except Exception:  # what cannot be drawn from the prior is not checked
        return None
    return None


def _is_masked(site: Node) -> bool:
    """Whether data are left out, where there may be any numbers in their place."""
    family = site["fn"]
    while not isinstance(family, dist.MaskedDistribution):
        if not hasattr(family, "base_dist"):
            return site["mask"] is not None
        family = family.base_dist
    return True
