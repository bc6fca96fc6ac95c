"""What a transition asks of a target: a log density of position and noise, batched over rows.

A Pyro model's :class:`~pyro_hamflow.model.potential.Potential` is one; so is a surrogate's energy.
A target of one's own is a few lines:

    >>> class StandardNormal:
    ...     dimension, noise_dimension, example = 2, 0, torch.zeros(())
    ...
    ...     def graph(self, kind, num_chains):
    ...         return lambda position, noise: (0.5 * position.square().sum(-1), position)
    ...
    ...     def vectors(self, num_chains):
    ...         return torch.zeros(num_chains, 2), torch.zeros(num_chains, 0)
    ...
    ...     def accelerate(self, name, function, *examples):
    ...         return function
    ...
    ...     def evaluate(self, position, noise):
    ...         return Evaluation(0.5 * position.square().sum(-1), {}, {})
    >>> from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
    >>> transition = HMCTransition(StandardNormal(), num_chains=4)
    >>> transition.state_at(torch.ones(4, 2), torch.ones(4, 0)).gradient
    tensor([[1., 1.],
            [1., 1.],
            [1., 1.],
            [1., 1.]])
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.programs.capture import Program


class Target(Protocol):
    """Minus a log density, of all chains at once."""

    @property
    def dimension(self) -> int:
        """How many numbers a position has."""

    @property
    def noise_dimension(self) -> int:
        """How many numbers the noise has; none where the density is no estimate."""

    @property
    def example(self) -> Tensor:
        """A scalar of the type and on the device of all tensors."""

    def graph(self, kind: str, num_chains: int) -> Program:
        """A program from positions ``(chains, dimension)`` and noise ``(chains, noise_dimension)``.

        Of kind ``"gradient"``: to the potential, of shape ``(chains,)``, and its gradient in the
        position. ``"gradients"``: to that in the noise as well, which joint moves alone ask for.
        """

    def vectors(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Positions and noise to capture programs with."""

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """A function around :meth:`graph` programs, captured once, or as it is.

        Arguments:
            name: What the function does; with the examples' shapes it tells functions apart.
            function: The function.
            examples: Arguments of the shapes that it will be called with.
        """

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """The potential of every chain, and the local sites that belong to it."""
