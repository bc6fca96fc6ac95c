"""Draws of many chains in machine code: a captured gradient and the trajectories around it.

Inductor writes kernels for the graph of one chain's gradient; these, a plan of their scratch
memory and this package's trajectories become one shared library. A call makes many draws of all
chains, without the interpreter's lock. The library depends on the graph and the shapes of the data
alone, and is kept from one process to the next.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.programs.engines.buffers import NotSupported, kind_of
from pyro_hamflow.programs.engines.lowering import source_of, with_constants_as_arguments
from pyro_hamflow.programs.engines.translation import Function
from pyro_hamflow.programs.machine_code import compiler
from pyro_hamflow.programs.machine_code.libraries import library
from pyro_hamflow.programs.machine_code.store import Store, key_of, user_store

_HERE = Path(__file__).parent
HEADERS = {name: (_HERE / f"{name}.hpp").read_text() for name in ("kernels", "trajectories")}

_PLATFORMS = [("Linux", "x86_64"), ("Linux", "aarch64")]  # where its trajectories were tried

_NUMBERS = [
    *("chains", "draws", "noise_dimension", "slots", "dense", "turning", "threads"),
    *("points", "seed", "first_draw"),
]
_PLACES = [
    *("data", "root", "step_sizes", "noise", "momenta", "uniforms", "num_steps", "position"),
    *("value", "gradient", "positions", "values", "rate", "error", "energy", "n_steps"),
    *("diverging", "limited", "accepted"),
]


class _Call(ctypes.Structure):
    """What one call is to do; as in ``trajectories.hpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _PLACES),
    ]


class Made(NamedTuple):
    """The draws of one call, of shape ``(chains, draws)`` but for the positions.

    Attributes:
        positions: Of shape ``(chains, draws, dimension)``.
        values: The potential.
        rate: The probability of acceptance, of trees its mean over their points.
        error: By how much the Hamiltonian grew.
        energy: The Hamiltonian at the draw.
        n_steps: Steps of the integrator.
        diverging: Whether the Hamiltonian grew without bound.
        limited: Whether a tree ended because it may not double again.
        accepted: Whether the draw is another one than that before.
    """

    positions: Tensor
    values: Tensor
    rate: Tensor
    error: Tensor
    energy: Tensor
    n_steps: Tensor
    diverging: Tensor
    limited: Tensor
    accepted: Tensor


class Request(NamedTuple):
    """What is to be made of each chain's state.

    Attributes:
        root: The square root of the inverse mass: a lower triangle, or a diagonal.
        step_sizes: Of each chain.
        num_steps: For each draw, how many steps its trajectory takes, or may take at most.
        turning: Whether trajectories double until they turn back.
        slots: One more than they may double.
        seed: Of all random numbers.
        first_draw: The number of the first draw: each chain's random numbers depend on it alone.
        threads: How many threads share the chains.
        momenta: Momenta to take in place of random ones, ``(chains, dimension)``, whitened.
        uniforms: Uniform numbers to take likewise, of shape ``(chains, points, 3)``.
    """

    root: Tensor
    step_sizes: Tensor
    num_steps: Tensor
    turning: bool
    slots: int
    seed: int
    first_draw: int
    threads: int = 1
    momenta: Tensor | None = None
    uniforms: Tensor | None = None


