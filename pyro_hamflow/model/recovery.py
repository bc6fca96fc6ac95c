"""Local sites that were integrated out, recovered from the particles of their estimate."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.poutine as poutine
from torch import Tensor


class Evaluation(NamedTuple):
    """What a model says at given positions and noise.

    Attributes:
        value: The potential of each chain, of shape ``(chains,)``.
        log_likelihoods: Log-likelihood estimates of each group's elements, ``(chains, *plates)``.
        local: A draw of each local site, given position and noise.
    """

    value: Tensor
    log_likelihoods: dict[str, Tensor]
    local: dict[str, Tensor]


class Recovery:
    """The likelihood estimates in a model, and what a program's results say of their sites.

    Arguments:
        sites: The sites of a run that hold estimates.
        num_noise_sites: How many noise sites the model has.

    Attributes:
        estimates: The estimates.
        num_choices: How many particles are picked when local sites are recovered.
        factorises: Whether all noise belongs to estimates whose elements multiply to the
            likelihood.
    """

    def __init__(self, sites: list[Any], num_noise_sites: int) -> None:
        self.estimates = [site["infer"]["estimate"] for site in sites]
        self.num_choices = sum(estimate.group.shape.numel() for estimate in self.estimates)
        plain = [site for site in sites if site["scale"] == 1.0 and site["mask"] is None]
        self.factorises = 0 < len(plain) == num_noise_sites == len(sites)

    def evaluation(self, value: Tensor, *results: Tensor) -> Evaluation:
        """A value with the results of :func:`pick_particles` by name."""
        rest = iter(results)
        local: dict[str, Tensor] = {}
        log_likelihoods = {}
        for estimate in self.estimates:
            log_likelihoods[estimate.group.name] = next(rest)
            local |= {name: next(rest) for name in estimate.group.sites}
        return Evaluation(value, log_likelihoods, local)


def estimate_sites(trace: poutine.Trace) -> list[Any]:
    """The sites of a run that hold likelihood estimates."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and "estimate" in site["infer"]
    ]


def pick_particles(trace: poutine.Trace, uniform: Tensor) -> list[Tensor]:
    """Picks a particle of each element of each estimate in a trace, by its weight.

    Given parameters and noise from their joint posterior, it is a draw of the local sites from
    theirs.

    Arguments:
        trace: A run of a marginal model.
        uniform: A uniform random number for each element of each estimate, in a row.

    Returns:
        For each estimate the log estimates of its elements, then the picked values of its sites.
    """
    results: list[Tensor] = []
    for site in estimate_sites(trace):
        estimate = site["infer"]["estimate"]
        group, log_weights = estimate.group, estimate.log_weights
        level, uniform = uniform.tensor_split([group.shape.numel()])
        cumulated = log_weights.softmax(0).cumsum(0)
        chosen = (cumulated < level.reshape(log_weights.shape[1:])).sum(0)
        chosen = chosen.clamp(max=len(log_weights) - 1)
        results.append(log_weights.logsumexp(0).reshape(group.shape))
        for name, event_dim in zip(group.sites, group.event_dims, strict=True):
            particles = estimate.values[name]
            outer = chosen.dim() - (particles.dim() - 1 - event_dim)
            index = chosen.reshape(chosen.shape[outer:] + (1,) * event_dim)
            results.append(particles.gather(0, index.expand(particles.shape[1:])[None])[0])
    return results
