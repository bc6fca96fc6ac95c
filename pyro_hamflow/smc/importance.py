"""Draws of a guide with the weights that correct them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_hamflow.checks import whole
from pyro_hamflow.flows.lost_modes import describe_lost_modes
from pyro_hamflow.flows.pyro_guides import as_guide
from pyro_hamflow.model.guides import Guide, draw_from
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.process import undisturbed
from pyro_hamflow.programs.capture import rows_at_once
from pyro_hamflow.smc.resampling import effective_size, log_mean_exp
from pyro_hamflow.smc.weights import mean_error, smooth_weights

_BATCH = 1000  # draws proposed at once
_LARGEST_K = 0.7
_FEWEST_EFFECTIVE = 100  # below which means are rough, and a heavy tail may not have shown yet


@dataclass(frozen=True)
class ImportanceSamples:
    """Draws with importance weights.

    Attributes:
        position: Draws on the real line, of shape ``(num_samples, dimension)``.
        log_weights: The logarithms of their weights, of shape ``(num_samples,)``; minus infinity
            where the model's density vanishes or is no number. Their exponentials have the evidence
            as mean.
        local: Recovered values of sites that were integrated out.
        num_invalid: How many densities were no number.
        lost: What modes the guide has lost, in a sentence; ``None`` if no such is seen.
    """

    position: Tensor = field(repr=False)
    log_weights: Tensor = field(repr=False)
    local: dict[str, Tensor] = field(repr=False)
    num_invalid: int
    lost: str | None = field(repr=False)
    potential: Potential = field(repr=False)
    model: Model = field(repr=False)
    guide: str = field(repr=False)

    separate_noise = True

    def __repr__(self) -> str:
        return (
            f"ImportanceSamples({len(self.position)} draws, log_evidence={self.log_evidence:.4f} "
            f"+- {self.log_evidence_error:.2g}, pareto_k={self.pareto_k:.2f}, ess={self.ess:.0f})"
        )

    @property
    def log_evidence(self) -> float:
        """The logarithm of the mean weight, the estimated evidence."""
        return float(log_mean_exp(self.log_weights))

    @cached_property
    def log_evidence_error(self) -> float:
        """Its error: half of what 95 repetitions in 100 would stay within; infinite for k above 1.

        Where the weights have a heavy tail, the largest of its weights are mostly not among those
        drawn: the evidence is then mostly too low, by more than the standard error of a mean, which
        lacks them too. So the error is that of repetitions whose tail comes from the Pareto
        distribution fitted to it. Of 400 estimates with 10,000 weights of one and of four
        dimensions, so many in a hundred were too low by more than two standard errors, and by more
        than two of these errors: 3 to 4 and 2 at k of 0.3, 8 to 19 and 3 to 6 at 0.6, 19 to 31 and
        6 to 7 at 0.7, 35 to 57 and 8 to 17 at 0.8.
        """
        return mean_error(self.log_weights, *self._smoothed)

    @property
    def ess(self) -> float:
        """The effective sample size of the weights; zero if all of them are."""
        return float(effective_size(self.log_weights))

    @property
    def pareto_k(self) -> float:
        """The shape of the weights' tail: below 0.7 they can be relied on."""
        return self._smoothed[1]

    @property
    def weights(self) -> Tensor:
        """The weights, their tail smoothed if there is one to fit, adding up to one."""
        return self._smoothed[0]

    @cached_property
    def _smoothed(self) -> tuple[Tensor, float]:
        return smooth_weights(self.log_weights)

    @property
    def samples(self) -> dict[str, Tensor]:
        """The draws in their supports, recovered local sites included; they count by weight."""
        return self.potential.constrain(self.position) | self.local

    @property
    def settings(self) -> dict[str, Any]:
        """How the draws were made, in plain values."""
        return {"method": "importance sampling", "guide": self.guide}

    @property
    def message(self) -> str:
        """What the weights say about the result, in a sentence."""
        if self.lost is not None:
            return self.lost
        said = f"Pareto k is {self.pareto_k:.2f}"
        if self.pareto_k < _LARGEST_K:
            if self.ess >= _FEWEST_EFFECTIVE:
                return (
                    f"{said}: the corrected draws can be relied on; they are worth {self.ess:.0f}."
                )
            return (
                f"{said}, but the corrected draws are worth {self.ess:.0f} only, too few to rely "
                "on, or to know the tail of the weights: draw more, or train the guide for longer."
            )
        said += (
            ": the guide misses part of the posterior, and neither weighted draws nor evidence can "
            "be relied on: train it for longer, give it more steps, or sample with `NUTS`."
        )
        if not self.potential.noise_dimension:
            return said
        return said + (
            " Or the likelihood's estimate is too noisy: see `estimator_quality`, and take more "
            "particles or `points='rqmc'`."
        )

    def resample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of equal weight, picked with replacement by their weights.

        Arguments:
            num_samples: How many.
        """
        picked = self.pick(num_samples)
        return {name: value[picked] for name, value in self.samples.items()}

    def pick(self, num_samples: int) -> Tensor:
        """Indices of draws, picked with replacement by their weights."""
        return torch.multinomial(self.weights, num_samples, replacement=True)

    def mean(self, value: Tensor) -> Tensor:
        """The weighted mean of values ``(num_samples, *)`` over the draws."""
        weights = self.weights.to(value).reshape(-1, *[1] * (value.dim() - 1))
        return (weights * value).sum(0)


def importance_sample(
    model: Model,
    guide: Guide | AutoGuide,
    *args: Any,
    num_samples: int = 10_000,
    seed: int | None = None,
    jit_compile: bool = False,
    **kwargs: Any,
) -> ImportanceSamples:
    r"""Corrects a guide: draws with weights, and the evidence.

    The guide draws on a larger space, positions q with momenta p (and the noise u of a likelihood
    estimate), and so do the weights,

    .. math:: W = \frac{p(q, y \mid u)\, r(p \mid q)}{M(q, p)},

    whose mean is the evidence, without bias, for any guide that covers the posterior. Weighted
    means over the draws are consistent, which those of the guide alone are not.

    Arguments:
        model: The Pyro model.
        guide: An :class:`~pyro_hamflow.AutoFlow` or
            :class:`~pyro_hamflow.AutoNeuralHamiltonianFlow`, one of Pyro's own guides whose density
            is known, or anything that fills the protocol
            :class:`~pyro_hamflow.model.guides.Guide`.
        args: The model's arguments.
        num_samples: How many draws.
        seed: Makes the draws repeat themselves, and leaves random states as they were; torch's
            current one, which goes on, if not given.
        jit_compile: Whether to compile the model's density to machine code: it pays on a model with
            many particles, where a draw costs milliseconds.
        kwargs: The model's keyword arguments.

    Returns:
        Draws and weights. ``pareto_k`` says whether to trust them, and ``message`` whether the
        guide lacks modes, which descents of the potential from elsewhere have found.

    Raises:
        TypeError: If the guide lacks a method of the protocol.
        ValueError: If there are fewer than 2 draws, the guide is of another dimension, or the model
            has one of the faults that :class:`~pyro_hamflow.model.potential.Potential` lists.

    Invariant:
        The mean of the weights is the evidence.

    References:
        | Pareto smoothed importance sampling (Vehtari et al., 2024)
        | https://arxiv.org/abs/1507.02646

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> guide = AutoNeuralHamiltonianFlow(model, hidden=(8, 8))
        >>> found = importance_sample(model, guide, torch.tensor(1.0), num_samples=1000)
        >>> exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.0))
        >>> abs(found.log_evidence - float(exact)) < 5 * found.log_evidence_error
        True
    """
    guide = as_guide("guide", guide, Guide)
    whole("num_samples", num_samples, 2)
    with undisturbed(seed):
        potential = Potential(model, args, kwargs, separate_noise=True, compile_graphs=jit_compile)
        guide.prepare(*args, **kwargs)
        with torch.no_grad():
            at_once = min(_together(potential), num_samples)
            batches = [
                _weigh(potential, guide, min(_BATCH, num_samples - start), at_once)
                for start in range(0, num_samples, _BATCH)
            ]
        position, log_weight, local = _join(batches)
        invalid = log_weight.isnan()
        log_weight = torch.where(invalid, -torch.inf, log_weight)
        weights, _ = smooth_weights(log_weight)
        return ImportanceSamples(
            position,
            log_weight,
            local,
            int(invalid.sum()),
            describe_lost_modes(guide, potential, (position, weights)),
            potential,
            model,
            repr(guide).splitlines()[0],
        )


def _together(potential: Potential) -> int:
    """How many densities to evaluate at once."""
    graph = potential.graph("evaluate", 1)
    if not isinstance(graph, torch.fx.GraphModule):
        return _BATCH
    return rows_at_once(graph)


def _weigh(potential: Potential, guide: Guide, count: int, at_once: int) -> Any:
    """Draws, their log weights, and what belongs to them."""
    position, log_density = draw_from(guide, potential, count)
    pieces = []
    for part in position.split(at_once):
        # All pieces are of one size, for which there is a program.
        padded = torch.cat([part, part[:1].expand(at_once - len(part), -1)])
        evaluation = potential.evaluate(padded, potential.draw_noise(at_once))
        pieces.append((evaluation.value, evaluation.local))
    value, local = _join(pieces)
    log_weight = -value[:count].double() - log_density.double()
    return position, log_weight, {name: part[:count] for name, part in local.items()}


def _join(pieces: Sequence[Any]) -> Any:
    """One after the other: tensors, dictionaries of them, and tuples of both."""
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(list(pieces))
    if isinstance(first, dict):
        return {name: _join([piece[name] for piece in pieces]) for name in first}
    return [_join(parts) for parts in zip(*pieces, strict=True)]
