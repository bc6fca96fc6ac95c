"""Where guides start: a Laplace approximation of the posterior, the prior, or a distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
_ROUNDS, _STEPS = 20, 25  # of a descent, and steps of each
_NEWTON_DECREMENT = 1.0  # below which a descent has come to a mode
_PAIRS = 10  # of draws that a Gaussian of independent coordinates is fitted over
_FIRST_LOG_SCALE = -1.0  # of its coordinates
_FIT_ROUNDS = 4  # of that fit at most: 60 steps do for 38 coordinates
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
    Where a descent comes to no mode, as in the neck of a hierarchy, whose density grows without end
    while its mass vanishes, both are those of a Gaussian of independent coordinates, if it fits
    better.

    Arguments:
        value_of: The potential of one position.
        position: Where to begin the search, of shape ``(dimension,)``.

    Returns:
        The mode, and a lower triangle of shape ``(dimension, dimension)``.
    """
    best = _lowest(value_of, position, _ROUNDS)
    hessian = torch.autograd.functional.hessian(value_of, best).double()
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.mT).nan_to_num())
    sizes = values.abs().clamp(min=_FLATTEST)
    slope = torch.autograd.functional.jacobian(value_of, best).double() @ vectors
    triangle = torch.linalg.qr((vectors * sizes.rsqrt()).mT).R.mT  # however badly conditioned
    triangle = (triangle * triangle.diagonal().sign()).to(best)
    if float((slope.square() / sizes).sum()) < _NEWTON_DECREMENT:
        return best, triangle
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(_PAIRS, len(best), generator=generator, dtype=torch.float64)
    noise = torch.cat([half, -half]).to(best)
    other = _mean_field(value_of, position, noise)
    by_curvature = _misfit(value_of, best, triangle, noise)
    return other if _misfit(value_of, *other, noise) < by_curvature else (best, triangle)


def _lowest(value_of: Callable[[Tensor], Tensor], position: Tensor, rounds: int) -> Tensor:
    """Where a descent from a position ends, or has come to by so many rounds of steps."""
    best = position.detach().clone()
    point = best.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = value_of(point)
        value.backward()
        return value

    lowest = float(value_of(best).detach())
    for _ in range(rounds):
        optimizer.step(closure)
        value = float(value_of(point.detach()).detach())
        if not value < lowest - 1e-6:
            break
        lowest, best = value, point.detach().clone()
    return best


def _mean_field(
    value_of: Callable[[Tensor], Tensor], position: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The Gaussian of independent coordinates that fits best over these draws.

    As they stay the same, the search is that of a minimum.

    References:
        | Black Box Variational Inference with a Deterministic Objective (Giordano, Ingram,
          Broderick, 2024)
        | https://arxiv.org/abs/2304.05527
    """

    def misfit(both: Tensor) -> Tensor:
        loc, log_scale = both.chunk(2)
        return _misfit(value_of, loc, log_scale.exp().diag(), noise)

    begin = torch.cat([position, torch.full_like(position, _FIRST_LOG_SCALE)])
    loc, log_scale = _lowest(misfit, begin, _FIT_ROUNDS).chunk(2)
    return loc, log_scale.exp().diag()


def _misfit(
    value_of: Callable[[Tensor], Tensor], loc: Tensor, scale_tril: Tensor, noise: Tensor
) -> Tensor:
    """Minus the evidence lower bound of a Gaussian, but for a constant, by its draws of noise."""
    energies = [value_of(loc + scale_tril @ row) for row in noise]
    return torch.stack(energies).mean() - scale_tril.diagonal().log().sum()


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
