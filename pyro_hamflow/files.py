"""Files of learned parts: numbers and names, without code, that say what they are."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_hamflow.process import random_state_kept

_VERSION = 1  # files of before have neither version nor checksum

Made = TypeVar("Made")
Module = TypeVar("Module", bound=nn.Module)


class FileFault(ValueError):
    """A file that is damaged, or holds something else than was expected."""


def save(path: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Writes names, numbers and tensors to a file, which is there as a whole or not at all.

    Arguments:
        path: The file.
        kind: What it holds, in words.
        content: What it is to hold.
    """
    head = {"format": f"pyro_hamflow {kind}", "version": _VERSION, "checksum": _checksum(content)}
    beside = Path(f"{path}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            torch.save(head | dict(content), file)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | Path, kind: str, make: Callable[[dict[str, Any]], Made]) -> Made:
    """Reads what :func:`save` wrote, and makes something of it.

    Arguments:
        path: The file.
        kind: What it has to hold, in words.
        make: From the content to what is wanted; whatever it raises is a fault of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFault: If it is damaged, or of another kind or version.
    """
    whole = io.BytesIO(Path(path).read_bytes())
    try:
        content = torch.load(whole, weights_only=True, map_location="cpu")
    except Exception as error:
        raise FileFault(f"'{path}' is damaged, or no file of torch's: expected {kind}") from error
    if not isinstance(content, dict):
        raise FileFault(f"'{path}' holds no {kind}, but a {type(content).__name__}")
    head = {name: content.pop(name, None) for name in ("format", "version", "checksum")}
    if head["format"] not in (None, f"pyro_hamflow {kind}"):
        raise FileFault(f"'{path}' holds no {kind}, but: {head['format']}")
    if head["version"] not in (None, _VERSION):
        raise FileFault(
            f"'{path}' is of version {head['version']}: expected {_VERSION}; another release of "
            "pyro_hamflow has written it"
        )
    try:
        if head["checksum"] not in (None, _checksum(content)):
            raise FileFault(f"'{path}' is damaged: its numbers are not those that were written")
        return make(content)
    except FileFault:
        raise
    except Exception as error:
        raise FileFault(
            f"'{path}' holds no {kind}, or one that is damaged: {type(error).__name__}: {error}"
        ) from error


def parts(content: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The parts of a content that has these, and no others."""
    if set(content) != set(names):
        raise ValueError(f"it has {sorted(map(str, content))}: expected {sorted(names)}")
    return [content[name] for name in names]


def restored(kind: type[Module], sizes: Mapping[str, Any], weights: Mapping[str, Any]) -> Module:
    """A module of given sizes with given weights, in their precision.

    Sizes that do not fit the weights are found before any memory is asked for.
    """
    with torch.device("meta"):
        empty = kind(**sizes)
    kept = {name: tensor.shape for name, tensor in weights.items()}
    wanted = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    if kept != wanted:
        raise ValueError(f"its weights are of shapes {kept}: expected {wanted}")
    dtype = next(iter(weights.values())).dtype
    with random_state_kept():
        module = kind(**sizes).to(dtype)
    module.load_state_dict(weights)
    return module


def _checksum(content: Any) -> str:
    """A number that tells contents apart: of names, plain values and the bytes of tensors."""
    digest = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, Mapping):
            for name, value in part.items():
                digest.update(repr(name).encode())
                take(value)
        elif isinstance(part, list | tuple):
            for value in part:
                take(value)
        elif isinstance(part, Tensor):
            digest.update(repr((part.dtype, tuple(part.shape))).encode())
            plain = part.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())

    take(content)
    return digest.hexdigest()
