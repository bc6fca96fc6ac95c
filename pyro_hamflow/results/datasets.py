"""Tensors as xarray datasets, their dimensions named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_hamflow.model.trace import Frames, is_deterministic, vectorized_frames
from pyro_hamflow.results.names import Names

if TYPE_CHECKING:
    import xarray

_DRAWN = ("chain", "draw")


class Array(NamedTuple):
    """The values of a site, or of several that are joined.

    Attributes:
        sites: Their names in the model.
        value: The values.
        frames: The plates around them.
        event_dim: How many dimensions, counted from the right, cannot be plates.
        is_density: Whether it holds log densities, in which event dimensions are summed up.
        entries: Which of the site's entries, counted flat, its one dimension holds; ``None`` for
            all.
        numbers: Of a loop's sites, those at the end of their names; they lie side by side along the
            first dimension that is no plate's. Empty for others.
    """

    sites: tuple[str, ...]
    value: Tensor
    frames: Frames
    event_dim: int
    is_density: bool = False
    entries: Tensor | None = None
    numbers: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """How messages call it."""
        return "_".join(self.sites)


def array_of(name: str, value: Any, node: Any, lead: int) -> Array:
    """The values of a site of a model.

    Arguments:
        name: Its name.
        value: Its values.
        node: What the trace of the model holds of it; ``None`` for a site that is not the model's.
        lead: How many dimensions come before the site's own, as those of draws.
    """
    value = torch.as_tensor(value).detach().cpu()
    if node is None:
        return Array((name,), value, (), value.dim() - lead)
    own = torch.as_tensor(node["value"])
    while value.dim() - lead > max(own.dim(), 0) and value.shape[lead] == 1:
        value = value.squeeze(lead)  # a dimension for plates elsewhere, as `Predictive` makes it
    frames, event_dim = vectorized_frames(node), node["fn"].event_dim
    if is_deterministic(node) and event_dim == own.dim():
        # Pyro counts all dimensions of a deterministic site as its event's: find the plates.
        for right in range(own.dim() if frames else 0):
            batch = own.shape[: own.dim() - right]
            if all(-f.dim <= len(batch) and batch[f.dim] == f.size for f in frames):
                return Array((name,), value, frames, right)
    return Array((name,), value, frames, event_dim)


class Datasets:
    """Makes datasets, in all of which a name means the same.

    Arguments:
        names: The names of sites and dimensions.
        dims: Names for the dimensions of each site that are no plates.
        coords: Coordinate values of dimensions.

    Raises:
        TypeError: If ``dims`` of a site is a text.
    """

    def __init__(
        self,
        names: Names,
        dims: Mapping[str, Sequence[str | None]],
        coords: Mapping[str, Sequence[Any]],
    ) -> None:
        for site, given in dims.items():
            if isinstance(given, str):
                raise TypeError(f"`dims` of site '{site}' is {given!r}: expected a list of names")
        self.names, self.dims, self.coords = names, dims, coords
        self._seen_sites: set[str] = set()
        self._seen_dimensions: dict[str, str] = {}  # by the name in the model
        # Of dimensions of loops: the sites that lie along them, by their numbers.
        self._numbers: dict[str, dict[tuple[int, ...], str]] = {}

    def make(self, arrays: Sequence[Array], *, drawn: bool) -> xarray.Dataset:
        """A dataset of arrays, the first two of whose dimensions are chains and draws if drawn.

        Raises:
            ValueError: If names or coordinates do not fit the arrays' shapes.
        """
        import xarray  # imports pandas

        lead = _DRAWN if drawn else ()
        variables: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        sizes: dict[str, tuple[int, str]] = {}
        for array in arrays:
            shape, names = self._dimensions(array, len(lead))
            for dim, size in zip(lead + names, array.value.shape[: len(lead)] + shape, strict=True):
                other, site = sizes.setdefault(dim, (size, array.label))
                if other != size:
                    raise ValueError(
                        f"dimension '{dim}' has size {size} at site '{array.label}' and {other} at "
                        f"site '{site}': expected a name in `dims` to mean one size"
                    )
                coords[dim] = np.arange(size) if dim in lead else self._values(dim, size, array)
            data = to_numpy(array.value).reshape(array.value.shape[: len(lead)] + shape)
            variables[self.names.site(*array.sites)] = (lead + names, data)
        return xarray.Dataset(variables, coords)

    def refuse_unknown(self) -> None:
        """Raises a ValueError if ``dims`` or ``coords`` name what no dataset has."""
        for site in self.dims:
            if site not in self._seen_sites:
                raise ValueError(
                    f"`dims` names site '{site}': expected some of {sorted(self._seen_sites)}"
                )
        known = {*self._seen_dimensions, *self._seen_dimensions.values()}
        for dimension in self.coords:
            if dimension not in known:
                raise ValueError(
                    f"`coords` names dimension '{dimension}': expected some of {sorted(known)}"
                )

    def _dimensions(self, array: Array, lead: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The sizes and names of an array's dimensions, but for those that other plates take."""
        shape = array.value.shape[lead:]
        batch = max(0, len(shape) - array.event_dim)
        frames = {batch + frame.dim: frame for frame in array.frames}
        given = list(self.dims.get(array.sites[0], ())) if len(array.sites) == 1 else []
        self._seen_sites.update(array.sites)
        kept: list[int] = []
        names: list[str] = []
        number = 0
        for i, size in enumerate(shape):
            frame = frames.get(i)
            if frame is not None and frame.size == size:
                names.append(self._named(frame.name))
            elif size == 1 and i < batch and frames:
                continue
            else:
                own = given[number] if number < len(given) else None
                is_time = bool(array.numbers) and i == batch
                part = "time" if is_time else f"dim_{number}"
                names.append(self._unnamed(array, part) if own is None else self._named(own))
                if is_time:
                    self._numbers.setdefault(names[-1], {})[array.numbers] = array.label
                number += 1
            kept.append(size)
        if len(given) > number and not array.is_density:
            raise ValueError(
                f"`dims` of site '{array.label}' has {len(given)} names: expected {number} or "
                "fewer, as many as it has dimensions that are no plates"
            )
        if len(set(names)) < len(names):
            raise ValueError(
                f"`dims` of site '{array.label}' gives two dimensions of one site one name: {names}"
            )
        return tuple(kept), tuple(names)

    def _named(self, name: str) -> str:
        self._seen_dimensions[name] = self.names.dimension(name)
        return self._seen_dimensions[name]

    def _unnamed(self, array: Array, part: str) -> str:
        name = self.names.unnamed(self.names.site(*array.sites), part)
        self._seen_dimensions.setdefault(name, name)
        return name

    def _values(self, dimension: str, size: int, array: Array) -> Any:
        """A dimension's coordinates, given under its name in the model or in the result."""
        keys = [name for name, own in self._seen_dimensions.items() if own == dimension]
        for key in [*keys, dimension]:
            if key in self.coords:
                values = np.asarray(self.coords[key])
                if values.shape != (size,):
                    raise ValueError(
                        f"`coords` of dimension '{key}' has {len(values)} values: expected "
                        f"{size}, as site '{array.label}' has"
                    )
                return values
        numbers = self._numbers.get(dimension, {})
        if len(numbers) > 1:
            (first, site), (second, other), *_ = numbers.items()
            raise ValueError(
                f"dimension '{dimension}' has numbers {first[0]} to {first[-1]} at site '{site}' "
                f"and {second[0]} to {second[-1]} at site '{other}': expected `coords` of it"
            )
        if numbers:
            return np.asarray(next(iter(numbers)))
        return np.arange(size) if array.entries is None else to_numpy(array.entries)


def to_numpy(value: Tensor) -> np.ndarray:
    """A tensor as an array that files can hold: of single precision where it has less."""
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()
