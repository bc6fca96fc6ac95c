"""Points beyond those that were seen."""

from __future__ import annotations

import torch

from pyro_hamflow.flows.transport_flow import TransportFlow
from pyro_hamflow.flows.transport_tails import Outskirts, outskirts


def test_outskirts_lie_beyond_but_not_too_far():
    """One global coordinate is far out, and none further than what was seen lies apart."""
    torch.manual_seed(0)
    seen = torch.randn(500, 6).clamp(-2.0, 2.0)
    x = outskirts(TransportFlow([1, 5]), seen, 2000)
    assert len(x) > 1500
    assert (x[:, 0].abs() > 2.5).double().mean() > 0.3
    assert (x[:, 1:].abs() > 3.5).double().mean() < 0.001
    low, high = seen.min(0).values, seen.max(0).values
    assert (x > low - (high - low)).all()
    assert (x < high + (high - low)).all()


def test_gradients_are_asked_for_there():
    """As many rows at a time as there are chains; what is no number is left out."""
    torch.manual_seed(0)
    seen, noise, rows = torch.randn(600, 4), torch.zeros(3, 0), []

    def gradients(position, noise):
        rows.append(len(position))
        value = position.sum(-1)
        return value.where(position[:, 0] < 3.0, torch.nan), 2.0 * position, noise

    known = Outskirts()
    held_out = torch.arange(600) < 60
    x, g, out = known.beside(seen[:, 1:], seen[:, 1:], held_out)
    assert torch.equal(x, seen[:, 1:])
    known.explore(TransportFlow([1, 2]), seen, torch.tensor([1, 2, 3]), gradients, noise)
    x, g, out = known.beside(seen[:, 1:], seen[:, 1:], held_out)
    assert set(rows) == {3}
    assert 60 < len(x) - 600 <= 100
    assert torch.equal(g[600:], 2.0 * x[600:])
    assert torch.equal(out[:600], held_out)
    assert 0 < out[600:].sum() < 20
