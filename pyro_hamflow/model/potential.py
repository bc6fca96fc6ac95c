"""A Pyro model as the density of one flat vector.

:class:`Potential` is the only place where samplers meet a model. It moves the model's continuous
latent variables to the real line by Pyro's own transforms and stacks them into one *position*
vector; its noise variables are stacked into a *noise* vector. What the samplers see are programs
of these two, batched over chains: captured as graphs where possible, run as Python where not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from torch import Tensor

from pyro_hamflow.model.enumeration import refuse_branches, sum_out
from pyro_hamflow.model.gradients import value_and_gradients
from pyro_hamflow.model.look import check_data, key_of_two, plain_run
from pyro_hamflow.model.missing import without_gaps
from pyro_hamflow.model.recovery import Evaluation, estimate_sites, pick_particles
from pyro_hamflow.model.sites import (
    add_jacobians,
    constrain,
    flatten,
    ravel,
    refuse_moving_supports,
    split,
    stack_sites,
)
from pyro_hamflow.model.supports import is_discrete
from pyro_hamflow.model.trace import (
    SetValues,
    is_latent,
    outline,
    plate_nesting,
    run_with,
)
from pyro_hamflow.model.unused import find_unused, with_own_prior
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.captured import captured_of
from pyro_hamflow.programs.failures import describe_failures, first_that_works
from pyro_hamflow.programs.fingerprint import Fingerprint, explained, take_fingerprint
from pyro_hamflow.programs.program_cache import ProgramCache
from pyro_hamflow.programs.validation import no_validation

# Where the model is looked at: at the first where its numbers allow it.
_FACTORS = (0.3, 0.1, 0.03, -0.3, 1.0, -1.0, 2.0, 0.0)  # times a fixed random position


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
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        separate_noise: bool = False,
        compile_graphs: bool = False,
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
    ) -> None:
        self.programs = ProgramCache(self, compile_graphs=compile_graphs)
        self.model = self.original = model
        self.args = args
        self.kwargs = dict(kwargs or {})
        self.separate_noise = separate_noise
        plain = self._trace_plainly()
        self._hold: Callable[[], AbstractContextManager[None]] = nullcontext
        if hasattr(model, "holding"):  # it looks at itself each time that it runs
            self._hold = model.holding(*args, **self.kwargs)
        check_data(plain)
        latent = {name: site for name, site in plain.nodes.items() if is_latent(site)}
        discrete = [name for name, site in latent.items() if is_discrete(name, site)]
        noisy = [n for n in latent if separate_noise and latent[n]["infer"].get("noise")]
        self.sites = stack_sites(
            latent, [n for n in latent if n not in discrete and n not in noisy], transforms
        )
        unknown = sorted(set(transforms or ()) - {site.name for site in self.sites})
        if unknown:
            raise ValueError(
                f"`transforms` names {unknown}: expected names of the sites "
                f"{[site.name for site in self.sites]}"
            )
        self.noise_sites = stack_sites(latent, noisy)
        self.dimension = self.sites[-1].stop if self.sites else 0
        self.noise_dimension = self.noise_sites[-1].stop if self.noise_sites else 0
        values = [latent[s.name]["value"] for s in self.sites + self.noise_sites]
        example = values[0] if values else torch.zeros(())
        dtype = example.dtype
        for value in values:
            dtype = torch.promote_types(dtype, value.dtype)
        self.example = torch.zeros((), dtype=dtype, device=example.device)
        nesting = max(plate_nesting(plain), getattr(model, "max_plate_nesting", 0))
        if max_plate_nesting is not None:
            if max_plate_nesting < nesting and discrete:
                raise ValueError(
                    f"`max_plate_nesting` is {max_plate_nesting}: expected {nesting} or more, for "
                    "so many dimensions are plates"
                )
            nesting = max(nesting, max_plate_nesting)
        self._enumerated, self._nesting = bool(discrete), nesting
        if discrete:
            marked = poutine.infer_config(model, sum_out)
            self.model = poutine.enum(marked, first_available_dim=-1 - nesting)
        self.plain_trace = plain
        self._unused: dict[str, Tensor] = {}
        self._vectors: dict[int, tuple[Tensor, Tensor]] = {}
        position, noise = (part[0] for part in self.vectors(1))
        zero = torch.zeros_like(position)
        points = [zero + 0.1, *(factor * position for factor in _FACTORS)]
        with refuse_branches(discrete):
            trace = first_that_works(lambda point: self.trace(point, 0.0 * noise), points)
        refuse_moving_supports(self.sites, trace, transforms)
        self._evaluator = self.evaluator_of(trace)
        self._unused = self._find_unused(trace)
        self._factor = _FACTORS[0]
        self._key = explained(
            lambda: key_of_two(*first_that_works(self._look_twice, _FACTORS)),
            self.value_of_one,
            position,
            noise,
        )
        self.programs.captured = captured_of(model, self._key)

    def _trace_plainly(self) -> poutine.Trace:
        """A run of the model at draws from its priors, always the same."""
        return plain_run(self.original, self.args, self.kwargs)

    # --- one chain, in Python -------------------------------------------------------------------

    def trace(self, position: Tensor, noise: Tensor) -> poutine.Trace:
        """A run of the model at one chain's vectors, without its noise sites."""
        return self._run(split(self.sites, position), split(self.noise_sites, noise))

    def _run(self, free: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> poutine.Trace:
        return self._run_at(constrain(self.sites, free) | constrain(self.noise_sites, noise))

    def _run_at(self, values: Mapping[str, Tensor]) -> poutine.Trace:
        with self._hold(), poutine.block(), no_validation():
            # Conditioning inside the enumeration, so that only discrete sites are enumerated.
            with SetValues(lambda msg: values.get(msg["name"])):
                trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        for site in self.noise_sites:
            trace.remove_node(site.name)
        for node in trace.nodes.values():
            if node["type"] == "sample":
                node["value"] = without_gaps(node)
        for name, unused in self._unused.items():
            trace.nodes[name].update(with_own_prior(trace.nodes[name], unused))
        return trace

    def evaluator_of(self, trace: poutine.Trace) -> TraceEinsumEvaluator:
        """What adds up the densities of runs with the sites of this one, as the potential does."""
        return TraceEinsumEvaluator(trace, self._enumerated, self._nesting)

    def run_freely(self) -> poutine.Trace:
        """A run of the model, every latent site drawn from its prior."""
        with self._hold():
            return run_with(self.original, lambda msg: None, *self.args, **self.kwargs)

    def value_of_one(self, position: Tensor, noise: Tensor) -> Tensor:
        """The potential of one chain, by running the model: vectors in, a scalar out."""
        free = split(self.sites, position)
        return self._value_of_run(self._run(free, split(self.noise_sites, noise)), free)

    def _value_of_run(self, trace: poutine.Trace, free: Mapping[str, Tensor]) -> Tensor:
        with no_validation():
            log_joint = self._evaluator.log_prob(trace)
            if not isinstance(log_joint, Tensor):  # no site has a density
                log_joint = self.example.new_zeros(())
            log_joint = add_jacobians(log_joint, self.sites, free)
        return -log_joint

    def function(self, kind: str) -> Program:
        """What a kind of program does for one chain: gradients, gradient, or evaluation."""

        def gradients(position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                position = position.detach().requires_grad_()
                noise = noise.detach().requires_grad_()
                return value_and_gradients(self.value_of_one(position, noise), position, noise)

        def gradient(position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                position = position.detach().requires_grad_()
                return value_and_gradients(self.value_of_one(position, noise), position)

        def evaluate(position: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                free = split(self.sites, position)
                trace = self._run(free, split(self.noise_sites, noise))
                value = self._value_of_run(trace, free)
                return value, *(pick_particles(trace, uniform) if self.estimates else ())

        programs: dict[str, Program] = {
            "gradients": gradients,
            "gradient": gradient,
            "evaluate": evaluate,
        }
        return programs[kind]

    def _find_unused(self, trace: poutine.Trace) -> dict[str, Tensor]:
        noise = {s.name: self.plain_trace.nodes[s.name]["value"] for s in self.noise_sites}

        def log_density(values: Mapping[str, Tensor]) -> Tensor:
            with no_validation():
                return self._evaluator.log_prob(self._run_at({**values, **noise}))

        return find_unused({site.name: trace.nodes[site.name] for site in self.sites}, log_density)

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
        """The potential of every chain, of shape ``(chains,)``; arguments as :meth:`gradients`."""
        return self.evaluate(position, noise).value

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """The potential of every chain, and the local sites that belong to it.

        A particle picked by its weight, given parameters and noise from their joint posterior, is a
        draw of the local sites from theirs.

        Arguments:
            position: Of shape ``(chains, dimension)``.
            noise: Of shape ``(chains, noise_dimension)``.
        """
        shape = (len(position), self.num_choices)
        uniform = torch.rand(shape, dtype=position.dtype, device=position.device)
        value, *rest = self.programs.program("evaluate", len(position))(position, noise, uniform)
        local, log_likelihoods = {}, {}
        for estimate in self.estimates:
            log_likelihoods[estimate.group.name] = rest.pop(0)
            for name in estimate.group.sites:
                local[name] = rest.pop(0)
        return Evaluation(value, log_likelihoods, local)

    def examples(self, kind: str, num_chains: int) -> tuple[Tensor, ...]:
        """Arguments to capture a kind's program with, chains first."""
        vectors = self.vectors(num_chains)
        if kind == "evaluate":
            return *vectors, torch.full((num_chains, self.num_choices), 0.4).to(self.example)
        return vectors

    def known_to_work(self, kind: str) -> tuple[Tensor, ...]:
        """Arguments of one chain at which the model has run."""
        position, *others = (example[0] for example in self.examples(kind, 1))
        return self.from_middle(self._factor, position), *others

    def from_middle(self, factor: float, position: Tensor) -> Tensor:
        """A position in this direction from the middle of those that the model is looked at."""
        return factor * position

    def begins_gradient(self, kind: str) -> bool:
        """Whether a kind computes the potential alone, as the gradient does first."""
        return kind == "evaluate" and not self.estimates

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

    def _look(self) -> Fingerprint:
        """What the model does, run at a point of its own."""

        def run(position: Tensor, noise: Tensor) -> Any:
            free = split(self.sites, position)
            trace = self._run(free, split(self.noise_sites, noise))
            outlines = [outline(name, site) for name, site in trace.nodes.items()]
            return self._value_of_run(trace, free), outlines

        position, noise = (part[0] for part in self.vectors(1))
        return take_fingerprint(run, self.from_middle(self._factor, position), noise)

    def _look_twice(self, factor: float) -> tuple[Fingerprint, Fingerprint]:
        """What the model does in two runs at one point, so many times the fixed random one."""
        self._factor = factor
        with torch.random.fork_rng():
            return self._look(), self._look()

    def is_unchanged(self) -> bool:
        """Whether the model still does what it did when it was looked at first."""
        if self._key is not None:
            # Whatever a model's own code may raise.
            with torch.random.fork_rng(), suppress(Exception):
                return self._look().key == self._key
        return False

    def renew(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Takes new arguments, if with them the model does what it did with those before.

        Programs hold as long as it does. Whether it does, is told by its operations and by all
        that they read, arguments or not.

        Returns:
            Whether it does; otherwise nothing changes.
        """
        before = self.args, self.kwargs, self._hold
        self.args, self.kwargs = args, dict(kwargs)
        try:
            with torch.random.fork_rng():
                if hasattr(self.original, "holding"):
                    self._hold = self.original.holding(*args, **kwargs)
                if self._key is not None and self._look().key == self._key:
                    self.plain_trace = self._trace_plainly()
                    self.programs.failures.clear()
                    return True
        except Exception:  # whatever a model's own code may raise at values of other shapes
            pass
        self.args, self.kwargs, self._hold = before
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
        """Captures a function around :meth:`graph` programs, once; compiled if that is asked for.

        Arguments are those of
        :meth:`~pyro_hamflow.programs.program_cache.ProgramCache.accelerate`.
        """
        return self.programs.accelerate(self, name, function, *examples)

    # --- names and vectors ----------------------------------------------------------------------

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

    # --- recovered local sites ------------------------------------------------------------------

    @property
    def estimates(self) -> list[Any]:
        """The likelihood estimates in the model, as its first run made them."""
        return [site["infer"]["estimate"] for site in self._estimate_sites()]

    @property
    def factorises(self) -> bool:
        """Whether all noise belongs to estimates whose elements multiply to the likelihood."""
        plain = [s for s in self._estimate_sites() if s["scale"] == 1.0 and s["mask"] is None]
        return 0 < len(plain) == len(self.noise_sites) == len(self._estimate_sites())

    def _estimate_sites(self) -> list[Any]:
        """Sites that hold estimates; none where enumeration runs through them."""
        if not self.noise_sites or self._enumerated:
            return []
        return estimate_sites(self.plain_trace)

    @property
    def num_choices(self) -> int:
        """How many particles are picked when local sites are recovered."""
        return sum(estimate.group.shape.numel() for estimate in self.estimates)
