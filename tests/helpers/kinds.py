"""Cases of a test of which some are for `--slow` alone: those of a kind that stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def long_but(quick: Iterable[Any] | Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """The cases of a test, all but the quick ones marked as long.

    Arguments:
        quick: The cases that stay, or which of them do.
        cases: All of them; tuples are several arguments.
    """
    cases = list(cases)
    if not callable(quick):
        assert set(quick) <= set(cases), "a case that there is not"
    stays = quick if callable(quick) else set(quick).__contains__
    rows = [(case if isinstance(case, tuple) else (case,), stays(case)) for case in cases]
    return [pytest.param(*row, marks=() if kept else pytest.mark.slow) for row, kept in rows]
