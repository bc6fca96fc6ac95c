"""Hessians of a path's density are products with all directions at once."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow.marginal.whitening.curvature import gradient_and_bands
from pyro_hamflow.programs import banded
from pyro_hamflow.programs.capture import capture, largest_tensor

PLACES = torch.linspace(0.0, 3.0, 24, dtype=torch.float64)


def curved(n, width):
    """From a length to the slope of what the bands of a process' density add up to."""
    x = PLACES[:n]

    def run(length):
        length = length.detach().requires_grad_()
        u = (0.3 * x).requires_grad_()
        kernel = (-0.5 * ((x[:, None] - x) / length).square()).exp() + 0.1 * torch.eye(n)
        root = torch.linalg.cholesky(kernel)
        prior = dist.MultivariateNormal(0.0 * x, scale_tril=root, validate_args=False)
        value = prior.log_prob(u) - u.exp().sum()
        gradient, bands = gradient_and_bands(value, u, width)
        total = gradient.square().sum() + bands.sin().sum()
        return gradient.detach(), bands.detach(), torch.autograd.grad(total, length)[0]

    return run


def test_they_are_what_torch_finds():
    length = torch.tensor(0.7, dtype=torch.float64)
    x = PLACES[:8]
    kernel = (-0.5 * ((x[:, None] - x) / length).square()).exp() + 0.1 * torch.eye(8)

    def density(u):
        return -0.5 * u @ torch.linalg.solve(kernel, u) - u.exp().sum()

    hessian = torch.autograd.functional.hessian(density, 0.3 * x)
    gradient, bands, slope = capture(curved(8, 8), length)(length)
    torch.testing.assert_close(banded.dense(bands), -hessian)
    torch.testing.assert_close(gradient, torch.func.grad(density)(0.3 * x))
    known = curved(8, 8)(length)[2]
    torch.testing.assert_close(slope, known)


@pytest.mark.parametrize("width", [3, None])
def test_more_places_are_no_more_operations(width):
    length = torch.tensor(0.7, dtype=torch.float64)
    graphs = [capture(curved(n, width or n), length) for n in (12, 24)]
    few, many = (len(graph.graph.nodes) for graph in graphs)
    assert many <= few + 2
    assert largest_tensor(graphs[1]) <= 2 * 24**2
