"""Log densities that single precision cannot tell apart."""

from __future__ import annotations

import math
import warnings

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.model.structure import is_deterministic, log_density
from pyro_hamflow.model.validation import no_validation

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
        with no_validation(), torch.no_grad():
            density = log_density(site)
        value = site["value"]
        if not isinstance(value, Tensor) or density.dtype == torch.float64 or not value.numel():
            continue
        size, why = float(density.numel()), "a sum over so many"
        if getattr(getattr(site["fn"], "support", None), "is_discrete", False):
            largest = float(value.double().nan_to_num().abs().max())
            if largest * math.log1p(largest) > size:
                size, why = largest * math.log1p(largest), f"counts of {largest:.3g}"
        error = 0.5 * torch.finfo(density.dtype).eps * size
        if error > _COARSE:
            warnings.warn(
                f"The log density of site '{name}' is computed in {density.dtype} and rounded by "
                f"about {error:.2g}, since {why} needs more digits: give parameters and data in "
                "torch.float64.",
                RuntimeWarning,
                stacklevel=2,
            )
