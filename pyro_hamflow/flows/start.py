"""Where guides start: a Laplace approximation of the posterior, the prior, or a distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_hamflow.flows.energy import energy
from pyro_hamflow.flows.guided_sites import sees_part
from pyro_hamflow.flows.standardised import standardised
from pyro_hamflow.model.kinds import Args, Kwargs, Model
from pyro_hamflow.model.many_runs import many_runs
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.sites import Site, add_jacobians, constrain, split
from pyro_hamflow.model.trace import run_with
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.validation import no_validation

PILOT_DRAWS = 1000
_ROUNDS, _STEPS = 100, 5  # of a descent, and steps of each
_NEWTON_DECREMENT = 1.0  # below which a descent has come to a mode
_LOOKS = 20  # at places on its way, if not
_FLATTEST = 1e-6  # the least curvature that counts as one


def guide_start(
    start: Any,
    model: Model,
    args: Args,
    kwargs: Kwargs,
    sites: list[Site],
    position: Tensor,
    saved: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor, Any]:
    """Centre and scale of a flow's coordinates, and the base in them.

    Arguments:
        start: ``"laplace"``, ``"prior"`` or a distribution of positions.
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        sites: Its latent sites as parts of a position.
        position: Where the search for the mode begins, of shape ``(dimension,)``.
        saved: Centre and scale, where they are known.

    Returns:
        The centre, the scale as a lower triangle, and a distribution; none for ``"laplace"``, where
        the posterior is about standard.

    Raises:
        ValueError: If the distribution is of another dimension.
    """
    if start == "laplace":
        loc, scale_tril = saved or laplace(potential_of_one(model, args, kwargs, sites), position)
        return loc, scale_tril, None
    given = PriorDistribution(model, args, kwargs) if start == "prior" else start
    if tuple(given.event_shape) != (len(position),):
        raise ValueError(
            f"`start` has event shape {tuple(given.event_shape)}: expected ({len(position)},), "
            f"for the sites {[site.name for site in sites]}"
        )
    draws = given.sample((PILOT_DRAWS,)).to(position)
    low, middle, high = draws.quantile(torch.tensor([0.16, 0.5, 0.84]).to(draws), 0)
    loc, scale_tril = saved or (middle, torch.diag(0.5 * (high - low)))
    return loc, scale_tril, standardised(given, loc, scale_tril.diagonal())


def laplace(value_of: Callable[[Tensor], Tensor], position: Tensor) -> tuple[Tensor, Tensor]:
    """The mode of a density and the root of its covariance there.

    Where the potential curves downwards, or not at all, the size of the curvature stands in for it.
    Where there is no mode, as in the neck of a hierarchy, whose density grows without end while its
    mass vanishes, it is the place on the way down that has the most mass.

    Arguments:
        value_of: The potential of one position.
        position: Where to begin the search, of shape ``(dimension,)``.

    Returns:
        The mode, and a lower triangle of shape ``(dimension, dimension)``.
    """
    way = _descend(value_of, position)
    best, curvature = way[-1], _curvature(value_of, way[-1])
    slope = torch.autograd.functional.jacobian(value_of, best).double() @ curvature.axes
    if not float((slope.square() / curvature.sizes).sum()) < _NEWTON_DECREMENT:
        looked_at = way[:: -(-len(way) // _LOOKS)]
        every = [_curvature(value_of, place) for place in looked_at]
        mass = [
            -float(value_of(place).detach()) - 0.5 * float(found.sizes.log().sum())
            for place, found in zip(looked_at, every, strict=True)
        ]
        highest = max(range(len(mass)), key=mass.__getitem__)
        best, curvature = looked_at[highest], every[highest]
    root = curvature.axes * curvature.sizes.rsqrt()
    triangle = torch.linalg.qr(root.mT).R.mT  # of the covariance, however badly conditioned
    return best, (triangle * triangle.diagonal().sign()).to(best)


def _descend(value_of: Callable[[Tensor], Tensor], position: Tensor) -> list[Tensor]:
    """Places on the way down to a mode, the lowest last."""
    way = [position.detach().clone()]
    point = way[0].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = value_of(point)
        value.backward()
        return value

    lowest = float(value_of(way[0]).detach())
    for _ in range(_ROUNDS):
        optimizer.step(closure)
        value = float(value_of(point.detach()).detach())
        if not value < lowest - 1e-6:
            break
        lowest = value
        way.append(point.detach().clone())
    return way


class Curvature(NamedTuple):
    """Of a potential: its principal axes, as columns, and the sizes of its curvature along them."""

    sizes: Tensor
    axes: Tensor


def _curvature(value_of: Callable[[Tensor], Tensor], position: Tensor) -> Curvature:
    hessian = torch.autograd.functional.hessian(value_of, position).double()
    values, axes = torch.linalg.eigh(0.5 * (hessian + hessian.mT).nan_to_num())
    return Curvature(values.abs().clamp(min=_FLATTEST), axes)


def potential_of_one(
    model: Model, args: Args, kwargs: Kwargs, sites: list[Site]
) -> Callable[[Tensor], Tensor]:
    """The potential of one position; where data are subsampled, as a fixed part of them tells it.

    Arguments:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        sites: The latent sites as parts of a flat vector.
    """
    with random_state_kept(), poutine.block(), no_validation():
        torch.manual_seed(0)
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    if sees_part(trace):
        return _seeded_potential(model, args, kwargs, sites)
    potential = Potential(model, args, kwargs, separate_noise=True)
    noise = potential.vectors(1)[1][0]
    return lambda position: potential.value_of_one(position, noise)


def _seeded_potential(
    model: Model, args: Args, kwargs: Kwargs, sites: list[Site]
) -> Callable[[Tensor], Tensor]:
    def value_of(position: Tensor) -> Tensor:
        free = split(sites, position)
        values = constrain(sites, free)
        with random_state_kept():
            torch.manual_seed(0)
            trace = run_with(model, lambda msg: values.get(msg["name"]), *args, **kwargs)
        with no_validation():
            log_joint = trace.log_prob_sum()
        return -add_jacobians(log_joint, sites, free)

    return value_of


class PriorDistribution(TorchDistribution):
    """A model's prior on the real line, all parameters in one vector.

    Arguments:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, model: Model, args: Args, kwargs: Kwargs) -> None:
        def hidden(msg: Any) -> bool:
            return msg["type"] == "sample" and (
                msg["is_observed"]
                or isinstance(msg["fn"], _Subsample)
                or msg["infer"].get("noise", False)
            )

        self.potential = Potential(poutine.block(model, hide_fn=hidden), args, kwargs)
        super().__init__(torch.Size(), torch.Size([self.potential.dimension]), validate_args=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> PriorDistribution:
        return self  # nothing in it changes

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        potential = self.potential

        def draw() -> Tensor:
            trace = run_with(
                potential.original, lambda msg: None, *potential.args, **potential.kwargs
            )
            return potential.flatten(
                {s.name: trace.nodes[s.name]["value"] for s in potential.sites}
            )

        try:
            draws = many_runs(draw, shape.numel(), potential.example)
        except RuntimeError:  # torch's for an operation that it cannot batch
            with torch.no_grad():
                draws = torch.stack([draw() for _ in range(shape.numel())])
        return draws.reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        flat = value.reshape(-1, value.shape[-1])
        noise = flat.new_zeros(len(flat), 0)
        return -energy(self.potential, flat, noise).reshape(value.shape[:-1])
