"""Draws of many chains in machine code: a captured gradient and the trajectories around it.

A call makes many draws of all chains, without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.programs.capture import first_result
from pyro_hamflow.programs.engines.buffers import NotSupported
from pyro_hamflow.programs.engines.calls import Call, Made, Place, Request
from pyro_hamflow.programs.engines.lowering import with_constants_as_arguments
from pyro_hamflow.programs.engines.model_library import Part, library_of, moves_noise
from pyro_hamflow.programs.machine_code.store import Store, user_store


class Looks(NamedTuple):
    """What a model says where its noise moves: its evaluation, as a graph.

    Attributes:
        graph: From position, noise and uniform numbers of one chain to the potential, and behind
            it factors of the likelihood estimate and values of local sites.
        uniform: An example of the numbers.
        results: Of each result behind the potential, how many numbers it has, and whether it is a
            local site's.
    """

    graph: GraphModule
    uniform: Tensor
    results: tuple[tuple[int, bool], ...]

    def room(self, *, local: bool) -> int:
        """How many numbers there are of factors, or of local sites."""
        return sum(size for size, is_local in self.results if is_local == local)

    def rows(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Results of one chain behind the potential: factors and local sites, in a row each."""
        pairs = list(zip(results, self.results, strict=True))
        return [
            torch.cat(
                [self.uniform[:0], *(r.reshape(-1) for r, (_, local) in pairs if local == wanted)]
            )
            for wanted in (False, True)
        ]


