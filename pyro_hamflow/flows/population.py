"""Flows built from populations: from draws, and the gradients of the potential there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_hamflow.flows.coupling import couplings
from pyro_hamflow.flows.mixture_flow import DefendedFlow, MixtureFlow
from pyro_hamflow.flows.modes import Mode, mixture_about
from pyro_hamflow.flows.product_mixture import ProductMixture, fit_product, independent
from pyro_hamflow.flows.standardised import standardise
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.networks.training import CHECK_EVERY, HELD_OUT, PATIENCE, Training, train

_OUTLYING = 10.0  # times the median size, beyond which a score does not count as larger
_STEEPEST = 10.0  # a pull on one coordinate that training follows
_WORTHWHILE = 0.01  # gain in held-out log density for which coupling layers stay


def flow_for(
    potential: Potential,
    position: Tensor,
    gradient: Tensor,
    log_weights: Tensor | None = None,
    *,
    modes: Sequence[Mode] = (),
    num_layers: int = 6,
    hidden: Sequence[int] = (64, 64),
    num_steps: int = 400,
) -> DefendedFlow:
    """The flow for a population: fitted to draws and to the gradients of the potential there.

    Arguments:
        potential: The model.
        position: Draws, about from the posterior, of shape ``(draws, dimension)``; those at which
            a gradient is not finite do not count.
        gradient: Of the potential there, of the same shape.
        log_weights: Of the draws, ``(draws,)``; equal if not given.
        modes: Those that are known; where there are several, each has a share of the flow.
        num_layers: How many coupling layers there are, if they are any better than none.
        hidden: The widths of the hidden layers of their networks.
        num_steps: How many steps their training takes at most.

    Raises:
        ValueError: If fewer than two draws have finite gradients.
    """
    position, score, weights = _usable(position, -gradient, log_weights)
    held_out = torch.arange(len(position)) % HELD_OUT == 0
    alone = independent(position, score)
    loc, scale_tril = _whitening(position, score, weights, alone)
    whitened = standardise(position, loc, scale_tril)
    mixture = fit_product(whitened, score @ scale_tril, weights, held_out, alone)
    if isinstance(mixture, ProductMixture) and bool(alone.all()):
        num_layers = 0  # they make coordinates hang on each other
    layers = couplings(position.shape[-1], num_layers, hidden)
    flow = MixtureFlow(loc, scale_tril, mixture, layers).to(position)
    if len(flow.layers):
        fit = _fit(flow, position, score, weights, num_steps=num_steps)
        if not fit.best_loss < fit.checks[0] - _WORTHWHILE:
            flow.layers = nn.ModuleList()
    about = mixture_about(modes).to(potential.example) if len(modes) > 1 else None
    return DefendedFlow(flow.to(potential.example), _prior_of(potential), about)


def train_flow(
    flow: MixtureFlow,
    position: Tensor,
    gradient: Tensor,
    log_weights: Tensor | None = None,
    *,
    num_steps: int = 400,
    learning_rate: float = 1e-3,
) -> Training:
    """Trains a flow further, on more draws; it is left in the state that does held-out ones best.

    Arguments:
        flow: The flow, changed in place.
        position: As in :func:`flow_for`.
        gradient: As in :func:`flow_for`.
        log_weights: As in :func:`flow_for`.
        num_steps: How many steps at most.
        learning_rate: The first learning rate.
    """
    position, score, weights = _usable(position, -gradient, log_weights)
    position, score, weights = (part.to(flow.loc) for part in (position, score, weights))
    return _fit(flow, position, score, weights, num_steps=num_steps, learning_rate=learning_rate)


def _fit(
    flow: MixtureFlow,
    position: Tensor,
    score: Tensor,
    weights: Tensor,
    *,
    num_steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
) -> Training:
    held_out = torch.arange(len(position), device=position.device) % HELD_OUT == 0
    judged, judges = position[held_out], weights[held_out] / weights[held_out].sum()
    position, score, weights = position[~held_out], score[~held_out], weights[~held_out]

    def loss(progress: float) -> Tensor:
        picked = torch.multinomial(weights, batch_size, replacement=True)
        return _forward_loss(flow, position[picked], score[picked])

    @torch.no_grad()
    def measure(progress: float, mean: float) -> float:
        return -float(judges @ flow.log_ratio(judged))

    return train(
        flow,
        loss,
        measure=measure,
        num_steps=num_steps,
        learning_rate=learning_rate,
        check_every=CHECK_EVERY,
        patience=PATIENCE * num_steps,
    )


def _forward_loss(flow: MixtureFlow, position: Tensor, score: Tensor) -> Tensor:
    r"""A loss whose gradient is that of the forward divergence, half of it by the scores.

    Draws and scores of the target, pulled back to z, should have the density and the score of the
    mixture. The divergence's gradient along z alone,

    .. math:: E\left[ J^\top (\nabla \log p - \nabla \log q) \cdot
        \partial_\phi T_\phi^{-1}(x) \right],

    has no noise where the flow is right, and so learns from few draws; minus the log density, the
    other half, moves the mixture's shares besides.
    """
    position = position.detach().requires_grad_()
    z, growth = flow.pull(position)
    log_density = flow.mixture.log_density(z) + growth
    (own_score,) = torch.autograd.grad(log_density.sum(), position, retain_graph=True)
    start = z.detach().requires_grad_()
    pulled = (flow.push(start)[0] * (score - own_score)).sum()
    (pull,) = torch.autograd.grad(pulled, start)
    pull = pull.clamp(-_STEEPEST, _STEEPEST)
    return 0.5 * ((pull * z).sum(-1) - log_density).mean()


def _prior_of(potential: Potential) -> Prior | None:
    """The prior, where it can be drawn from."""
    try:
        return Prior(potential)
    except ValueError:
        return None


def _usable(
    position: Tensor, score: Tensor, log_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws, scores and weights of mean one, in double precision, where all are finite."""
    if log_weights is None:
        log_weights = position.new_zeros(len(position))
    good = position.isfinite().all(-1) & score.isfinite().all(-1) & (log_weights > -math.inf)
    if int(good.sum()) < 2:
        raise ValueError(
            f"{int(good.sum())} of {len(position)} draws have finite gradients and weights: "
            "expected 2 or more to build a flow from"
        )
    weights = log_weights[good].double().softmax(0) * int(good.sum())
    return position[good].detach().double(), score[good].detach().double(), weights


def _whitening(
    position: Tensor, score: Tensor, weights: Tensor, alone: Tensor
) -> tuple[Tensor, Tensor]:
    """Centre and unit of coordinates in which each mode is about standard.

    The scores' covariance is the mean curvature, which does not know how far modes are apart, as
    the draws' covariance does. It is drawn towards its own diagonal, the more so the fewer draws
    there are; coordinates that are alone stay so.
    """
    share = weights / weights.sum()
    size = score.abs().median(0).values.clamp(min=torch.finfo(score.dtype).tiny)
    score = torch.minimum(torch.maximum(score, -_OUTLYING * size), _OUTLYING * size)
    score = score - share @ score
    diagonal = (share @ score.square()).rsqrt()
    standard = score * diagonal
    count, dimension = position.shape
    strength = 5.0 + 0.2 * dimension
    eye = torch.eye(dimension).to(score)
    curvature = (share[:, None] * standard).mT @ standard
    curvature = (count * curvature + strength * eye) / (count + strength)
    curvature = torch.where(alone | alone[:, None], curvature.diagonal().diag(), curvature)
    covariance = diagonal[:, None] * torch.linalg.inv(curvature) * diagonal
    return share @ position, torch.linalg.cholesky(0.5 * (covariance + covariance.mT))
