"""Shared libraries: loaded from where they are kept, or made, kept and loaded."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pyro_hamflow.programs.machine_code.compiler import NotCompiled
from pyro_hamflow.programs.machine_code.store import Store

_ENDING = ".so"


def library(key: str, make: Callable[[], bytes], store: Store) -> ctypes.CDLL:
    """The library of a key; where it cannot be kept, it is made for this process alone.

    Arguments:
        key: Of everything that the library is made from.
        make: Makes the library.
        store: Where it is kept.

    Raises:
        NotCompiled: If no library can be made or loaded.
    """
    kept = store.find(key, _ENDING)
    if kept is not None:
        with suppress(OSError):  # one that this machine does not load is made anew
            return ctypes.CDLL(str(kept))
    content = make()
    try:
        return ctypes.CDLL(str(store.keep(key, _ENDING, content)))
    except OSError:
        return _of_this_process(key, content)


def _of_this_process(key: str, content: bytes) -> ctypes.CDLL:
    """Loads a library from a folder that goes: one that is loaded needs no file."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(Store(Path(folder)).keep(key, _ENDING, content)))
    except OSError as error:
        raise NotCompiled(f"a library cannot be loaded: {error}") from error
