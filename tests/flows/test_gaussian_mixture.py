"""The mixture that is fitted to draws and scores finds the modes that there are."""

from __future__ import annotations

import torch

from pyro_hamflow.flows.gaussian_mixture import GaussianMixture, fit_mixture


def narrow_and_wide_modes(seed, count=14):
    """Modes whose widths differ by a factor of thirty, with shares from a third to a hundredth."""
    torch.manual_seed(seed)
    double = {"dtype": torch.float64}
    shares = torch.linspace(0.0, -3.5, count, **double)
    mean = 6.0 * torch.rand(count, 4, **double) - 3.0
    width = torch.logspace(-2.0, -0.5, count, **double)[torch.randperm(count)]
    roots = torch.eye(4, **double).expand(count, 4, 4).clone()
    roots[:, 0, 0] = width
    return GaussianMixture(shares, mean, roots * 0.3)


def draws_and_scores(target, count):
    x = target.draw(count).requires_grad_()
    (score,) = torch.autograd.grad(target.log_density(x).sum(), x)
    return x.detach(), score


def test_small_and_narrow_modes_are_found():
    for seed in range(3):
        target = narrow_and_wide_modes(seed)
        x, score = draws_and_scores(target, 4000)
        torch.manual_seed(seed)
        found = fit_mixture(x, score, torch.ones(4000).to(x), torch.arange(4000) % 5 == 0)
        fresh = target.draw(4000)
        with torch.no_grad():
            short = target.log_density(fresh) - found.log_density(fresh)
            shares = found.log_parts(fresh).softmax(0).mean(1)
        assert float(short.mean()) < 0.3, (seed, found.num_components)
        assert float(short.mean()) > 0.0
        assert float((short > 3.0).double().mean()) < 0.005  # few draws are hardly covered
        assert torch.allclose(shares.sum(), torch.ones(()).to(x))


def test_one_gaussian_stays_one():
    torch.manual_seed(0)
    x = torch.randn(4000, 10, dtype=torch.float64)
    found = fit_mixture(x, -x, torch.ones(4000).to(x), torch.arange(4000) % 5 == 0)
    assert found.num_components == 1
