"""Gradients of a population by machine code, where that pays."""

from __future__ import annotations

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.engines.choice import choose_engine
from pyro_hamflow.programs.engines.native import native_program

_GRADIENTS = 500  # that each particle takes, roughly


def machine_gradient(potential: Potential, num_particles: int) -> Program | None:
    """Potential and gradient of any number of particles, for a population of so many; or none.

    Whether it pays to compile them is told by the graph, and not by a clock, so that runs are
    repeated.

    Arguments:
        potential: The posterior.
        num_particles: How many particles will be moved.
    """
    if potential.noise_dimension:
        return None
    graph = potential.programs.base("gradient")
    position, noise = potential.vectors(num_particles)
    if choose_engine("auto", graph, position, noise[0], _GRADIENTS).name != "native":
        return None
    return compiled_gradient(potential)


def compiled_gradient(potential: Potential) -> Program | None:
    """The same, where that is known to work."""
    graph = potential.programs.base("gradient")
    if graph is None or potential.noise_dimension:
        return None
    return native_program(graph, [part[0] for part in potential.vectors(1)]).gradient
