"""Where the particles of an estimate lie: independent points, pairs, or a shifted lattice.

All are functions of standard normal noise. For independent points the noise is the points
themselves. For antithetic pairs each is followed by its mirror image, so that whatever is odd in
the noise cancels: the skewness that a Gaussian proposal lacks, above all. For a lattice it is the
shift: the points fill the unit cube evenly, whatever the shift. Each point alone is standard normal
in all three, so that the estimate stays unbiased, and varies less.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

POINTS = ("iid", "antithetic", "rqmc")
_CANDIDATES = 64  # generators that the best lattice is sought among


def noise_count(points: str, num_points: int) -> int:
    """How many noise vectors a set of points takes."""
    return {"iid": num_points, "antithetic": (num_points + 1) // 2}.get(points, 1)


def place_points(points: str, num_points: int, noise: Tensor) -> Tensor:
    """Turns noise into standard normal points.

    Arguments:
        points: ``"iid"``, ``"antithetic"`` or ``"rqmc"``.
        num_points: How many points.
        noise: Standard normal noise, of shape ``(noise_count, *, dimension)``.

    Returns:
        The points, of shape ``(num_points, *, dimension)``; each alone is standard normal, up to
        the precision of floating-point numbers near 1, which ends a lattice's points at |z| = 8.
    """
    if points == "iid":
        return noise
    if points == "antithetic":
        return torch.cat([noise, -noise])[:num_points]
    grid = lattice(num_points, noise.shape[-1]).to(noise)
    grid = grid.reshape(num_points, *[1] * (noise.dim() - 2), noise.shape[-1])
    edge = torch.finfo(noise.dtype).eps
    moved = grid + torch.special.ndtr(noise)
    return torch.special.ndtri((moved - moved.floor()).clamp(edge, 1 - edge))


@lru_cache(maxsize=64)
def lattice(num_points: int, dimension: int) -> Tensor:
    """A rank-one lattice of Korobov's form with a well-chosen generator.

    The generator is the one, among at most 64 candidates, with the smallest worst-case error over
    functions with square-integrable mixed derivatives.

    Arguments:
        num_points: Number of points N.
        dimension: Their dimension d.

    Returns:
        Points of the unit cube, of shape ``(N, d)``.

    References:
        | Lattice Methods for Multiple Integration (Sloan and Joe, 1994)

    Example:
        >>> lattice(4, 1).squeeze()
        tensor([0.0000, 0.2500, 0.5000, 0.7500], dtype=torch.float64)
    """
    index = torch.arange(num_points, dtype=torch.float64)[:, None]
    if dimension == 1 or num_points < 3:
        return (index * torch.ones(dimension) / num_points) % 1.0
    candidates = torch.arange(1, num_points)
    candidates = candidates[torch.gcd(candidates, torch.tensor(num_points)) == 1]
    candidates = candidates[:: max(1, len(candidates) // _CANDIDATES)]
    best, best_error = index, float("inf")
    for generator in candidates.tolist():
        powers = [1]
        for _ in range(dimension - 1):
            powers.append(powers[-1] * generator % num_points)
        grid = (index * torch.tensor(powers) / num_points) % 1.0
        bernoulli = grid.square() - grid + 1 / 6
        error = (1 + bernoulli).prod(-1).mean().item()
        if error < best_error:
            best, best_error = grid, error
    return best