class NativeProgram:
    """Trajectories along one chain's gradient, in machine code.

    Arguments:
        graph: From position and noise of one chain to the potential and its gradient.
        examples: A position and a noise.
        store: Where libraries are kept.

    Raises:
        NotSupported: If an operation of the graph has no code here, or there is no compiler.
    """

    def __init__(
        self, graph: GraphModule, examples: Sequence[Tensor], store: Store | None = None
    ) -> None:
        lifted, self._constants = with_constants_as_arguments(graph)
        inputs = [*(example.contiguous() for example in examples), *self._constants]
        self._dtype = examples[0].dtype
        if examples[0].device.type != "cpu":
            raise NotSupported(f"the device {examples[0].device}")
        real = kind_of(self._dtype)
        library = _library(lifted, inputs, real, store or user_store())
        self._make_draws, self._evaluate = library.make_draws, library.evaluate
        self._data = (ctypes.c_void_p * len(inputs))(*(part.data_ptr() for part in inputs))

    def gradient(self, position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials of shape ``(chains,)``, and their gradients in the position."""
        position, noise = self._fitting(position), self._fitting(noise)
        value, gradient = position.new_empty(len(position)), torch.empty_like(position)
        places = {"position": position, "noise": noise, "value": value, "gradient": gradient}
        self._call(self._evaluate, position, noise, places, slots=0)
        return value, gradient

    def draw(
        self, position: Tensor, value: Tensor, gradient: Tensor, noise: Tensor, request: Request
    ) -> Made:
        """Makes draws; position, value and gradient of each chain are moved on in place.

        Arguments:
            position: Of shape ``(chains, dimension)``, without gaps in memory, as all of these.
            value: The potential, of shape ``(chains,)``.
            gradient: Its gradient, of the shape of the position.
            noise: Of shape ``(chains, noise_dimension)``; it is held.
            request: What to make.
        """
        shape = len(position), len(request.num_steps)
        double, flag = partial(torch.empty, shape, device="cpu", dtype=torch.float64), torch.bool
        made = Made(
            positions=position.new_empty(*shape, position.shape[1]),
            values=position.new_empty(shape),
            rate=double(),
            error=double(),
            energy=double(),
            n_steps=torch.empty(shape, device="cpu", dtype=torch.int64),
            diverging=torch.empty(shape, device="cpu", dtype=flag),
            limited=torch.empty(shape, device="cpu", dtype=flag),
            accepted=torch.empty(shape, device="cpu", dtype=flag),
        )
        if position.dtype != self._dtype:
            raise TypeError(f"positions are {position.dtype}: expected {self._dtype}")
        noise, root = self._fitting(noise), self._fitting(request.root)
        sizes, momenta = self._fitting(request.step_sizes), request.momenta
        places = made._asdict() | {
            "position": position,
            "value": value,
            "gradient": gradient,
            "noise": noise,
            "root": root,
            "step_sizes": sizes,
            "num_steps": request.num_steps,
            "momenta": None if momenta is None else self._fitting(momenta),
            "uniforms": request.uniforms,
        }
        self._call(
            self._make_draws,
            position,
            noise,
            places,
            draws=shape[1],
            slots=request.slots,
            dense=request.root.dim() == 2,
            turning=request.turning,
            threads=max(1, min(request.threads, shape[0])),
            points=0 if request.uniforms is None else request.uniforms.shape[1],
            seed=request.seed,
            first_draw=request.first_draw,
        )
        return made

    def _fitting(self, tensor: Tensor) -> Tensor:
        """A tensor of the type that the machine code reads, without gaps in memory."""
        return tensor.to(device="cpu", dtype=self._dtype).contiguous()

    def _call(
        self,
        function: ctypes._NamedFuncPointer,
        position: Tensor,
        noise: Tensor,
        places: Mapping[str, Tensor | None],
        **numbers: int,
    ) -> None:
        known = {n: part.data_ptr() for n, part in places.items() if part is not None}
        call = _Call(
            chains=len(position),
            noise_dimension=noise.shape[1],
            data=ctypes.addressof(self._data),
            **numbers,
            **known,
        )
        function(ctypes.byref(call))


_programs: WeakKeyDictionary[GraphModule, NativeProgram] = WeakKeyDictionary()


def native_program(graph: GraphModule, examples: Sequence[Tensor]) -> NativeProgram:
    """As :class:`NativeProgram`, made once of each graph."""
    if graph not in _programs:
        _programs[graph] = NativeProgram(graph, examples)
    return _programs[graph]


def _library(graph: GraphModule, inputs: list[Tensor], real: str, store: Store) -> ctypes.CDLL:
    """The library of a graph: from the store, or newly made."""
    kinds = repr([(tuple(part.shape), str(part.dtype)) for part in inputs])
    made_with = compiler.description(), torch.__version__, _own_code(), *HEADERS.values()
    key = key_of(graph.code, kinds, *made_with)
    declined = store.find(key, ".txt")
    if declined is not None:
        raise NotSupported(declined.read_text())
    try:
        return library(key, partial(_made, graph, inputs, real), store)
    except NotSupported as error:
        with suppress(OSError):
            store.keep(key, ".txt", str(error).encode())
        raise
    except compiler.NotCompiled as error:
        raise NotSupported(f"any operation, for {error}") from error


def _made(graph: GraphModule, inputs: list[Tensor], real: str) -> bytes:
    """A library, made for this processor."""
    if (platform.system(), platform.machine()) not in _PLATFORMS:
        raise compiler.NotCompiled("it knows neither this system nor this processor")
    compiler.check_compiler()
    source, with_torch_headers = _source(graph, inputs, real)
    headers = [f"-I{folder}" for folder in _torch_headers()] if with_torch_headers else []
    return compiler.compiled(source, "-march=native", *headers)


def _torch_headers() -> list[str]:
    root = Path(torch.__file__).parent / "include"
    return [str(root), str(root / "torch" / "csrc" / "api" / "include")]


@cache
def _own_code() -> str:
    """What writes libraries: with other code of ours, what is kept is another."""
    return "".join(path.read_text() for path in sorted(_HERE.glob("*.py")))


def _source(graph: GraphModule, inputs: list[Tensor], real: str) -> tuple[str, bool]:
    """A library's source, and whether it includes headers of torch's."""
    function = Function(source_of(graph, inputs), inputs)
    body, special = function.text("gradient_of"), function.needs_torch_headers
    first = ["#define WITH_TORCH_HEADERS", "#include <ATen/native/Math.h>"] if special else []
    memory = ["#include <memory>"] if "std::unique_ptr" in body else []
    parts = [
        *first,
        HEADERS["kernels"],
        *memory,
        f"using Real = {real};",
        f"static const long gradient_scratch = {function.scratch}, NUM_INPUTS = {len(inputs)};",
        f"static const long DIMENSION = {len(inputs[0])};",
        body,
        HEADERS["trajectories"],
    ]
    return "\n".join(parts), special
