"""A rough guess of the parameters, from which likelihood sites are fitted and chains started."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.sites import transform_of
from pyro_hamflow.model.structure import run_with

_PARTICLES = 16
_ROUNDS = 4
_STEPS = 40
_LEARNING_RATE = 0.1


def find_pilot(
    marginal: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    start: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Climbs the estimated posterior for a few steps, refitting the likelihood sites on the way.

    A rough guess needs few particles, however many the marginal model has.

    Arguments:
        marginal: A marginal model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        start: Unconstrained values to start from; near zero if not given.

    Returns:
        Constrained values of the parameters.
    """
    plan = marginal.plan(*args, **kwargs)
    names = plan.structure.parameters
    least = max(len(layout.strata) for layout in plan.layouts.values())
    most = max(layout.num_particles for layout in plan.layouts.values())
    count = max(least, min(most, _PARTICLES))
    rough = type(marginal)(marginal.model, marginal.sites, count, marginal.proposal, "iid")
    trace = run_with(marginal.model, lambda msg: None, *args, **kwargs)
    transforms = {
        name: transform_of(name, trace.nodes[name]["fn"])
        for name in names
        if not getattr(trace.nodes[name]["fn"], "has_enumerate_support", False)
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        point = {}
        for name, transform in transforms.items():
            # Not zero itself, which may be a saddle, as it is for mixtures.
            free = 0.1 * torch.randn_like(transform.inv(trace.nodes[name]["value"]))
            given = (start or {}).get(name, free)  # one of another shape is refused later, by name
            point[name] = transform(given.to(free) if given.shape == free.shape else free)
        for _ in range(_ROUNDS):
            rough.fit(*args, pilot=point, **kwargs)
            potential = Potential(rough, args, kwargs, separate_noise=True)
            point = potential.constrain(_climb(potential, potential.flatten(point)))
    return point


def _climb(potential: Potential, position: Tensor) -> Tensor:
    """A few steps of gradient descent on the potential, the noise held."""
    position = position.detach().clone().requires_grad_()
    noise = potential.draw_noise(1)[0]
    optimizer = torch.optim.Adam([position], lr=_LEARNING_RATE)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        value = potential.value_of_one(position, noise)
        if not bool(value.isfinite()):
            break
        value.backward()
        if position.grad is None or not bool(position.grad.isfinite().all()):
            break
        optimizer.step()
    return position.detach()
