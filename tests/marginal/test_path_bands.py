"""How many bands a path's curvature has, seen before any are tried."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import marginalize
from pyro_hamflow.marginal import path_bands
from pyro_hamflow.programs import banded


@pytest.mark.parametrize("width", [1, 2, 7, 40])
@pytest.mark.parametrize("is_uneven", [False, True])
def test_a_column_never_tells_of_more_bands_than_there_are(width, is_uneven):
    """Nor of those that rounding of much larger rows hides."""
    torch.manual_seed(0)
    bands = torch.randn(100, width, dtype=torch.float64)
    bands[:, 0] = bands.abs().sum(-1)
    matrix = banded.dense(bands)
    if is_uneven:
        size = torch.ones(100, dtype=torch.float64)
        size[50 + width // 2 + 1 :] = 1e9
        matrix = size[:, None] * matrix * size
    noise = 1e-12 * matrix.abs().amax(-1) * torch.randn(100, dtype=torch.float64)
    products = matrix @ torch.randn(100, 2, dtype=torch.float64)
    least = path_bands._least(matrix[50] + noise, products.mT)
    assert 1 <= least <= width
    assert is_uneven or least == width


def test_a_vector_without_bands_is_seen_by_a_column(monkeypatch):
    tried, agrees = [], path_bands._agrees

    def count(sight, width):
        tried.append(width)
        return agrees(sight, width)

    monkeypatch.setattr(path_bands, "_agrees", count)
    gaps = torch.linspace(0.0, 3.0, 60, dtype=torch.float64)
    kernel = (-(gaps[:, None] - gaps).square()).exp() + 0.1 * torch.eye(60).double()

    def model(y):
        size = pyro.sample("size", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros_like(gaps), size * kernel))
        pyro.sample("y", dist.Poisson(f.exp()).to_event(1), obs=y)

    marginal = marginalize(model, ["f"], num_particles=1)
    marginal.fit(torch.ones(60).double(), pilot={"size": torch.tensor(1.0).double()})
    assert marginal.proposal.fitted["f"].bands.prior == 60
    assert len(tried) < 25
