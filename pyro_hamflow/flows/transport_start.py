"""What a map may begin with: local centres and scales by least squares on global coordinates."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_hamflow.flows.transport_flow import TransportFlow
from pyro_hamflow.flows.transport_layers import Coupling, Locals
from pyro_hamflow.flows.transport_prior import Points, prior_and_data

_RIDGE = 1e-6  # of the points, on slopes of coordinates of unit variance: more would move necks
_POINTS_EACH = 10  # that a slope wants
_MOST_GLOBALS = 50  # the equations of each local coordinate are as many
_STRAIGHT = 1e-3  # the divergence below which nothing else is looked for than linear parts
_BETTER = 0.9  # of the divergence of nothing, below which that of linear parts has to be
# Of the divergence of linear parts, below which that of a prior and data has to be. Of correlated
# pairs of effects .3 to .8 was left, with slopes right to some hundredths: at .5 a quarter of them
# was set, and the necks of both scales were lost.
_WORTH = 0.7
_DONORS = 2  # effects whose priors others try
_ROUNDS = 4  # of scales given centres, and of centres given scales


@torch.no_grad()
def begin(
    flow: TransportFlow,
    position: Tensor,
    gradient: Tensor,
    held_out: Tensor,
    seen: int | None = None,
) -> None:
    r"""Starts a fresh flow where locals' centres and log scales are linear in the globals.

    Where :math:`b` is normal given :math:`a`, with mean :math:`m(a)` and standard deviation
    :math:`\sigma(a)`, the potential's gradient is :math:`g = (b - m) / \sigma^2` at every point,
    whatever the points are drawn from. Both follow by linear least squares in turn:
    :math:`2 \log \sigma` is the logarithm of :math:`|(b - m) / g|`, and m is
    :math:`b - \sigma^2 g`, in units of :math:`\sigma`. Of a funnel they are exact, where steps of
    an optimiser are many until they have found slopes of several units.

    Where effects have a prior that globals govern and data of their own, they are moved by both
    (:class:`~pyro_hamflow.flows.transport_layers.Locals`).

    A coordinate begins so where points held out are nearer to a normal density for it.

    Arguments:
        flow: The flow, in place; its shift and scale are kept.
        position: Of shape ``(points, dimension)``.
        gradient: The potential's gradient there.
        held_out: Which points are held out, of shape ``(points,)``.
        seen: How many of the first points chains have seen; others lie further out, and tell of
            priors alone.
    """
    seen = len(position) if seen is None else seen
    x, g = (position - flow.loc) / flow.scale, gradient * flow.scale
    for layer in reversed(flow.layers):
        if isinstance(layer, Coupling) and layer.moves in {"globals", "locals"}:
            _start(layer, flow, (x, g, held_out), seen)
        x, g = layer.pull(x, g)
    flow.keep_settled()


def _start(
    layer: Coupling, flow: TransportFlow, everything: tuple[Tensor, Tensor, Tensor], seen: int
) -> None:
    x, g, held_out = everything
    parts = x[:, layer.fixed], x[:, layer.moved], g[:, layer.moved]
    a, b, of_b = (part[:seen][~held_out[:seen]].double() for part in parts)
    beyond = [part[seen:][~held_out[seen:]].double() for part in parts]
    if layer.moves == "globals":
        a = a[:, :0]  # a centre and a scale for all
    elif a.shape[1] > min(_MOST_GLOBALS, len(a) / _POINTS_EACH):
        return
    points = x[:seen], g[:seen], held_out[:seen]
    with contextlib.suppress(torch.linalg.LinAlgError):
        constants, slopes = _linear(a, b, of_b)

        def add_linear(which: Tensor) -> None:
            zero = torch.zeros_like(constants)
            parts = (part.where(which.repeat(2), zero) for part in (constants, slopes))
            layer.add_linear(*parts)

        fresh = _each_divergence(layer, *points)
        fresh = fresh.where(fresh > torch.finfo(fresh.dtype).eps, 0.0)  # beyond rounding
        _change(layer, points, add_linear, _BETTER * fresh)
        least = _each_divergence(layer, x, g, held_out)
        limit = (_WORTH * least).where(least > _STRAIGHT, 0.0)
        crooked = limit > 0.0
        if isinstance(layer, Locals) and crooked.any():
            both = crooked.repeat(2)
            some, further = (
                (governing, *(part[:, crooked] for part in rest))
                for governing, *rest in ((a, b, of_b), beyond)
            )
            linear = constants[both], slopes[:, both]
            _set_priors(layer, flow, everything, (some, further), linear, limit)


def _set_priors(
    layer: Locals,
    flow: TransportFlow,
    everything: tuple[Tensor, Tensor, Tensor],
    known: tuple[Points, Points],
    linear: tuple[Tensor, Tensor],
    limit: Tensor,
) -> None:
    """Sets priors of the effects whose divergences they bring below limits, which are positive.

    The prior of the effect that is nearest to a normal one then is tried by all others.
    """
    wanted = limit > 0.0
    tried, reached = ~wanted, torch.full_like(limit, torch.inf)
    prior = None
    for _ in range(1 + _DONORS):
        found = prior_and_data(*known, *linear, prior)

        def set_prior(which: Tensor, found: tuple[Tensor, Tensor, Tensor] = found) -> None:
            among = which[wanted].repeat(2)
            layer.set_prior(which, *(part[..., among] for part in found))

        now = _change(layer, everything, set_prior, torch.minimum(limit, reached))
        reached = torch.minimum(reached, now)
        donor = int(reached.where(~tried, torch.inf).argmin())
        if tried[donor] or not reached[donor] < limit[donor]:
            break
        tried[donor] = True
        prior = _lent(layer, donor, wanted, flow.loc, flow.scale)
    layer.settled = reached < limit


def _lent(
    layer: Locals, donor: int, takers: Tensor, loc: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The prior of one effect in the units of others: those of a site have often the same.

    Least squares of one may have ended elsewhere, where data tell more of it than of another.
    """
    places = layer.moved[takers]
    ratio = scale[layer.moved[donor]] / scale[places]
    shift = (loc[layer.moved[donor]] - loc[places]) / scale[places]
    rows = [donor, donor + len(layer.moved)]
    (centre, log_scale), slopes = (
        part[rows].double() for part in (layer.prior, layer.prior_slopes)
    )
    constants = torch.cat([shift + ratio * centre, log_scale + ratio.log()])
    of_centre, of_scale = (row[:, None].expand(-1, len(places)) for row in slopes)
    return constants, torch.cat([of_centre * ratio, of_scale], -1)


