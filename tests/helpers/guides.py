"""Guides whose draws are far from their targets, for samplers that are to correct them."""

from __future__ import annotations

from functools import cache

import torch

from pyro_hamflow import AutoNeuralHamiltonianFlow
from tests.helpers.exact_draws import HMC_TARGETS, make_target


def untrained(model, args, **settings):
    """A guide that covers the target and is far from it: its parameters are random."""
    torch.manual_seed(2)
    guide = AutoNeuralHamiltonianFlow(model, hidden=(16, 16), num_steps=3, **settings)
    guide.prepare(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.08 * torch.randn_like(parameter)
    return guide


@cache
def guide_of(name, settings=()):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    if name in HMC_TARGETS:
        model, args = HMC_TARGETS[name][:2]
    else:
        model, args = make_target(name).model, make_target(name).potential.args
    guide = untrained(model, args, **dict(settings))
    torch.set_default_dtype(before)
    return guide
