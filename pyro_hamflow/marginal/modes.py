r"""Where the local posterior of each element has its modes, for likelihoods that have several.

Newton's method starts from many places of the prior at once, those of all elements together. What
has come to rest is ordered by its Laplace mass, and what lies where a heavier mode does is dropped.
Elements differ in how many modes they have. One with fewer than the others has the same again in
the places left, which share its mass, so that no particle is idle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.marginal.joint_density import Evaluate, Joint
from pyro_hamflow.marginal.likelihood_site import apply, solve
from pyro_hamflow.marginal.newton import maximise
from pyro_hamflow.marginal.noise_layout import Block, Layout
from pyro_hamflow.marginal.points import lattice
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.programs.vectorize import Vectorized

MOST_MODES = 6  # of an element; the prior's particles are there for others
_STARTS = 32  # of searches for each element
_BREADTH = 1.5  # of the starts, in prior standard deviations: parameters may be others later
_NEAR = 0.25  # squared standard deviations of a mode, within which others are the same
_UNREST = 0.01  # the Newton decrement up to which a search has come to rest
_FLAT = 1e-6  # the least curvature of a top
_LIGHTEST = 12.0  # by how much a mode's log mass may be below the heaviest's
_EVEN = 0.2  # what is shared out evenly: elsewhere, light modes may be heavy


def find_modes(
    group: Group, layout: Layout, joint: Joint, values: dict[str, Tensor], most: int
) -> tuple[Tensor, Tensor]:
    """Finds the modes of each element's log joint density.

    Arguments:
        group: The group.
        layout: Its coordinates.
        joint: The log joint density of its elements.
        values: Constrained values of the parameters.
        most: How many modes an element may have; the heaviest are kept.

    Returns:
        Their coordinates, of shape ``(modes, *group.shape, dimension)``, and the logarithm of each
        one's share, ``(modes, *group.shape)``; an element's shares sum to one.
    """
    evaluate = joint(values, 1.0)
    each = Vectorized(f"Modes of {list(group.sites)}")

    def log_joint(v: Tensor) -> Tensor:
        return evaluate({name: part.spread(v, group) for name, part in layout.blocks.items()})[0]

    starts = each(lambda z: _from_prior(evaluate, layout.blocks, group, z), _levels(group, layout))
    found = maximise(lambda v: each(log_joint, v), starts.detach())
    curvatures, axes = torch.linalg.eigh(found.curvature)
    along = apply(axes.mT, found.gradient)
    is_top = (curvatures > _FLAT).all(-1) & ((along.square() / curvatures).sum(-1) < _UNREST)
    log_mass = found.value - 0.5 * curvatures.clamp(min=_FLAT).log().sum(-1)
    log_mass = torch.where(is_top & log_mass.isfinite(), log_mass, -torch.inf)
    return _heaviest(found.place, found.curvature, log_mass, most)


def _levels(group: Group, layout: Layout) -> Tensor:
    """Noise that spreads the starts evenly, the same for each element; the first is zero."""
    points = (lattice(_STARTS, layout.dimension) + 0.5 / _STARTS) % 1.0
    z = _BREADTH * torch.special.ndtri(points).to(layout.example)
    z = torch.cat([torch.zeros_like(z[:1]), z])
    z = z.reshape(len(z), *[1] * len(group.shape), layout.dimension)
    return z.expand(len(z), *group.shape, layout.dimension)


def _from_prior(evaluate: Evaluate, blocks: dict[str, Block], group: Group, z: Tensor) -> Tensor:
    """The prior's coordinates at some noise, each site's given those before."""
    parts: list[Tensor] = []
    for name, block in blocks.items():
        rest = z[..., block.start :]
        v = torch.cat([*parts, torch.zeros_like(rest)], -1)
        loc, precision = evaluate({n: b.spread(v, group) for n, b in blocks.items()})[1][name]
        value = loc + solve(torch.linalg.cholesky(precision), block.spread(z, group))
        parts.append(block.collect(value, group))
    return torch.cat(parts, -1)


def _heaviest(
    places: Tensor, curvature: Tensor, log_mass: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """The heaviest of many places that are not the same, all elements to the same number."""
    picks, masses = [], []
    left = log_mass
    for _ in range(most):
        mass, pick = left.max(0)
        picks.append(pick)
        masses.append(mass)
        gap = places - _pick(places, pick)
        distance = (gap * apply(_pick(curvature, pick), gap)).sum(-1)
        left = torch.where(distance < _NEAR, -torch.inf, left)
        left = left.scatter(0, pick[None], -torch.inf)
    mass = torch.stack(masses)
    counts = (mass > mass[0] - _LIGHTEST).sum(0).clamp(min=1)
    slots = torch.arange(int(counts.max()), device=counts.device)
    slots = slots.reshape(-1, *[1] * counts.dim())
    mode = slots % counts
    own = mass.gather(0, mode)
    own = torch.where(counts == 1, 0.0, own)  # which may have come to no rest at all
    times = (len(slots) - 1 - mode) // counts + 1
    share = own.sub(own.amax(0)).exp() / times
    even = 1.0 / (counts * times)
    share = torch.lerp(share / share.sum(0), even.to(share), _EVEN)
    return _pick_each(places, torch.stack(picks).gather(0, mode)), share.log()


def _pick(rows: Tensor, pick: Tensor) -> Tensor:
    """For each element its own row, of shape ``(*elements, *)``."""
    return _pick_each(rows, pick[None])[0]


def _pick_each(rows: Tensor, picks: Tensor) -> Tensor:
    """For each element several rows of its own, of shape ``(picks, *elements, *)``."""
    rank = rows.dim() - picks.dim()
    index = picks.reshape(*picks.shape, *[1] * rank)
    return rows.gather(0, index.expand(*picks.shape, *rows.shape[picks.dim() :]))
