r"""Maps fitted to a density by its gradients: the Fisher divergence.

With draws x of anything, and the gradient g of the potential there, a map's coordinates z of x and
the gradient :math:`g_z` of the moved density's potential there tell how far that density is from
N(0, I), whose gradient is z. Each draw gives as many equations as it has coordinates.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from pyro_hamflow.flows.transport_flow import TransportFlow
from pyro_hamflow.networks.training import BATCH, Training, train

FIRST_RATE, LATER_RATE = 2e-2, 5e-3  # of learning, by a new map and by one that goes on
_CHECKS = 20  # of a training, which takes all its steps: many gain only as the rate falls


def divergences(coordinates: Tensor, gradient: Tensor) -> Tensor:
    r"""How far gradients are from those of N(0, I), at each point, of shape ``(points,)``.

    :math:`\log(1 + |g - z|^2 / d)`: the logarithm keeps single points, such as the first of a
    chain, from outweighing all others.

    Arguments:
        coordinates: Of shape ``(points, dimension)``.
        gradient: The potential's gradient there.
    """
    return torch.log1p((gradient - coordinates).square().mean(-1))


@torch.no_grad()
def mean_divergence(points: tuple[Tensor, Tensor], held_out: Tensor) -> float:
    """The mean of points held out, of coordinates and gradients; infinite if it is no number."""
    value = float(divergences(*points)[held_out].mean())
    return value if math.isfinite(value) else math.inf


def worst_divergence(points: tuple[Tensor, Tensor], held_out: Tensor) -> float:
    """That of the one coordinate that is furthest from normal."""
    each = zip(*(part.split(1, -1) for part in points), strict=True)
    return max(mean_divergence(one, held_out) for one in each)


def whitened(x: Tensor, g: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Points and gradients in the coordinates that a covariance makes of them, as a mass does."""
    root = torch.linalg.cholesky(covariance.double())
    centred = x.double() - x.double().mean(0) + g.double().mean(0) @ covariance.double()
    z = torch.linalg.solve_triangular(root, centred.mT, upper=False).mT
    return z, g.double() @ root


def fit_transport(
    flow: TransportFlow,
    position: Tensor,
    gradient: Tensor,
    held_out: Tensor,
    *,
    num_steps: int,
    learning_rate: float = FIRST_RATE,
) -> Training:
    """Fits a flow to gradients of a potential, in place, by the Fisher divergence.

    It is trained in single precision, which is twice as fast; any map is exact.

    Arguments:
        flow: The flow; trained further if it was trained before.
        position: Of shape ``(points, dimension)``.
        gradient: The potential's gradient there.
        held_out: Which points are held out, to tell states apart by, of shape ``(points,)``.
        num_steps: The most steps of the optimiser.
        learning_rate: Of its first steps; it decays to nothing.

    Returns:
        How it went, measured at the points held out.
    """
    trained = copy.deepcopy(flow).float()
    x, g = position.float(), gradient.float()
    known, test = (~held_out).nonzero()[:, 0], held_out

    def loss(progress: float) -> Tensor:
        picked = known[torch.randint(len(known), (min(BATCH, len(known)),), device=x.device)]
        return divergences(*trained.pull(x[picked], g[picked])).mean()

    @torch.no_grad()
    def measure(progress: float, mean: float) -> float:
        return float(divergences(*trained.pull(x[test], g[test])).mean())

    check_every = max(1, num_steps // _CHECKS)
    training = train(
        trained,
        loss,
        measure=measure,
        num_steps=num_steps,
        learning_rate=learning_rate,
        check_every=check_every,
        patience=num_steps,
    )
    flow.load_state_dict(trained.state_dict())
    return training
