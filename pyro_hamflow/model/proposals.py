"""Where the particles of a likelihood estimate come from.

A proposal turns noise into values of a model's local sites and says by how much each value is
over-represented: the log ratio of its prior density to the density it was drawn from. Mixtures are
never sampled: every component gets particles of its own (a *stratum*), and the sum over components
is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributions as torch_dist
from torch import Tensor

from pyro_hamflow.model.normal_transform import NormalTransform, normal_transform, support
from pyro_hamflow.model.scores import Reference, reference, score_form

_SUPPORT_CHECKS = 100
_MULTIVARIATE = (torch_dist.MultivariateNormal, torch_dist.LowRankMultivariateNormal)
_GAUSSIANS = (torch_dist.Normal, *_MULTIVARIATE)


class Draw(NamedTuple):
    """Particles of one site.

    Attributes:
        value: The site's value.
        log_ratios: Log prior minus log proposal density, per element of the site's batch, for each
            density of a mixture; none where the particles come from the prior itself.
        origin: The noise from which the prior itself would have made the value; ``None`` where that
            is not known, or is the noise that was given.
    """

    value: Tensor
    log_ratios: tuple[Tensor, ...]
    origin: Tensor | None = None


class Proposal(Protocol):
    """How particles of local sites are drawn; see :class:`PriorProposal` for the plainest.

    Attributes:
        stratified: Whether each component of a mixture prior gets particles of its own.
        enough_particles: How many particles mostly serve well.
        is_defended: Whether some particles come from the prior, lest it misses something.
    """

    stratified: bool
    is_defended: bool
    enough_particles: int

    def noise_shape(self, name: str, fn: Any, components: int | None) -> torch.Size:
        """The shape of the noise of one element of a site.

        Arguments:
            name: The site.
            fn: Its prior.
            components: How many components of a mixture prior get particles of their own.
        """

    def draw(self, name: str, fn: Any, noise: Tensor, component: int | None) -> Draw:
        """Draws the value of a site.

        Arguments:
            name: The site.
            fn: Its prior distribution, given all that comes before it.
            noise: Standard normal noise, of shape ``batch_shape + noise_shape``.
            component: Which component of a mixture prior to draw from; ``None`` for others.
        """


def component_count(fn: Any) -> int | None:
    """The number of components of a mixture; ``None`` for every other distribution."""
    if isinstance(fn, torch_dist.MixtureSameFamily):
        return int(fn.mixture_distribution.logits.shape[-1])
    return None


def component_log_weight(fn: torch_dist.MixtureSameFamily, component: int) -> Tensor:
    """The log weight of one component of a mixture, of the mixture's batch shape."""
    logits = fn.mixture_distribution.logits
    return torch.log_softmax(logits, -1)[..., component]


class PriorProposal:
    """Particles from the prior, as a smooth transform of normal noise.

    They follow every parameter by themselves, and their weights are the likelihood alone, bounded
    wherever the likelihood is.
    """

    stratified = True
    is_defended = False
    enough_particles = 32

    def noise_shape(self, name: str, fn: Any, components: int | None) -> torch.Size:
        try:
            source = fn if components is None else fn.component_distribution
            return normal_transform(source).noise_shape
        except ValueError as error:
            raise ValueError(
                f"the prior of local site '{name}' does not serve as a proposal: {error}; or give "
                "`proposal` a function that samples the site"
            ) from error

    def draw(self, name: str, fn: Any, noise: Tensor, component: int | None) -> Draw:
        noise = noise.to(float_type(fn, noise.dtype))
        if component is None:
            return Draw(normal_transform(fn).draw(noise), ())
        transform = normal_transform(fn.component_distribution)
        dim = noise.dim() - len(transform.noise_shape)
        value = transform.draw(noise.unsqueeze(dim))
        return Draw(value.select(value.dim() - 1 - len(fn.event_shape), component), ())


