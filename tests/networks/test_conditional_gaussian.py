"""Gaussians given a context: their density, their root, and what they learn."""

from __future__ import annotations

import torch

from pyro_hamflow.networks.conditional_gaussian import ConditionalGaussian


def test_density_is_that_of_mean_and_root():
    gaussian = ConditionalGaussian(3, 2, hidden=(8,))
    position, context = 2.0 + 3.0 * torch.randn(50, 3), torch.randn(50, 2)
    gaussian.whiten_by(position, context)
    location, root = gaussian.place(context)
    law = torch.distributions.MultivariateNormal(location, scale_tril=root)
    apart = gaussian(position, context) + law.log_prob(position)
    assert torch.allclose(apart, apart[0].expand(50))


def test_density_teaches_the_posterior():
    """Of a standard normal number seen through noise of variance a quarter."""
    truth = torch.randn(4000, 1)
    seen = truth + 0.5 * torch.randn(4000, 1)
    gaussian = ConditionalGaussian(1, 1, hidden=(16,))
    gaussian.whiten_by(truth, seen)
    optimiser = torch.optim.Adam(gaussian.parameters(), 1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        gaussian(truth, seen).mean().backward()
        optimiser.step()
    new = torch.tensor([[-1.0], [0.0], [1.5]])
    location, root = gaussian.place(new)
    assert torch.allclose(location, 0.8 * new, atol=0.1)
    assert torch.allclose(root[..., 0], torch.full((3, 1), 0.2**0.5), atol=0.05)


def test_contexts_without_bound_are_bounded():
    gaussian = ConditionalGaussian(2, 3)
    strange = torch.tensor([torch.inf, torch.nan, -1e300])
    assert torch.equal(gaussian.standardised(strange), torch.tensor([10.0, 0.0, -10.0]))
    assert all(part.isfinite().all() for part in gaussian.place(strange))
