"""A Pyro model as the density of one flat vector.

:class:`Potential` is the only place where samplers meet a model. It moves the model's continuous
latent variables to the real line by Pyro's own transforms and stacks them into one *position*
vector; its noise variables are stacked into a *noise* vector. What the samplers see are programs
of these two, batched over chains: captured as graphs where possible, run as Python where not.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.model.enumeration import refuse_branches
from pyro_hamflow.model.float_type import example_of
from pyro_hamflow.model.gradients import gradient_functions
from pyro_hamflow.model.kinds import Args, Kwargs, Model
from pyro_hamflow.model.look import FACTORS, Looks
from pyro_hamflow.model.recovery import Evaluation, Recovery, estimate_sites, pick_particles
from pyro_hamflow.model.runs import Runs
from pyro_hamflow.model.sites import (
    add_jacobians,
    constrain,
    flatten,
    ravel,
    refuse_moving_supports,
    split,
    stack_sites,
)
from pyro_hamflow.model.trace import outline
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.captured import captured_of
from pyro_hamflow.programs.failures import describe_failures, first_that_works
from pyro_hamflow.programs.fingerprint import Fingerprint, take_fingerprint
from pyro_hamflow.programs.program_cache import ProgramCache
from pyro_hamflow.programs.validation import no_validation


class Potential:
    r"""The potential energy :math:`U(\theta, u) = -\log p(\theta, y \mid u)` of a Pyro model.

    :math:`\theta` stacks the latent sites on the real line (the transforms' Jacobians included),
    enumerable discrete sites are summed out, and :math:`u` stacks the noise sites, whose own
    density N(0, I) is left out: the samplers know it.

    Arguments:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        separate_noise: Whether noise sites form the noise vector; otherwise they are latent sites
            like any other, density included, and the noise vector is empty.
        compile_graphs: Whether to compile what is captured.
        transforms: From a site's support to the real line, where it is not to be the registered
            map.
        max_plate_nesting: How many dimensions, counted from the right, may be plates, where
            discrete sites are summed out; found by a run of the model if not given.

    Raises:
        ValueError: If a plate is subsampled, a discrete site cannot be enumerated, data contain
            NaN, a site has no fixed support to be moved to the real line from, or the model draws
            random numbers of its own.

    Example:
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> potential = Potential(model, (torch.tensor(0.5),))
        >>> position, noise = torch.zeros(4, 1), torch.zeros(4, 0)  # four chains
        >>> value, gradient, _ = potential.gradients(position, noise)
        >>> gradient[0]
        tensor([0.7500])
    """

    def __init__(
        self,
        model: Model,
        args: Args = (),
        kwargs: Kwargs | None = None,
        *,
        separate_noise: bool = False,
        compile_graphs: bool = False,
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
    ) -> None:
        self.programs = ProgramCache(self, compile_graphs=compile_graphs)
        self.separate_noise = separate_noise
        runs = Runs(
            model,
            args,
            kwargs or {},
            separate_noise=separate_noise,
            max_plate_nesting=max_plate_nesting,
        )
        self._take(runs)
        self.sites = stack_sites(runs.latent, runs.continuous, transforms)
        self.noise_sites = stack_sites(runs.latent, runs.noise)
        self.dimension = self.sites[-1].stop if self.sites else 0
        self.noise_dimension = self.noise_sites[-1].stop if self.noise_sites else 0
        self.example = example_of([runs.latent[n]["value"] for n in runs.continuous + runs.noise])
        self._vectors: dict[int, tuple[Tensor, Tensor]] = {}
        position, noise = (part[0] for part in self.vectors(1))
        points = [torch.full_like(position, 0.1), *(factor * position for factor in FACTORS)]
        with refuse_branches(runs.discrete):
            trace = first_that_works(lambda point: self.trace(point, 0.0 * noise), points)
        refuse_moving_supports(self.sites, trace, transforms)
        runs.settle(trace)
        self._looks = Looks(self._look, self.value_of_one, position, noise)
        self.programs.captured = captured_of(model, self._looks.key)

    def _take(self, runs: Runs) -> None:
        self.runs, self.model, self.original = runs, runs.model, runs.original
        self.args, self.kwargs, self.plain_trace = runs.args, runs.kwargs, runs.plain_trace
        noisy = runs.noise and not runs.discrete  # enumeration would run through estimates
        sites = estimate_sites(runs.plain_trace) if noisy else []
        self.recovery = Recovery(sites, len(runs.noise))

    # --- one chain, in Python -------------------------------------------------------------------

    def trace(self, position: Tensor, noise: Tensor) -> poutine.Trace:
        """A run of the model at one chain's vectors, without its noise sites."""
        return self._trace_at(split(self.sites, position), noise)

    def _trace_at(self, free: Mapping[str, Tensor], noise: Tensor) -> poutine.Trace:
        still = constrain(self.noise_sites, split(self.noise_sites, noise))
        return self.runs.at(constrain(self.sites, free) | still)

    def value_of_one(self, position: Tensor, noise: Tensor) -> Tensor:
        """The potential of one chain, by running the model: vectors in, a scalar out."""
        return self._run(position, noise)[0]

    def _run(self, position: Tensor, noise: Tensor) -> tuple[Tensor, poutine.Trace]:
        free = split(self.sites, position)
        trace = self._trace_at(free, noise)
        return self._value_of_run(trace, free), trace

    def _value_of_run(self, trace: poutine.Trace, free: Mapping[str, Tensor]) -> Tensor:
        with no_validation():
            log_joint = self.runs.evaluator.log_prob(trace)
            if not isinstance(log_joint, Tensor):  # no site has a density
                log_joint = self.example.new_zeros(())
            log_joint = add_jacobians(log_joint, self.sites, free)
        return -log_joint

    def function(self, kind: str) -> Program:
        """What a kind of program does for one chain: gradients, gradient, or evaluation."""

        def evaluate(position: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                value, trace = self._run(position, noise)
                return value, *(pick_particles(trace, uniform) if self.recovery.estimates else ())

        return (gradient_functions(self.value_of_one) | {"evaluate": evaluate})[kind]

    # --- many chains, as programs ---------------------------------------------------------------

    def gradients(self, position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Potential and both gradients of every chain.

        Arguments:
            position: Of shape ``(chains, dimension)``.
            noise: Of shape ``(chains, noise_dimension)``.

        Returns:
            Potentials of shape ``(chains,)``; gradients of the shapes of position and noise.
        """
        return self.programs.program("gradients", len(position))(position, noise)

    def value(self, position: Tensor, noise: Tensor) -> Tensor:
        """The potential of every chain, of shape ``(chains,)``."""
        return self.evaluate(position, noise).value

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """The potential of every chain, and the local sites that belong to it.

        A particle picked by its weight, given parameters and noise from their joint posterior, is a
        draw of the local sites from theirs. Arguments are those of :meth:`gradients`.
        """
        shape = (len(position), self.recovery.num_choices)
        uniform = torch.rand(shape, dtype=position.dtype, device=position.device)
        results = self.programs.program("evaluate", len(position))(position, noise, uniform)
        return self.recovery.evaluation(*results)

    def examples(self, kind: str, num_chains: int) -> tuple[Tensor, ...]:
        """Arguments to capture a kind's program with, chains first."""
        vectors = self.vectors(num_chains)
        if kind == "evaluate":
            return *vectors, self.example.new_full((num_chains, self.recovery.num_choices), 0.4)
        return vectors

    def known_to_work(self, kind: str) -> tuple[Tensor, ...]:
        """Arguments of one chain at which the model has run."""
        position, *others = (example[0] for example in self.examples(kind, 1))
        return self.from_middle(self._looks.factor, position), *others

    def from_middle(self, factor: float, position: Tensor) -> Tensor:
        """A position in this direction from the middle of those that the model is looked at."""
        return factor * position

    def begins_gradient(self, kind: str) -> bool:
        """Whether a kind computes the potential alone, as the gradient does first."""
        return kind == "evaluate" and not self.recovery.estimates

    def vectors(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Positions and noise to capture programs with; random, but always the same."""
        if num_chains not in self._vectors:
            generator = torch.Generator().manual_seed(0)
            position, noise = (
                torch.randn(num_chains, size, generator=generator, device="cpu").to(self.example)
                for size in (self.dimension, self.noise_dimension)
            )
            self._vectors[num_chains] = position, noise
        return self._vectors[num_chains]

    def _look(self, factor: float) -> Fingerprint:
        """What the model does, run at so many times a fixed random point."""

        def run(position: Tensor, noise: Tensor) -> Any:
            value, trace = self._run(position, noise)
            return value, [outline(name, site) for name, site in trace.nodes.items()]

        position, noise = (part[0] for part in self.vectors(1))
        return take_fingerprint(run, self.from_middle(factor, position), noise)

    def is_unchanged(self) -> bool:
        """Whether the model still does what it did when it was looked at first."""
        return self._looks.is_unchanged()

    def renew(self, args: Args, kwargs: Kwargs) -> bool:
        """Takes new arguments, if with them the model does what it did with those before.

        Programs hold as long as it does. Whether it does, is told by its operations and by all
        that they read, arguments or not.

        Returns:
            Whether it does; otherwise nothing changes.
        """
        before = self.runs
        with random_state_kept(), suppress(Exception):  # whatever a model raises at other shapes
            self._take(before.of(args, kwargs))
            if self.is_unchanged():
                self.programs.failures.clear()
                return True
        self._take(before)
        return False

    def describe_failures(self, diverging: int) -> str | None:
        """Where the model has failed since its programs were made, in a sentence; or nothing.

        Arguments:
            diverging: How many transitions have diverged, as those do that meet such a position.
        """
        return describe_failures(
            self.programs.failures, self.programs.fallible, self.constrain, diverging
        )

    def graph(self, kind: str, num_chains: int) -> Program:
        """A kind's batched program, to build larger programs from."""
        return self.programs.graph(kind, num_chains)

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """As :meth:`~pyro_hamflow.programs.program_cache.ProgramCache.accelerate` does it."""
        return self.programs.accelerate(self, name, function, *examples)

    @property
    def transforms(self) -> dict[str, Any]:
        """From each site's support to the real line."""
        return {site.name: site.transform.inv for site in self.sites}

    def constrain(self, position: Tensor) -> dict[str, Tensor]:
        """The latent sites' values in their supports, from positions ``(*, dimension)``."""
        return constrain(self.sites, self.unravel(position))

    def unravel(self, position: Tensor) -> dict[str, Tensor]:
        """The latent sites' values on the real line."""
        return split(self.sites, position)

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """One position, of shape ``(dimension,)``, from values in the sites' supports."""
        return flatten(self.sites, values, self.example)

    def ravel(self, values: Mapping[str, Tensor], num_chains: int) -> Tensor:
        """Positions from values on the real line, each with a leading chain dimension.

        Raises:
            ValueError: If a site is missing, unknown, or of another shape.
        """
        known = self.sites + self.noise_sites
        return ravel(self.sites, known, values, num_chains, self.example)

    def draw_noise(self, num_chains: int) -> Tensor:
        """Standard normal noise for every chain."""
        return torch.randn(
            num_chains, self.noise_dimension, dtype=self.example.dtype, device=self.example.device
        )
