"""A segment of the run of some chains, made in whatever process an executor takes it to.

What goes there is one value of bytes, and what comes back is another. Nothing of a process but its
cache of captured models outlives a segment, so that each may be made anywhere, and made again.
"""

from __future__ import annotations

import hashlib
import pickle
import signal
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import settings

from pyro_hamflow.mcmc.adaptation.window import Findings
from pyro_hamflow.mcmc.chains import Chains
from pyro_hamflow.mcmc.draws import Draws, Record
from pyro_hamflow.mcmc.identity import random_states, set_random_states
from pyro_hamflow.mcmc.moving import Counts, Mover
from pyro_hamflow.mcmc.snapshot import Frozen, capture, found_words, source_words, take_up
from pyro_hamflow.mcmc.storable import Unstorable
from pyro_hamflow.process import HeldSignals, undisturbed

try:
    import cloudpickle as pickler  # takes models of a notebook, too
except ImportError:
    pickler = pickle

_UNPOOLED = (
    "`pool_warmup` is True of a kernel whose state cannot be stored: expected one of pyro_hamflow, "
    "made of numbers, tensors and objects of its own"
)
_MOST_TASKS = 8  # that a process remembers, with their captured models


@dataclass
class Task:
    """The run of a group of chains, and what it takes from the process that it was set up in.

    Arguments:
        run: What moves the chains.
        seed: What its random numbers begin with.
    """

    run: Mover
    seed: int
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    device: torch.device = field(default_factory=torch.get_default_device)
    num_threads: int = field(default_factory=torch.get_num_threads)
    settings: dict[str, Any] = field(default_factory=settings.get)
    parameters: Any = field(default_factory=lambda: pyro.get_param_store().get_state())

    @contextmanager
    def process(self) -> Iterator[None]:
        """Sets a process up like the one that the task comes from, as long as it lasts."""
        with undisturbed(self.seed), ExitStack() as stack:
            torch.set_default_dtype(self.dtype)
            if torch.get_num_threads() != self.num_threads:
                torch.set_num_threads(self.num_threads)
            settings.set(**self.settings)
            if torch.get_default_device() != self.device:
                stack.enter_context(self.device)
            stack.enter_context(pyro.get_param_store().scope(self.parameters))
            yield


@dataclass
class Saved:
    """Where a group is: all that its next iteration depends on.

    Attributes:
        findings: What its warm-up has found, if it waits for what that of all groups has.
    """

    source: Frozen
    found: Frozen
    random: dict[str, Any]
    iteration: int
    warm: Record
    kept: Record
    findings: Findings | None = None


@dataclass
class Segment:
    """What a segment has led to.

    Attributes:
        draws: Those that were made in it; none if there are none.
        warm: The same of the warm-up, where it is kept.
        saved: Where the group is now; none if its state cannot be stored, or is not whole.
        iteration: How many iterations of warm-up the group has made so far.
        made: How many draws it has made so far.
        warmup_left: How many iterations of warm-up are to come, as far as is known.
        messages: What its kernel has to say so far.
        warmup_time: Seconds of warm-up in this segment.
        sampling_time: Seconds of drawing in it.
        error: What has ended it before its time.
    """

    draws: Draws | None
    warm: Draws | None
    saved: Saved | None
    iteration: int
    made: int
    warmup_left: int
    messages: list[str]
    warmup_time: float
    sampling_time: float
    error: BaseException | None


_known: OrderedDict[str, Task] = OrderedDict()


def packed(value: Any) -> bytes:
    """A value as bytes, functions of a script or a notebook included."""
    return pickler.dumps(value)


