"""Where chains start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.model.data_faults import describe_impossible
from pyro_hamflow.model.far_starts import come_down
from pyro_hamflow.model.many_runs import many_runs
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.supports import RADIUS, support_of
from pyro_hamflow.model.trace import run_with
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.validation import no_validation

Strategy = Callable[[Any], Tensor]

_TRIES = 100


def find_start(
    potential: Potential,
    num_chains: int,
    centre: Tensor | None = None,
    radius: float = RADIUS,
    strategy: Strategy | None = None,
    covariance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws positions, uniformly around a centre, until every chain's potential is finite.

    Those that no strategy gives, and that lie far out, come down from there:
    :func:`~pyro_hamflow.model.far_starts.come_down`.

    Arguments:
        potential: The target.
        num_chains: Number of chains.
        centre: Where to look, of shape ``(dimension,)`` or ``(chains, dimension)``; zero if not
            given.
        radius: Half the width of the box around it, for each coordinate.
        strategy: One of Pyro's, to draw positions by instead: a site's value, from the site.
        covariance: Roughly that of the posterior about the centre, ``(dimension, dimension)``, to
            draw positions by instead; those outside the box are drawn in to its edge.

    Returns:
        Positions and noise.

    Raises:
        ValueError: If a hundred tries find no finite point, or the strategy gives values that are
            none of its site; names the sites at fault.
    """
    shape = (num_chains, potential.dimension)
    middle = potential.example.new_zeros(shape) if centre is None else centre.expand(shape)

    root = None if covariance is None else _root_of(covariance).to(middle)

    def draw() -> Tensor:
        if root is not None:
            step = torch.randn_like(middle) @ root
            return middle + step * (radius / step.abs().amax(-1, keepdim=True)).clamp(max=1.0)
        if strategy is None:
            return middle + torch.empty_like(middle).uniform_(-radius, radius)
        return _by_strategy(potential, strategy, num_chains)

    position, noise = draw(), potential.draw_noise(num_chains)
    for _ in range(_TRIES):
        gradient = potential.graph("gradient", num_chains)
        value, slope = gradient(position, noise)
        good = value.isfinite() & slope.isfinite().all(-1)
        if good.all():
            given = strategy is not None or not radius
            return position if given else come_down(gradient, position, noise), noise
        position = torch.where(good[:, None], position, draw())
        noise = torch.where(good[:, None], noise, potential.draw_noise(num_chains))
    bad = int((~good).nonzero()[0])
    raise ValueError(
        f"no finite starting point in {_TRIES} tries: {fault(potential, position[bad], noise[bad])}"
    )


def _root_of(covariance: Tensor) -> Tensor:
    """A symmetric root of a covariance, which rounding may have made negative somewhere."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.mT


def _by_strategy(potential: Potential, strategy: Strategy, num_chains: int) -> Tensor:
    """Positions of all chains, of shape ``(chains, dimension)``, by runs of the model.

    They are one run where model and strategy can be batched, and else one for each chain.
    """
    choice = _Choice(potential, strategy)
    try:
        position, inside = many_runs(choice.run, num_chains, potential.example)
        alike = (position == position[0]).all(0)  # to be so of each run, not by chance of another
        if bool((choice.run()[0] != position[0])[alike].any()):
            raise ValueError("the strategy draws by other means than torch's")
    except Exception:  # noqa: BLE001  # a fault of the strategy is found again, and raised, below
        runs = [choice.run() for _ in range(num_chains)]
        position = torch.stack([position for position, _ in runs])
        inside = {name: torch.stack([found[name] for _, found in runs]) for name in runs[0][1]}
    for name, found in inside.items():
        if not bool(found.all()):
            raise ValueError(
                f"`init_strategy` gave site '{name}' a value outside its support "
                f"{choice.supports[name]}"
            )
    return position


class _Choice:
    """A run of a model at the values that a strategy gives its sites.

    Attributes:
        supports: Of each site, in the latest run.
    """

    def __init__(self, potential: Potential, strategy: Strategy) -> None:
        self.potential = potential
        self.strategy = strategy
        self.supports: dict[str, Any] = {}

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The position ``(dimension,)``, and of each site whether its value is in its support."""
        names = {site.name for site in self.potential.sites}
        values: dict[str, Tensor] = {}
        inside: dict[str, Tensor] = {}

        def choose(msg: Any) -> Tensor | None:
            name = msg["name"]
            if name not in names:
                return None
            with torch.no_grad():
                value = torch.as_tensor(self.strategy(msg)).to(self.potential.example)
            shape = msg["fn"].shape()
            if value.shape != shape:
                raise ValueError(
                    f"`init_strategy` gave site '{name}' a value of shape {tuple(value.shape)}: "
                    f"expected {tuple(shape)}"
                )
            self.supports[name] = support_of(name, msg["fn"])
            values[name], inside[name] = value, self.supports[name].check(value).all()
            return value

        potential = self.potential
        run_with(potential.model, choose, *potential.args, **potential.kwargs)
        return potential.flatten(values), inside


def fault(potential: Potential, position: Tensor, noise: Tensor) -> str:
    """Which sites have no finite log density at a chain's point, in words."""
    with torch.no_grad(), no_validation():
        trace = potential.trace(position, noise)
        trace.compute_log_prob()
        gaps = _gaps(trace)
        whole = -potential.value_of_one(position, noise)
    faults = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or bool(torch.isfinite(site["log_prob"]).all()):
            continue
        worst = site["log_prob"][~site["log_prob"].isfinite()].flatten()[0]
        kind = "observed site" if site["is_observed"] else "site"
        kind = "likelihood estimate" if "estimate" in site["infer"] else kind
        faults.append(f"{kind} '{name}' has log density {worst.item()}")
    hidden = getattr(potential.model, "model_of_data", None)  # of one that hides the data's sites
    if faults and hidden is not None:
        args, kwargs = potential.args, potential.kwargs
        with random_state_kept():
            plain = run_with(hidden, lambda msg: None, *args, **kwargs)
        faults[-1] += describe_impossible(plain)
    if not faults and not bool(whole.isfinite()):
        return f"the log density is {whole.item()}"
    return "; ".join(faults) or f"the gradient of the log density is not finite{gaps}"


def _gaps(trace: poutine.Trace) -> str:
    """Which sites are computed from NaN under their masks, in words."""
    gaps = [
        f"'{name}'"
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["fn"].log_prob(site["value"]).isnan().any()
    ]
    if not gaps:
        return ""
    return (
        f"; under the mask of {', '.join(gaps)} it is computed from NaN: expected numbers in "
        "masked rows of covariates too, such as `x.nan_to_num()`"
    )
