"""Handlers that run a model up to its path, and then on with the path given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_hamflow.model.kinds import Model


def values_before(path: Sequence[str], model: Model, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Runs a model until its path begins; what comes before is seen by outer handlers.

    Arguments:
        path: The names of the path's sites.
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        The values of all sample sites before the path.
    """
    with _UntilPath(path) as before, suppress(_PathBegins):
        model(*args, **kwargs)
    return before.values


class _PathBegins(Exception):
    """Ends a run of a model where its path begins, and leaves the plates around it."""


class _UntilPath(Messenger):
    """Runs a model up to its path, and records what comes before."""

    def __init__(self, path: Sequence[str]) -> None:
        super().__init__()
        self.path = path
        self.values: dict[str, Any] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.path:
            raise _PathBegins

    def _pyro_post_sample(self, msg: Message) -> None:
        self.values[str(msg["name"])] = msg["value"]


class WithPath(Messenger):
    """Gives a path its values, and hides what outer handlers have seen before.

    Arguments:
        path: The values of the path's sites, which become deterministic.
        before: Those of the sites seen before.
    """

    def __init__(self, path: Mapping[str, Tensor], before: Mapping[str, Any]) -> None:
        super().__init__()
        self.path, self.before = path, before

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if name in self.before:
            msg["value"] = self.before[name]
            msg["done"] = msg["stop"] = True
        elif name in self.path:
            value = self.path[name]
            msg["fn"] = dist.Delta(value, event_dim=msg["fn"].event_dim).mask(False)
            msg["value"], msg["is_observed"] = value, True
            msg["infer"] = {**(msg["infer"] or {}), "_deterministic": True}
