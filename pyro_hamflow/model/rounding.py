"""Log densities, and values, that numbers of a precision cannot tell apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.transforms import IndependentTransform

from pyro_hamflow.model.float_type import float_type
from pyro_hamflow.model.sites import Site, split
from pyro_hamflow.model.trace import is_deterministic

_FAR = 0.2  # of a coordinate, over which a density may change by a part that matters
_SHARE = 5e-4  # of the draws
_COARSE = 0.1  # in a log density: a tenth of what tells one hypothesis from another


def warn_of_rounding(trace: poutine.Trace) -> None:
    """Warns of observed sites whose log density is rounded so that inference would notice.

    A density of counts is a difference of terms of the size of count times its logarithm; a sum
    over rows is about as large as their number, and as coarse as its last digit.

    Arguments:
        trace: A run of the model.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or is_deterministic(site):
            continue
        value, fn = site["value"], site["fn"]
        if not isinstance(value, Tensor) or not value.numel():
            continue
        dtype = float_type(fn, torch.get_default_dtype())
        if value.is_floating_point():
            dtype = torch.promote_types(dtype, value.dtype)
        rows = torch.Size(fn.batch_shape).numel()  # which is a plain tuple of some distributions
        size, why = float(max(value.numel(), rows)), "a sum over so many"
        if _counts(fn):
            largest = float(value.double().nan_to_num().abs().max())
            if largest * math.log1p(largest) > size:
                size, why = largest * math.log1p(largest), f"counts of {largest:.3g}"
        error = 0.5 * torch.finfo(dtype).eps * size
        if error > _COARSE:
            warnings.warn(
                f"The log density of site '{name}' is computed in {dtype} and rounded by about "
                f"{error:.2g}, since {why} needs more digits: give parameters and data in "
                "torch.float64.",
                RuntimeWarning,
                stacklevel=2,
            )


def describe_ends(sites: Sequence[Site], stretches: Iterable[Tensor]) -> str | None:
    """Which site's draws are rounded at the ends of its support, in a sentence; mostly none.

    Such draws do not have the model's density: a sampler moves on while the value stays.

    Arguments:
        sites: The latent sites.
        stretches: Draws, so many at a time, of shape ``(*, dimension)``.
    """
    by_name = {site.name: site for site in sites}
    far: dict[str, Tensor] = {}
    count = 0
    for position in stretches:
        count += position[..., :1].numel()
        for name, free in split(list(sites), position).items():
            transform = by_name[name].transform
            while isinstance(transform, IndependentTransform):
                transform = transform.base_transform
            if transform.domain.event_dim or not free.numel():
                continue
            off = (transform.inv(transform(free)) - free).abs()
            rows = (~(off <= _FAR)).reshape(-1, *by_name[name].shape).double().sum(0)
            far[name] = far[name] + rows if name in far else rows
    for name, rows in far.items():
        share, dtype = float(rows.max()) / count, by_name[name].dtype
        if share > _SHARE:
            wider = "" if dtype == torch.float64 else "parameters in torch.float64, or "
            return (
                f"{share:.2g} of the draws of '{name}' are rounded by {dtype} to an end of "
                "its support, where they are too few or too many: give "
                f"{wider}another site in its place, such as its logit or logarithm."
            )
    return None


def _counts(fn: TorchDistribution) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):  # it tells no support
        return False
