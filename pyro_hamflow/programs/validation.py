"""Runs without the checks by which distributions read their arguments and values.

A check asks for numbers, so a model that checks cannot be recorded as a graph. Pyro's own
``validation_enabled(False)`` reaches the distributions made under it; those made before (priors in
a dictionary, in a ``PyroSample``, at the head of a module) keep a flag of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
from torch.distributions import Distribution

_FLAG = "_validate_args"
_lock = threading.Lock()
_blocks: set[object] = set()  # that have begun and not ended; an interruption may leave none behind
_restore = ExitStack()


class _Off:
    """Hides each distribution's own flag; what is set meanwhile stays with the distribution."""

    def __get__(self, distribution: Distribution | None, owner: type) -> bool:
        return False

    def __set__(self, distribution: Distribution, value: Any) -> None:
        distribution.__dict__[_FLAG] = value


@contextmanager
def no_validation() -> Iterator[None]:
    """Turns off the checks of all distributions, whenever they were made.

    Blocks may nest, and overlap in several threads; after the last one all is as it was before the
    first. Neither the distributions nor Pyro's settings are changed.

    Example:
        >>> prior = dist.Exponential(1.0, validate_args=True)
        >>> with no_validation():
        ...     prior.log_prob(torch.tensor(-1.0))
        tensor(1.)
        >>> prior._validate_args
        True
    """
    block = object()
    try:
        _enter(block)
        yield
    finally:
        _leave(block)


def _enter(block: object) -> None:
    global _restore
    with _lock:
        if not _blocks:
            with ExitStack() as stack:
                stack.callback(_set_flag, Distribution.__dict__[_FLAG])
                stack.enter_context(pyro.validation_enabled(False))
                _set_flag(_Off())
                _restore = stack.pop_all()
        _blocks.add(block)


def _leave(block: object) -> None:
    with _lock:
        _blocks.discard(block)
        if not _blocks:
            _restore.close()


def _set_flag(value: Any) -> None:
    setattr(Distribution, _FLAG, value)
