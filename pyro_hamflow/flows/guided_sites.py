"""Which sites of a model a flow covers, which it leaves to others, and which it refuses."""

from __future__ import annotations

from typing import Any

import pyro.poutine as poutine
from pyro.infer.autoguide.guides import prototype_hide_fn

from pyro_hamflow.model.supports import is_circular


def stays_out(msg: Any) -> bool:
    """Whether a flow leaves a site out: observed, noise, or summed out by enumeration."""
    return prototype_hide_fn(msg) or is_noise(msg) or _is_enumerable(msg)


def is_noise(msg: Any) -> bool:
    """Whether a site is noise of a likelihood estimate."""
    return bool(msg["infer"].get("noise", False))


def _is_enumerable(msg: Any) -> bool:
    return bool(getattr(msg["fn"], "has_enumerate_support", False))


def sees_part(trace: poutine.Trace) -> bool:
    """Whether any site of a run lies in a plate of which only some elements are seen."""
    frames = (frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ()))
    return any(_is_part(frame) for frame in frames)


def _is_part(frame: Any) -> bool:
    return frame.full_size is not None and frame.size != frame.full_size


def refuse_angles(trace: poutine.Trace) -> None:
    """Raises a ValueError if a latent site is an angle: a flow on the line has no such target."""
    for name, site in trace.iter_stochastic_nodes():
        if is_circular(site["fn"]):
            raise ValueError(
                f"latent site '{name}' is an angle ({type(site['fn']).__name__}): expected sites "
                "on the real line, such as two normal ones whose `torch.atan2` is the angle"
            )


def refuse_local_subsampling(trace: poutine.Trace) -> None:
    """Raises a ValueError if a latent site lies in a plate of which only a part is seen."""
    for name, site in trace.iter_stochastic_nodes():
        for frame in site["cond_indep_stack"]:
            if _is_part(frame):
                raise ValueError(
                    f"latent site '{name}' lies in plate '{frame.name}', which is subsampled "
                    f"({frame.size} of {frame.full_size} elements): expected all of its elements, "
                    "since the flow would take those of one part for those of another; integrate "
                    "the site out with `marginalize`, or leave it to an AutoNormal in an "
                    "AutoGuideList"
                )
