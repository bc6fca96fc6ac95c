"""The two drawings of the site: ``python docs/figures/drawings.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

HERE = Path(__file__).parent
QUESTIONS = {
    "Must it be compared\nby evidence?": ("AnnealedSampler", "C4"),
    "Several modes?": ("FlowNUTS", "C3"),
    "Local latents: an effect for\neach subject, item, group?": (
        "marginalize, then\nPseudoMarginalNUTS",
        "C0",
    ),
    "Many data sets,\none after the other?": ("learn_surrogate, then\nHNNNUTS", "C2"),
    "A costly gradient?": ("HNNNUTS", "C2"),
    "A funnel that stays\none?": ('NUTS,\ntransport="flow"', "C1"),
    "Approximate first?": ("fit_guide, then\nimportance_sample", "C5"),
}
PLAIN = ("NUTS", "C7")


def decide() -> None:
    """From what a model is like to the sampler that suits it."""
    figure, axes = plt.subplots(figsize=(8.0, 9.0))
    places = np.linspace(0.9, 0.1, len(QUESTIONS))
    for i, (question, (answer, colour)) in enumerate(QUESTIONS.items()):
        _box(axes, 0.27, places[i], question, "0.93", "0.5")
        _box(axes, 0.77, places[i], answer, "white", colour, bold=True)
        _arrow(axes, (0.48, places[i]), (0.58, places[i]), "yes")
        below = places[i + 1] if i + 1 < len(places) else -0.02
        _arrow(axes, (0.27, places[i] - 0.047), (0.27, below + 0.047), "no")
    _box(axes, 0.27, -0.02, PLAIN[0], "white", PLAIN[1], bold=True)
    _finish(figure, axes, (-0.08, 0.97), "decision.svg")


def one_idea() -> None:
    """A trajectory that follows a rough gradient, and is judged by the true energy at its end."""
    figure, axes = plt.subplots(figsize=(8.0, 3.0))
    x, y = np.meshgrid(np.linspace(-3.0, 3.0, 200), np.linspace(-1.4, 1.6, 120))
    axes.contour(
        x, y, _energy(x, y), levels=np.geomspace(0.2, 12, 9), colors="0.75", linewidths=0.8
    )
    point, momentum, path = np.array([-2.2, 1.0]), np.array([1.6, 0.3]), []
    for _ in range(60):  # leapfrog along a force that is not quite the energy's
        momentum = momentum - 0.04 * _force(point)
        point = point + 0.08 * momentum
        momentum = momentum - 0.04 * _force(point)
        path.append(point)
    way = np.array(path[:42])
    axes.plot(*way.T, color="C0", lw=2)
    axes.scatter(*way[0], color="C0", zorder=3)
    axes.scatter(*way[-1], color="C3", zorder=3, s=60)
    axes.annotate(
        "follow: any force of position alone\n(a network's, an estimate's)", way[14], (-1.1, 1.25)
    )
    axes.annotate(
        "judge: the exact energy, here", way[-1], way[-1] + np.array([0.15, -0.35]), color="C3"
    )
    _finish(figure, axes, (-1.4, 1.6), "one_idea.svg", (-3.0, 3.0))


def _energy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.5 * x**2 + 3.0 * (y - 0.25 * x**2 + 0.4) ** 2


def _force(point: np.ndarray) -> np.ndarray:
    x, y = point
    gap = y - 0.22 * x**2 + 0.4
    return np.array([0.9 * x - 6.0 * gap * 0.44 * x, 6.0 * gap])


def _box(
    axes: Axes, x: float, y: float, text: str, face: str, edge: str, *, bold: bool = False
) -> None:
    style = {"boxstyle": "round,pad=0.5", "facecolor": face, "edgecolor": edge, "linewidth": 1.6}
    weight = "bold" if bold else "normal"
    axes.text(x, y, text, ha="center", va="center", fontsize=11, bbox=style, weight=weight)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.3"})
    middle = (0.5 * (start[0] + end[0]), 0.5 * (start[1] + end[1]))
    beside = (0.0, 0.012) if start[1] == end[1] else (0.025, -0.005)
    axes.text(middle[0] + beside[0], middle[1] + beside[1], text, ha="center", fontsize=9)


def _finish(
    figure: plt.Figure,
    axes: Axes,
    heights: tuple[float, float],
    name: str,
    widths: tuple[float, float] = (0.0, 1.0),
) -> None:
    axes.set(xlim=widths, ylim=heights)
    axes.set_axis_off()
    figure.tight_layout()
    figure.savefig(HERE / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    plt.rcParams |= {"svg.hashsalt": "one", "svg.fonttype": "path"}
    decide()
    one_idea()