def make_segment(
    task: bytes,
    saved: bytes | None,
    findings: bytes | None,
    seconds: float,
    most_draws: int,
    attempt: int,
) -> bytes:
    """Moves the chains of a group on, until they have their draws or their time is over.

    Arguments:
        task: A packed :class:`Task`.
        saved: Where the group is, packed; at the beginning if not given.
        findings: What the warm-up of all groups has found, packed, where this one waits for it.
        seconds: For how long.
        most_draws: Up to how many draws.
        attempt: Tells this call from earlier ones, which executors might take for the same.

    Returns:
        A packed :class:`Segment`.
    """
    found = _task(task)
    with found.process():
        return packed(_make(found.run, saved, findings, seconds, most_draws))


def _task(task: bytes) -> Task:
    """The task of these bytes: as it was before in this process, its model captured, if it was."""
    key = hashlib.sha256(task).hexdigest()
    known = _known.pop(key, None)
    _known[key] = found = pickle.loads(task) if known is None else known
    while len(_known) > _MOST_TASKS:
        _known.popitem(last=False)
    return found


def _make(
    run: Mover, saved: bytes | None, findings: bytes | None, seconds: float, most_draws: int
) -> Segment:
    ends = time.monotonic() + seconds
    chains = run.new_chains(None)
    run.counts = Counts()
    planned = run.num_samples
    error: BaseException | None = None
    place: Saved | None = None
    try:
        if saved is None:
            run.begin(chains, None)
        else:
            _go_on_from(run, pickle.loads(saved), chains)
        if findings is not None:
            _, state = chains.begun()
            chains.state = run.kernel.take_in(pickle.loads(findings), state)
            chains.phase = run.kernel.phase
        run.num_samples = most_draws  # so that no call of an engine makes more
        can_be_saved = True
        with HeldSignals(signal.SIGINT) as held:
            while place is None and chains.kept.made < planned:
                run.move(chains)
                if held.came:
                    raise KeyboardInterrupt
                waits = run.kernel.share(chains.begun()[1]) is not None
                over = time.monotonic() >= ends or chains.kept.made >= most_draws
                if waits or (over and can_be_saved):
                    place = _saved(run, chains)
                    if place is None:  # then all is one segment
                        if waits:
                            raise TypeError(_UNPOOLED)
                        can_be_saved, run.num_samples = False, planned
    except BaseException as caught:  # noqa: BLE001  # goes back with the draws
        error = _carried(caught)
        if chains.state is not None and chains.is_whole:
            place = _saved(run, chains)
    finally:
        run.num_samples = planned
    kernel = run.kernel
    begun = chains.state is not None
    return Segment(
        chains.kept.stacked() if len(chains.kept) else None,
        chains.warm.stacked() if len(chains.warm) else None,
        place,
        chains.iteration,
        chains.kept.made,
        kernel.warmup_left if begun else 0,
        list(kernel.messages) if begun else [],
        run.counts.warmup_time,
        run.counts.sampling_time,
        error,
    )


def _saved(run: Mover, chains: Chains) -> Saved | None:
    """Where chains are; none if their kernel holds what cannot be stored."""
    _, state = chains.begun()
    try:
        words = source_words(run.kernel), found_words(run.kernel, state)
    except Unstorable:
        return None
    records = _emptied(chains.warm), _emptied(chains.kept)
    findings = run.kernel.share(state)
    return Saved(*words, random_states(), chains.iteration, *records, findings)


def _emptied(record: Record) -> Record:
    """A record that goes on after another."""
    return replace(record, position=[], stats={}, local={}, blocks=[], stored=record.count)


def _go_on_from(run: Mover, saved: Saved, chains: Chains) -> None:
    """Puts a kernel and chains where they were."""
    capture(run.kernel, run.args, run.kwargs, saved.source)
    chains.state = take_up(run.kernel, saved.found)
    chains.phase, chains.iteration = run.kernel.phase, saved.iteration
    chains.warm, chains.kept = saved.warm, saved.kept
    set_random_states(saved.random)


def _carried(error: BaseException) -> BaseException:
    """An exception that can be packed, with where it was raised as a note."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(packed(error))
    except Exception:  # noqa: BLE001  # whatever the classes of others raise
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = None
    error.add_note(f"It was raised in a worker:\n{where}")
    return error
