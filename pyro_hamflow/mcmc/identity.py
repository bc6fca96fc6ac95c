"""What a run depends on beside its state, to be compared or set: model, data, random states."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_hamflow.model.kinds import Kwargs
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.trace import Frames, is_latent, vectorized_frames

_CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def structure_of(potential: Potential) -> dict[str, Any]:
    """The sites of a model, in plain words."""
    return {
        kind: [[site.name, list(site.shape), str(site.dtype)] for site in getattr(potential, kind)]
        for kind in ("sites", "noise_sites")
    }


def plates_of(potential: Potential) -> dict[str, dict[int, tuple[str, int]]]:
    """Of each latent site, the names and sizes of plates by the dimension that they take."""
    sites: dict[str, tuple[Frames, int]] = {}
    for name, node in potential.plain_trace.nodes.items():
        if node["type"] == "sample" and is_latent(node):
            sites[name] = vectorized_frames(node), len(node["fn"].batch_shape)
    for estimate in potential.recovery.estimates:
        frames = estimate.group.frames
        batch = -frames[0].dim if frames else 0
        sites |= dict.fromkeys(estimate.group.sites, (frames, batch))
    taken = {"chain", "draw", *sites}
    return {
        name: {
            batch + frame.dim: (frame.name.replace("/", "."), frame.size)
            for frame in frames
            if frame.name not in taken
        }
        for name, (frames, batch) in sites.items()
    }


def dimension_names(
    label: str, shape: tuple[int, ...], plates: Mapping[int, tuple[str, int]]
) -> list[str]:
    """Names of a variable's dimensions: of plates where they have their sizes, else numbers."""
    names: list[str] = []
    for i, size in enumerate(shape):
        plate, length = plates.get(i, ("", -1))
        numbered = f"{label}_dim_{i}"
        names.append(plate if size == length and plate not in names else numbered)
    return names


def digest_of(potential: Potential, args: Sequence[Any], kwargs: Kwargs) -> str:
    """A digest of a model's arguments, of what it observes, and of Pyro's parameters in it."""
    digest = hashlib.sha256()
    nodes = potential.plain_trace.nodes.values()
    of_model = [
        (node["name"], node["value"])
        for node in nodes
        if node["type"] == "param" or (node["type"] == "sample" and node["is_observed"])
        if "estimate" not in node["infer"]
    ]
    for word in _words([list(args), dict(kwargs), of_model]):
        digest.update(len(word).to_bytes(8, "little") + word)
    return digest.hexdigest()


def _words(value: Any, above: tuple[int, ...] = ()) -> Iterator[bytes]:
    """Values as bytes: of arrays, tables and collections all, of other objects what is public.

    Arguments:
        value: The value.
        above: The ids of those that it is a part of.
    """
    if isinstance(value, Tensor) and value.layout == torch.strided:
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        plain = value.detach().cpu().contiguous()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
        return
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    yield type(value).__qualname__.encode()
    if id(value) in above or isinstance(value, _CODE):
        return
    above = (*above, id(value))
    if isinstance(value, set | frozenset):
        yield from sorted(b"".join(_words(part, above)) for part in value)
        return
    parts: list[Any]
    if isinstance(value, Tensor):
        parts = [value.detach().to_dense()]
    elif isinstance(value, list | tuple):
        parts = [len(value), *value]
    elif isinstance(value, np.ndarray):
        parts = [list(value.shape), *value.flat]
    elif isinstance(value, Mapping) or hasattr(value, "columns"):  # a table of pandas or polars
        parts = [part for name in value for part in (name, value[name])]
    elif hasattr(value, "__array__"):
        parts = [np.asarray(value)]
    elif isinstance(value, nn.Module):
        parts = [value.state_dict()]
    elif hasattr(value, "__dict__"):
        public = (pair for pair in vars(value).items() if not pair[0].startswith("_"))
        parts = [part for pair in public for part in pair]
    else:
        parts = _made_of(value)
    for part in parts:
        yield from _words(part, above)


def _made_of(value: Any) -> list[Any]:
    """What an object of a class without attributes, as a date, is made of, as far as it says so."""
    try:
        made = value.__reduce_ex__(2)
    except TypeError:
        return []
    return list(made[1:]) if isinstance(made, tuple) else [made]


# --- random states ------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """Those of torch, on devices in use, of NumPy and of Python, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "gpus": list(on_gpus),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Sets what :func:`random_states` has found."""
    torch.set_rng_state(states["torch"])
    for device, state in zip(range(torch.cuda.device_count()), states["gpus"], strict=False):
        torch.cuda.set_rng_state(state, device)
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
