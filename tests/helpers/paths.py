"""Latent paths whose likelihood a filter tells: Kalman's, or one on a grid."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

T = 20
torch.manual_seed(0)
Y = (0.3 * torch.randn(T, dtype=torch.float64)).cumsum(0) + 0.5 * torch.randn(T).double()


def parameters():
    one = torch.ones((), dtype=torch.float64)
    phi = pyro.sample("phi", dist.Uniform(-one, one))
    return phi, pyro.sample("s", dist.HalfNormal(one)), pyro.sample("r", dist.HalfNormal(one))


class Autoregression(dist.TorchDistribution):
    """A stationary path about a mean, in linear time."""

    arg_constraints = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, mean, phi, scale, length):
        self.centre, self.phi, self.scale = mean, phi, scale
        super().__init__(torch.Size(), torch.Size([length]), validate_args=False)

    def log_prob(self, value):
        x = value - self.centre
        first = dist.Normal(0.0, self.scale / (1 - self.phi**2).sqrt()).log_prob(x[..., 0])
        return first + dist.Normal(self.phi * x[..., :-1], self.scale).log_prob(x[..., 1:]).sum(-1)

    def rsample(self, sample_shape=()):
        path = [self.scale / (1 - self.phi**2).sqrt() * torch.randn(sample_shape).double()]
        for _ in range(self.event_shape[0] - 1):
            path.append(self.phi * path[-1] + self.scale * torch.randn(sample_shape).double())
        return self.centre + torch.stack(path, -1)


def vector(y):
    phi, s, r = parameters()
    x = pyro.sample("x", Autoregression(0.0, phi, s, len(y)))
    pyro.sample("y", dist.Normal(x, r).to_event(1), obs=y)


def kalman(y, transition, noise, start, read, r) -> Tensor:
    """The exact log likelihood of a linear Gaussian chain, by the filter."""
    mean, covariance = torch.zeros(len(read)).double(), start
    total = torch.zeros(()).double()
    for t, value in enumerate(y):
        if t:
            mean = transition @ mean
            covariance = transition @ covariance @ transition.T + noise
        variance = read @ covariance @ read + r**2
        total = total + dist.Normal(read @ mean, variance.sqrt()).log_prob(value)
        gain = covariance @ read / variance
        mean = mean + gain * (value - read @ mean)
        covariance = covariance - gain[:, None] * (read @ covariance)
    return total


def one_by_one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def volatility(y):
    one = torch.ones((), dtype=torch.float64)
    phi = pyro.sample("phi", dist.Uniform(-one, one))
    s = pyro.sample("s", dist.HalfNormal(one))
    x = pyro.sample("x", Autoregression(0.0, phi, s, len(y)))
    pyro.sample("y", dist.Normal(y.new_zeros(()), (x / 2).exp()).to_event(1), obs=y)


def filtered(y, phi, s, points=801, reach=9.0) -> Tensor:
    """The log likelihood of stochastic volatility by a filter on a grid."""
    grid = torch.linspace(-reach, reach, points, dtype=torch.float64) * s / (1 - phi**2) ** 0.5
    width = grid[1] - grid[0]
    move = dist.Normal(phi * grid[:, None], s).log_prob(grid).exp() * width
    weights = dist.Normal(0.0, s / (1 - phi**2) ** 0.5).log_prob(grid).exp() * width
    total = torch.zeros(()).double()
    for t, value in enumerate(y):
        weights = weights @ move if t else weights
        weights = weights * dist.Normal(0.0, (grid / 2).exp()).log_prob(value).exp()
        total, weights = total + weights.sum().log(), weights / weights.sum()
    return total


def returns(length, phi=0.9, s=0.4):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, length, generator=generator, dtype=torch.float64)
    x = [noise[0, 0]]
    for z in noise[0, 1:]:
        x.append(phi * x[-1] + s * z)
    return (torch.stack(x) / 2).exp() * noise[1]
