"""What a population says about its result."""

from __future__ import annotations

import math

from pyro_hamflow.smc.annealing import Population
from pyro_hamflow.smc.importance import ImportanceSamples

_LARGEST_ERROR = 0.5  # of the log evidence
_LARGEST_OF_FEW = 0.2  # of it, where particles descend from few of the first
_MANY_ERRORS = 4.0  # between two estimates of the evidence
_FEWEST_DRAWS = 100.0  # independent ones, below which means are rough
_LOWEST_ACCEPTANCE = 0.2  # at a temperature, below which particles hardly move


def describe_missed(number: int) -> str | None:
    """That a population from the prior alone misses so many modes but for luck, in a sentence."""
    if number == 0:
        return None
    return (
        f"descents found {number} mode{'s' * (number > 1)} that a population from the prior "
        "misses but for luck, as it does narrow ones: it began there, too. Modes narrower "
        "still, which no descent begins above, may be missed all the same."
    )


def _is_luck(population: Population) -> bool:
    """Whether it descends from so few particles that its weights are luck."""
    return population.lineages.are_few and not population.log_evidence_error < _LARGEST_OF_FEW


def describe_lineages(population: Population) -> str | None:
    """That a population descends from so few particles that its weights are luck, in a sentence."""
    if not _is_luck(population):
        return None
    worth, error = population.lineages.effective, population.log_evidence_error
    return (
        "The evidence cannot be relied on, nor the weights of modes: the draws descend from "
        f"about {worth:.0f} of the {len(population.position)} particles that the path "
        "began with, which were the first to find where the posterior is, so that its error may be "
        f"more than the {error:.2g} that is seen; take more particles (`num_particles`), or begin "
        "at a guide (`flow`)."
    )


def describe_few(population: Population) -> str | None:
    """That jumps are made of what so few particles have found, in a sentence."""
    if not _is_luck(population):
        return None
    worth = population.lineages.effective
    return (
        f"the population that chains start from, and jumps are made of, descends from about "
        f"{worth:.0f} of {len(population.position)} particles, the first to find "
        "where the posterior is: modes that these have missed are missed in the draws as well, "
        "and the shares of modes need not be right; take more particles (`num_particles`)."
    )


def describe(population: Population, guide: ImportanceSamples | None) -> str:
    """Whether evidence and weights of modes can be relied on, in a sentence.

    Arguments:
        population: The population.
        guide: Weighted draws of the guide that it began at, if it did.
    """
    error, drift = population.log_evidence_error, population.drift
    if drift is not None and drift.matters:
        return (
            "The evidence cannot be relied on, nor the draws: as the population moved on at the "
            "end, its mean log density against the start's changed by "
            f"{drift.change:.2g} (chance makes {drift.noise:.2g}), so that it had not reached the "
            "posterior, whose narrow parts moves may miss; write a scale and what depends on it as "
            "`pyro.sample` statements in place of a `pyro.factor`, or begin at a guide (`flow`), "
            "or take more moves (`num_moves`)."
        )
    of_few = describe_lineages(population)
    if of_few is not None:
        return of_few
    if not error < _LARGEST_ERROR:
        return (
            "The evidence cannot be relied on, nor the weights of modes: the parts of the "
            f"population differ so much that the error of its logarithm is {error:.2g}; take more "
            "particles (`num_particles`), more moves (`num_moves`), or temperatures that are "
            "closer (`conditional_ess`)."
        )
    worst = min(population.passages, key=lambda passage: passage.acceptance_rate)
    if worst.acceptance_rate < _LOWEST_ACCEPTANCE:
        return (
            f"At the inverse temperature {worst.inverse_temperature:.3g} only "
            f"{worst.acceptance_rate:.0%} of the moves were accepted, so that the population may "
            "have missed what it should have spread to: take temperatures that are closer "
            "(`conditional_ess`), or more moves (`num_moves`)."
        )
    if guide is not None:
        between_them = abs(guide.log_evidence - population.log_evidence)
        if between_them > _MANY_ERRORS * math.hypot(error, guide.log_evidence_error):
            return (
                "The guide's importance weights give the log evidence "
                f"{guide.log_evidence:.2f}, the population gives {population.log_evidence:.2f}: "
                "one of them misses part of the posterior; take a wider guide, or more particles "
                "(`num_particles`)."
            )
    worth = population.lineages.draws
    said = (
        f"The parts of the population agree: the error of the log evidence is {error:.2g}, and the "
        f"draws are worth {worth:.0f} independent ones."
    )
    if worth < _FEWEST_DRAWS:
        said += (
            " Means over them are rough, as many descend from the same few of the first particles: "
            "take more particles (`num_particles`), or more moves (`num_moves`)."
        )
    return said