class NativeProgram:
    """Trajectories along one chain's gradient, in machine code.

    Arguments:
        graph: From position and noise of one chain to the potential and its gradient, in the
            position alone or in the noise as well: then trajectories move both. Or to the potential
            alone, for moves that follow no gradient: what stands for it is then zero.
        examples: A position and a noise; behind them, what the graph takes and does nothing with.
        looks: What the model says beside its potential, where its noise moves.
        store: Where libraries are kept.

    Raises:
        NotSupported: If an operation of the graph has no code here, or there is no compiler.
    """

    def __init__(
        self,
        graph: GraphModule,
        examples: Sequence[Tensor],
        looks: Looks | None = None,
        store: Store | None = None,
    ) -> None:
        self._dtype = examples[0].dtype
        if examples[0].device.type != "cpu":
            raise NotSupported(f"the device {examples[0].device}")
        self.looks = looks
        self.moves_noise = moves_noise(graph)
        gradient = _part(graph, examples)
        evaluation = None
        if looks is not None:
            evaluation = _part(looks.graph, [*examples[:2], looks.uniform], looks.results)
        self._library = library_of(gradient, evaluation, store or user_store())
        self._inputs = [part.inputs for part in (gradient, evaluation) if part is not None]
        self._data = [
            (ctypes.c_void_p * len(inputs))(*(part.data_ptr() for part in inputs))
            for inputs in self._inputs
        ]

    def gradient(self, position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials of shape ``(chains,)``, and their gradients in all that moves."""
        place = self.place(position, noise)
        self._call("evaluate", place)
        return place.value, place.gradient

    def look(self, position: Tensor, noise: Tensor, uniform: Tensor) -> Place:
        """What the model says at positions and noise, with uniform numbers for each chain."""
        place = self.place(position, noise)
        self._call("look", place, {"tape": uniform.double().contiguous()})
        return place

    def place(
        self,
        position: Tensor,
        noise: Tensor,
        value: Tensor | None = None,
        gradient: Tensor | None = None,
        likelihoods: Sequence[Tensor] = (),
        local: Sequence[Tensor] = (),
    ) -> Place:
        """Copies of where chains are, as calls move them on; with room for what is not given."""
        if position.dtype != self._dtype:
            raise TypeError(f"positions are {position.dtype}: expected {self._dtype}")
        chains, looks = len(position), self.looks

        def row(parts: Sequence[Tensor], *, local: bool) -> Tensor:
            if parts:
                return torch.cat([self._fitting(part.reshape(chains, -1)) for part in parts], -1)
            return torch.zeros(chains, looks.room(local=local) if looks else 0).to(self._dtype)

        size = position.shape[1] + (noise.shape[1] if self.moves_noise else 0)
        moving = position.new_zeros(chains, size)
        if gradient is not None:
            moving[:, : gradient.shape[1]] = gradient
        return Place(
            self._fitting(position).clone(),
            self._fitting(noise).clone(),
            self._fitting(position.new_zeros(chains) if value is None else value).clone(),
            self._fitting(moving),
            row(likelihoods, local=False),
            row(local, local=True),
        )

    def draw(self, place: Place, request: Request) -> Made:
        """Makes draws; where chains are is moved on in place.

        Arguments:
            place: Where chains are, of :meth:`place`.
            request: What to make.
        """
        made = Made.room(place, len(request.num_steps))
        fitting = ("root", "step_sizes", "momenta")
        given = {n: getattr(request, n) for n in (*fitting, "uniforms", "tape", "num_steps")}
        given |= {n: self._fitting(given[n]) for n in fitting if given[n] is not None}
        numbers: dict[str, Any] = {}
        if (moves := request.moves) is not None:
            given |= {n: part for n, part in moves._asdict().items() if isinstance(part, Tensor)}
            given["along"] = self._fitting(moves.along)
            plain = ("refresh", "factorises", "blocks", "correlation", "stretches")
            numbers = {name: getattr(moves, name) for name in plain}
        self._call(
            "make_draws",
            place,
            made._asdict() | given,
            draws=len(request.num_steps),
            slots=request.slots,
            dense=request.root.dim() == 2,
            motion=request.motion,
            threads=max(1, min(request.threads, len(place.position))),
            points=0 if request.uniforms is None else request.uniforms.shape[1],
            tape_length=0 if request.tape is None else request.tape.shape[1],
            seed=request.seed,
            first_draw=request.first_draw,
            **numbers,
        )
        return made

    def _fitting(self, tensor: Tensor) -> Tensor:
        """A tensor of the type that the machine code reads, without gaps in memory."""
        return tensor.to(device="cpu", dtype=self._dtype).contiguous()

    def _call(
        self,
        function: str,
        place: Place,
        others: Mapping[str, Tensor | None] | None = None,
        **numbers: Any,
    ) -> None:
        tensors = place._asdict() | dict(others or {})
        known = {n: part.data_ptr() for n, part in tensors.items() if part is not None}
        names = ("data", "evaluation_data")
        known |= {n: ctypes.addressof(part) for n, part in zip(names, self._data, strict=False)}
        call = Call(chains=len(place.position), **numbers, **known)
        getattr(self._library, function)(ctypes.byref(call))


def _part(
    graph: GraphModule, examples: Sequence[Tensor], results: tuple[tuple[int, bool], ...] = ()
) -> Part:
    """A graph with its constants among its arguments."""
    lifted, constants = with_constants_as_arguments(graph)
    return Part(lifted, [*(example.contiguous() for example in examples), *constants], results)


_programs: WeakKeyDictionary[GraphModule, dict[tuple[bool, bool], NativeProgram]]
_programs = WeakKeyDictionary()


def native_program(
    graph: GraphModule,
    examples: Sequence[Tensor],
    looks: Looks | None = None,
    *,
    gradient: bool = True,
) -> NativeProgram:
    """As :class:`NativeProgram`, made once of each graph, with its looks and without.

    Arguments:
        graph: As there.
        examples: As there.
        looks: As there.
        gradient: Whether chains follow the gradient; else it is left out.
    """
    known = _programs.setdefault(graph, {})
    key = looks is not None, gradient
    if key not in known:
        if not gradient:
            graph, examples = first_result(graph), [*examples, examples[0][:0]]
        known[key] = NativeProgram(graph, examples, looks)
    return known[key]
