"""Values as words and arrays, and back: what a run is at one moment, without any code.

A value is a graph of objects. Each becomes an entry of a table that names its class and refers to
others by their number, so that what was one object is one object again; tensors become arrays.
Parts that the other side has already, as the user's model, are named and not stored. Classes are
those of :mod:`~pyro_hamflow.mcmc.storable`: a file can name these, and makes nothing else run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_hamflow.mcmc.storable import Unstorable, class_of, found, is_method, name_of

_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "size": torch.Size,
}
_HOOKS = tuple(vars(nn.Module()).keys() - {"training", "_parameters", "_buffers", "_modules"})
_AS_INTEGERS = {torch.bfloat16: torch.int16}  # which NumPy has no type for

Table = list[Any]
Arrays = list[np.ndarray]


def freeze(value: Any, parts: Mapping[str, Any], root: str = "state") -> tuple[Table, Arrays]:
    """A value as a table of plain words and numbers, and arrays that it refers to.

    Arguments:
        value: Objects that refer to each other as they like.
        parts: What the other side has already, by names.
        root: What the whole is called in messages.

    Returns:
        The table, which JSON has, and the arrays.

    Raises:
        Unstorable: If there is a function in it, or an object of an unknown class.
    """
    freezer = _Freezer(parts)
    freezer.table[0] = freezer.word(value, root)
    return freezer.table, freezer.arrays


def thaw(table: Table, arrays: Arrays, parts: Mapping[str, Any]) -> Any:
    """The value that :func:`freeze` made a table of.

    Raises:
        ValueError: If the table names a class or a part that there is not.
    """
    thawer = _Thawer(table, arrays, parts)
    return thawer.value(table[0])


class _Freezer:
    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.table: Table = [None]
        self.arrays: Arrays = []
        self._names = {id(part): name for name, part in parts.items() if part is not None}
        self._known: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no two have the same id

    def word(self, value: Any, path: str) -> Any:
        """A plain value as it is, and any other as the number of its entry."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        number = self._known.get(id(value))
        if number is None:
            number = self._known[id(value)] = len(self.table)
            self._alive.append(value)
            self.table.append(None)
            self.table[number] = self._entry(value, path)
        return {"at": number}

    def _entry(self, value: Any, path: str) -> list[Any]:
        if id(value) in self._names:
            return ["part", self._names[id(value)]]
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind in (torch.dtype, torch.device):
            return [kind.__name__, str(value)]
        if kind is slice:
            return [
                "slice",
                *(self.word(end, path) for end in (value.start, value.stop, value.step)),
            ]
        if kind is list:
            return ["list", self._words(value, path)]
        if kind in (dict, OrderedDict):
            pairs = [
                [self.word(key, path), self.word(part, f"{path}[{key!r}]")]
                for key, part in value.items()
            ]
            return ["ordered" if kind is OrderedDict else "dict", pairs]
        for name, sequence in _SEQUENCES.items():
            if kind is sequence:
                return [name, self._words(value, path)]
        if isinstance(value, MethodType) and is_method(value.__self__, value.__name__):
            return ["method", self.word(value.__self__, path), value.__name__]
        return self._object(value, path)

    def _words(self, values: Any, path: str) -> list[Any]:
        return [self.word(part, f"{path}[{i}]") for i, part in enumerate(values)]

    def _object(self, value: Any, path: str) -> list[Any]:
        kind = type(value)
        if class_of(name_of(kind)) is not kind:
            raise Unstorable(value, path)
        if isinstance(value, tuple):
            return ["named", name_of(kind), self._words(value, path)]
        if hasattr(value, "made_of"):
            args, kwargs = value.made_of
            entry = ["made", name_of(kind), self.word(args, path), self.word(kwargs, path)]
            return entry
        if not hasattr(value, "__dict__"):
            raise Unstorable(value, path)
        left_out = _HOOKS if isinstance(value, nn.Module) else ()
        attributes = [
            [name, self.word(part, f"{path}.{name}")]
            for name, part in vars(value).items()
            if name not in left_out
        ]
        return ["object", name_of(kind), attributes]

    def _tensor(self, value: Tensor, path: str) -> list[Any]:
        plain = value.detach()
        if type(value) not in (Tensor, nn.Parameter) or plain.layout != torch.strided:
            raise Unstorable(value, path)
        kept = plain[tuple(slice(0, 1) if step == 0 else slice(None) for step in plain.stride())]
        as_integers = _AS_INTEGERS.get(plain.dtype)
        if as_integers is not None:
            kept = kept.view(as_integers)
        self.arrays.append(np.array(kept.cpu().numpy(), order="C"))  # it may change in place
        shape = [list(plain.shape), list(plain.stride())]
        how = [value.requires_grad, isinstance(value, nn.Parameter)]
        device = str(plain.device)
        return ["tensor", len(self.arrays) - 1, str(plain.dtype), device, *shape, *how]


