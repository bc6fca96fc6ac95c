r"""Proposals for the noise of a likelihood estimate, reversible for its law N(0, I).

A proposal that leaves N(0, I) reversible is accepted on the ratio of the estimates alone,
:math:`\min(1, \hat p(\theta, u') / \hat p(\theta, u))`. And where the estimate is a product over
independent elements, so is its density given the parameters: each element's noise is then accepted
or rejected by itself, on its own factor. A thousand elements, none of which would all be accepted
at once, are each accepted nearly always.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyro_hamflow.checks import between, whole
from pyro_hamflow.mcmc.transitions.base import select, select_evaluation
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.trace import plate_shape

EvaluateNoise = Callable[[Tensor], Evaluation]


class Refresh(Protocol):
    """A move of the noise with the parameters held."""

    def __call__(
        self, blocks: Blocks, noise: Tensor, current: Evaluation, evaluate: EvaluateNoise
    ) -> tuple[Tensor, Evaluation, Tensor, int]:
        """Moves the noise of every chain.

        Arguments:
            blocks: Which parts of the noise are accepted together.
            noise: Of shape ``(chains, noise_dimension)``.
            current: The model's evaluation at that noise.
            evaluate: The model's evaluation at other noise, parameters held.

        Returns:
            The new noise; the evaluation there; the share that moved, of shape ``(chains,)``; how
            many densities it took.
        """


class Blocks:
    """Parts of the noise that are accepted or rejected on their own.

    Arguments:
        potential: The target. If its likelihood estimate factorises over elements, each element is
            a block; otherwise all noise is one.
    """

    def __init__(self, potential: Potential) -> None:
        recovery = potential.recovery
        self.groups = [e.group for e in recovery.estimates] if recovery.factorises else []
        sites = {site.name: site for site in potential.noise_sites}
        self.sites = [sites[f"{group.name}_noise"] for group in self.groups]

    def log_ratios(self, new: Evaluation, old: Evaluation) -> dict[str, Tensor]:
        """By how much each block's log estimate is larger at ``new`` than at ``old``.

        Returns:
            By the group's name, of shape ``(chains, *plates)``; one entry of shape ``(chains,)``
            under the empty name, where all noise is one block.
        """
        if not self.groups:
            return {"": (old.value.double() - new.value.double())}
        return {
            group.name: new.log_likelihoods[group.name].double()
            - old.log_likelihoods[group.name].double()
            for group in self.groups
        }

    def merge(self, accepted: dict[str, Tensor], new: Tensor, old: Tensor) -> Tensor:
        """Noise with the accepted blocks from ``new`` and the others from ``old``."""
        if not self.groups:
            return select(accepted[""], new, old)
        merged = old.clone()
        for group, site in zip(self.groups, self.sites, strict=True):
            part = slice(site.start, site.stop)
            shape = (len(old), *site.shape)  # chains, vectors, plates, coordinates
            taken = accepted[group.name][:, None, ..., None]
            mixed = torch.where(taken, new[:, part].reshape(shape), old[:, part].reshape(shape))
            merged[:, part] = mixed.reshape(len(old), -1)
        return merged

    def turn(self, angle: dict[str, Tensor], noise: Tensor, fresh: Tensor) -> Tensor:
        """Noise on the ellipse through ``noise`` and ``fresh``, each block at its own angle."""
        if not self.groups:
            turned = angle[""].to(noise.dtype)[:, None]
            return noise * turned.cos() + fresh * turned.sin()
        result = noise.clone()
        for group, site in zip(self.groups, self.sites, strict=True):
            part = slice(site.start, site.stop)
            shape = (len(noise), *site.shape)
            turned = angle[group.name].to(noise.dtype)[:, None, ..., None]
            old, new = noise[:, part].reshape(shape), fresh[:, part].reshape(shape)
            result[:, part] = (old * turned.cos() + new * turned.sin()).reshape(len(noise), -1)
        return result

    def stretches(self, count: int, offset: float, noise: Tensor) -> Tensor:
        """The stretch of its path that each number of the noise belongs to, ``(noise_dimension,)``.

        Arguments:
            count: How many stretches there are.
            offset: Where the first begins, as a part of one.
            noise: The noise, chains first.
        """
        return (self.along(noise) * count + offset).floor().long() % count

    def along(self, noise: Tensor) -> Tensor:
        """Where along its path each number of the noise lies, from zero to one."""
        place = torch.linspace(0.0, 1.0, noise.shape[-1], device=noise.device)
        for site in self.sites:
            along = torch.linspace(0.0, 1.0, site.shape[-1], device=noise.device)
            place[site.start : site.stop] = along.expand(site.shape).reshape(-1)
        return place

    def merge_evaluations(
        self, accepted: dict[str, Tensor], new: Evaluation, old: Evaluation
    ) -> Evaluation:
        """The evaluation at merged noise: ``new`` of accepted elements, else ``old``."""
        if not self.groups:
            return select_evaluation(accepted[""], new, old)
        value, local = old.value, dict(old.local)
        log_likelihoods = dict(old.log_likelihoods)
        for group in self.groups:
            taken, name = accepted[group.name], group.name
            change = new.log_likelihoods[name] - old.log_likelihoods[name]
            gained = torch.where(taken, change, torch.zeros_like(change))
            value = value - gained.reshape(len(gained), -1).sum(-1)
            log_likelihoods[name] = torch.where(
                taken, new.log_likelihoods[name], old.log_likelihoods[name]
            )
            for site, event_dim in zip(group.sites, group.event_dims, strict=True):
                shape = plate_shape(group.frames, new.local[site].dim() - 1 - event_dim)
                mask = taken.reshape([len(taken), *shape] + [1] * event_dim)
                local[site] = torch.where(mask, new.local[site], old.local[site])
        return Evaluation(value, log_likelihoods, local)


def _share(accepted: dict[str, Tensor]) -> Tensor:
    parts = [part.reshape(len(part), -1).double() for part in accepted.values()]
    return torch.cat(parts, -1).mean(-1)


@dataclass(frozen=True)
class CorrelatedRefresh:
    r"""Proposes :math:`u' = \rho u + \sqrt{1 - \rho^2}\, \epsilon`; independent noise at zero.

    Arguments:
        correlation: :math:`\rho`, from 0 up to, but not including, 1.

    Invariant:
        The density of the noise given the parameters, exactly.

    References:
        | The correlated pseudo-marginal method (Deligiannidis, Doucet, Pitt, 2018)
        | https://arxiv.org/abs/1511.04992
    """

    correlation: float = 0.0

    def __post_init__(self) -> None:
        between("correlation", self.correlation, 0.0, 1.0, ends="low")

    def __call__(
        self, blocks: Blocks, noise: Tensor, current: Evaluation, evaluate: EvaluateNoise
    ) -> tuple[Tensor, Evaluation, Tensor, int]:
        fresh = math.sqrt(1.0 - self.correlation**2) * torch.randn_like(noise)
        proposed = self.correlation * noise + fresh
        return *_metropolis(blocks, proposed, noise, current, evaluate), 1


def _metropolis(
    blocks: Blocks, proposed: Tensor, noise: Tensor, current: Evaluation, evaluate: EvaluateNoise
) -> tuple[Tensor, Evaluation, Tensor]:
    """Accepts or rejects each block of noise that was proposed reversibly by its density."""
    new = evaluate(proposed)
    accepted = {}
    for name, log_ratio in blocks.log_ratios(new, current).items():
        uniform = torch.rand_like(log_ratio).log()
        accepted[name] = uniform < log_ratio  # false where the ratio is no number
    merged = blocks.merge(accepted, proposed, noise)
    evaluation = blocks.merge_evaluations(accepted, new, current)
    return merged, evaluation, _share(accepted)


@dataclass(frozen=True)
class StretchRefresh:
    """Renews the noise of a path stretch by stretch, each accepted by the whole estimate.

    For long paths, whose estimate varies too much for all of their noise to be accepted at once.
    Where the stretches begin is drawn anew each time.

    Arguments:
        num_stretches: How many there are, of about the same length; an evaluation each.

    Invariant:
        The density of the noise given the parameters, exactly.
    """

    num_stretches: int = 4

    def __post_init__(self) -> None:
        whole("num_stretches", self.num_stretches, 1)

    def __call__(
        self, blocks: Blocks, noise: Tensor, current: Evaluation, evaluate: EvaluateNoise
    ) -> tuple[Tensor, Evaluation, Tensor, int]:
        number = blocks.stretches(self.num_stretches, float(torch.rand(())), noise)
        shares = []
        for k in range(self.num_stretches):
            proposed = torch.where(number == k, torch.randn_like(noise), noise)
            noise, current, share = _metropolis(blocks, proposed, noise, current, evaluate)
            shares.append(share)
        return noise, current, torch.stack(shares).mean(0), self.num_stretches


@dataclass(frozen=True)
class EllipticalSliceRefresh:
    """Moves the noise along an ellipse through it and fresh noise, to where the estimate allows.

    The ellipse's angle is shrunk towards the current noise until the estimate lies above a random
    threshold, so that every block moves, for several evaluations instead of one.

    Invariant:
        The density of the noise given the parameters, exactly.

    References:
        | Elliptical slice sampling (Murray, Adams, MacKay, 2010)
        | https://arxiv.org/abs/1001.0175
    """

    def __call__(
        self, blocks: Blocks, noise: Tensor, current: Evaluation, evaluate: EvaluateNoise
    ) -> tuple[Tensor, Evaluation, Tensor, int]:
        fresh = torch.randn_like(noise)
        zero = blocks.log_ratios(current, current)
        threshold = {name: torch.rand_like(ratio).log() for name, ratio in zero.items()}
        angle = {name: 2 * math.pi * torch.rand_like(ratio) for name, ratio in zero.items()}
        low = {name: value - 2 * math.pi for name, value in angle.items()}
        high = dict(angle)
        done = {name: torch.zeros_like(ratio, dtype=torch.bool) for name, ratio in zero.items()}
        merged, evaluation, count = noise, current, 0
        while not all(bool(d.all()) for d in done.values()):
            proposed = blocks.turn(angle, noise, fresh)
            new = evaluate(proposed)
            count += 1
            ratios = blocks.log_ratios(new, current)
            fits = {name: ~done[name] & (ratio > threshold[name]) for name, ratio in ratios.items()}
            merged = blocks.merge(fits, proposed, merged)
            evaluation = blocks.merge_evaluations(fits, new, evaluation)
            for name, fit in fits.items():
                done[name] = done[name] | fit
                negative = angle[name] < 0
                low[name] = torch.where(negative, angle[name], low[name])
                high[name] = torch.where(negative, high[name], angle[name])
                spread = high[name] - low[name]
                angle[name] = low[name] + spread * torch.rand_like(spread)
        return merged, evaluation, _share(done), count
