"""The prior of a Pyro model: its density on the real line, and draws from it.

The prior is what the model's latent sites say, the Jacobians of their maps to the real line
included; all else, the observed sites and what ``pyro.factor`` adds, is the likelihood. Noise
sites are latent, with density N(0, I); where they are a vector apart, that density is left out
here as it is in the potential.
"""

from __future__ import annotations

import pyro.poutine as poutine
import torch
from pyro.distributions import ImproperUniform
from torch import Tensor

from pyro_hamflow.model.function import FunctionPotential
from pyro_hamflow.model.gradients import gradient_functions
from pyro_hamflow.model.kinds import Node
from pyro_hamflow.model.many_runs import many_runs
from pyro_hamflow.model.missing import entries_that_count
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.sites import add_jacobians
from pyro_hamflow.model.supports import base_of
from pyro_hamflow.model.trace import is_latent
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.made import Made
from pyro_hamflow.programs.program_cache import ProgramCache
from pyro_hamflow.programs.validation import no_validation

# Runs of the model that are made as one, for each gradient: what its tensors gain in a cache is
# little beside what it takes to run it.
_TOGETHER = 16
_REMEDY = "expected a proper prior, or a guide to start from"


class Prior(Made):
    """The prior of a model as minus a log density, batched, and draws from it.

    Arguments:
        potential: The model.

    Raises:
        ValueError: If a site's prior is improper, masked or scaled, so that the model does not draw
            from it, or the potential is a function without a model.

    Example:
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> prior = Prior(Potential(model, (torch.tensor(0.5),)))
        >>> position, noise = prior.draw(4)
        >>> value, gradient = prior.graph("gradient", 4)(position, noise)
        >>> bool(torch.allclose(gradient, position))  # log of the scale is N(0, 1)
        True
    """

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.example = potential.example
        if isinstance(potential, FunctionPotential):
            raise ValueError(f"a `potential_fn` has no prior: {_REMEDY}")
        position, noise = self.known_to_work("gradient")
        trace = potential.trace(position, noise)
        for name, site in trace.nodes.items():
            if is_latent(site):
                _refuse_undrawable(name, site)
        self._evaluator = potential.runs.evaluator_of(_prior_part(trace))
        self.programs = ProgramCache(self, compile_graphs=potential.programs.compile_graphs)
        self.programs.captured = potential.programs.captured.part("prior")

    def graph(self, kind: str, num_chains: int) -> Program:
        """Minus the log density and its gradients, of kinds as targets have them."""
        return self.programs.graph(kind, num_chains)

    def value(self, position: Tensor, noise: Tensor) -> Tensor:
        """Minus the log density at positions ``(chains, dimension)``, of shape ``(chains,)``."""
        return self.programs.program("value", len(position))(position, noise, noise)[0]

    def draw(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Positions ``(chains, dimension)`` and noise, from runs of the model.

        All runs are made as one where the model's operations allow it, and one after the other
        elsewhere.
        """
        rows = _TOGETHER * self.potential.programs.rows_at_once("gradient", num_chains)
        try:
            return many_runs(self._draw_one, num_chains, self.example, min(rows, num_chains))
        except Exception:  # whatever a model's own code may raise where it is batched
            runs = [self._draw_one() for _ in range(num_chains)]
            position, noise = zip(*runs, strict=True)
            return torch.stack(position), torch.stack(noise)

    def _draw_one(self) -> tuple[Tensor, Tensor]:
        potential = self.potential
        with torch.no_grad():
            nodes = potential.runs.freely().nodes
            position = potential.flatten({s.name: nodes[s.name]["value"] for s in potential.sites})
            noise = [nodes[site.name]["value"].reshape(-1) for site in potential.noise_sites]
            return position, torch.cat([position[:0], *noise]).to(position)

    # --- what a cache makes programs of ---------------------------------------------------------

    def _value_of_one(self, position: Tensor, noise: Tensor) -> Tensor:
        potential = self.potential
        trace = _prior_part(potential.trace(position, noise))
        with no_validation():
            log_prior = self._evaluator.log_prob(trace)
            if not isinstance(log_prior, Tensor):  # no site has a density
                log_prior = self.example.new_zeros(())
            return -add_jacobians(log_prior, potential.sites, potential.unravel(position))

    def function(self, kind: str) -> Program:
        """What a kind of program does for one chain: gradients, gradient, or value."""

        def value(position: Tensor, noise: Tensor, ignored: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (self._value_of_one(position, noise),)

        return (gradient_functions(self._value_of_one) | {"value": value})[kind]

    def examples(self, kind: str, num_chains: int) -> tuple[Tensor, ...]:
        """Arguments to capture a kind's program with, chains first."""
        position, noise = self.potential.vectors(num_chains)
        return (position, noise, noise) if kind == "value" else (position, noise)

    def known_to_work(self, kind: str) -> tuple[Tensor, ...]:
        """Arguments of one chain at which the model has run."""
        position, noise = self.potential.known_to_work("gradient")
        return (position, noise, noise) if kind == "value" else (position, noise)

    def from_middle(self, factor: float, position: Tensor) -> Tensor:
        """A position in this direction from the middle of those that the model is looked at."""
        return self.potential.from_middle(factor, position)

    def begins_gradient(self, kind: str) -> bool:
        """Whether a kind computes the density alone, as the gradient does first.

        It takes an argument more, and does nothing with it.
        """
        return kind == "value"

    def is_unchanged(self) -> bool:
        """Whether the model still does what it did when its programs were captured first."""
        return self.potential.is_unchanged()


def _prior_part(trace: poutine.Trace) -> poutine.Trace:
    """A run of a model with nothing but its latent sites."""
    part = trace.copy()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not is_latent(site):
            part.remove_node(name)
    return part


def _refuse_undrawable(name: str, site: Node) -> None:
    """Raises a ValueError if a run of the model does not draw from the prior's density."""
    counts = torch.as_tensor(entries_that_count(site["fn"], site["mask"]))
    if isinstance(base_of(site["fn"]), ImproperUniform):
        raise ValueError(f"the prior of site '{name}' is improper: {_REMEDY}")
    if not bool(counts.all()):
        raise ValueError(f"the prior of site '{name}' is masked, and so improper: {_REMEDY}")
    if not bool((torch.as_tensor(site["scale"]) == 1.0).all()):
        raise ValueError(
            f"the prior of site '{name}' is scaled, and cannot be drawn from: {_REMEDY}"
        )