class ProgramProposal:
    """Particles from a user's Pyro program, which samples the local sites.

    Arguments:
        distributions: What the program samples each site from, in one run.
        values: What it has drawn.
    """

    stratified = False
    is_defended = False
    enough_particles = 32

    def __init__(self, distributions: dict[str, Any], values: dict[str, Tensor]) -> None:
        self.distributions = distributions
        self.values = values

    def noise_shape(self, name: str, fn: Any, components: int | None) -> torch.Size:
        source = self.distributions[name]
        if source.batch_shape != fn.batch_shape or source.event_shape != fn.event_shape:
            raise ValueError(
                f"the proposal samples site '{name}' with batch shape "
                f"{tuple(source.batch_shape)} and event shape {tuple(source.event_shape)}: "
                f"expected {tuple(fn.batch_shape)} and {tuple(fn.event_shape)}, as in the model"
            )
        if not bool(support(source).check(fn.sample((_SUPPORT_CHECKS,))).all()):
            raise ValueError(
                f"the proposal of local site '{name}', {type(source).__name__}, has support "
                f"{support(source)}: expected one that holds every value of its prior, "
                f"{type(fn).__name__}, or the estimate would be too small"
            )
        return program_transform(name, source).noise_shape

    def draw(self, name: str, fn: Any, noise: Tensor, component: int | None) -> Draw:
        source, value = self.distributions[name], self.values[name]
        return Draw(value, (fn.log_prob(value) - source.log_prob(value),))


def float_type(fn: Any, default: torch.dtype) -> torch.dtype:
    """The floating-point type of a distribution's draws, by promotion of its arguments'.

    Arguments:
        fn: The distribution.
        default: The type of one without such arguments.
    """
    found = [part.dtype for part in _floats(fn)]
    return reduce(torch.promote_types, found) if found else default


def _floats(fn: Any) -> list[Tensor]:
    """The floating-point tensors that a distribution is made of."""
    found: list[Tensor] = []
    seen: list[Any] = []  # a transform and its inverse hold each other

    def visit(part: Any) -> None:
        if isinstance(part, Tensor) and part.is_floating_point():
            found.append(part)
        elif isinstance(part, (torch_dist.Distribution, torch_dist.Transform)):
            if any(part is other for other in seen):
                return
            seen.append(part)
            for value in vars(part).values():
                visit(value)
        elif isinstance(part, list | tuple):
            for value in part:
                visit(value)

    visit(fn)
    return found


def program_transform(name: str, fn: Any) -> NormalTransform:
    """The transform of a site of a user's proposal; raises a ValueError if none is known."""
    try:
        return normal_transform(fn)
    except ValueError as error:
        raise ValueError(f"the proposal of local site '{name}': {error}") from error


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
    name: str, fn: Any, component: int | None = None, near: Reference | None = None
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
    if component is not None:
        if near is not None:
            near = Reference(*(part.unsqueeze(len(fn.batch_shape)) for part in near))
        form = gaussian_form(name, fn.component_distribution, None, near)
        dim, count = len(fn.batch_shape), form.loc.shape[-2]

        def expand(v: Tensor) -> Tensor:
            value = form.value(v.unsqueeze(-2).expand(*v.shape[:-1], count, v.shape[-1]))
            return value.select(value.dim() - 1 - len(fn.event_shape), component)

        return GaussianForm(
            form.loc.select(dim, component), form.precision.select(dim, component), expand
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
        scores = score_form(fn, _floats(fn)[0].to(float_type(fn, torch.float32)), near)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"the prior of local site '{name}' is a {type(fn).__name__}: proposal 'laplace' "
            f"expects a transform of normal noise; {error}"
        ) from error
    return GaussianForm(scores.loc, scores.scale.pow(-2).diag_embed(), scores.value)


def _is_transformed_gaussian(fn: Any) -> bool:
    """Whether a prior is a map of a Gaussian, of the same batch, that loses nothing."""
    if not isinstance(fn, torch_dist.TransformedDistribution):
        return _is_gaussian(fn)
    same = len(fn.base_dist.batch_shape) == len(fn.batch_shape)
    bijective = all(part.bijective for part in fn.transforms)
    return same and bijective and _is_transformed_gaussian(fn.base_dist)


def _is_gaussian(fn: Any) -> bool:
    if isinstance(fn, torch_dist.Independent):
        return isinstance(fn.base_dist, torch_dist.Normal)
    return isinstance(fn, _GAUSSIANS)


def reference_of(fn: Any, value: Tensor, component: int | None) -> Reference | None:
    """Where the coordinates of a prior are held, at a value; none of Gaussian ones, which stay."""
    if component is not None:
        dim = len(fn.batch_shape)
        many = value.unsqueeze(dim).expand(fn.component_distribution.shape())
        found = reference_of(fn.component_distribution, many, None)
        return found and Reference(*(part.select(dim, component) for part in found))
    return None if _is_transformed_gaussian(fn) else reference(fn, value)
