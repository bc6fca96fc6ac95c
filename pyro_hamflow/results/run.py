"""The draws of a run, whoever ran it, and what is said of the run as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.mcmc import MCMC
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.smc.importance import ImportanceSamples
from pyro_hamflow.smc.resampling import effective_size, resample_systematically
from pyro_hamflow.smc.sampler import AnnealedSampler
from pyro_hamflow.version import __version__

_SHORTEST = 4  # draws of a chain, of which ArviZ tells anything


class Run:
    """The draws of a run, whoever ran it.

    Arguments:
        result: As in :func:`~pyro_hamflow.to_inference_data`.

    Raises:
        TypeError: If it is of no such kind.
        ValueError: If there are no draws.
    """

    kernel: Any
    warmup_draws: Draws | None = None
    sampling_time: float | None = None
    seed: int | None = None
    told: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, result: Any) -> None:
        if isinstance(result, ImportanceSamples | AnnealedSampler):
            self.kernel, self.tuning_steps = result, 0
            try:
                self.draws = _picked(result)
            except RuntimeError as error:
                raise ValueError(str(error)) from error
            if isinstance(result, AnnealedSampler):
                self.sampling_time, self.seed = result.sampling_time, result.seed
                self.told = {"messages": [result.message]}
            return
        kernel = getattr(result, "kernel", None)
        if not isinstance(kernel, Kernel):
            raise TypeError(
                f"the result is a {type(result).__name__} without a kernel of pyro_hamflow: "
                "expected an MCMC object that ran one"
            )
        self.kernel = kernel
        self.tuning_steps = result.warmup_steps
        if isinstance(result, MCMC):
            try:
                self.draws = result.draws
            except RuntimeError as error:
                raise ValueError(str(error)) from error
            self.warmup_draws = result.warmup_draws
            self.sampling_time = result.sampling_time
            self.seed = result.seed
            self.told = {"messages": result.messages, "diagnostics": result.report}
        else:  # Pyro's runner
            records = [part["record"] for part in result._diagnostics if part is not None]
            if not records:
                raise ValueError("there are no draws yet: call `run` first")
            self.draws = Draws.join([record.stacked() for record in records])
        with random_state_kept():
            self.kernel.prepare(result._args, result._kwargs)

    def attributes(self) -> dict[str, Any]:
        """What is said of the run as a whole."""
        attributes: dict[str, Any] = {
            "inference_library": "pyro_hamflow",
            "inference_library_version": __version__,
            "torch_version": str(torch.__version__),
            "pyro_version": str(pyro.__version__),
            "tuning_steps": self.tuning_steps,
            "kernel_settings": json.dumps(plain(self.kernel.settings), allow_nan=False),
        }
        if isinstance(self.kernel, ImportanceSamples):
            attributes["pareto_k"] = self.kernel.pareto_k
        if isinstance(self.kernel, ImportanceSamples | AnnealedSampler):
            for name in ("log_evidence", "log_evidence_error", "ess"):
                attributes[name] = float(getattr(self.kernel, name))
        if self.sampling_time is not None:
            attributes["sampling_time"] = self.sampling_time
        if self.seed is not None:
            attributes["seed"] = self.seed
        for name, part in self.told.items():
            attributes[name] = json.dumps(plain(part), allow_nan=False)
        return attributes


def plain(value: Any) -> Any:
    """A value that JSON has: numbers that are not finite become null, others words.

    Example:
        >>> plain({"variance": float("nan"), "shape": (2, 3)})
        {'variance': None, 'shape': [2, 3]}
    """
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else repr(value)


def _picked(result: ImportanceSamples | AnnealedSampler) -> Draws:
    """Draws of equal weight, as many as the weights are worth.

    A population's are in its own order, in which relatives follow each other, and its parts are
    chains: so ArviZ sees how alike they are.
    """
    number = float(effective_size(result.log_weights))
    if isinstance(result, AnnealedSampler):
        chains = result.num_replicates
        length = max(_SHORTEST, int(number) // chains)
        picked = resample_systematically(result.log_weights[None], chains * length)[0]
        picked = picked.reshape(chains, length)
    else:
        picked = result.pick(max(1, int(number)))[None]

    def in_chains(part: Tensor) -> Tensor:
        return part[picked].detach().cpu()

    local = {name: in_chains(part) for name, part in result.local.items()}
    stats = {"log_weight": in_chains(result.log_weights)}
    return Draws(in_chains(result.position), stats, local)
