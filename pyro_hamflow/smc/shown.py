"""How far a population has come, shown as it goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from pyro_hamflow.progress import Bar, progress
from pyro_hamflow.smc.annealing import Report
from pyro_hamflow.smc.particles import Passage

_BAR = "{l_bar}{bar}| [{elapsed}{postfix}]"


@contextmanager
def shown(*, hidden: bool) -> Iterator[Report]:
    """What :func:`~pyro_hamflow.smc.annealing.anneal` is to report to, for a while.

    Arguments:
        hidden: Whether to show nothing.
    """
    with progress(200, "Anneal", hidden=hidden, bar_format=_BAR) as bar:
        yield partial(_show, bar)


def _show(bar: Bar, passage: Passage) -> None:
    """Half of the bar is for the first population, half for the second."""
    done = bar.n % 100
    there = 100.0 * passage.inverse_temperature
    bar.set_postfix(
        inverse_temperature=f"{passage.inverse_temperature:.3g}",
        ess=f"{passage.ess:.2f}",
        acceptance=f"{passage.acceptance_rate:.2f}",
        refresh=False,
    )
    bar.update(max(0.0, there - done))
