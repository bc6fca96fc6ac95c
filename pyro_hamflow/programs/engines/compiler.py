"""The C++ compiler, and what it makes shared libraries with."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from pyro_hamflow.programs.engines.buffers import NotSupported

_FLAGS = [
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w"),
    # Loops with calls and choices become vectors; results stay what IEEE says but for rounding.
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
    # Differences that are zero for torch are zero here, under roots and logarithms.
    "-ffp-contract=off",
]
_SHORT = 200  # characters of a message


@functools.cache
def compiler() -> str | None:
    """The path of a compiler: ``CXX``, or g++ or clang++ where they are found."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return None
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        found = shutil.which(name)
        if found is not None:
            return str(Path(found).resolve())
    return None


@functools.cache
def description() -> str:
    """What tells compiler, flags, processor and torch from others, without running anything."""
    path = compiler()
    file = Path(path).stat() if path else None
    identity = (path, file and file.st_size, file and file.st_mtime_ns)
    return repr((identity, _FLAGS, _processor(), torch.__version__))


def _processor() -> str:
    """What the processor can do: code made for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("flags", "Features", "model name")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))


def compiled(source: str, *, with_torch_headers: bool) -> bytes:
    """A shared library.

    Arguments:
        source: In C++.
        with_torch_headers: Whether it includes headers of torch's.

    Raises:
        NotSupported: If the compiler refuses it, or there is none.
    """
    path = compiler()
    if path is None:
        raise NotSupported("no compiler")
    headers = [f"-I{folder}" for folder in _torch_headers()] if with_torch_headers else []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        command = [path, *_FLAGS, *headers, "-x", "c++", "-", "-o", str(library)]
        try:
            subprocess.run(command, input=source, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NotSupported(_complaint(error)) from error
        return library.read_bytes()


def _torch_headers() -> list[str]:
    root = Path(torch.__file__).parent / "include"
    return [str(root), str(root / "torch" / "csrc" / "api" / "include")]


def _complaint(error: OSError | subprocess.CalledProcessError) -> str:
    """The first error that a compiler tells of."""
    text = str(getattr(error, "stderr", None) or error)
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0][:_SHORT]
