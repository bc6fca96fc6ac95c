"""How chains are moved, iteration by iteration, through their warm-up and their draws."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_hamflow.marginal.whiten import WhitenedModel
from pyro_hamflow.mcmc.chains import Chains
from pyro_hamflow.mcmc.draws import Record
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.stopping import StopWhen
from pyro_hamflow.mcmc.transitions.base import Info
from pyro_hamflow.model.kinds import Args
from pyro_hamflow.model.validity import fault_of
from pyro_hamflow.process import random_state_kept

_LONGEST = 4  # times the fewest iterations of warm-up


@dataclass
class Counts:
    """What a run has taken so far.

    Attributes:
        warmup_steps: How many iterations of warm-up were made.
        warmup_time: Seconds of warm-up.
        sampling_time: Seconds of drawing.
    """

    warmup_steps: int = 0
    warmup_time: float = 0.0
    sampling_time: float = 0.0


def planned_warmup(given: int | None, num_chains: int) -> int:
    """How many iterations of warm-up chains make that are tuned together, if it goes well."""
    return 100 + math.ceil(600 / num_chains) if given is None else given


@dataclass
class Mover:
    """Moves the chains of a run, or of a group of it.

    Arguments:
        kernel: What they are moved by.
        num_samples: How many draws each makes.
        num_chains: How many there are.
        tuned_together: How many of them.
        warmup_steps: How many iterations of warm-up they make; as many as it takes if not given.
        initial_params: Unconstrained starting values, chains first.
        hook_fn: Called after each iteration.
        stop_when: Is asked after each draw whether there are enough.
        save_params: The sites that draws are shown of.
        save_warmup: Whether the draws of the warm-up are kept.
        thin: Of how many draws one is kept.
        keep: Which recovered local sites are kept.
        hides_progress: Whether no progress is shown.
        args: The model's arguments.
        kwargs: Its keyword arguments.
        pools_warmup: Whether warm-up waits for what that of other chains has found.
        counts: What the run has taken so far.
    """

    kernel: Kernel
    num_samples: int
    num_chains: int
    tuned_together: int
    warmup_steps: int | None
    initial_params: Mapping[str, Tensor] | None
    hook_fn: Callable[..., None] | None
    stop_when: StopWhen | None
    save_params: Sequence[str] | None
    save_warmup: bool
    thin: int
    keep: Sequence[str] | None
    hides_progress: bool
    args: Args
    kwargs: dict[str, Any]
    pools_warmup: bool = False
    counts: Counts = field(default_factory=Counts)

    @property
    def planned_warmup_steps(self) -> int:
        return planned_warmup(self.warmup_steps, self.tuned_together)

    def validate(self, *, disabled: bool | None) -> None:
        """Runs the model with the checks of its distributions.

        Arguments:
            disabled: Whether what they find is told, and no error; as Pyro's own setting says if
                None.
        """
        model = self.kernel.model
        if model is None:
            return
        if disabled or (disabled is None and not is_validation_enabled()):
            written = model.model if isinstance(model, WhitenedModel) else model
            written = getattr(written, "model_of_data", written)
            fault = fault_of(written, self.args, self.kwargs)
            if fault is not None:
                warnings.warn(
                    f"The model fails the checks of its distributions: {fault}. Its density is "
                    "taken as it is written, and may not be the one that is meant; "
                    "`disable_validation=False` makes this an error.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        with random_state_kept(), poutine.block(), pyro.validation_enabled():
            poutine.trace(model).get_trace(*self.args, **self.kwargs).compute_log_prob()

    def new_chains(self, chain: int | None) -> Chains:
        """Chains that have not begun: all of them, or one."""
        if chain is None:
            return Chains("", self.num_chains)
        return Chains("" if self.num_chains == 1 else f" [{chain}]", 1)

    def begin(self, chains: Chains, chain: int | None) -> None:
        """Prepares the kernel, and finds where chains start."""
        kernel, planned = self.kernel, self.planned_warmup_steps
        kernel.planned_draws = self.num_samples
        kernel.hides_progress = self.hides_progress
        kernel.pools_warmup = self.pools_warmup
        given = self.warmup_steps
        kernel.most_warmup_steps = None if given is not None else _LONGEST * planned
        began = time.perf_counter()
        initial = self.initial(chain)
        chains.state = kernel.begin(chains.num_chains, planned, self.args, self.kwargs, initial)
        chains.phase = kernel.phase
        self.refuse_unknown_sites()
        keep = None if self.keep is None else frozenset(self.keep)
        chains.kept = Record(thin=self.thin, room=self.num_samples // self.thin, keep=keep)
        chains.warm = Record(thin=self.thin, keep=keep)
        self.counts.warmup_time += time.perf_counter() - began

    def stage(self, chains: Chains) -> str:
        """The name of the stage that chains are at."""
        return ("Warmup" if self.kernel.warming else "Sample") + chains.label

    def move(self, chains: Chains) -> Info:
        """One iteration: keeps what it leads to, and calls the user's function.

        Where nobody wants to see each draw, a kernel may make many at once.
        """
        kernel, began = self.kernel, time.perf_counter()
        _, state = chains.begun()
        warming, stage = kernel.warming, self.stage(chains)
        chains.is_whole = False
        if not warming and self.hook_fn is None and self.stop_when is None:
            left = self.num_samples - chains.kept.made
            many = kernel.advance_many(state, left)
            if many is not None:
                chains.state, info, draws = many
                chains.kept.extend(draws)
                chains.is_whole = True
                self.counts.sampling_time += time.perf_counter() - began
                return info
        state, info = kernel.advance(state)
        record, number = (
            (chains.warm, chains.iteration) if warming else (chains.kept, chains.kept.made)
        )
        if self.save_warmup or not warming:
            record.append(kernel.shown(state), info, kernel.step_size)
        chains.state, chains.phase = state, kernel.phase
        chains.iteration += warming
        chains.is_whole = True
        self.counts.warmup_steps = max(chains.iteration, self.counts.warmup_steps)
        if self.hook_fn is not None:
            position = kernel.shown(state).position
            moved = position if chains.num_chains > 1 else position[0]
            self.hook_fn(kernel, kernel.potential.unravel(moved), stage, number)
        seconds = time.perf_counter() - began
        if warming:
            self.counts.warmup_time += seconds
        else:
            self.counts.sampling_time += seconds
        return info

    def refuse_unknown_sites(self) -> None:
        """Refuses names, in what the user wants to see or keep, that the model does not have."""
        names = [site.name for site in self.kernel.potential.sites]
        unknown = sorted(set(self.save_params or ()) - set(names))
        if unknown:
            raise ValueError(f"`save_params` names {unknown}: expected names of the sites {names}")
        estimates = self.kernel.potential.recovery.estimates
        names += [name for estimate in estimates for name in estimate.group.sites]
        unknown = sorted(set(self.keep or ()) - set(names))
        if unknown:
            raise ValueError(f"`keep` names {unknown}: expected names of the sites {names}")

    def initial(self, chain: int | None) -> Mapping[str, Tensor] | None:
        """Where chains start, if that was given: all of them, or one."""
        if self.initial_params is None:
            return None
        values = {n: torch.as_tensor(v) for n, v in self.initial_params.items()}
        if self.num_chains == 1 and self.kernel.model is None:
            return {n: v[None] for n, v in values.items()}
        if self.num_chains == 1:
            shapes = self.kernel.site_shapes(self.args, self.kwargs)
            return {n: v[None] if v.shape == shapes.get(n) else v for n, v in values.items()}
        for name, value in values.items():
            if value.dim() == 0 or value.shape[0] != self.num_chains:
                raise ValueError(
                    f"`initial_params` of site '{name}' has shape {tuple(value.shape)}: expected "
                    f"a first dimension of {self.num_chains}, one entry for each chain"
                )
        return values if chain is None else {n: v[chain : chain + 1] for n, v in values.items()}
