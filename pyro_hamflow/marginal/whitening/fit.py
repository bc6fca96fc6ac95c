"""A path's whitening: Gaussian sites fitted at a mode of path and parameters, and their map.

Nothing here has to be exact: any sites give the same posterior.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.marginal.whitening.affine import AffineMap, CovarianceMap
from pyro_hamflow.marginal.whitening.path_prior import PathPrior, Values
from pyro_hamflow.marginal.whitening.search import MOST_FOLLOWED, Search
from pyro_hamflow.marginal.whitening.sites import PathSites
from pyro_hamflow.marginal.whitening.split_model import SplitModel
from pyro_hamflow.model.kinds import Arguments, Model
from pyro_hamflow.model.sites import flatten
from pyro_hamflow.programs.banded import multiply

_STEP = 0.02  # ahead and behind, on the real line


class WhiteningFit(NamedTuple):
    """What whitening a path in a model with its data needs.

    Attributes:
        split: The model.
        prior: The path's prior, with values of all latent sites at the mode.
        sites: The sites.
        centre: The parameters where they were fitted, on the real line.
        followed: How many coordinates of them, from the first on, the sites follow.
        starts: Values of all parameters, about as far from the mode as posterior draws are.
        has_kinks: Whether the rest of the density has kinks in the path.
        other_modes: How high other modes of the parameters are, as ratios of densities.
    """

    split: SplitModel
    prior: PathPrior
    sites: PathSites
    centre: Tensor
    followed: int
    starts: list[Values]
    has_kinks: bool
    other_modes: tuple[float, ...]

    @property
    def u(self) -> Tensor:
        """The path's variables at the mode, of shape ``(n,)``."""
        return self.sites.held.mode

    def map(self, parameters: Values) -> AffineMap:
        """From noise to the path's variables, given values of the sites drawn so far."""
        theta = flatten(self.split.parameters, self.prior.others | parameters, self.u)
        mode, precision = self.sites.at((theta - self.centre)[: self.followed])
        form = self.prior.form(self.u, parameters)
        if self.has_kinks:  # at one path its gradient says little, and jumps as the path moves
            return form.about(precision, mode)
        linear = multiply(precision, mode) + self.split.pull(theta, mode)
        return form.times(precision, linear)


def log_prob_of(prior: PathPrior, path: AffineMap, z: Tensor, parameters: Values) -> Tensor:
    """The log density, under a path's prior, of the noise that a map leads to it."""
    if isinstance(path, CovarianceMap):
        return path.log_prob(z)
    return prior.log_density(path.forward(z), parameters) + path.log_volume()


def fit_whitening(model: Model, data: Arguments, names: Sequence[str]) -> WhiteningFit:
    """Fits the sites of a path to a model and its data.

    Raises:
        ValueError: If the sites are not a path that can be whitened.
    """
    split = SplitModel(model, data, names)
    search = Search(split)
    theta, modes = search.top() if len(split.start) else (split.start, ())
    held = search.sites(theta)
    search.hold()
    size = min(split.num_before, MOST_FOLLOWED)
    steps = _STEP * torch.eye(len(theta), dtype=theta.dtype, device=theta.device)[:size]
    pairs = [
        (search.sites(theta + step, held.mode), search.sites(theta - step, held.mode))
        for step in steps
    ]
    sites = PathSites.following(held, pairs, _STEP)
    others = split.prior.others | split.values(theta) | split.prior.layout.values(held.mode)
    others = {name: value.detach() for name, value in others.items()}
    search.u = held.mode
    starts = [split.values(start) for start in search.draws(theta)]
    prior, has_kinks = split.prior._replace(others=others), search.place is not None
    return WhiteningFit(split, prior, sites, theta, size, starts, has_kinks, modes)
