"""Where the estimated posterior is highest: sites are fitted there, and chains start there.

The estimate times the prior is climbed with the noise held, so that it is a smooth function. A
proposal that was fitted elsewhere makes the estimate noisy, which mostly means too low, so that the
climb would lead back there: it is fitted anew at every point. The gradient of the estimate with the
proposal held is that of the marginal posterior, up to the estimate's noise (Fisher's identity), and
the climb ends where it vanishes. Nothing here has to be exact: warm-up fits the proposal once more,
at draws of the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions.transforms import IndependentTransform, Transform

from pyro_hamflow.marginal.climb import NEAR, Top, climb, covariance_of, newton_distance
from pyro_hamflow.marginal.even_noise import even_noise
from pyro_hamflow.marginal.other_modes import other_modes
from pyro_hamflow.marginal.proposals.choice import choose_proposal
from pyro_hamflow.marginal.tuned_estimator import TunedEstimator
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.supports import RADIUS, is_discrete, middle, transform_of
from pyro_hamflow.model.trace import run_with
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.functions import InOtherWords

# Of 26 mixed models of textbooks each climb came to rest after 6 to 46 gradients. With independent
# points in place of even ones half of them did not, and were off by up to 60 posterior deviations.
_PARTICLES = 16
_LOOKS, _STARTS = 3, 4  # climbs, and if none of them comes to rest
_DRAWS = 9  # of the prior, whose medians are typical
_UNREST = 0.5  # by how much a top without rest has to be higher: the height of one such deviation
_MOVED = 0.5  # posterior standard deviations, beyond which another top is meant
_NUDGES, _NUDGE = 4, 1e-6  # of a position in single precision: slopes differ by rounding alone
_WIDTHS = (0.001, 0.01, 0.1, 1.0)  # of changes beside it
_TOLD = 10.0  # times rounding, from which on a change of slopes is taken for what it is
_END = 40.0  # of the logarithm by which a support is stretched: a scale of 4e-18 to 2e17
_BEYOND = 60.0  # which is too far to have been led there, not thrown


class Pilot(NamedTuple):
    """Parameter values of high posterior density.

    Attributes:
        values: Constrained values of the parameters.
        distance: How far the top may be, in posterior standard deviations.
        escaped: Sites that every climb has led to the end of their support.
        refused: The error that a search in double precision ended with; empty if it was made.
        other_modes: How high other modes' tops are beside this one, as ratios of densities.
        covariance: Roughly the posterior's, of unconstrained values; none if nothing is known.
    """

    values: dict[str, Tensor]
    distance: float
    escaped: tuple[str, ...] = ()
    refused: str = ""
    other_modes: tuple[float, ...] = ()
    covariance: Tensor | None = None


def find_pilot(
    marginal: TunedEstimator,
    data: Arguments,
    start: dict[str, Tensor] | None = None,
) -> Pilot:
    """Climbs the estimated posterior to its top, fitting the likelihood sites on the way.

    Few particles do, however many the marginal model has. All chains start near the pilot, so that
    no diagnostic tells of modes that none of them comes to. So there are several climbs: the first
    begins near zero, the second at the prior's medians, others at random places as far from zero as
    other kernels' chains start. None goes on beyond what is taken for the end of a support; where
    all of them come there, the density may have no bound, and the pilot is where the first began.

    Arguments:
        marginal: A marginal model.
        data: What the model is called with.
        start: Unconstrained values to start from, whose mode is meant; near zero if not given.
    """
    plan = marginal.plan(*data.args, **data.kwargs)
    layouts = plan.layouts.values()
    least = max(len(layout.strata) for layout in layouts)
    most = max(layout.num_particles for layout in layouts)
    count = max(least, min(most, _PARTICLES))
    rough = marginal.refined(count, "iid")
    if not rough.proposal.is_final:
        # Whatever the particles come from later, here they had better know the data.
        rough.take(choose_proposal(plan))
    with random_state_kept(), rough.hold(plan.structure):
        torch.manual_seed(0)
        trace = run_with(marginal.model, lambda msg: None, *data.args, **data.kwargs)
        drawn = _free_values(trace, plan.structure.parameters)
        somewhere = {name: middle(transform, free) for name, transform, free in drawn}
        rough.follow(somewhere, *data.args, **data.kwargs)  # so that the model can run at all
        potential = Potential(rough, *data, separate_noise=True)
        gradient = _gradient_of(rough, potential, data)
        tops: list[Top] = []
        starts: list[Tensor] = []
        escaped: set[str] = set()
        for trial in range(_STARTS if potential.dimension else 0):
            rested = [top for top in tops if top.distance <= NEAR]
            if rested and (trial >= _LOOKS or start is not None):
                break
            # Not zero itself, which may be a saddle, as it is for mixtures.
            position = 0.1 * torch.randn(potential.dimension).to(potential.example)
            if trial == 0:
                _fill(position, potential, start or {})
            elif trial == 1 and start is None:
                _fill(position, potential, typical(marginal, data))
            else:
                position = RADIUS * (2.0 * torch.rand(potential.dimension) - 1.0).to(position)
            starts.append(position)
            top = climb(gradient, position, tops=rested)
            if top.value == -math.inf:
                escaped |= _at_end(potential, top.position, _END)
            else:
                tops.append(top)
        if not starts:
            return Pilot({}, 0.0)
        if not tops:
            return Pilot(potential.constrain(starts[0]), math.inf, tuple(sorted(escaped)))
        best = min(tops, key=_height)
        others = other_modes(gradient, best, tops)
        if rough.proposal.is_defended:
            best = _undefended(rough, best, count, data)
        if best.position.dtype != torch.float64:
            best = _doubted(gradient, best)
    values, covariance = potential.constrain(best.position), covariance_of(best.pairs)
    return Pilot(values, best.distance, other_modes=others, covariance=covariance)


def typical(marginal: TunedEstimator, data: Arguments) -> dict[str, Tensor]:
    """Unconstrained parameter values in the middle of their prior."""
    names = marginal.plan(*data.args, **data.kwargs).structure.parameters
    draws: dict[str, list[Tensor]] = {}
    with random_state_kept():
        torch.manual_seed(0)
        for _ in range(_DRAWS):
            trace = run_with(marginal.model, lambda msg: None, *data.args, **data.kwargs)
            for name, _, free in _free_values(trace, names):
                draws.setdefault(name, []).append(free)
    return {name: torch.stack(values).median(0).values for name, values in draws.items()}


def _free_values(trace: Trace, names: Iterable[str]) -> Iterator[tuple[str, Transform, Tensor]]:
    """The names of continuous parameters, their maps to supports, and values on the real line."""
    for name in names:
        site = trace.nodes[name]
        if not is_discrete(name, site):
            transform = transform_of(name, site["fn"])
            yield name, transform, transform.inv(site["value"])


def _fill(position: Tensor, potential: Potential, given: Mapping[str, Tensor]) -> None:
    """Puts values by site in their places, but those of another shape: refused later, by name."""
    for part in potential.sites:
        value = given.get(part.name)
        if value is not None and value.shape == part.shape and bool(value.isfinite().all()):
            position[part.start : part.stop] = value.to(position).reshape(-1)


def _undefended(rough: TunedEstimator, top: Top, count: int, data: Arguments) -> Top:
    """The top without points from the prior, if it is near; else that with them.

    Those keep a climb from places that suit one of an element's modes alone. But one that falls
    near the mode of an element that the data know well pulls the slope to its own side, by a fifth
    of a posterior deviation for counts of thousands. Twice as many points, which the climb has not
    seen, tell how far off it may be for its own, and for rounding.
    """
    slopes = []
    for number in (count, 2 * count):
        other = rough.refined(number, "iid")  # held at its structure, as this one is
        other.take(rough.proposal.undefended())
        potential = Potential(other, *data, separate_noise=True)
        slopes.append(_gradient_of(other, potential, data))
    _, slope = slopes[0](top.position)
    if not newton_distance(top.pairs, slope) <= _MOVED:
        return top
    near = climb(slopes[0], top.position, top.pairs)
    moved = -float(slope @ (near.position - top.position))  # square of the way, by both slopes
    if not (near.distance <= NEAR and moved <= _MOVED**2):
        return top
    unseen = newton_distance(near.pairs, slopes[1](near.position)[1])
    return near._replace(distance=max(near.distance, unseen))


def _doubted(gradient: Callable[[Tensor], tuple[float, Tensor]], top: Top) -> Top:
    """The top of a search in single precision, with how far rounding of slopes alone may lead.

    Rounding looks like a curvature so high that every place is near the top. So the curvature along
    rounding's own direction is taken from a change so wide that slopes tell more than rounding.
    """

    def slope(step: Tensor) -> Tensor:
        return gradient(top.position + step)[1].double()

    scale = 1.0 + top.position.abs()
    slopes = [slope(_NUDGE * scale * torch.randn_like(scale)) for _ in range(_NUDGES)]
    spread = torch.stack(slopes).std(0)
    noise = float(spread.norm())
    if not noise > 0.0:
        return top
    direction = (spread / noise).to(scale)
    for width in _WIDTHS:
        step = width * direction
        change = float((slope(step) - slope(-step)) @ direction.double())
        if change > _TOLD * noise:
            return top._replace(distance=max(top.distance, noise * (2 * width / change) ** 0.5))
    return top._replace(distance=math.inf)


def _gradient_of(
    rough: TunedEstimator, potential: Potential, data: Arguments
) -> Callable[[Tensor], tuple[float, Tensor]]:
    """Minus the log of the estimate times the prior and its slope, with the noise held."""
    noise = even_noise(rough.plan(*data.args, **data.kwargs), potential)

    def gradient(position: Tensor) -> tuple[float, Tensor]:
        if _at_end(potential, position, _END):
            thrown = bool(_at_end(potential, position, _BEYOND))
            return math.inf if thrown else -math.inf, torch.zeros_like(position)
        try:
            rough.follow(potential.constrain(position), *data.args, **data.kwargs)
            position = position.detach().requires_grad_()
            with InOtherWords():
                value = potential.value_of_one(position, noise)
                (slope,) = torch.autograd.grad(value, position)
        except (RuntimeError, ValueError):  # as of a matrix that is not positive definite there
            return math.inf, torch.zeros_like(position)
        return float(value.detach()), slope

    return gradient


def _height(top: Top) -> float:
    """By what tops are compared. One at which a climb came to rest is where it wanted to go."""
    value = top.value if math.isfinite(top.value) else math.inf
    return value if top.distance <= NEAR else value + _UNREST


def _at_end(potential: Potential, position: Tensor, end: float) -> set[str]:
    """The sites that a position puts at the end of their support, as a scale is at zero."""
    found = set()
    for site in potential.sites:
        free, transform = position[site.start : site.stop].reshape(site.shape), site.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        stretch = transform.log_abs_det_jacobian(free, transform(free)).abs()
        if bool((stretch * stretch.numel() > end * free.numel()).any()):
            found.add(site.name)
    return found
