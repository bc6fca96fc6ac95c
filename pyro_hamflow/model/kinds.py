"""What models, their arguments and their sites are to a type checker."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Model = Callable[..., Any]  # a Pyro model
Args = tuple[Any, ...]  # its arguments
Kwargs = Mapping[str, Any]  # and those by name
Node = dict[str, Any]  # a site of its traces, or a message, with all that Pyro notes of it


class Arguments(NamedTuple):
    """What a model is called with."""

    args: Args
    kwargs: Kwargs = {}
