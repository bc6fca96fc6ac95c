"""The log densities of a long path as small programs, that derivatives are taken of quickly.

A model that writes its path as a loop performs thousands of operations on one number each, and its
gradients and Hessians several times as many. Recorded once, with alike operations performed
together, the log densities are a few dozen operations, and so are their derivatives.

The programs tell of the model as it was when they were made. They serve to fit a path and to map
noise to it, which may be done in any way, and not for densities that samplers see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.programs.agreement import same_but_for_order
from pyro_hamflow.programs.capture import Program, capture
from pyro_hamflow.programs.joining import joined
from pyro_hamflow.programs.validation import no_validation

Values = dict[str, Tensor]
PRIOR, REST = 0, 1  # of a path, and all other densities of its model
_MOVED = (1.0, 0.7)  # times the examples: where programs are compared with the functions


class Densities:
    """Functions of a path and of sites' values as programs, where that makes them much shorter.

    Arguments:
        functions: From a flat path and the values of other sites to a log density each.
        names: These sites.
        path: A path to record them with.
        values: Values of the sites to record them with, and of those that are not told later.
    """

    def __init__(
        self,
        functions: Sequence[Callable[[Tensor, Values], Tensor]],
        names: Sequence[str],
        path: Tensor,
        values: Values,
    ) -> None:
        self._names = list(names)
        self._examples = [path.detach(), *(values[name].detach() for name in names)]
        self._programs: list[GraphModule | None] = []
        self.make(functions)

    def make(self, functions: Sequence[Callable[[Tensor, Values], Tensor]]) -> None:
        """Makes the programs, as in another process that has none."""
        self._programs = list(map(self._made, functions))

    def __call__(self, number: int, path: Tensor, values: Values) -> Tensor | None:
        """A log density by its program; nothing where there is none."""
        program = self._programs[number]
        if program is None:
            return None
        pairs = zip(self._names, self._examples[1:], strict=True)
        result: Tensor = program(path, *(values.get(name, value) for name, value in pairs))
        return result

    def _made(self, function: Callable[[Tensor, Values], Tensor]) -> GraphModule | None:
        def run(path: Tensor, *values: Tensor) -> Tensor:
            return function(path, dict(zip(self._names, values, strict=True)))

        inputs = [example.clone().requires_grad_() for example in self._examples]
        try:
            with no_validation(), torch.enable_grad():
                long = capture(run, *inputs, live=True)
                short = joined(long, *inputs, live=True)
                if short is long:
                    return None
                for factor in _MOVED:
                    told = [_with_slopes(f, inputs, factor) for f in (short, run)]
                    if not same_but_for_order(*told):
                        return None
        except Exception:  # whatever a model's own code may raise while it is traced
            return None
        return short

    def __getstate__(self) -> dict[str, Any]:
        """Programs stay in the process that made them; elsewhere there are none."""
        return self.__dict__ | {"_programs": [None for _ in self._programs]}


def _with_slopes(function: Program, inputs: list[Tensor], factor: float) -> list[Tensor]:
    """A function's value and its gradients."""
    moved = [inputs[0].detach() * factor, *(part.detach() for part in inputs[1:])]
    moved = [part.requires_grad_() for part in moved]
    value = function(*moved)
    slopes = torch.autograd.grad(value, moved, allow_unused=True, materialize_grads=True)
    return [value.detach(), *slopes]
