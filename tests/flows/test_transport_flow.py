"""The map that samplers learn, and its fit to gradients."""

from __future__ import annotations

import pytest
import torch

from pyro_hamflow.flows.fisher import divergences, fit_transport, worst_divergence
from pyro_hamflow.flows.transport_flow import TransportFlow, _cuts
from pyro_hamflow.flows.transport_layers import Coupling
from pyro_hamflow.flows.transport_start import begin
from pyro_hamflow.model.transported import pulled_back
from tests.helpers.kinds import long_but
from tests.helpers.transports import SHAPES, random_flow, trained_flow

SIZES = [[1], [2], [1, 3], [4, 1, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bijection(sizes):
    """There and back, with the log determinant of the Jacobian."""
    flow = random_flow(sizes)
    z = torch.randn(20, sum(sizes))
    x, log_volume = flow(z)
    again, back = flow.inverse(x)
    assert torch.allclose(again, z)
    assert torch.allclose(back, -log_volume)
    for row, found in zip(z, log_volume, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda row: flow(row[None])[0][0], row)
        assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, found)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_move_with_points(sizes):
    """What is written out is what automatic differentiation gives."""
    flow, z = random_flow(sizes), torch.randn(20, sum(sizes))
    x, _ = flow(z)
    slope = torch.sin(3.0 * x) + x**3
    _, expected = pulled_back(flow.forward, z, lambda _: slope)
    found, gradient = flow.pull(x, slope)
    assert torch.allclose(found, z)
    assert torch.allclose(gradient, expected)
    _, again = pulled_back(flow.inverse, x, lambda _: gradient)
    assert torch.allclose(again, slope)


def test_begins_as_shift_and_scale():
    flow = TransportFlow([1, 2]).double().requires_grad_(False)
    flow.loc.copy_(torch.tensor([1.0, 2.0, 3.0]))
    flow.scale.copy_(torch.tensor([0.1, 1.0, 10.0]))
    z = torch.randn(5, 3)
    assert torch.allclose(flow(z)[0], flow.loc + flow.scale * z)


def test_same_map_of_same_seed():
    torch.manual_seed(0)
    first = TransportFlow([1, 5]).state_dict()
    torch.manual_seed(0)
    second = TransportFlow([1, 5]).state_dict()
    assert all(torch.equal(part, second[name]) for name, part in first.items())


def test_cuts_follow_sizes():
    """Sites of few elements come before those of many, wherever they stand."""
    cuts = _cuts([4, 1, 2])
    assert [(a.tolist(), b.tolist()) for a, b in cuts] == [
        ([4], [5, 6, 0, 1, 2, 3]),
        ([4, 5, 6], [0, 1, 2, 3]),
    ]
    assert not _cuts([7])
    assert len(_cuts([1] * 9)) == 3


@pytest.mark.parametrize("shape", long_but(["banana"], SHAPES))
def test_fit_straightens(shape):
    """New draws are N(0, I) in the coordinates of a map that was fitted to others."""
    model, draw, sizes = SHAPES[shape]
    flow = trained_flow(model, sizes, draw(3000), num_steps=400)
    x = draw(5000)
    z, _ = flow.inverse(x)
    assert z.mean(0).abs().max() < 0.1
    assert (z.T.cov() - torch.eye(x.shape[1])).abs().max() < 0.15
    assert (z.pow(4).mean(0) / 3.0 - 1.0).abs().max() < 0.5
    plain = (x - x.mean(0)) / x.std(0)
    assert (plain.pow(4).mean(0) / 3.0 - 1.0).abs().max() > 0.9


def test_divergence_of_normal_densities():
    """Nothing of N(0, I), and the logarithm of one and the mean square of the error elsewhere."""
    z = torch.randn(7, 3)
    assert torch.equal(divergences(z, z), torch.zeros(7))
    assert torch.allclose(divergences(z, z + 2.0), torch.full((7,), 5.0).log())


def test_fit_of_single_precision_and_double():
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(500, 3, dtype=dtype)
        flow = TransportFlow([3]).to(dtype)
        training = fit_transport(flow, 2.0 + x, x, torch.arange(500) < 50, num_steps=60)
        assert flow.loc.dtype == dtype
        assert training.best_loss < training.checks[0]


# --- what a map may begin with -------------------------------------------------------------------


def _wide_funnel(points, size=20):
    """Draws whose scales span four orders of magnitude, about a line, and gradients there."""
    level, noise = 3.0 * torch.randn(points, 1), torch.randn(points, size)
    scale, slopes = (0.5 * level).exp(), torch.linspace(-1.0, 1.0, size)
    of_level = level / 9.0 + 0.5 * (1.0 - noise.square()).sum(-1, keepdim=True)
    of_level = of_level - (slopes * noise / scale).sum(-1, keepdim=True)
    x = slopes * level + scale * noise
    return torch.cat([level, x], -1), torch.cat([of_level, noise / scale], -1)


def _fresh(position, sizes):
    flow = TransportFlow(sizes).to(position).requires_grad_(False)
    flow.loc.copy_(position.mean(0))
    flow.scale.copy_(position.std(0).clamp(max=2.0))
    return flow


def test_begins_with_centres_and_scales_of_a_funnel():
    """They follow the global coordinate, beyond the points that they are found from, too."""
    torch.manual_seed(0)
    position, gradient = _wide_funnel(4000)
    inner = position[:, 0].abs() < 5.0
    position, gradient = position[inner], gradient[inner]
    flow, held_out = _fresh(position, [1, 20]), torch.arange(len(position)) % 10 == 0
    plain = worst_divergence(flow.pull(position, gradient), held_out)
    begin(flow, position, gradient, held_out)
    assert plain > 1.0
    assert worst_divergence(flow.pull(position, gradient), held_out) < 1e-3
    z = torch.zeros(3, 21)
    z[:, 0] = torch.tensor([-8.0, 0.0, 8.0]) / 3.0
    one = torch.cat([torch.zeros(1), torch.ones(20)])
    (low, _), (high, _) = flow(z), flow(z + one)
    level = low[:, :1]
    assert torch.allclose(level, 3.0 * z[:, :1], atol=0.1)
    width = (high - low)[:, 1:] / (0.5 * level).exp()
    assert (width - 1.0).abs().max() < 0.05
    offset = (low[:, 1:] - torch.linspace(-1.0, 1.0, 20) * level) / (0.5 * level).exp()
    assert offset.abs().max() < 0.1


def test_map_that_has_begun_is_one():
    """There and back; the moved density by the map's and by automatic differentiation's volume."""
    torch.manual_seed(0)
    position, gradient = _wide_funnel(2000, 4)
    flow = _fresh(position, [1, 4])
    begin(flow, position, gradient, torch.arange(2000) % 10 == 0)
    z = torch.randn(20, 5)
    x, log_volume = flow(z)
    again, back = flow.inverse(x)
    assert torch.allclose(again, z, rtol=0.0, atol=1e-10)
    assert torch.allclose(back, -log_volume, rtol=0.0, atol=1e-10)
    for row, found in zip(z, log_volume, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda row: flow(row[None])[0][0], row)
        assert abs(torch.linalg.slogdet(jacobian).logabsdet - found) < 1e-10


@pytest.mark.parametrize("sizes", [[30, 40], [1, 5]], ids=str)
def test_begins_not_where_it_cannot(sizes):
    """Of many globals, of few points, or where held-out points are no nearer, nothing changes."""
    torch.manual_seed(0)
    flow, count = TransportFlow(sizes), 60 if sizes[0] > 1 else 9
    before = {name: part.clone() for name, part in flow.state_dict().items()}
    x = torch.randn(count, sum(sizes))
    begin(flow, x, x, torch.arange(count) % 10 == 0)
    assert all(torch.equal(part, before[name]) for name, part in flow.state_dict().items())
    begin(flow, x, torch.full_like(x, torch.nan), torch.arange(count) % 10 == 0)
    assert all(torch.equal(part, before[name]) for name, part in flow.state_dict().items())


def test_log_scales_are_linear_until_they_are_bounded():
    layer = Coupling(torch.tensor([0]), torch.tensor([1])).requires_grad_(False)
    layer.add_linear(torch.zeros(2), torch.tensor([[0.0, 1.0]]))
    level = torch.tensor([[-100.0, 1.0], [-8.0, 1.0], [3.0, 1.0], [8.0, 1.0], [100.0, 1.0]])
    expected = torch.tensor([-10.0, -8.0, 3.0, 8.0, 10.0])
    assert torch.allclose(layer.forward(level)[1], expected)
