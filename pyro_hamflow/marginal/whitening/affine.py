r"""Gaussian priors times Gaussian sites, and the affine maps that they are.

The product of a prior and sites is a Gaussian of mean m and precision :math:`Q`. Its map takes
standard normal noise z to :math:`x = m + L z` with :math:`L L^\top = Q^{-1}`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_hamflow.marginal.path_looks import added, deviations_of
from pyro_hamflow.programs import banded
from pyro_hamflow.programs.large_factors import weighted_square
from pyro_hamflow.programs.triangular import linalg_solve_triangular


class AffineMap(Protocol):
    """From noise ``(n,)`` to the variables of a path, and back."""

    def forward(self, z: Tensor, /) -> Tensor:
        """The variables."""

    def inverse(self, x: Tensor, /) -> Tensor:
        """The noise."""

    def log_volume(self) -> Tensor:
        """The logarithm of the volume's growth from noise to variables."""


class PriorForm(Protocol):
    """A Gaussian prior."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What it is made from."""

    def times(self, precision: Tensor, linear: Tensor, /) -> AffineMap:
        """The map of the prior times sites.

        Arguments:
            precision: The sites' precision by its lower bands, of shape ``(n, q)``.
            linear: Their linear terms, of shape ``(n,)``.
        """

    def about(self, precision: Tensor, mean: Tensor, /) -> AffineMap:
        """The map of the prior times sites of some precision with which it has a given mean."""

    def deviations(self, precision: Tensor, /) -> Tensor:
        """The standard deviations of the prior times sites, of shape ``(n,)``."""


class BandedPrior(NamedTuple):
    """A Gaussian by its precision.

    Attributes:
        bands: The lower bands of the precision, of shape ``(n, p)``.
        linear: The precision times the mean.
    """

    bands: Tensor
    linear: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.bands, self.linear

    @classmethod
    def at(cls, u: Tensor, gradient: Tensor, bands: Tensor) -> BandedPrior:
        """From the gradient and minus the Hessian of a log density somewhere."""
        return cls(bands, gradient + banded.multiply(bands, u))

    def times(self, precision: Tensor, linear: Tensor) -> BandedMap:
        root = banded.cholesky(added(self.bands, precision))
        return BandedMap(root, self.linear + linear)

    def about(self, precision: Tensor, mean: Tensor) -> BandedMap:
        whole = added(self.bands, precision)
        return BandedMap(banded.cholesky(whole), banded.multiply(whole, mean))

    def deviations(self, precision: Tensor) -> Tensor:
        return deviations_of(added(self.bands, precision))


class BandedMap(NamedTuple):
    r"""The map of a Gaussian given by its precision :math:`R R^\top`.

    Attributes:
        root: The lower bands of R.
        linear: The precision times the mean.
    """

    root: Tensor
    linear: Tensor

    def forward(self, z: Tensor) -> Tensor:
        return banded.draw(self.root, self.linear, z)

    def inverse(self, x: Tensor) -> Tensor:
        along = banded.multiply_root(self.root, x, transposed=True)
        return along - banded.solve(self.root, self.linear)

    def log_volume(self) -> Tensor:
        return -0.5 * banded.log_det(self.root)


class CovariancePrior(NamedTuple):
    r"""A Gaussian by its covariance :math:`C C^\top`.

    Attributes:
        loc: Its mean.
        root: C, lower triangular.
    """

    loc: Tensor
    root: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.loc, self.root

    def times(self, precision: Tensor, linear: Tensor) -> CovarianceMap:
        root = self._root(precision)
        pull = self.root.mT @ (linear - banded.multiply(precision, self.loc))
        return CovarianceMap(self, root, _solve(root, pull))

    def about(self, precision: Tensor, mean: Tensor) -> CovarianceMap:
        root = self._root(precision)
        return CovarianceMap(self, root, root.mT @ _solve(self.root, mean - self.loc))

    def deviations(self, precision: Tensor) -> Tensor:
        none = torch.zeros_like(self.loc)
        return CovarianceMap(self, self._root(precision), none).deviations()

    def log_density(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its own log density, but for a constant, and minus the gradient of that."""
        v = _solve(self.root, x - self.loc)
        return -0.5 * (v @ v) - _log_diagonal(self.root), _solve(self.root.mT, v, upper=True)

    def _root(self, precision: Tensor) -> Tensor:
        """Of the precision of prior times sites, in the prior's own standard normal noise."""
        eye = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        if precision.shape[-1] == 1:
            return torch.linalg.cholesky(eye + weighted_square(self.root, precision))
        weighted = banded.dense(precision) @ self.root
        return torch.linalg.cholesky(eye + self.root.mT @ weighted)


class CovarianceMap(NamedTuple):
    r"""The map of a prior of covariance :math:`C C^\top` times sites.

    In :math:`v = C^{-1} (x - \mu)`, which is standard normal under the prior, the product has
    precision :math:`R R^\top`. No precision of the prior is formed: those of smooth processes are
    nearly singular.

    Attributes:
        prior: The prior.
        root: R, lower triangular.
        linear: R's solution of the linear term.
    """

    prior: CovariancePrior
    root: Tensor
    linear: Tensor

    def scores(self, z: Tensor) -> Tensor:
        """The variables as the prior's own standard normal noise."""
        return _solve(self.root.mT, self.linear + z, upper=True)

    def forward(self, z: Tensor) -> Tensor:
        return self.prior.loc + self.prior.root @ self.scores(z)

    def draw(self, noise: Tensor) -> Tensor:
        """What :meth:`forward` gives, by the name that paths are drawn by."""
        return self.forward(noise)

    def deviations(self) -> Tensor:
        """The variables' standard deviations, of shape ``(n,)``."""
        moves = torch.linalg.solve_triangular(self.root, self.prior.root.mT, upper=False)
        return moves.norm(dim=0)

    def pulled(self, direction: Tensor) -> Tensor:
        """The direction of the noise that moves the variables in one the furthest."""
        return _solve(self.root, self.prior.root.mT @ direction)

    def inverse(self, x: Tensor) -> Tensor:
        v = _solve(self.prior.root, x - self.prior.loc)
        return self.root.mT @ v - self.linear

    def log_volume(self) -> Tensor:
        return _log_diagonal(self.prior.root) - _log_diagonal(self.root)

    def log_prob(self, z: Tensor) -> Tensor:
        """The prior's log density of the variables, in terms of the noise."""
        v = self.scores(z)
        normal = -0.5 * (v @ v) - 0.5 * len(v) * math.log(2.0 * math.pi)
        return normal - _log_diagonal(self.root)


def _solve(root: Tensor, vector: Tensor, *, upper: bool = False) -> Tensor:
    return linalg_solve_triangular(root, vector[:, None], upper=upper)[:, 0]


def _log_diagonal(root: Tensor) -> Tensor:
    return root.diagonal().log().sum()
