"""Where the values of sites lie, and how the real line is mapped there.

Most maps are those registered with torch. Added to them are those of directions and angles, which
forget the length of a vector, of positive definite matrices by their Cholesky factors, and of a
simplex by logarithms.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    Independent,
    IndependentTransform,
    Transform,
    TransformedDistribution,
    constraints,
)
from torch.nn.functional import logsigmoid, pad

from pyro_hamflow.model.intervals import map_onto
from pyro_hamflow.model.kinds import Node

_WRAPPERS = (MaskedDistribution, ExpandedDistribution, Independent)
_CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
RADIUS = 2.0  # of the box on the real line in which values are looked for
_FIRMNESS = 8.0  # of the lengths of vectors that stand for directions


class Direction(Transform):
    r"""The direction of a vector, whose length has a density of its own.

    A vector x of density :math:`p(x / |x|)\, c\, |x|^k \exp(-k |x|^2 / 2)` has directions of
    density p on the sphere, independent of its length, which is near one. In place of the logarithm
    of a Jacobian stands that of the other factors; c makes the whole integrate to one.
    """

    domain = constraints.real_vector
    codomain = dist.constraints.sphere
    bijective = True  # of vectors of length one

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def _call(self, x: Tensor) -> Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt()

    def _inverse(self, y: Tensor) -> Tensor:
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        square, half = x.square().sum(-1), 0.5 * (x.shape[-1] + _FIRMNESS)
        log_integral = half * math.log(2.0 / _FIRMNESS) + math.lgamma(half) - math.log(2.0)
        return 0.5 * _FIRMNESS * (square.log() - square) - log_integral


class Angle(Direction):
    r"""The angle of a vector of two entries, between :math:`-\pi` and :math:`\pi`.

    An angle itself is no coordinate to move in: the line repeats the circle for ever, and an
    interval would cut it.
    """

    codomain = constraints.real

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return shape[:-1]

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape, 2])

    def _call(self, x: Tensor) -> Tensor:
        return torch.atan2(x[..., 1], x[..., 0])

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.stack([y.cos(), y.sin()], -1)


class StickBreaking(Transform):
    """Points of a simplex, each the share that a coordinate breaks off what is left of a stick.

    The coordinates are those of torch's map. That one keeps every share away from zero and from the
    whole by the last digit of a number, beyond which its density is flat for ever; here shares are
    logarithms until the end, which become as small as numbers are.
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StickBreaking)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] - 1])

    def _call(self, x: Tensor) -> Tensor:
        broken, left = self._logs(x)
        logs = torch.cat([broken, left[..., -1:]], -1)
        return logs.softmax(-1)  # they sum to one but for rounding

    def _inverse(self, y: Tensor) -> Tensor:
        left = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return y[..., :-1].log() - left.log() + self._offset(left)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        broken, _ = self._logs(x)
        return (broken + logsigmoid(self._offset(x) - x)).sum(-1)

    def _logs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithms of all shares but the last, and of what each leaves of the stick."""
        level = x - self._offset(x)
        left = logsigmoid(-level).cumsum(-1)
        return logsigmoid(level) + pad(left[..., :-1], (1, 0)), left

    def _offset(self, x: Tensor) -> Tensor:
        """By how much coordinates are shifted, so that zero stands for equal shares."""
        return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()


class LogCholesky(Transform):
    """Positive definite matrices from the entries of their Cholesky factors, row after row.

    The logarithm of the diagonal is taken.
    """

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogCholesky)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        size = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        return torch.Size([*shape[:-1], size, size])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-2], shape[-1] * (shape[-1] + 1) // 2])

    def _call(self, x: Tensor) -> Tensor:
        size = self.forward_shape(x.shape)[-1]
        row = torch.arange(size, device=x.device)
        places = row[:, None] * (row[:, None] + 1) // 2 + row.minimum(row[:, None])
        root = x[..., places]
        root = root.tril(-1) + torch.diag_embed(root.diagonal(dim1=-2, dim2=-1).exp())
        return root @ root.mT

    def _inverse(self, y: Tensor) -> Tensor:
        root = torch.linalg.cholesky(y)
        diagonal = root.diagonal(dim1=-2, dim2=-1)
        root = root.tril(-1) + torch.diag_embed(diagonal.log())
        row, column = torch.tril_indices(*y.shape[-2:], device=y.device)
        return root[..., row, column]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        size = y.shape[-1]
        number = torch.arange(1, size + 1, device=x.device)
        logs = x[..., number * (number + 1) // 2 - 1]
        return (logs * (size + 2 - number)).sum(-1) + size * math.log(2.0)


def is_circular(fn: TorchDistribution) -> bool:
    """Whether the values of a distribution are angles."""
    return isinstance(base_of(fn), _CIRCULAR)


def base_of(fn: TorchDistribution) -> Any:
    """A distribution without the masks, plates and event dimensions around it."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def support_of(name: str, fn: TorchDistribution) -> Any:
    """The support of a site's distribution; raises a ValueError if it has none."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        # Since torch 2.13 its mixtures tell no support; their components do.
        support = getattr(getattr(fn, "component_distribution", None), "support", None)
    if support is None:
        raise ValueError(
            f"the distribution of site '{name}', {type(fn).__name__}, has no support: expected one "
            "that says where its values lie, such as `constraints.real`"
        )
    return _of_components(support)


def _of_components(support: Any) -> Any:
    """A support in which a mixture's, from torch 2.13 a class of its own, is its components'."""
    of_mixtures: Any = getattr(constraints, "MixtureSameFamilyConstraint", ())
    if isinstance(support, of_mixtures):
        return _of_components(support.base_constraint)
    if isinstance(support, constraints.independent):
        base = _of_components(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    return support


def transform_of(name: str, fn: TorchDistribution) -> Any:
    """The map from the real line to a site's support; raises a ValueError if none is known."""
    support = support_of(name, fn)
    if is_circular(fn):
        return Angle()
    if (image := _map_to_image(name, fn)) is not None:
        return image
    innermost = _innermost(support)
    if innermost is dist.constraints.sphere:
        return Direction()
    if innermost is constraints.positive_definite:
        return LogCholesky()
    if innermost is constraints.simplex:
        return StickBreaking()
    try:
        return map_onto(support)
    except NotImplementedError as error:
        raise ValueError(
            f"the distribution of site '{name}', {type(fn).__name__}, has support {support}, to "
            "which no map from the real line is registered: expected another distribution, or a "
            "map in `torch.distributions.biject_to`"
        ) from error


