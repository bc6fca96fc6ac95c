"""The marginal likelihood of a mixed model, its effects integrated out by quadrature.

Written apart from the package, and from the models in Pyro: whoever adds a model here writes its
likelihood down a second time, as a function of standardised effects.

The likelihood of an element is an integral over its effects z, which are standard normal a priori
(the likelihood scales them). It is taken by adaptive Gauss-Hermite quadrature: nodes are centred at
the element's mode and scaled by the curvature there, anew for each parameter value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import Tensor

from tests.mixed_models.priors import Prior

NODES = {0: 1, 1: 41, 2: 15}  # along each dimension of the effects
_BLOCK = 1_500_000  # numbers held at once
_ITERATIONS = 60
_CLOSE_ENOUGH = 0.01  # to the mode, in standard deviations

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """What the quadrature needs to know of a model.

    Attributes:
        priors: The prior of each parameter.
        likelihood: From parameters, standardised effects and the model's data to the log-likelihood
            of each visit. A scalar parameter has shape (*, 1, 1, 1), a vector of p (*, p); each
            effect is (*, elements, nodes, 1), data are (elements, 1, visits) or
            (elements, 1, visits, p). A model whose effects are a mixture has one likelihood for
            each component.
        log_weights: The log probabilities of the components, from the parameters.
        dimension: The number of effects of an element; none if the likelihood has them integrated
            out in closed form.
        summary: What the likelihood takes in place of the model's data, made from them.
    """

    priors: dict[str, Prior]
    likelihood: Callable[..., Tensor] | tuple[Callable[..., Tensor], ...]
    log_weights: Callable[[Values], tuple[Tensor, ...]] | None = None
    dimension: int = 1
    summary: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def names(self) -> list[str]:
        """One name for each unconstrained number."""
        return [
            name if prior.size == 1 else f"{name}[{i}]"
            for name, prior in self.priors.items()
            for i in range(prior.size)
        ]

    def split(self, free: Tensor) -> dict[str, Tensor]:
        """Unconstrained vectors by parameter, each ``(*, size)``."""
        sizes = [prior.size for prior in self.priors.values()]
        return dict(zip(self.priors, free.split(sizes, -1), strict=True))

    def log_prior(self, free: Tensor) -> Tensor:
        """The log prior density of unconstrained vectors."""
        parts = self.split(free)
        return sum(prior.log_density(parts[name]).sum(-1) for name, prior in self.priors.items())

    def values(self, free: Tensor) -> Values:
        """The parameters as the likelihood takes them."""
        values = {}
        for name, part in self.split(free).items():
            value = self.priors[name].constrain(part)
            values[name] = value[..., None, None] if self.priors[name].size == 1 else value
        return values


@dataclass
class Marginal:
    """The marginal likelihood of a data set under a model."""

    truth: Truth
    data: tuple[Tensor, ...]
    nodes: int | None = None
    start: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        data = self.data if self.truth.summary is None else self.truth.summary(*self.data)
        rows = np.concatenate([a.double().reshape(len(a), -1).numpy() for a in data], 1)
        _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
        self.rows = tuple(a[torch.as_tensor(first)][:, None].double() for a in data)
        self.counts = torch.as_tensor(counts).double()  # elements with the same data
        many = isinstance(self.truth.likelihood, tuple)
        self.likelihoods = self.truth.likelihood if many else (self.truth.likelihood,)
        dimension = self.truth.dimension
        x, w = np.polynomial.hermite_e.hermegauss(self.nodes or NODES[dimension])
        self.grid = torch.as_tensor(list(product(x, repeat=dimension)))
        weights = torch.as_tensor(list(product(w, repeat=dimension)))
        self.log_weights = (weights.log() + 0.5 * self.grid.square()).sum(-1)
        visits = max(a[0].numel() for a in self.rows)
        self.cost = len(counts) * visits * len(self.grid)

    def log_likelihood(self, free: Tensor) -> Tensor:
        """The log marginal likelihood of unconstrained vectors, (points, D), one each."""
        block = max(1, _BLOCK // self.cost)
        parts = [self._of_block(part) for part in free.split(block)]
        return torch.cat(parts)

    def log_posterior(self, free: Tensor) -> Tensor:
        """The same with the log prior."""
        return self.log_likelihood(free) + self.truth.log_prior(free)

    def _of_block(self, free: Tensor) -> Tensor:
        values = self.truth.values(free)
        elements = []
        for i, likelihood in enumerate(self.likelihoods):
            if self.truth.dimension == 0:
                elements.append(likelihood(values, (), *self.rows).sum(-1).squeeze(-1))
            else:
                elements.append(self._integrate(i, values, len(free)))
        if self.truth.log_weights is None:
            joined = elements[0]
        else:
            weights = self.truth.log_weights(values)
            pairs = zip(elements, weights, strict=True)
            joined = torch.stack([a + w.squeeze(-1).squeeze(-1) for a, w in pairs]).logsumexp(0)
        return (joined * self.counts).sum(-1)

    def _log_joint(self, i: int, values: Values, z: Tensor) -> Tensor:
        """Of effects ``(*, elements, nodes, dimension)``: likelihood times standard normal."""
        effects = tuple(part[..., None] for part in z.unbind(-1))
        likelihood = self.likelihoods[i](values, effects, *self.rows).sum(-1)
        prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        return likelihood + prior

    def _integrate(self, i: int, values: Values, count: int) -> Tensor:
        mode, precision = self._mode(i, {n: v.detach() for n, v in values.items()}, count)
        root = torch.linalg.cholesky(torch.linalg.inv(precision))
        z = mode[..., None, :] + torch.einsum("bjde,ke->bjkd", root, self.grid)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        logs = self._log_joint(i, values, z) + self.log_weights
        return logs.logsumexp(-1) + log_det

    def _mode(self, i: int, values: Values, count: int) -> tuple[Tensor, Tensor]:
        """The mode of each element's effects by Newton steps, and the curvature there."""
        elements, dimension = len(self.counts), self.truth.dimension
        while len(self.start) <= i:
            self.start.append(torch.zeros(elements, dimension, dtype=torch.float64))
        z = self.start[i].expand(count, elements, dimension)
        for _ in range(_ITERATIONS):
            z = z.detach().requires_grad_()
            value = self._log_joint(i, values, z[..., None, :])
            (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
            rows = [
                torch.autograd.grad(part.sum(), z, retain_graph=True)[0]
                for part in gradient.unbind(-1)
            ]
            precision = _definite(-torch.stack(rows, -1).detach())
            step = torch.linalg.solve(precision, gradient.detach()[..., None])[..., 0]
            step = step.nan_to_num(0.0).clamp(-1.0, 1.0)
            z = z.detach() + step
            size = step.abs() * precision.diagonal(dim1=-2, dim2=-1).sqrt()
            if float(size.max()) < _CLOSE_ENOUGH:
                break
        self.start[i] = z.mean(0).nan_to_num(0.0)
        return z.detach(), precision


def _definite(precision: Tensor) -> Tensor:
    """A scale for the nodes, whatever the curvature: it need not be concave, nor even finite."""
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype)
    finite = precision.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    precision = torch.where(finite, precision, eye)
    if len(eye) == 1:
        return precision.clamp(0.25, 1e20)
    return precision + 1e-9 * precision.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * eye
