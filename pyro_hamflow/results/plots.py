"""Pictures of what a flow has learned.

Matplotlib draws them; it is no requirement of the package, and is imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.flows.guide import AutoNeuralHamiltonianFlow
from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow

_POINTS = 120


def plot_potential(
    flow: NeuralHamiltonianFlow | AutoNeuralHamiltonianFlow,
    target: Callable[[Tensor], Tensor] | None = None,
    *,
    extent: Sequence[float] = (-5.0, 5.0, -5.0, 5.0),
    dimensions: tuple[int, int] = (0, 1),
    at: Tensor | None = None,
    axes: Any = None,
) -> Any:
    """The learned potential beside minus the log density of the target, over a plane.

    Under a classical kinetic energy the wells of the potential are the modes of the target, and
    this is how one sees what was learned. Both are shown less their minimum.

    Arguments:
        flow: The flow, or a guide, whose potential is taken at the positions' place in it.
        target: The log density of positions ``(*, D)``; if not given, the potential stands alone.
        extent: The plane: from, to, from, to.
        dimensions: Which two coordinates span it.
        at: A position ``(D,)`` for the other coordinates; zero for a flow and the centre for a
            guide, if not given.
        axes: Matplotlib's axes, one or two; made if not given.

    Returns:
        The axes.

    Raises:
        ValueError: If the flow has no such coordinates.
    """
    dimension = flow.dimension
    _check_dimensions(dimensions, dimension)
    guide = flow if isinstance(flow, AutoNeuralHamiltonianFlow) else None
    inner = flow.flow if isinstance(flow, AutoNeuralHamiltonianFlow) else flow
    example = next(inner.parameters()).detach()
    centre = example.new_zeros(dimension) if guide is None else guide.loc
    x = torch.linspace(extent[0], extent[1], _POINTS).to(example)
    y = torch.linspace(extent[2], extent[3], _POINTS).to(example)
    positions = (centre if at is None else at.to(example)).repeat(_POINTS, _POINTS, 1)
    positions[..., dimensions[0]] = x[None, :]
    positions[..., dimensions[1]] = y[:, None]
    with torch.no_grad():
        places = positions if guide is None else guide.standardise(positions)
        panels = {"learned potential": inner.potential(places)}
        if target is not None:
            panels["minus log target"] = -target(positions)
    shown = axes_for(axes, len(panels))
    for axis, (title, value) in zip(shown, panels.items(), strict=True):
        raised = (value - value[value.isfinite()].min()).clamp(max=_height(value))
        drawn = axis.contourf(x.cpu(), y.cpu(), raised.cpu(), levels=30, cmap="viridis")
        axis.figure.colorbar(drawn, ax=axis)
        axis.set(title=title, aspect="equal")
    return shown


def plot_momenta(
    flow: NeuralHamiltonianFlow | AutoNeuralHamiltonianFlow,
    positions: Tensor | None = None,
    *,
    num_samples: int = 5000,
    dimensions: tuple[int, int] = (0, 1),
    axes: Any = None,
) -> Any:
    """The momenta that the motion begins and ends with.

    Momenta of several modes say that the encoder, not the potential, holds those of the target.

    Arguments:
        flow: The flow or guide.
        positions: Positions ``(*, D)``, of a flow's samples for instance: the left panel then shows
            the momenta that the encoder at the end gives them; else those of the flow's draws.
        num_samples: How many draws are shown.
        dimensions: Which two coordinates.
        axes: Matplotlib's two axes; made if not given.

    Returns:
        The axes.
    """
    _check_dimensions(dimensions, flow.dimension)
    inner = flow.flow if isinstance(flow, AutoNeuralHamiltonianFlow) else flow
    with torch.no_grad():
        q, p, _ = inner.draw_phase((num_samples,))
        start = inner.pull(q, p)[1]
        end = p if positions is None else inner.end_momenta.draw(positions.to(q))[0]
    shown = axes_for(axes, 2)
    for axis, momenta, title in zip(
        shown, (start, end), ("at the start", "at the end"), strict=True
    ):
        first, second = (momenta.reshape(-1, momenta.shape[-1])[:, d].cpu() for d in dimensions)
        axis.hist2d(first.numpy(), second.numpy(), bins=80, cmap="magma")
        axis.set(title=f"momenta {title}", aspect="equal")
    return shown


def plot_path(
    flow: NeuralHamiltonianFlow | AutoNeuralHamiltonianFlow,
    *,
    num_samples: int = 3000,
    num_shown: int = 5,
    dimensions: tuple[int, int] = (0, 1),
    axes: Any = None,
) -> Any:
    """Positions on their way from the base to the flow's density, and some of their paths.

    Arguments:
        flow: The flow or guide; a guide's positions are shown on the real line.
        num_samples: How many positions.
        num_shown: At how many times, the first and the last included.
        dimensions: Which two coordinates.
        axes: Matplotlib's ``num_shown`` axes; made if not given.

    Returns:
        The axes.

    Raises:
        ValueError: If fewer than two times are to be shown, or the flow has no such coordinates.
    """
    if num_shown < 2:
        raise ValueError(f"`num_shown` is {num_shown}: expected 2 or more")
    _check_dimensions(dimensions, flow.dimension)
    guide = flow if isinstance(flow, AutoNeuralHamiltonianFlow) else None
    inner = flow.flow if isinstance(flow, AutoNeuralHamiltonianFlow) else flow
    with torch.no_grad():
        q = inner.base.sample((num_samples,))
        positions, _ = inner.path(q, inner.start_momenta.draw(q)[0])
        positions = positions if guide is None else guide.to_position(positions)
    path = positions[..., list(dimensions)].cpu()
    times = torch.linspace(0, inner.num_steps, num_shown).round().long().tolist()
    shown = axes_for(axes, num_shown)
    for axis, step in zip(shown, times, strict=True):
        axis.scatter(path[step, :, 0], path[step, :, 1], s=1, alpha=0.3)
        axis.plot(path[: step + 1, :20, 0], path[: step + 1, :20, 1], color="C3", lw=0.7)
        axis.set(title=f"time {inner.time * step / inner.num_steps:.2g}", aspect="equal")
    return shown


def axes_for(axes: Any, count: int) -> Any:
    """As many axes as panels, in a row; those given, if any."""
    if axes is None:
        import matplotlib.pyplot as plt  # optional, and slow to import

        size = (4.5 * count, 4.0)
        _, axes = plt.subplots(1, count, figsize=size, constrained_layout=True, squeeze=False)
        return axes[0]
    shown = axes if hasattr(axes, "__len__") else [axes]
    if len(shown) != count:
        raise ValueError(f"`axes` has {len(shown)} axes: expected {count}")
    return shown


def _height(value: Tensor) -> Tensor:
    """Above which differences do not matter: nine tenths of the plane lie below."""
    finite = value[value.isfinite()]
    return (finite.quantile(0.9) - finite.min()).clamp(min=1e-3)


def _check_dimensions(dimensions: tuple[int, int], dimension: int) -> None:
    if any(not 0 <= d < dimension for d in dimensions):
        raise ValueError(
            f"`dimensions` is {dimensions}: expected two of the {dimension} coordinates"
        )