def _innermost(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _map_to_image(name: str, fn: TorchDistribution) -> Any:
    """The map to what transforms make of a base's support; none where that is all their range.

    A transformed distribution's support is its last transform's range: of an exponential variable
    that is shifted, the whole line, on much of which torch's density is not zero.
    """
    inner = base_of(fn)
    if getattr(type(inner), "support", None) is not TransformedDistribution.support:
        return None
    base, transforms = inner.base_dist, inner.transforms
    reals = (constraints.real, constraints.real_vector)
    if not transforms or not all(transform.bijective for transform in transforms):
        return None
    if _innermost(transforms[0].domain) not in reals or _innermost(base.support) in reals:
        return None
    image = ComposeTransform([transform_of(name, base), *transforms])
    around = fn.event_dim - image.codomain.event_dim
    return IndependentTransform(image, around) if around else image


def point_of(name: str, fn: TorchDistribution, like: Tensor) -> tuple[Any, Tensor]:
    """A site's support, and a value in its interior of the shape and type of another."""
    fn = getattr(fn, "component_distribution", fn)
    support = support_of(name, fn)
    if support.is_discrete:
        lowest = torch.as_tensor(getattr(support, "lower_bound", 0.0), device=like.device)
        return support, lowest.to(like.dtype).detach().expand(like.shape)
    transform = transform_of(name, fn)
    free = like.new_zeros(transform.inverse_shape(like.shape))
    return support, middle(transform, free).detach()


def middle(transform: Any, free: Tensor) -> Tensor:
    """A value that is like no other: a map's at zero, where it has one."""
    return transform(torch.full_like(free, float(isinstance(transform, Direction))))


def first_value(name: str, fn: TorchDistribution, *args: Any, **kwargs: Any) -> Tensor:
    """A draw of a site; of one that cannot be drawn, such as an improper one, a random value."""
    try:
        return fn(*args, **kwargs)
    except NotImplementedError:
        transform = transform_of(name, fn)
        free = torch.empty(transform.inverse_shape(fn.shape()))
        return transform(free.uniform_(-RADIUS, RADIUS))


def is_discrete(name: str, site: Node) -> bool:
    """Whether a site is summed out; raises a ValueError if it is discrete and cannot be."""
    fn = site["fn"]
    if getattr(fn, "has_enumerate_support", False):
        return True
    if getattr(support_of(name, fn), "is_discrete", False):
        raise ValueError(
            f"latent site '{name}' is a {type(fn).__name__}, discrete without finite support: "
            "expected a continuous site, or a discrete one that can be enumerated, such as a "
            "`Categorical` over the values that matter"
        )
    return False
