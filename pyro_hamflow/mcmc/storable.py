"""Of which classes files may hold objects.

Those of the package, torch's layers, and classes of one's own that :func:`storable` was said of. A
file names a class, and its objects' attributes are set: it can make no other code run.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any, TypeVar

_OWN, _LAYERS = "pyro_hamflow.", "torch.nn.modules."
_Class = TypeVar("_Class", bound=type)
_storable: dict[str, type] = {}


def storable(cls: _Class) -> _Class:
    """Says of a class of one's own that checkpoints may hold its objects, by their attributes.

    Example:
        >>> @storable
        ... class Scale:
        ...     def __init__(self, value):
        ...         self.value = value
        >>> class_of(name_of(Scale)) is Scale
        True
    """
    _storable[name_of(cls)] = cls
    return cls


class Unstorable(TypeError):
    """A value that no file can hold.

    Attributes:
        path: Where it is in the whole, by the names of attributes.
    """

    def __init__(self, value: Any, path: str) -> None:
        self.path = path
        super().__init__(
            f"`{path}` is {value!r}, which no file can hold without running code when it is read: "
            "expected numbers, tensors, objects of pyro_hamflow, or of a class that "
            "`pyro_hamflow.mcmc.storable.storable` was said of"
        )


def name_of(cls: type) -> str:
    """The name of a class in files."""
    return f"{cls.__module__}:{cls.__qualname__}"


def class_of(name: str) -> type | None:
    """A class by its name, if it is one that files may name; none if not."""
    if name in _storable:
        return _storable[name]
    module, _, path = name.partition(":")
    if not module.startswith((_OWN, _LAYERS)):
        return None
    named: Any = sys.modules.get(module)
    for part in path.split("."):
        named = None if named is None else vars(named).get(part)
    is_its_own = isinstance(named, type) and named.__module__ == module
    return named if is_its_own else None


def found(name: str, kind: type = object, *, made: bool = False) -> Any:
    """A class by its name in a file.

    Arguments:
        name: The name.
        kind: A class that it has to be built on.
        made: Whether its objects have to be such as are made again of their arguments.

    Raises:
        ValueError: If there is no such class, or files may not name it.
    """
    cls = class_of(name)
    if cls is None or not issubclass(cls, kind) or (made and not hasattr(cls, "made_of")):
        raise ValueError(f"there is no class {name!r} that files may name")
    return cls


def is_method(owner: Any, name: str) -> bool:
    """Whether it is a plain method of a class that files may name."""
    cls = type(owner)
    defined = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    return isinstance(defined, FunctionType) and class_of(name_of(cls)) is cls
