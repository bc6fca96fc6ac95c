"""Runs of a Pyro model, with its arguments, at values of its latent sites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import pyro.poutine as poutine
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from torch import Tensor

from pyro_hamflow.model.enumeration import sum_out
from pyro_hamflow.model.kinds import Args, Kwargs, Model
from pyro_hamflow.model.look import check_data, plain_run
from pyro_hamflow.model.missing import without_gaps
from pyro_hamflow.model.supports import is_discrete
from pyro_hamflow.model.trace import SetValues, is_latent, plate_nesting, run_with
from pyro_hamflow.model.unused import find_unused, with_own_prior
from pyro_hamflow.programs.validation import no_validation


class Runs:
    """A model and its arguments: what its sites are, and runs of it at values of theirs.

    Arguments:
        model: A Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        separate_noise: Whether noise sites are apart from other latent ones.
        max_plate_nesting: How many dimensions may be plates; found by a run if not given.

    Attributes:
        original: The model.
        model: The same with its discrete sites at all their values at once.
        plain_trace: A run at draws from the priors, always the same.
        latent: The nodes of its latent sites in that run.
        continuous, discrete, noise: The names of these, of three kinds.
        unused: Which of their masked entries nothing depends on, so that these keep their priors.
        evaluator: What adds up the densities of runs, once one was settled by.

    Raises:
        ValueError: If a plate is subsampled, data contain NaN, or there are more plates than told.
    """

    def __init__(
        self,
        model: Model,
        args: Args,
        kwargs: Kwargs,
        *,
        separate_noise: bool,
        max_plate_nesting: int | None,
    ) -> None:
        self.model = self.original = model
        self._take(args, kwargs)
        check_data(self.plain_trace)
        latent = {n: site for n, site in self.plain_trace.nodes.items() if is_latent(site)}
        self.latent, self.unused = latent, dict[str, Tensor]()
        self.discrete = [name for name, site in latent.items() if is_discrete(name, site)]
        self.noise = [n for n in latent if separate_noise and latent[n]["infer"].get("noise")]
        apart = {*self.discrete, *self.noise}
        self.continuous = [name for name in latent if name not in apart]
        nesting = max(plate_nesting(self.plain_trace), getattr(model, "max_plate_nesting", 0))
        if self.discrete and max_plate_nesting is not None and max_plate_nesting < nesting:
            raise ValueError(
                f"`max_plate_nesting` is {max_plate_nesting}: expected {nesting} or more, for so "
                "many dimensions are plates"
            )
        self._nesting = max(nesting, max_plate_nesting or 0)
        if self.discrete:
            marked = poutine.infer_config(model, sum_out)
            self.model = poutine.enum(marked, first_available_dim=-1 - self._nesting)

    def _take(self, args: Args, kwargs: Kwargs) -> None:
        self.args, self.kwargs = args, dict(kwargs)
        self.plain_trace = plain_run(self.original, args, self.kwargs)
        self._hold: Callable[[], AbstractContextManager[None]] = nullcontext
        if hasattr(self.original, "holding"):  # it looks at itself each time that it runs
            self._hold = self.original.holding(*args, **self.kwargs)

    def of(self, args: Args, kwargs: Kwargs) -> Runs:
        """The same model with other arguments, with which its sites are taken to be the same."""
        other = copy.copy(self)
        other._take(args, kwargs)
        return other

    def settle(self, trace: poutine.Trace) -> None:
        """Learns from a first run how densities add up, and what entries nothing depends on."""
        self.evaluator = self.evaluator_of(trace)
        noise = {name: self.latent[name]["value"] for name in self.noise}

        def log_density(values: Mapping[str, Tensor]) -> Tensor:
            with no_validation():
                return self.evaluator.log_prob(self.at({**values, **noise}))

        self.unused = find_unused({n: trace.nodes[n] for n in self.continuous}, log_density)

    def at(self, values: Mapping[str, Tensor]) -> poutine.Trace:
        """A run at values of the continuous sites and the noise, without the noise sites."""
        with self._hold(), poutine.block(), no_validation():
            # Conditioning inside the enumeration, so that only discrete sites are enumerated.
            with SetValues(lambda msg: values.get(msg["name"])):
                trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        for name in self.noise:
            trace.remove_node(name)
        for node in trace.nodes.values():
            if node["type"] == "sample":
                node["value"] = without_gaps(node)
        for name, unused in self.unused.items():
            trace.nodes[name].update(with_own_prior(trace.nodes[name], unused))
        return trace

    def freely(self) -> poutine.Trace:
        """A run with every latent site drawn from its prior."""
        with self._hold():
            return run_with(self.original, lambda msg: None, *self.args, **self.kwargs)

    def evaluator_of(self, trace: poutine.Trace) -> TraceEinsumEvaluator:
        """What adds up the densities of runs with the sites of this one."""
        return TraceEinsumEvaluator(trace, bool(self.discrete), self._nesting)
