"""What a run of a program read and did, as a key.

Something found by looking at one run of a program holds for runs that do the same. Whether another
run does, its arguments do not tell: a model reads closures, attributes, arrays and tables that may
have changed in place. Its operations tell, with the contents of every tensor that they take from
elsewhere: two runs with the same of both compute the same function of their inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_hamflow.programs.owners import NEW_TENSORS, Call
from pyro_hamflow.programs.storages import Storages, apart
from pyro_hamflow.programs.watching import watching


class Fingerprint(NamedTuple):
    """A run of a program.

    Attributes:
        key: Equal to another run's if both did the same with the same; ``None`` if that cannot be
            told, since Python has read values that depend on the inputs.
        result: What the program returned.
        random: Of each tensor in the result, in order, whether it depends on random numbers that
            were drawn on the way.
    """

    key: str | None
    result: Any
    random: list[bool]


def take_fingerprint(function: Callable[..., Any], *inputs: Tensor) -> Fingerprint:
    """Runs a function of tensors and describes what it did.

    Arguments:
        function: The function; parts of its result that are no tensors belong to the description.
        inputs: What to run it with; their values do not.

    Example:
        >>> data = torch.tensor([1.0, 2.0])
        >>> scale = lambda x: data * x
        >>> first = take_fingerprint(scale, torch.tensor(3.0)).key
        >>> take_fingerprint(scale, torch.tensor(-7.0)).key == first
        True
        >>> _ = data.mul_(2.0)
        >>> take_fingerprint(scale, torch.tensor(3.0)).key == first
        False
    """
    with apart():
        watcher = _Watcher()
        copies = [tensor.detach().clone() for tensor in inputs]
        for copy in copies:
            watcher.take_input(copy)
        with watcher:
            result = function(*copies)
        return watcher.close(result)


Result = TypeVar("Result")


def explained(
    run: Callable[[], Result], again: Callable[..., Any] | None = None, *inputs: Tensor
) -> Result:
    """Runs a model; says so if it fails for a shape that follows values of latent sites.

    Arguments:
        run: What to run.
        again: What to run once more if that fails, if it is not the same.
        inputs: Latent values to run it with; others are known by being random.

    Raises:
        ValueError: If it fails, and a shape on the way followed latent values.
        Exception: What it raises, if it fails otherwise.
    """
    try:
        return run()
    except Exception as error:
        watcher = _Watcher()
        for tensor in inputs:
            watcher.take_input(tensor)
        with apart(), watcher, suppress(Exception):
            (again or run)(*inputs)
        if watcher.moving_shape is None:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            "the model fails where the shape of a result follows the values of latent sites, in "
            f"operation '{watcher.moving_shape}': {lines[0]}; expected operations on whole "
            "tensors, such as `torch.where(x > 0, x, 0.0)` in place of `x[x > 0]`"
        ) from error


_UNRELATED = NEW_TENSORS | {"rand_like", "randint_like", "randn_like"}  # to numbers in arguments


@dataclass
class _Memory:
    """One piece of memory.

    Attributes:
        number: Its own.
        varies: Whether it holds what was computed from the inputs.
        random: Whether it holds what was computed from random numbers.
        read: Of memory from elsewhere, which parts of it have been read; else ``None``.
    """

    number: int
    varies: bool = False
    random: bool = False
    read: set[Any] | None = None


@watching
class _Watcher(TorchDispatchMode):
    """Describes operations as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._digest = hashlib.blake2b(digest_size=16)
        self._memories: Storages[_Memory] = Storages()
        self._count = 0
        self._is_certain = True
        self.moving_shape: str | None = None

    def take_input(self, tensor: Tensor) -> None:
        """Takes a tensor as an input."""
        self._own(tensor, _Memory(self._count, varies=True))
        self._write(self._describe(tensor, []))

    def close(self, result: Any) -> Fingerprint:
        """Describes the result, and closes."""
        memories: list[_Memory] = []
        self._write(self._describe(result, memories))
        key = self._digest.hexdigest() if self._is_certain else None
        return Fingerprint(key, result, [memory.random for memory in memories])

    def __torch_dispatch__(
        self, target: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if target is torch.ops.aten.detach.default and not self._memory(args[0]).varies:
            # It changes nothing there, and torch does it to what it has just made, or not: by
            # whether anyone else, such as a profiler, still refers to that.
            return target(*args)
        memories: list[_Memory] = []
        self._write((target.name(), self._describe((args, kwargs), memories)))
        is_related = target.overloadpacket.__name__ not in _UNRELATED
        varies = is_related and any(memory.varies for memory in memories)
        random = any(memory.random for memory in memories)
        random = random or torch.Tag.nondeterministic_seeded in target.tags
        if (varies or random) and (call := Call(target, args, kwargs, self)).reads_values():
            self._is_certain = False
            if torch.Tag.dynamic_output_shape in target.tags:
                self.moving_shape = self.moving_shape or call.name
        result = target(*args, **kwargs)
        for part in result if isinstance(result, list | tuple) else (result,):
            if isinstance(part, Tensor) and self._memories.get(part) is None:
                self._is_certain &= part.layout == torch.strided or not (varies or random)
                self._own(part, _Memory(self._count, varies, random))
        if target._schema.is_mutable and (varies or random):
            for argument in (*args, *kwargs.values()):  # one of them was written to
                if isinstance(argument, Tensor):
                    memory = self._memory(argument)
                    memory.varies |= varies
                    memory.random |= random
        return result

    def owner(self, tensor: Tensor) -> Tensor:
        """One where values depend on the inputs, or are random; zero elsewhere."""
        return torch.tensor(int(self.has_owners(tensor))).expand(tensor.shape)

    def has_owners(self, tensor: Tensor) -> bool:
        memory = self._memory(tensor)
        return memory.varies or memory.random

    def _write(self, description: Any) -> None:
        self._digest.update(repr(description).encode())

    def _describe(self, value: Any, memories: list[_Memory]) -> Any:
        """A description of a value, and of what is nested in it.

        Tensors are described by their memory and their place in it, other values by themselves.

        Arguments:
            value: The value.
            memories: Where the memories of its tensors are added, in order.
        """
        if isinstance(value, Tensor):
            memory = self._memory(value)
            memories.append(memory)
            place: tuple[Any, ...] = (value.shape, value.dtype, value.layout)
            if value.layout == torch.strided:
                place += (value.stride(), value.storage_offset())
            if memory.read is not None and place not in memory.read:
                memory.read.add(place)
                self._write(_contents(value))
            return (memory.number, place, value.device)
        if isinstance(value, list | tuple):
            return [self._describe(part, memories) for part in value]
        if isinstance(value, dict):
            return [(key, self._describe(part, memories)) for key, part in value.items()]
        return value

    def _memory(self, tensor: Tensor) -> _Memory:
        memory = self._memories.get(tensor)
        if memory is None:
            memory = self._own(tensor, _Memory(self._count, read=set()))
        return memory

    def _own(self, tensor: Tensor, memory: _Memory) -> _Memory:
        self._count += 1
        self._memories.set(tensor, memory)
        return memory


def _contents(tensor: Tensor) -> bytes:
    """A digest of all the numbers in a tensor."""
    if tensor.layout == torch.sparse_coo:
        return _contents(tensor._indices()) + _contents(tensor._values())
    if tensor.layout != torch.strided:
        return _contents(tensor.to_sparse_coo())
    numbers = tensor.detach().resolve_conj().resolve_neg().cpu().reshape(-1)
    # A single number that was expanded counts as contiguous, and is not.
    numbers = numbers.clone(memory_format=torch.contiguous_format)
    return hashlib.blake2b(numbers.view(torch.uint8).numpy().data, digest_size=16).digest()
