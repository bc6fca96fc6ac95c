"""Priors that are Gaussian once they are transformed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import pyro.poutine as poutine
import torch
import torch.distributions as torch_dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_hamflow.marginal.scores import Reference, reference, score_form
from pyro_hamflow.model.float_type import float_type, floats

_MULTIVARIATE = (torch_dist.MultivariateNormal, torch_dist.LowRankMultivariateNormal)


_GAUSSIANS = (torch_dist.Normal, *_MULTIVARIATE)

Component: TypeAlias = int | Tensor  # of a mixture, the tensor a scalar


class GaussianForm(NamedTuple):
    """A prior as a transform of a Gaussian vector v, for each element of a site's batch.

    Attributes:
        loc: The mean of v, of shape ``(*batch, k)``.
        precision: The precision of v, of shape ``(*batch, k, k)``.
        value: The map from v to the site's value.
    """

    loc: Tensor
    precision: Tensor
    value: Callable[[Tensor], Tensor]

    def to(self, dtype: torch.dtype) -> GaussianForm:
        """The same of vectors of another type; the site's value keeps the prior's own type."""
        own = torch.promote_types(self.loc.dtype, self.precision.dtype)
        if own == dtype == self.loc.dtype == self.precision.dtype:
            return self
        value = self.value
        loc, precision = self.loc.to(dtype), self.precision.to(dtype)
        return GaussianForm(loc, precision, lambda v: value(v.to(own)))


def gaussian_form(
    name: str,
    fn: TorchDistribution,
    component: Component | None = None,
    near: Reference | None = None,
) -> GaussianForm:
    """Writes a prior, or a component of a mixture, as a transform of a Gaussian vector.

    Arguments:
        name: The site.
        fn: Its prior.
        component: Which component of a mixture is meant.
        near: Where the vector is held, if it is a normal score.

    Raises:
        ValueError: If no such transform is known for the prior.
    """
    if component is not None and isinstance(fn.component_distribution, torch_dist.Normal):
        of_all = fn.component_distribution
        loc, scale = (pick(part, -1, component) for part in (of_all.loc, of_all.scale))
        fn, component = torch_dist.Normal(loc, scale, validate_args=False), None
    if component is not None:
        if near is not None:
            near = Reference(*(part.unsqueeze(len(fn.batch_shape)) for part in near))
        form = gaussian_form(name, fn.component_distribution, None, near)
        dim, count = len(fn.batch_shape), form.loc.shape[-2]

        def expand(v: Tensor) -> Tensor:
            value = form.value(v.unsqueeze(-2).expand(*v.shape[:-1], count, v.shape[-1]))
            return pick(value, value.dim() - 1 - len(fn.event_shape), component)

        return GaussianForm(
            pick(form.loc, dim, component), pick(form.precision, dim, component), expand
        )
    if isinstance(fn, torch_dist.Normal):
        loc, scale = torch.broadcast_tensors(fn.loc, fn.scale)
        return GaussianForm(loc[..., None], scale.pow(-2)[..., None, None], lambda v: v[..., 0])
    if isinstance(fn, _MULTIVARIATE):
        return GaussianForm(fn.loc, fn.precision_matrix, lambda v: v)
    if isinstance(fn, torch_dist.Independent) and isinstance(fn.base_dist, torch_dist.Normal):
        shape = fn.event_shape
        loc = fn.base_dist.loc.expand(fn.batch_shape + shape).flatten(len(fn.batch_shape))
        scale = fn.base_dist.scale.expand(fn.batch_shape + shape).flatten(len(fn.batch_shape))
        return GaussianForm(
            loc, scale.pow(-2).diag_embed(), lambda v: v.reshape(v.shape[:-1] + shape)
        )
    if _is_transformed_gaussian(fn):
        form = gaussian_form(name, fn.base_dist)

        def transform(v: Tensor) -> Tensor:
            value = form.value(v)
            for part in fn.transforms:
                value = part(value)
            return value

        return GaussianForm(form.loc, form.precision, transform)
    try:
        scores = score_form(fn, floats(fn)[0].to(float_type(fn, torch.float32)), near)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"the prior of local site '{name}' is a {type(fn).__name__}: proposal 'laplace' "
            f"expects a transform of normal noise; {error}"
        ) from error
    return GaussianForm(scores.loc, scores.scale.pow(-2).diag_embed(), scores.value)


def pick(tensor: Tensor, dim: int, component: Component) -> Tensor:
    """A component's part of a tensor that has those of all components along a dimension."""
    if isinstance(component, int):
        return tensor.select(dim, component)
    return tensor.index_select(dim, component.reshape(1)).squeeze(dim)


def gaussian_shapes(
    trace: poutine.Trace, splits: Mapping[str, int | None]
) -> dict[str, torch.Size]:
    """The shapes of the coordinates in which priors are Gaussian.

    Arguments and errors are those of :meth:`Proposal.noise_shapes`.
    """
    shapes = {}
    for name, split in splits.items():
        form = gaussian_form(name, trace.nodes[name]["fn"], None if split is None else 0)
        shapes[name] = form.loc.shape[-1:]
    return shapes


def has_gaussian_form(fn: TorchDistribution, component: int | None) -> bool:
    """Whether :func:`gaussian_form` knows a transform for a prior, or a component of a mixture."""
    try:
        gaussian_form("", fn, component)
    except ValueError:
        return False
    return True


def _is_transformed_gaussian(fn: TorchDistribution) -> bool:
    """Whether a prior is a map of a Gaussian, of the same batch, that loses nothing."""
    if not isinstance(fn, torch_dist.TransformedDistribution):
        return _is_gaussian(fn)
    same = len(fn.base_dist.batch_shape) == len(fn.batch_shape)
    bijective = all(part.bijective for part in fn.transforms)
    return same and bijective and _is_transformed_gaussian(fn.base_dist)


def _is_gaussian(fn: TorchDistribution) -> bool:
    if isinstance(fn, torch_dist.Independent):
        return isinstance(fn.base_dist, torch_dist.Normal)
    return isinstance(fn, _GAUSSIANS)


def reference_of(fn: TorchDistribution, value: Tensor, component: int | None) -> Reference | None:
    """Where the coordinates of a prior are held, at a value; none of Gaussian ones, which stay."""
    if component is not None:
        dim = len(fn.batch_shape)
        many = value.unsqueeze(dim).expand(fn.component_distribution.shape())
        found = reference_of(fn.component_distribution, many, None)
        return found and Reference(*(part.select(dim, component) for part in found))
    return None if _is_transformed_gaussian(fn) else reference(fn, value)
