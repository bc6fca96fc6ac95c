"""Effects' priors and data, found from gradients, and followed beyond the points they come from."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from pyro_hamflow.flows.fisher import divergences, fit_transport
from pyro_hamflow.flows.transport_flow import TransportFlow
from pyro_hamflow.flows.transport_prior import prior_and_data
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


# --- what points further out are for --------------------------------------------------------------


LOW = -5.0  # a level far down the neck


def of_successes(x):
    """As `gradient_at`, with ten trials of each effect, whose logit it is."""
    _, level, effects = x.split([1, 1, 4], -1)
    gradient = gradient_at(x)
    gradient[:, 2:] += 10.0 * torch.sigmoid(effects) - Y.clamp(0.0, 2.0) - (effects - Y) / ERROR**2
    return gradient


def learned_of_successes(steps, seen=None):
    """A map by points about a level of 0, and others down to -4; only *seen* of them begin it."""
    torch.manual_seed(1)
    level = torch.cat([0.7 * torch.randn(2000), -4.0 * torch.rand(400)]).double()
    mean = torch.randn(2400, 1).double() - 1.0
    effects = mean + level.exp()[:, None] * torch.randn(2400, 4).double()
    x = torch.cat([mean, level[:, None], effects], -1)
    held_out = torch.arange(2400) % 10 == 0
    flow = TransportFlow([1, 1, 4]).to(x).requires_grad_(False)
    flow.loc.copy_(x.mean(0))
    flow.scale.copy_(x.std(0))
    some = slice(None, seen)
    begin(flow, x[some], of_successes(x[some]), held_out[some], seen=2000)
    settled = copy.deepcopy(flow)
    flow.requires_grad_(True)
    fit_transport(flow, x, of_successes(x), held_out, num_steps=steps)
    return flow.requires_grad_(False), settled


def far_of_successes(flow):
    torch.manual_seed(2)
    mean = torch.randn(200, 1).double() - 1.0
    effects = mean + math.exp(LOW) * torch.randn(200, 4).double()
    x = torch.cat([mean, torch.full((200, 1), LOW).double(), effects], -1)
    z, slope = flow.pull(x, of_successes(x))
    return float(divergences(z[:, 2:], slope[:, 2:]).mean())


def test_points_further_out_tell_priors_precisely():
    """Data that are not normal bend what is found where they count."""
    assert far_of_successes(learned_of_successes(0)[0]) < 0.3
    assert far_of_successes(learned_of_successes(0, seen=2000)[0]) > 3.0


def test_they_count_where_they_are_exact(monkeypatch):
    """With residuals of all points alike, data's would turn the prior."""
    monkeypatch.setattr("pyro_hamflow.flows.transport_prior._CLOSE", 1.0)
    assert far_of_successes(learned_of_successes(0)[0]) > 1.0


def test_training_leaves_what_is_settled():
    """Neither a prior's effects nor what governs them are bent, however many steps are taken."""
    flow, settled = learned_of_successes(50)
    assert flow.is_settled
    for mine, before in zip(flow.layers[-2:], settled.layers[-2:], strict=True):
        assert mine.settled.all()
        for part, other in zip(mine.parameters(), before.parameters(), strict=True):
            assert torch.allclose(part, other)
    pairs = list(zip(flow.parameters(), settled.parameters(), strict=True))
    assert not all(torch.allclose(part, other) for part, other in pairs)


# --- priors that some effects tell better than others ---------------------------------------------


def begun_with_one_found(monkeypatch):
    """A map for whose effects least squares have led nowhere at first, but for the second."""
    lent = []

    def poor_at_first(seen, beyond, constants, slopes, prior=None):
        found = prior_and_data(seen, beyond, constants, slopes, prior)
        if prior is None and seen[1].shape[1] == 4:
            for part in found:
                part.view(-1, 2, 4)[..., torch.arange(4) != 1] = 10.0
        elif prior is not None:
            lent.append(prior)
        return found

    monkeypatch.setattr("pyro_hamflow.flows.transport_start.prior_and_data", poor_at_first)
    torch.manual_seed(1)
    return begun(points_at(0.7 * torch.randn(1000))), lent


def test_priors_are_tried_that_another_effect_has(monkeypatch):
    """In units of its own; so all go on down the neck when one does."""
    flow, lent = begun_with_one_found(monkeypatch)
    assert flow.layers[-2].settled.all()
    assert far_divergence(flow) < 1e-4
    _, slopes = lent[0]
    of_centre, of_scale = slopes.mT.split(4)
    ratio = flow.scale[:2] / flow.scale[2:, None]
    assert torch.allclose(of_centre, torch.tensor([1.0, 0.0]).double() * ratio, atol=1e-3)
    assert torch.allclose(of_scale, torch.tensor([0.0, 1.0]).double() * flow.scale[:2], atol=1e-3)
    constants = lent[0][0] - slopes.mT @ (flow.loc[:2] / flow.scale[:2])
    none = torch.cat([-flow.loc[2:] / flow.scale[2:], -flow.scale[2:].log()])
    assert torch.allclose(constants, none, atol=1e-3)


def test_without_another_they_are_not_found(monkeypatch):
    monkeypatch.setattr("pyro_hamflow.flows.transport_start._DONORS", 0)
    flow, _ = begun_with_one_found(monkeypatch)
    assert flow.layers[-2].settled.tolist() == [False, True, False, False]
    assert far_divergence(flow) > 1.0


def of_pairs(x):
    """Effects in pairs, correlated by .6 about 0, of one scale; each is observed with an error."""
    level, first, second = x.split([1, 3, 3], -1)
    scale = (-level).exp()
    a, b = first * scale, second * scale
    of_first, of_second = ((u - 0.6 * v) / 0.64 for u, v in ((a, b), (b, a)))
    of_level = level + 6.0 - (of_first * a + of_second * b).sum(-1, keepdim=True)
    data = torch.cat([first, second], -1) - 0.5
    return torch.cat([of_level, torch.cat([of_first, of_second], -1) * scale + data], -1)


@pytest.mark.parametrize("worth", [None, 0.4])
def test_priors_of_correlated_effects_are_found(monkeypatch, worth):
    """What is left of them by their partners does not stand against their scale."""
    if worth is not None:
        monkeypatch.setattr("pyro_hamflow.flows.transport_start._WORTH", worth)
    torch.manual_seed(1)
    level = torch.cat([0.7 * torch.randn(2000), -4.0 * torch.rand(400)]).double()[:, None]
    root = torch.linalg.cholesky(torch.tensor([[1.0, 0.6], [0.6, 1.0]]).double())
    pairs = torch.randn(2400, 3, 2).double() @ root.mT
    x = torch.cat([level, level.exp() * pairs[..., 0], level.exp() * pairs[..., 1]], -1)
    flow = TransportFlow([1, 6]).to(x).requires_grad_(False)
    flow.loc.copy_(x[:2000].mean(0))
    flow.scale.copy_(x[:2000].std(0))
    begin(flow, x, of_pairs(x), torch.arange(2400) % 10 == 0, seen=2000)
    layer = flow.layers[-2]
    assert bool(layer.settled.all()) == (worth is None)
    if worth is None:
        slopes = layer.prior_slopes[6:, 0].double() / flow.scale[0]
        assert torch.allclose(slopes, torch.ones(6).double(), atol=0.1)
