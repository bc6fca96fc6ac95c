"""Guides that are symmetric, whatever their flow is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_hamflow.flows.pyro_guides import as_guide
from pyro_hamflow.model.guides import DensityGuide
from pyro_hamflow.process import random_state_kept

_SAME = 1e-4  # difference between two images of a point, relative to its size


class SymmetrisedGuide:
    r"""A guide averaged over a finite group of maps, such as :math:`\phi \to -\phi`.

    A draw of the guide is moved by one of the maps, each as likely, so that the density is

    .. math:: \frac{1}{|G|} \sum_{T \in G} q(T^{-1} x)\, |\det \partial T^{-1} / \partial x|.

    Where the posterior has the symmetry, a flow need only find one of the modes that are images of
    each other. It trains by :func:`~pyro_hamflow.fit_guide`, and
    :func:`~pyro_hamflow.importance_sample` and :class:`~pyro_hamflow.FlowMH` take it.

    Arguments:
        guide: The guide, changed in place where this is trained: any that tells the density of
            positions.
        maps: The group without the identity, as transforms of torch or Pyro of positions on the
            real line, all sites in one vector: ``AffineTransform(0.0, -1.0)`` for a change of sign,
            ``Permute`` for exchanges of coordinates. Each needs an inverse.

    Raises:
        TypeError: If the guide lacks a method of the protocol, or a map is no transform.
        ValueError: If there are no maps; at the first call, if they and the identity are no group.

    Invariant:
        Weights and chains are exact for any maps; they help where the posterior has the symmetry.

    Example:
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 2.0))
        ...     pyro.factor("modes", -8.0 * (x.square() - 1.0).square())
        >>> guide = AutoNeuralHamiltonianFlow(model, hidden=(8, 8))
        >>> guide = SymmetrisedGuide(guide, [dist.transforms.AffineTransform(0.0, -1.0)])
        >>> fit = fit_guide(model, guide, num_steps=100, disable_progbar=True)
        >>> found = importance_sample(model, guide)
        >>> abs(float(found.mean((found.samples["x"] > 0.0).double())) - 0.5) < 0.1
        True
    """

    def __init__(self, guide: Any, maps: Sequence[Transform]) -> None:
        self.guide: Any = as_guide("guide", guide, DensityGuide)
        self.maps = list(maps)
        if not self.maps:
            raise ValueError("`maps` is empty: expected one map or more, the identity aside")
        for each in self.maps:
            if not isinstance(each, Transform):
                raise TypeError(f"`maps` has {each!r} in it: expected transforms of torch or Pyro")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.guide).__name__}, {len(self.maps)} maps)"

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Has the guide see the model's arguments, and sees that the maps are a group."""
        self.guide.prepare(*args, **kwargs)
        with random_state_kept(), torch.no_grad():
            _refuse_no_group(self.maps, self.guide.draw(1)[0][0])

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Positions ``(num_samples, dimension)`` and their log densities, ``(num_samples,)``.

        Gradients flow through both as far as the guide's do.
        """
        start, log_density = self.guide.draw(num_samples)
        picked = torch.randint(len(self.maps) + 1, (num_samples,), device=start.device)
        images = [self._image(index, start) for index in range(len(self.maps) + 1)]
        ends, growths = zip(*images, strict=True)
        rows = torch.arange(num_samples, device=start.device)
        position = torch.stack(ends)[picked, rows]
        own = log_density - torch.stack(growths)[picked, rows]
        # What the guide draws beside positions is kept where the draw came from.
        terms = self._terms(position).index_put((picked, rows), own)
        return position, terms.logsumexp(0) - math.log(len(terms))

    def log_ratio(self, position: Tensor) -> Tensor:
        """The log density of positions ``(positions, dimension)``, ``(positions,)``."""
        terms = self._terms(position)
        return terms.logsumexp(0) - math.log(len(terms))

    def _image(self, index: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """Where a map leads, and the log growth of volume; the identity is the first."""
        if index == 0:
            return start, start.new_zeros(len(start))
        return _move(self.maps[index - 1], start)

    def _terms(self, position: Tensor) -> Tensor:
        """The log density that each map brings there, ``(maps, positions)``."""
        starts, growths = [position], [position.new_zeros(len(position))]
        for each in self.maps:
            start, growth = _move(each.inv, position)
            starts.append(start)
            growths.append(growth)
        log_density = self.guide.log_ratio(torch.cat(starts))
        return log_density.reshape(len(starts), -1) + torch.stack(growths)

    # --- trained as the guide is ----------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.guide.parameters()

    def state_dict(self) -> dict[str, Any]:
        return self.guide.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        return self.guide.load_state_dict(state_dict)


def _move(transform: Transform, start: Tensor) -> tuple[Tensor, Tensor]:
    """Images of positions, and the log growth of volume at each."""
    end = transform(start)
    growth = transform.log_abs_det_jacobian(start, end)
    return end, growth.sum(-1) if growth.dim() == start.dim() else growth.expand(len(start))


def _refuse_no_group(maps: Sequence[Transform], point: Tensor) -> None:
    """Raises a ValueError if a map after a map is none of the maps."""
    images = [point, *(each(point[None])[0] for each in maps)]
    known = torch.stack(images)
    for index, image in enumerate(images):
        for each in maps:
            after = each(image[None])[0]
            distance = (known - after).abs().amax(-1).min()
            if not float(distance) <= _SAME * (1.0 + float(after.abs().max())):
                raise ValueError(
                    f"`maps` and the identity are no group: map {maps.index(each)} after "
                    f"{'the identity' if index == 0 else f'map {index - 1}'} is none of them"
                )
