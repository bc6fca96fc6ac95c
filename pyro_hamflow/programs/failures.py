"""What becomes of a model that fails at some of its positions.

A matrix that is not positive definite, or a check of the model's own, ends the run of the model,
not that of the sampler: such a position has no density, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_hamflow.programs.capture import Program

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Failures:
    """The failures of a model that is run in Python.

    Attributes:
        count: How often it has failed.
        calls: How often it was run.
        position: Where it failed first, if it did, of shape ``(dimension,)``.
        reason: What it said there.
    """

    position: Tensor | None

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets them."""
        self.count = 0
        self.calls = 0
        self.position = None
        self.reason = ""

    def tolerate(self, program: Program, failed: Callable[[], tuple[Tensor, ...]]) -> Program:
        """A program of one chain that returns something else where it would raise.

        Arguments:
            program: The program, whose first argument is the position.
            failed: Makes what to return.
        """

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            self.calls += 1
            try:
                return program(*inputs)
            except Exception as error:  # whatever a model's own code may raise
                self.count += 1
                if self.position is None:
                    self.position, self.reason = inputs[0].detach().clone(), first_line(error)
                return failed()

        return run


def first_that_works(run: Callable[[Argument], Result], points: Iterable[Argument]) -> Result:
    """What a run of a model gives at the first point where its numbers allow one.

    Raises:
        Exception: What the first run raised, if all of them fail; and at once what any of them
            raises that is no matter of numbers.
    """
    first: Exception | None = None
    for point in points:
        try:
            return run(point)
        except Exception as error:  # whatever a model's own code may raise
            if not is_numerical(error):
                raise
            first = first or error
    raise first or ValueError("no points were given: expected one at least")


def is_numerical(error: Exception) -> bool:
    """Whether an error may come from the values that a model was run with.

    So may a check of the model's own, a ``raise ValueError`` or an ``assert``.
    """
    if isinstance(error, ValueError | AssertionError | ArithmeticError):
        return True
    if isinstance(error, torch.linalg.LinAlgError | np.linalg.LinAlgError):
        return True
    return isinstance(error, RuntimeError) and "linalg" in str(error)


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe_failures(
    failures: Failures,
    fallible: set[str],
    values_at: Callable[[Tensor], Mapping[str, Tensor]],
    diverging: int,
) -> str | None:
    """Where a model has failed, or may have, in a sentence; or nothing.

    Arguments:
        failures: Where it failed when it was run in Python.
        fallible: What in its programs can fail.
        values_at: The values of its sites at a position.
        diverging: How many transitions have diverged, as those do that meet such a position.
    """
    if failures.position is not None:
        values = {name: value.tolist() for name, value in values_at(failures.position).items()}
        return (
            f"The model failed at {failures.count} of {failures.calls} positions, which "
            f"therefore have no density. It first said: {failures.reason} "
            f"That was at {values}."[:600]
        )
    if fallible and diverging:
        what = " or ".join(sorted(fallible))
        return (
            f"Positions where {what} fails have no density, and transitions that meet one "
            "diverge: if there should be none, add a little to the diagonal of the matrix."
        )
    return None
