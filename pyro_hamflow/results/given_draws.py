"""Draws that the user gives beside a run's own: of the prior, and of predicted data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def of_one_chain(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draws from the prior, as those of one chain."""
    parts = {name: torch.as_tensor(value) for name, value in values.items()}
    for name, part in parts.items():
        if not part.dim():
            raise ValueError(f"`prior` of site '{name}' has 1 draw: expected draws first")
        count = len(next(iter(parts.values())))
        if len(part) != count:
            raise ValueError(
                f"`prior` of site '{name}' has {len(part)} draws: expected {count}, as others have"
            )
    return {name: part[None] for name, part in parts.items()}


def by_chain(values: Mapping[str, Any], lead: torch.Size) -> dict[str, Tensor]:
    """Predictions for all draws of all chains, chains and draws apart."""
    parted = {}
    for name, given in values.items():
        value = torch.as_tensor(given)
        if value.shape[:1] != (lead.numel(),):
            raise ValueError(
                f"`posterior_predictive` of site '{name}' has {len(value) if value.dim() else 1} "
                f"draws: expected {lead.numel()}, all draws of all chains"
            )
        parted[name] = value.reshape(lead + value.shape[1:])
    return parted