class _Thawer:
    def __init__(self, table: Table, arrays: Arrays, parts: Mapping[str, Any]) -> None:
        self.table, self.arrays, self.parts = table, arrays, parts
        self._made: dict[int, Any] = {}
        self._begun: set[int] = set()

    def value(self, word: Any) -> Any:
        if not isinstance(word, dict):
            return word
        number = word["at"]
        if number not in self._made:
            if number in self._begun:
                raise ValueError("a value is a part of what it is made of")
            self._begun.add(number)
            self._make(number, *self.table[number])
        return self._made[number]

    def _make(self, number: int, kind: str, *entry: Any) -> None:
        """Makes one value; one that may be a part of itself is there before it is filled."""
        if kind == "list":
            self._made[number] = []
            self._made[number].extend(map(self.value, entry[0]))
        elif kind in ("dict", "ordered"):
            self._made[number] = OrderedDict() if kind == "ordered" else {}
            pairs = ((self.value(key), self.value(part)) for key, part in entry[0])
            self._made[number].update(pairs)
        elif kind == "object":
            self._made[number] = made = _blank(found(entry[0]))
            vars(made).update((name, self.value(part)) for name, part in entry[1])
        else:
            self._made[number] = self._whole(kind, *entry)

    def _whole(self, kind: str, *entry: Any) -> Any:
        if kind == "part":
            if self.parts.get(entry[0]) is None:
                raise ValueError(f"there is no part {entry[0]!r}")
            return self.parts[entry[0]]
        if kind == "tensor":
            return self._tensor(*entry)
        if kind == "dtype":
            return _dtype(entry[0])
        if kind == "device":
            return torch.device(entry[0])
        if kind == "slice":
            return slice(*map(self.value, entry))
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](list(map(self.value, entry[0])))
        if kind == "named":
            return found(entry[0], tuple)(*map(self.value, entry[1]))
        if kind == "made":
            return found(entry[0], made=True)(*self.value(entry[1]), **self.value(entry[2]))
        if kind == "method":
            owner, name = self.value(entry[0]), entry[1]
            if is_method(owner, name):
                return getattr(owner, name)
        raise ValueError(f"there is no {kind} {entry!r}")

    def _tensor(
        self,
        place: int,
        dtype: str,
        device: str,
        shape: list[int],
        strides: list[int],
        requires_grad: bool,  # noqa: FBT001
        is_parameter: bool,  # noqa: FBT001
    ) -> Tensor:
        kept = torch.as_tensor(self.arrays[place].copy())
        kept = (kept.view(_dtype(dtype)) if _dtype(dtype) in _AS_INTEGERS else kept).to(device)
        sizes = [1 if step == 0 else size for size, step in zip(shape, strides, strict=True)]
        strided = torch.empty_strided(sizes, strides, dtype=_dtype(dtype), device=device)
        strided.copy_(kept.reshape(sizes))
        full = strided.expand(shape) if sizes != shape else strided
        if is_parameter:
            return nn.Parameter(full, requires_grad=requires_grad)
        return full.requires_grad_(requires_grad)


def _blank(cls: Any) -> Any:
    """An object of a class whose attributes are still to be set."""
    blank = object.__new__(cls)
    if isinstance(blank, nn.Module):
        nn.Module.__init__(blank)
    return blank


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no number type {name!r}")
    return found
