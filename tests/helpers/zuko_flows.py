"""Flows of zuko, small."""

from __future__ import annotations

from functools import partial

from pyro_hamflow.conftest import zuko  # imported so that torch's distributions stay as they are

flows = zuko.flows
SMALL = {"hidden_features": (16, 16), "transforms": 2}
FLOWS = {
    "NICE": partial(flows.NICE, **SMALL),
    "RealNVP": partial(flows.RealNVP, **SMALL),
    "NSF": partial(flows.NSF, bins=6, **SMALL),
    "MAF": partial(flows.MAF, **SMALL),
}
