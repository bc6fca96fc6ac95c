"""Executors that runs are given, and what is done where one is broken, or none is there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeAlias

Executors: TypeAlias = Executor | Callable[[], Executor]


class InThisProcess(Executor):
    """Does what it is asked for at once, in this process."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def like(executor: Executor) -> Executor:
    """An executor made of the arguments that another was made of, where its attributes tell them.

    Raises:
        TypeError: If they do not tell enough.
    """
    found = inspect.signature(type(executor)).parameters.values()
    names = [argument.name for argument in found if argument.kind is not argument.VAR_KEYWORD]
    known = {name: getattr(executor, f"_{name}") for name in names if hasattr(executor, f"_{name}")}
    return type(executor)(**known)
