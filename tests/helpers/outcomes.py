"""Outcomes of transitions, made up, for what adapts to them."""

from __future__ import annotations

import torch

from pyro_hamflow.mcmc.transitions.base import Info, State
from pyro_hamflow.model.recovery import Evaluation


def outcome(position, gradient=None, rate=0.8, **stats):
    """Of an iteration that led to these positions."""
    chains = len(position)
    gradient = position if gradient is None else gradient
    zero, no = torch.zeros(chains), torch.zeros(chains, dtype=torch.bool)
    info = Info(~no, torch.full((chains,), rate), zero, no, zero, 1, 1, 0, stats)
    return State(position, position[:, :0], gradient, Evaluation(zero, {}, {})), info
