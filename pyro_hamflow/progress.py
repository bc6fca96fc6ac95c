"""How far something has come: a bar for who watches, now and then a line where nobody does."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TypeAlias

from tqdm.auto import tqdm

_EVERY = 30.0  # seconds between lines, so that an hour leaves about a screen of them


class Lines:
    """Prints a line each half minute, and nothing in less; with the methods of a bar of tqdm's.

    Attributes:
        n: How many steps are done.
        total: Of how many; ``None`` if it is not known.
    """

    def __init__(self, total: int | None, desc: str) -> None:
        self.n, self.total = 0, total
        self._what, self._postfix = desc, ""
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._printed > self._began:
            self._print()

    def set_description(self, desc: str, *, refresh: bool = True) -> None:
        self._what = desc

    def set_postfix(self, *, refresh: bool = True, **shown: Any) -> None:
        self._postfix = "".join(f", {name} {value}" for name, value in shown.items())

    def reset(self, total: int | None) -> None:
        self.n, self.total = 0, total

    def update(self, n: float = 1) -> None:
        self.n += n  # type: ignore[assignment]  # parts of a step, too
        if time.monotonic() - self._printed >= _EVERY:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        whole = "" if self.total is None else f" of {self.total} ({self.n / self.total:.0%})"
        seconds = self._printed - self._began
        line = f"{self._what}: {self.n:.0f}{whole}, {seconds:.0f} s{self._postfix}"
        print(line, file=sys.stderr, flush=True)


Bar: TypeAlias = "tqdm[Any] | Lines"


def progress(total: int | None, desc: str, *, hidden: bool, bar_format: str | None = None) -> Bar:
    """A bar on a terminal or in a notebook; lines in a file, or where ``CI`` is set.

    Arguments:
        total: How many steps there are.
        desc: What is done.
        hidden: Whether to show nothing.
        bar_format: As tqdm's.
    """
    if hidden or is_watched():
        return tqdm(total=total, desc=desc, disable=hidden, bar_format=bar_format)
    return Lines(total, desc)


def is_watched() -> bool:
    """Whether someone sees what is printed: on a terminal, or in a notebook."""
    return "CI" not in os.environ and (sys.stderr.isatty() or "ipykernel" in sys.modules)
