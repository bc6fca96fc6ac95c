"""The C++ compiler, and what it makes shared libraries with."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = [
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w"),
    # Loops with calls and choices become vectors; results stay what IEEE says but for rounding.
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
    # Differences that are zero for torch are zero here, under roots and logarithms.
    "-ffp-contract=off",
]
_SHORT = 200  # characters of a message
_SECONDS = 300.0  # that a compiler may take; a graph of a thousand operations takes seven


class NotCompiled(Exception):
    """Why there is no machine code, in words that follow "for"."""


@functools.cache
def compiler() -> str | None:
    """The path of a compiler: ``CXX``, or the first that is found of those usual."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found is not None:
            return str(Path(found).resolve())
    return None


def check_compiler() -> str:
    """The path of a compiler.

    Raises:
        NotCompiled: If there is none.
    """
    path = compiler()
    if path is None:
        raise NotCompiled("there is no C++ compiler")
    return path


@functools.cache
def description() -> str:
    """What tells compiler, flags and processor from others, without running anything."""
    path = compiler()
    file = Path(path).stat() if path else None
    identity = (path, file and file.st_size, file and file.st_mtime_ns)
    return repr((identity, _FLAGS, _processor()))


def _processor() -> str:
    """What the processor can do: code made for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    told = ("flags", "Features", "model name")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))


def compiled(source: str, *flags: str) -> bytes:
    """A shared library.

    Arguments:
        source: In C++.
        flags: Of the compiler, besides those that every library is made with.

    Raises:
        NotCompiled: If the compiler refuses it, or there is none.
    """
    path = check_compiler()
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "library.so"
            command = [path, *_FLAGS, *flags, "-x", "c++", "-", "-o", str(library)]
            subprocess.run(
                command, input=source, check=True, capture_output=True, text=True, timeout=_SECONDS
            )
            return library.read_bytes()
    except subprocess.TimeoutExpired as error:
        raise NotCompiled(f"the compiler took more than {_SECONDS:g} seconds") from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotCompiled(f"the compiler said: {_complaint(error)}") from error


def _complaint(error: OSError | subprocess.CalledProcessError) -> str:
    """The first error that a compiler tells of."""
    text = str(getattr(error, "stderr", None) or error)
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0][:_SHORT]
