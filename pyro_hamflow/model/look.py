"""What is seen of a model before it is sampled: a plain run, and what two runs have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.model.data_faults import fitting, refuse_nan
from pyro_hamflow.model.kinds import Args, Kwargs, Model
from pyro_hamflow.model.rounding import warn_of_rounding
from pyro_hamflow.model.trace import refuse_subsampling, run_with
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.failures import first_that_works
from pyro_hamflow.programs.fingerprint import Fingerprint, explained

# Where the model is looked at.
FACTORS = (0.3, 0.1, 0.03, -0.3, 1.0, -1.0, 2.0, 0.0)  # times a fixed random position
_SEEDS = 20  # draws from the priors


def plain_run(model: Model, args: Args, kwargs: Kwargs) -> poutine.Trace:
    """A run of a model at draws from its priors, always the same."""

    def run(seed: int) -> poutine.Trace:
        torch.manual_seed(seed)
        return fitting(run_with(model, lambda msg: None, *args, **kwargs))

    with random_state_kept():
        return explained(lambda: first_that_works(run, range(_SEEDS)))


def check_data(plain: poutine.Trace) -> None:
    """Refuses data that are a part of all or contain NaN, and warns where they are rounded.

    Raises:
        ValueError: If a plate is subsampled, or data contain NaN.
    """
    refuse_subsampling(plain)
    refuse_nan(plain)
    warn_of_rounding(plain)


class Looks:
    """What a model does when it is looked at, to be told from what it does later.

    Arguments:
        look: What it does at a point, so many times a fixed one.
        function: What is looked at, to explain its failures by.
        inputs: Its arguments at that fixed point.

    Attributes:
        factor: Where it was looked at: at the first where its numbers allow it.
        key: What it did; ``None`` if that cannot be told.

    Raises:
        ValueError: If the model draws random numbers of its own.
    """

    def __init__(
        self, look: Callable[[float], Fingerprint], function: Program, *inputs: Tensor
    ) -> None:
        self._look = look
        self.factor = FACTORS[0]
        self.key = explained(
            lambda: key_of_two(*first_that_works(self._twice, FACTORS)), function, *inputs
        )

    def _twice(self, factor: float) -> tuple[Fingerprint, Fingerprint]:
        self.factor = factor
        with random_state_kept():
            return self._look(factor), self._look(factor)

    def is_unchanged(self) -> bool:
        """Whether the model still does what it did when it was looked at first."""
        if self.key is not None:
            # Whatever a model's own code may raise.
            with random_state_kept(), suppress(Exception):
                return self._look(self.factor).key == self.key
        return False


def key_of_two(first: Fingerprint, second: Fingerprint) -> str | None:
    """What a model did in two runs at one point, as a key; ``None`` if not the same.

    Arguments:
        first: Of the first run, whose result begins with the potential.
        second: Of the second.

    Raises:
        ValueError: If they tell that the density is no function of the sample sites.
    """
    values = first.result[0], second.result[0]
    if first.random[0] or not torch.equal(*(value.nan_to_num() for value in values)):
        raise ValueError(
            f"the model {cause_of_change(random=first.random[0])}: its log density at one and "
            f"the same point was {-values[0].item():.6g}, then {-values[1].item():.6g}; expected "
            "all noise to come from `pyro_hamflow.noise`, and data to stay as they are"
        )
    return first.key if first.key == second.key else None


def cause_of_change(*, random: bool) -> str:
    """Why a density differs between two runs on the same values.

    Arguments:
        random: Whether it is computed from random numbers of torch's, as far as is seen.
    """
    draws = "draws random numbers that are no sample sites"
    return draws if random else f"changes its data in place, or {draws}"
