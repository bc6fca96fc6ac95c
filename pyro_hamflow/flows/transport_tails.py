"""Where a map leads to far out, beyond what chains have seen: what it is to be checked at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_hamflow.flows.transport_flow import TransportFlow

_EACH = 6  # points that were seen, to each that is asked for further out
_HELD_OUT = 10  # of which one is held out
_FAR = 3.0  # standard deviations of the one coordinate that lies far out


@torch.no_grad()
def outskirts(flow: TransportFlow, seen: Tensor, count: int) -> Tensor:
    """Positions that one global coordinate is far out at, as the map continues there.

    A funnel's neck is where chains hardly come while a map is learned; but gradients can be asked
    for anywhere. They lie no further beyond what was seen than that lies apart.

    Arguments:
        flow: The map so far.
        seen: Positions that are known, of shape ``(points, dimension)``.
        count: How many are drawn, of which those too far out are left out.
    """
    z = torch.randn(count, seen.shape[1]).to(seen)
    candidates = flow.global_coordinates.to(seen.device)
    picked = candidates[torch.randint(len(candidates), (count,), device=seen.device)]
    z[torch.arange(count), picked] *= _FAR
    x, _ = flow(z)
    low, high = seen.min(0).values, seen.max(0).values
    return x[((x - low).abs() + (x - high).abs() < 3.0 * (high - low)).all(-1)]


class Outskirts:
    """Points beyond those that were seen, and gradients there, fit by fit."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, Tensor]] = []

    def explore(
        self,
        flow: TransportFlow,
        seen: Tensor,
        moved: Tensor,
        gradients: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        noise: Tensor,
    ) -> None:
        """Asks for gradients where a map leads to far out, as many points at a time as chains.

        Arguments:
            flow: The map.
            seen: Positions that are known, of shape ``(points, dimension)``.
            moved: The coordinates that the map moves.
            gradients: Gives a potential and its gradient, of positions and noise.
            noise: Of the chains, of shape ``(chains, noise_dimension)``.
        """
        x = outskirts(flow, seen[:, moved], len(seen) // _EACH)
        position = seen[: len(x)].clone()
        position[:, moved] = x
        for rows in position.split(len(noise)):
            if len(rows) == len(noise):
                value, gradient = gradients(rows, noise)[:2]
                good = value.isfinite() & gradient.isfinite().all(-1)
                self._found.append((rows[good][:, moved], gradient[good][:, moved]))

    def beside(self, x: Tensor, g: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, gradients and which are held out: those given, and those further out."""
        position, gradient = map(torch.cat, zip((x, g), *self._found, strict=True))
        others = torch.arange(len(position) - len(x), device=x.device) % _HELD_OUT == 0
        return position, gradient, torch.cat([held_out, others])
