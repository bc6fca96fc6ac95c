"""A potential that is a function, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.mcmc.util import _PEMaker
from torch import Tensor
from torch.distributions import constraints

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.validation import no_validation

PotentialFunction = Callable[[dict[str, Tensor]], Tensor]


class FunctionPotential(Potential):
    """The potential energy that a function gives, from values on the real line by name.

    Its model has sites alone, flat ones, so that it is captured, batched and compiled as any other.

    Arguments:
        potential_fn: Gives minus the log density, a scalar, of a dictionary of values. It may run
            Pyro models, as those of :func:`pyro.infer.mcmc.util.initialize_model` do.
        example: A value of each of its parameters.
        compile_graphs: Whether to compile what is captured.
        transforms: To the real line from where a parameter's draws are wanted; their Jacobians are
            part of the function, if they are to be.

    Raises:
        ValueError: If the function gives no scalar, or the transforms name no parameters.

    Example:
        >>> potential = FunctionPotential(lambda z: z["x"].square(), {"x": torch.zeros(())})
        >>> potential.gradients(torch.ones(2, 1), torch.zeros(2, 0))[1]
        tensor([[2.],
                [2.]])
    """

    def __init__(
        self,
        potential_fn: PotentialFunction,
        example: Mapping[str, Tensor],
        *,
        compile_graphs: bool = False,
        transforms: Mapping[str, Any] | None = None,
    ) -> None:
        unknown = sorted(set(transforms or ()) - set(example))
        if unknown:
            raise ValueError(
                f"`transforms` names {unknown}: expected names of the parameters {list(example)}"
            )
        self.outward = dict(transforms or {})
        self.potential_fn = _uncompiled(potential_fn)
        self._example = {name: value.detach() for name, value in example.items()}
        sites = {name: _Flat(value) for name, value in self._example.items()}

        def model() -> None:
            for name, site in sites.items():
                pyro.sample(name, site)

        with suppress(Exception):  # what it raises here, it raises when it is looked at
            self._energy(self._example)  # what it compiles for itself, it compiles unobserved
        super().__init__(model, compile_graphs=compile_graphs)

    def _energy(self, values: Mapping[str, Tensor]) -> Tensor:
        with poutine.block(), no_validation():  # sites of models that it runs are not ours
            return torch.as_tensor(self.potential_fn(dict(values)))

    def _value_of_run(self, trace: poutine.Trace, free: Mapping[str, Tensor]) -> Tensor:
        energy = self._energy(free)
        if energy.numel() != 1:
            raise ValueError(
                f"`potential_fn` returned a tensor of shape {tuple(energy.shape)}: expected a "
                "scalar"
            )
        return energy.reshape(())

    def from_middle(self, factor: float, position: Tensor) -> Tensor:
        """Around the example, about which the function is known to work."""
        middle = self.ravel({name: value[None] for name, value in self._example.items()}, 1)[0]
        return middle + super().from_middle(factor, position)

    @property
    def transforms(self) -> dict[str, Any]:
        return self.outward

    def constrain(self, position: Tensor) -> dict[str, Tensor]:
        values = self.unravel(position)
        return {n: self.outward[n].inv(v) if n in self.outward else v for n, v in values.items()}

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        return super().flatten(
            {n: self.outward[n](v) if n in self.outward else v for n, v in values.items()}
        )


def _uncompiled(function: PotentialFunction) -> PotentialFunction:
    """What Pyro's ``initialize_model(jit_compile=True)`` would have TorchScript compile.

    Programs here are recorded from the operations of the model itself. TorchScript's own would hide
    them, and it compares the model's numbers while it runs, where that cannot be recorded.
    """
    method: Any = getattr(function, "func", None)
    if getattr(method, "__func__", None) is _PEMaker._potential_fn_jit:
        return method.__self__._potential_fn
    return function


class _Flat(TorchDistribution):
    """A density of one everywhere on the real line, which cannot be drawn from.

    Arguments:
        value: What is returned for a draw.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, value: Tensor) -> None:
        self.value = value
        super().__init__(event_shape=value.shape, validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.value.expand([*sample_shape, *self.event_shape])

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[: value.dim() - len(self.event_shape)])
