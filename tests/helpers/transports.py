"""Maps of parameters, and densities that they straighten."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from pyro_hamflow.flows.fisher import fit_transport
from pyro_hamflow.flows.transport_flow import TransportFlow
from pyro_hamflow.model.potential import Potential


def funnel(size=2):
    """Neal's: a log scale, and numbers of that scale."""
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, log_scale.exp()).expand([size]).to_event(1))


def funnel_draws(num_chains, size=2):
    log_scale = torch.randn(num_chains, 1)
    return torch.cat([log_scale, log_scale.exp() * torch.randn(num_chains, size)], -1)


def banana():
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    pyro.sample("b", dist.Normal(0.5 * a**2 - 1.0, 0.5))


def banana_draws(num_chains):
    a = 2.0 * torch.randn(num_chains)
    return torch.stack([a, 0.5 * a**2 - 1.0 + 0.5 * torch.randn(num_chains)], -1)


SHAPES = {"funnel": (funnel, funnel_draws, [1, 2]), "banana": (banana, banana_draws, [1, 1])}


def random_flow(sizes, spread=0.01):
    """A map that fits nothing: it bends more than it couples."""
    torch.manual_seed(3)
    flow = TransportFlow(sizes).to(torch.get_default_dtype()).requires_grad_(False)
    for parameter in flow.parameters():
        parameter += spread * torch.randn_like(parameter)
    flow.layers[0].log_tail += 0.2
    flow.layers[0].skew += 0.1 * torch.randn_like(flow.loc)
    flow.loc.copy_(0.3 * torch.randn_like(flow.loc))
    flow.scale.copy_((0.3 * torch.randn_like(flow.scale)).exp())
    return flow


def trained_flow(model, sizes, draws, *, num_steps=150):
    """A map fitted to a model's gradients at exact draws of it."""
    position = draws.to(torch.get_default_dtype())
    _, gradient, _ = Potential(model).gradients(position, position[:, :0])
    flow = TransportFlow(sizes).to(position)
    held_out = torch.arange(len(position)) % 10 == 0
    fit_transport(flow, position, gradient, held_out, num_steps=num_steps)
    return flow.requires_grad_(False)
