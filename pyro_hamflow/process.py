"""What a process shares, settings of torch and Pyro and random states, left as it was found."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

import pyro
import torch
from pyro import settings
from pyro.poutine.runtime import _PYRO_STACK
from pyro.util import get_rng_state, set_rng_state

_turn = threading.RLock()


def _free_in_child() -> None:
    """No thread of a forked process holds what another one of its parent's did."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_in_child)


@contextmanager
def undisturbed(seed: int | None = None) -> Iterator[None]:
    """Leaves the process as it was, however the block ends; blocks of several threads take turns.

    What is put back is torch's default precision, whether it records gradients, its number of
    threads, Pyro's settings, among them whether distributions check their arguments, and its stack
    of handlers. Random states (torch's on all devices, NumPy's and Python's) are put back if the
    block has a seed, and go on if it has none. Pyro's store keeps its parameters; one that a model
    makes for the first time stays there, for what was found holds at its value.

    Within it, gradients are recorded. Pyro's handlers and torch's random state belong to the whole
    process, so that a block waits until those of other threads are over. Blocks of one thread may
    nest.

    Arguments:
        seed: What random states are set to at the beginning.

    Example:
        >>> before = torch.get_rng_state()
        >>> with undisturbed(seed=3):
        ...     torch.set_default_dtype(torch.float16)
        ...     first = torch.rand(())
        >>> torch.equal(torch.get_rng_state(), before), torch.get_default_dtype()
        (True, torch.float32)
    """
    with _turn, ExitStack() as stack:
        stack.callback(_put_back())
        stack.enter_context(torch.enable_grad())
        if seed is not None:
            stack.enter_context(random_state_kept())
            stack.callback(set_rng_state, get_rng_state())  # NumPy's and Python's, too
            pyro.set_rng_seed(seed)
        yield


def random_state_kept() -> AbstractContextManager[None]:
    """Puts torch's random states back after a block, those of CUDA's devices if they are in use.

    To ask a device for its state starts CUDA, which takes seconds and memory that a model on the
    CPU has no use for, and forbids processes that are forked later to use it at all.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices, device_type="cuda")


@contextmanager
def collecting_later() -> Iterator[None]:
    """Looks for no garbage where nearly all of many new objects stay: in graphs, in modules."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class HeldSignals:
    """Holds back Ctrl-C and SIGTERM until what is under way is whole.

    The second Ctrl-C is not held back. SIGTERM comes, as it would have, when the block ends. Only a
    process's main thread can do so; in others, and in processes that are forked meanwhile, nothing
    is held back.

    Arguments:
        numbers: Which signals are held back.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self._numbers = numbers or (signal.SIGINT, signal.SIGTERM)
        self._came: list[int] = []
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                self._before[number] = signal.getsignal(number)
                signal.signal(number, self._hold)
        return self

    def __exit__(self, *reason: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if signal.SIGTERM in self._came:
            signal.raise_signal(signal.SIGTERM)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        forked = os.getpid() != self._process
        if number == signal.SIGINT and (forked or signal.SIGINT in self._came):
            raise KeyboardInterrupt
        if forked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._came.append(number)

    @property
    def came(self) -> bool:
        """Whether one has come."""
        return bool(self._came)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Leaves settings as they were, but takes no turn, so that other threads work meanwhile."""
    put_back = _put_back()
    try:
        yield
    finally:
        put_back()


def _put_back() -> Callable[[], None]:
    """A function that sets the settings to what they are now."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    threads, handlers = torch.get_num_threads(), list(_PYRO_STACK)
    found = settings.get()

    def put_back() -> None:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        settings.set(**{n: was for n, was in found.items() if settings.get(n) != was})
        _PYRO_STACK[:] = handlers

    return put_back
