"""Effects' priors and data, found from gradients, and followed beyond the points they come from."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_hamflow.flows.fisher import divergences
from pyro_hamflow.flows.transport_flow import TransportFlow
from pyro_hamflow.flows.transport_start import begin

ERROR = torch.tensor([0.5, 1.0, 2.0, 4.0])
Y = torch.tensor([1.0, -2.0, 3.0, 0.5])


def gradient_at(x):
    """Of effects N(mean, exp(level)), observed as Y with ERROR; mean and level are N(0, 1)."""
    mean, level, effects = x.split([1, 1, 4], -1)
    precision, z = (-2.0 * level).exp(), effects - mean
    of_effects = precision * z + (effects - Y) / ERROR**2
    of_mean = mean - (precision * z).sum(-1, keepdim=True)
    of_level = level + 4.0 - (precision * z**2).sum(-1, keepdim=True)
    return torch.cat([of_mean, of_level, of_effects], -1)


def points_at(level):
    """Effects from their posterior, given the level and a mean of N(0, 1)."""
    level, mean = level.double()[:, None], torch.randn(len(level), 1).double()
    precision = (-2.0 * level).exp() + ERROR**-2
    centre = (mean * (-2.0 * level).exp() + Y / ERROR**2) / precision
    return torch.cat([mean, level, centre + torch.randn(len(level), 4) / precision.sqrt()], -1)


def begun(x):
    torch.manual_seed(0)
    flow = TransportFlow([1, 1, 4]).to(x).requires_grad_(False)
    flow.loc.copy_(x.mean(0))
    flow.scale.copy_(x.std(0))
    begin(flow, x, gradient_at(x), torch.arange(len(x)) % 10 == 0)
    return flow


def far_divergence(flow):
    """Of effects far down the neck."""
    x = points_at(torch.full((200,), -7.0))
    z, slope = flow.pull(x, gradient_at(x))
    return float(divergences(z[:, 2:], slope[:, 2:]).mean())


def test_necks_are_followed_beyond_the_points():
    """The scale of effects is the prior's where it is small, and the data's where it is large."""
    torch.manual_seed(1)
    flow = begun(points_at(0.7 * torch.randn(1000)))
    assert far_divergence(flow) < 1e-4
    locals_layer = flow.layers[-2]
    logs = locals_layer.prior_slopes[4:] / flow.scale[:2]
    assert torch.allclose(logs, torch.tensor([0.0, 1.0]).double().expand(4, 2), atol=1e-3)


def test_straight_scales_alone_do_not_lead_there(monkeypatch):
    """What a prior and data are for: without them the neck is missed by far."""
    monkeypatch.setattr("pyro_hamflow.flows.transport_start._WORTH", 0.0)
    torch.manual_seed(1)
    assert far_divergence(begun(points_at(0.7 * torch.randn(1000)))) > math.log(2.0)


@pytest.mark.parametrize("governing", [2, 12])
def test_a_prior_moves_gradients_and_volumes(governing):
    """There and back, with a prior set for some of the coordinates."""
    torch.manual_seed(0)
    flow = TransportFlow([1] * governing + [20]).double().requires_grad_(False)
    for layer in flow.layers:
        for part in layer.parameters():
            part.add_(0.1 * torch.randn_like(part))
        if hasattr(layer, "set_prior"):
            which = torch.rand(len(layer.moved)) < 0.5
            some, fixed = 2 * int(which.sum()), len(layer.fixed)
            slopes = 0.3 * torch.randn(fixed, some)
            layer.set_prior(which, torch.randn(some), slopes, 0.3 * torch.randn(1 + fixed, some))
    z = torch.randn(10, governing + 20).double()
    x, log_volume = flow(z)
    again, back = flow.inverse(x)
    assert torch.allclose(again, z)
    assert torch.allclose(back, -log_volume)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow(row[None])[0][0], z[0])
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, log_volume[0])
    slope = torch.sin(3.0 * x)
    start = z.clone().requires_grad_()
    moved, volume = flow(start)
    (expected,) = torch.autograd.grad((moved * slope).sum() - volume.sum(), start)
    assert torch.allclose(flow.pull(x, slope)[1], expected)
