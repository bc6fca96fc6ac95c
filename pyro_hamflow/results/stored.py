"""Draws in a Zarr store, as they lie there: read when they are asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch

from pyro_hamflow.mcmc.group_checkpoints import whole_rows
from pyro_hamflow.mcmc.packing import CheckpointError, DamagedCheckpoint
from pyro_hamflow.mcmc.store import Store
from pyro_hamflow.mcmc.writer import GROUPS, WARM
from pyro_hamflow.version import __version__

if TYPE_CHECKING:
    import xarray


def stored_groups(
    path: str | os.PathLike[str],
) -> tuple[dict[str, xarray.Dataset], dict[str, Any]]:
    """The groups of a store that a run writes, or has written, and the attributes of the whole.

    They are as long as the latest checkpoint says. No model is needed, and no draw is read.

    Raises:
        CheckpointError: If there is no whole state.
        ValueError: If there are no draws.
    """
    import xarray  # imports pandas

    found = _extent(path)
    groups: dict[str, xarray.Dataset] = {}
    for prefix, draws in (("", found.draws), (WARM, found.warmup_draws)):
        for group in GROUPS if draws else ():
            whole = xarray.open_zarr(
                os.fspath(path), group=prefix + group, consolidated=False, chunks=None
            )
            part = whole.isel(chain=found.chains, draw=slice(draws))
            groups[prefix + group] = part.assign_coords(
                chain=range(len(found.chains)), draw=range(draws)
            )
    if not groups:
        raise ValueError(
            f"{os.fspath(path)} has no draws yet: the run is in its warm-up, or ended there and "
            "goes on by `MCMC.resume`"
        )
    attributes = {
        "inference_library": "pyro_hamflow",
        "inference_library_version": __version__,
        "torch_version": str(torch.__version__),
        "pyro_version": str(pyro.__version__),
        "tuning_steps": found.warmup_steps,
        "sampling_time": found.sampling_time,
    }
    for dataset in groups.values():
        dataset.attrs.update(attributes)
    return groups, attributes


class _Extent(NamedTuple):
    """How much of a run its latest checkpoint counts.

    Attributes:
        chains: The numbers of the chains that have draws.
        draws: How many are kept of each.
        warmup_draws: How many of the warm-up.
        warmup_steps: How many iterations of it there were.
        sampling_time: How many seconds drawing took.
    """

    chains: list[int]
    draws: int
    warmup_draws: int
    warmup_steps: int
    sampling_time: float


def _extent(path: str | os.PathLike[str]) -> _Extent:
    """How much there is of a run, while it goes on or afterwards.

    Raises:
        CheckpointError: If there is no whole state.
    """
    store = Store(path, writes=False)
    for _, saved in store.states():
        if isinstance(saved, DamagedCheckpoint):
            continue
        run, kept = saved.words["run"], saved.words["kept"][1]
        warm, times = saved.words["warm"][1], (run["warmup_steps"], run["sampling_time"])
        number = saved.words["num chains"]
        if "division" in saved.words:
            return _Extent(*whole_rows(saved.words, number), *times)
        if run["chain"] is None:
            return _Extent(list(range(number)), kept, warm, *times)
        of_each = [*run["ended"][: run["chain"]], [kept, warm]]
        if kept * len(of_each) < of_each[0][0] * (len(of_each) - 1):
            of_each.pop()  # a chain just begun: all would be cut to its length
        least = [min(counts) for counts in zip(*of_each, strict=True)]
        return _Extent(list(range(len(of_each))), least[0], least[1], *times)
    raise CheckpointError(f"{store.path} has no whole state")
