"""What moves along a map are worth beside plain ones."""

from __future__ import annotations

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch

from pyro_hamflow.mcmc.adaptation.transport_trial import Moves, compare
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.transported import TransportedTarget
from tests.helpers.transports import random_flow


def moves_of(rows, gradients, target=None):
    moves = Moves(target)
    for row in rows:
        moves.note(row, SimpleNamespace(n_gradients=torch.tensor([1, gradients])))
    return moves


def test_worth_of_moves():
    """Autoregressions of a known coefficient are worth (1 - a) / (1 + a) draws, at known costs."""
    potential = Potential(lambda: pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
    flow = random_flow([2], spread=0.0)
    flow.loc.zero_(), flow.scale.fill_(1.0)
    for layer in (flow.layers[0], flow.layers[-1]):
        layer.skew.zero_(), layer.log_tail.zero_()
    target = TransportedTarget(potential, flow)
    chains, coefficient = [torch.randn(10_000, 2)], torch.tensor([0.8, 0.0])
    for _ in range(7):
        fresh = (1.0 - coefficient**2).sqrt() * torch.randn(10_000, 2)
        chains.append(coefficient * chains[-1] + fresh)
    independent = [torch.randn(10_000, 2) for _ in range(8)]
    verdict = compare(potential, target, moves_of(independent, 3, target), moves_of(chains, 7))
    assert abs(verdict.mapped.draw - 1.0) < 0.05
    assert abs(verdict.plain.draw - 0.2 / 1.8) < 0.01
    assert verdict.mapped.gradients == 3.0
    assert verdict.plain.gradients == 7.0
    assert verdict.objection() is None
    dear = verdict._replace(mapped=verdict.mapped._replace(seconds=100.0))
    assert "a draw along it takes 3.0 gradients" in dear.objection()