def _change(
    layer: Coupling,
    points: tuple[Tensor, Tensor, Tensor],
    change: Callable[[Tensor], None],
    limit: Tensor,
) -> Tensor:
    """Changes a layer for those coordinates whose divergences that brings below their limits.

    Those whose limit is zero are left as they are.

    Returns:
        The divergences with the change made for all the others.
    """
    old = copy.deepcopy(layer.state_dict())
    change(limit > 0.0)
    found = _each_divergence(layer, *points)
    layer.load_state_dict(old)
    change(found < limit)
    return found


def _each_divergence(layer: Coupling, x: Tensor, g: Tensor, held_out: Tensor) -> Tensor:
    """How far each coordinate that a layer moves is from a normal one."""
    z, slope = (part[held_out][:, layer.moved] for part in layer.pull(x, g))
    return torch.log1p((slope - z).square()).mean(0).nan_to_num(nan=torch.inf)


def _linear(a: Tensor, b: Tensor, of_b: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and log scales of *b*, linear in *a*: constants, and slopes ``(of_a, 2 of_b)``."""
    mean = a.mean(0)
    size = (a - mean).square().mean(0).sqrt().clamp(min=1e-12)
    inputs = torch.cat([torch.ones_like(b[:, :1]), (a - mean) / size], -1)
    ridge = _RIDGE * len(a) * torch.eye(inputs.shape[1]).to(inputs)
    ridge[0, 0] = 0.0
    least = torch.finfo(torch.float32).tiny
    centre = torch.zeros_like(b)
    for _ in range(_ROUNDS):
        ratio = (b - centre).abs().clamp(min=least).log() - of_b.abs().clamp(min=least).log()
        of_scale = torch.linalg.solve(inputs.mT @ inputs + ridge, inputs.mT @ (0.5 * ratio))
        square = (2.0 * inputs @ of_scale).exp()
        weight = (1.0 / square) / (1.0 / square).mean(0)
        grams = torch.stack([(inputs * w[:, None]).mT @ inputs for w in weight.mT]) + ridge
        targets = inputs.mT @ (weight * (b - square * of_b))
        of_centre = torch.linalg.solve(grams, targets.mT[..., None])[..., 0].mT
        centre = inputs @ of_centre
    found = torch.cat([of_centre, of_scale], -1)
    slopes = found[1:] / size[:, None]
    return found[0] - mean @ slopes, slopes
