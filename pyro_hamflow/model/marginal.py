"""Models whose local latent variables are integrated out by an unbiased estimate.

:func:`marginalize` takes a Pyro model and returns another one. In place of the local sites it has
one noise site, and in place of the likelihood terms that depend on them the logarithm of an
importance-sampling estimate, which is a smooth function of parameters and noise. The estimate is
unbiased, and the noise is part of the state: whatever leaves the joint density of parameters and
noise invariant samples the exact posterior of the parameters, for any number of particles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_hamflow.model.laplace import (
    LaplaceProposal,
    LikelihoodSite,
    fit_sites,
    log_gaussian,
)
from pyro_hamflow.model.layout import Layout, Stratum, lay_out
from pyro_hamflow.model.points import place_points
from pyro_hamflow.model.proposals import (
    PriorProposal,
    ProgramProposal,
    Proposal,
    component_log_weight,
    gaussian_form,
    program_transform,
)
from pyro_hamflow.model.structure import (
    Frames,
    Group,
    SetValues,
    Structure,
    analyse,
    log_density,
    plate_shape,
    run_with,
    sum_to_elements,
    vectorized_frames,
)

Model = Callable[..., Any]


def noise(
    name: str,
    shape: Sequence[int] | torch.Size,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """A site of standard normal noise, for a likelihood estimate written by hand.

    The pseudo-marginal kernels keep such noise as part of their state; every other algorithm of
    Pyro sees a plain latent site.

    Arguments:
        name: The name of the site.
        shape: The shape of the noise.
        dtype: Its floating-point type; torch's default if not given.
        device: Where it lives; torch's default if not given.

    Returns:
        The noise.

    Example:
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     x = scale * noise("u", (32, 1))  # 32 particles of the latent variable
        ...     log_weights = dist.Normal(x, 1.0).log_prob(y).sum(-1)
        ...     pyro.factor("estimate", log_weights.logsumexp(0) - math.log(32))
    """
    shape = torch.Size(shape)
    standard = dist.Normal(
        torch.zeros(shape, dtype=dtype, device=device), torch.ones((), dtype=dtype, device=device)
    )
    return pyro.sample(name, standard.to_event(len(shape)), infer={"noise": True})


def marginalize(
    model: Model,
    sites: Sequence[str],
    *,
    num_particles: int,
    proposal: str | Callable[..., Any] = "prior",
    points: str = "iid",
) -> MarginalModel:
    r"""Integrates local latent sites out of a model by an unbiased likelihood estimate.

    Let :math:`x_t` be the local sites at one element :math:`t` of the plates around them. Its share
    of the likelihood is estimated from N particles,

    .. math:: \hat p(y_t \mid \theta, u_t) = \frac1N \sum_{i=1}^N
        \frac{p(x_t^i \mid \theta)}{q(x_t^i)} \, p(y_t \mid x_t^i, \theta),
        \quad x_t^i = g_\theta(u_t^i), \; u_t^i \sim N(0, I),

    which is unbiased for every N. Terms in plates inside those of the local sites are multiplied
    into it; sites in the same plates are integrated together; sites in no plate form one estimate.

    Arguments:
        model: A Pyro model.
        sites: Names of the local latent sites.
        num_particles: N, the number of particles of each element; components of a mixture prior
            share them.
        proposal: ``"prior"`` draws particles from the prior; ``"laplace"`` from the prior times a
            Gaussian approximation of the likelihood, fitted before sampling; a function
            ``(parameters, *model_args)`` from the sites that it samples as a Pyro program.
        points: ``"iid"`` for independent particles, ``"rqmc"`` for a randomly shifted lattice.

    Returns:
        The marginal model, a Pyro model with the same arguments. Names in it: for local site
        ``x``, the noise is ``x_noise`` and the estimate ``x_log_likelihood``.

    Raises:
        ValueError: If an argument is none of the above; faults of the sites are found when the
            model is first run, and raise a ValueError that names the site.

    Invariant:
        The mean of the likelihood estimate over the noise is the likelihood.

    References:
        | Pseudo-Marginal Hamiltonian Monte Carlo (Alenlöv et al., 2021)
        | https://arxiv.org/abs/1607.02516

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("group", len(y)):
        ...         x = pyro.sample("x", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Poisson(x.exp()), obs=y)
        >>> marginal = marginalize(model, ["x"], num_particles=8)
        >>> trace = pyro.poutine.trace(marginal).get_trace(torch.tensor([2.0, 0.0, 1.0]))
        >>> [name for name in trace.stochastic_nodes if name != "group"]
        ['mean', 'x_noise']
    """
    return MarginalModel(model, sites, num_particles, proposal, points)


@dataclass(frozen=True)
class Estimate:
    """The particles of one group and their weights, as one run of the model made them.

    Attributes:
        group: The group.
        log_weights: Of shape ``(particles, *plates)``; their log-sum-exp is the log estimate.
        values: The particles of each local site.
    """

    group: Group
    log_weights: Tensor
    values: dict[str, Tensor]


class MarginalModel:
    """A Pyro model in which local sites are integrated out; made by :func:`marginalize`."""

    def __init__(
        self,
        model: Model,
        sites: Sequence[str],
        num_particles: int,
        proposal: str | Callable[..., Any],
        points: str,
    ) -> None:
        if isinstance(sites, str) or not list(sites):
            raise ValueError(f"`sites` is {sites!r}: expected a list of names of local sites")
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise TypeError(f"`num_particles` is {num_particles!r}: expected an integer")
        if num_particles < 1:
            raise ValueError(f"`num_particles` is {num_particles}: expected 1 or more")
        if not callable(proposal) and proposal not in ("prior", "laplace"):
            raise ValueError(
                f"`proposal` is {proposal!r}: expected 'prior', 'laplace' or a function"
            )
        if points not in ("iid", "rqmc"):
            raise ValueError(f"`points` is {points!r}: expected 'iid' or 'rqmc'")
        self.model = model
        self.sites = tuple(dict.fromkeys(sites))
        self.num_particles = num_particles
        self.proposal = proposal
        self.points = points
        self._plans: dict[Any, Plan] = {}
        self._fit: Fit | None = None

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions the plates of the original model take, hidden ones included."""
        return max((plan.structure.nesting for plan in self._plans.values()), default=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.plan(*args, **kwargs)
        if self.proposal == "laplace":
            self.pilot(args, kwargs)
        with _HideLocalSites(plan.structure) as handler:
            result = self.model(*args, **kwargs)
        for group in plan.structure.groups:
            layout = plan.layouts[group.name]
            u = noise(
                f"{group.name}_noise",
                layout.noise_shape(group),
                dtype=layout.example.dtype,
                device=layout.example.device,
            )
            estimate = self.estimate(group, u, handler.values, *args, **kwargs)
            log_likelihood = estimate.log_weights.logsumexp(0)
            factor = dist.Unit(log_likelihood)
            with _InPlates(group.frames):
                pyro.sample(
                    f"{group.name}_log_likelihood",
                    factor,
                    obs=factor.sample(),
                    infer={"is_auxiliary": True, "estimate": estimate},
                )
        return result

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The structure of the model and the layout of its noise, found at the first call."""
        key = tuple(_signature(arg) for arg in args) + tuple(
            (name, _signature(arg)) for name, arg in sorted(kwargs.items())
        )
        if key not in self._plans:
            structure = analyse(self.model, self.sites, *args, **kwargs)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                trace = run_with(self.model, lambda msg: None, *args, **kwargs)
                parameters = {n: trace.nodes[n]["value"] for n in structure.parameters}
                layouts = {
                    group.name: lay_out(
                        group,
                        trace,
                        self._proposal(group, None, None, parameters, *args, **kwargs),
                        self.num_particles,
                        self.points,
                    )
                    for group in structure.groups
                }
            self._plans[key] = Plan(structure, layouts)
        return self._plans[key]

    def estimate(
        self, group: Group, u: Tensor, parameters: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Estimate:
        """The particles of a group and their weights, at given noise and parameters.

        Arguments:
            group: The group.
            u: Its noise.
            parameters: The values of all sites that are not integrated out.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
        """
        plan = self.plan(*args, **kwargs)
        layout = plan.layouts[group.name]
        log_weights, values = [], []
        for stratum, part in zip(layout.strata, layout.split(u), strict=True):

            def particle(coordinates: Tensor, stratum: Stratum = stratum) -> Any:
                proposal = self._proposal(group, stratum, coordinates, parameters, *args, **kwargs)
                return self._particle(
                    group, coordinates, stratum, proposal, parameters, *args, **kwargs
                )

            coordinates = place_points(self.points, stratum.count, part)
            weights, value = torch.func.vmap(particle, randomness="different")(coordinates)
            log_weights.append(weights - math.log(stratum.count))
            values.append(value)
        joined = {name: torch.cat([value[name] for value in values]) for name in group.sites}
        return Estimate(group, torch.cat(log_weights), joined)

    def _particle(
        self,
        group: Group,
        coordinates: Tensor,
        stratum: Stratum,
        proposal: Proposal,
        parameters: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One particle: its log weight for each element, and its values."""
        plan = self.plan(*args, **kwargs)
        structure, blocks = plan.structure, plan.layouts[group.name].blocks
        components = dict(stratum.components)
        log_ratios: list[Tensor] = []
        values: dict[str, Tensor] = {}

        def choose(msg: Message) -> Tensor | None:
            name = msg["name"]
            if name not in group.sites:
                return parameters.get(name, structure.placeholders.get(name))
            fn: Any = msg["fn"]
            component = components.get(name)
            draw = proposal.draw(name, fn, blocks[name].spread(coordinates, group), component)
            log_ratio = draw.log_ratio
            if component is not None:
                weight = component_log_weight(fn, component)
                log_ratio = weight if log_ratio is None else log_ratio + weight
            scale: Any = msg["scale"]
            if not isinstance(scale, float | int) or scale != 1.0:
                # The model counts this prior otherwise than once. A mask changes nothing: the
                # prior of a masked element integrates to one, and so does its estimate.
                change = (scale - 1.0) * fn.log_prob(draw.value)
                log_ratio = change if log_ratio is None else log_ratio + change
            if log_ratio is not None:
                frames = vectorized_frames(msg)
                log_ratios.append(
                    sum_to_elements(log_ratio, frames, group.frames, structure.nesting)
                )
            values[name] = draw.value
            return draw.value

        trace = run_with(self.model, choose, *args, **kwargs)
        terms = [
            sum_to_elements(
                log_density(trace.nodes[name]),
                vectorized_frames(trace.nodes[name]),
                group.frames,
                structure.nesting,
            )
            for name in group.terms
        ]
        zeros = coordinates.new_zeros(plate_shape(group.frames, structure.nesting))
        return sum(log_ratios + terms, start=zeros), values

    def _proposal(
        self,
        group: Group,
        stratum: Stratum | None,
        coordinates: Tensor | None,
        parameters: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Proposal:
        if callable(self.proposal):
            return self._run_proposal(group, coordinates, parameters, *args, **kwargs)
        if self.proposal == "prior":
            return PriorProposal()
        if stratum is None:
            return LaplaceProposal(group, {}, {})
        if self._fit is None:
            raise RuntimeError("the proposal is not fitted yet: call `fit` with the model's data")
        blocks = self.plan(*args, **kwargs).layouts[group.name].blocks
        return LaplaceProposal(group, blocks, self._fit.sites[group.name, stratum.components])

    def _run_proposal(
        self,
        group: Group,
        coordinates: Tensor | None,
        parameters: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> ProgramProposal:
        """Runs the user's proposal; without coordinates, for its distributions alone."""
        program: Any = self.proposal

        def choose(msg: Message) -> Tensor:
            fn: Any = msg["fn"]
            transform = program_transform(msg["name"], fn)
            if coordinates is None or msg["name"] not in group.sites:
                return transform.draw(torch.zeros(fn.batch_shape + transform.noise_shape)).detach()
            block = self.plan(*args, **kwargs).layouts[group.name].blocks[msg["name"]]
            return transform.draw(block.spread(coordinates, group))

        with poutine.block(), pyro.validation_enabled(False), SetValues(choose):
            trace = poutine.trace(program).get_trace(parameters, *args, **kwargs)
        for name in group.sites:
            if name not in trace.nodes:
                raise ValueError(
                    f"the proposal does not sample local site '{name}': it samples "
                    f"{list(trace.stochastic_nodes)}"
                )
        return ProgramProposal(
            {name: trace.nodes[name]["fn"] for name in group.sites},
            {name: trace.nodes[name]["value"] for name in group.sites},
        )

    def pilot(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        start: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The pilot fitted for these arguments, found anew if they have changed.

        Arguments:
            args: The model's arguments.
            kwargs: The model's keyword arguments.
            start: Unconstrained values to begin the search at.

        Returns:
            Constrained parameter values of high posterior density, roughly.
        """
        if self._fit is None or not same_arguments((args, kwargs), self._fit.arguments):
            from pyro_hamflow.model.pilot import find_pilot  # which runs marginal models

            self.fit(*args, pilot=find_pilot(self, args, kwargs, start), **kwargs)
        return self._fit.pilot  # type: ignore[union-attr]

    def fit(self, *args: Any, pilot: dict[str, Tensor], **kwargs: Any) -> None:
        """Fits the ``"laplace"`` proposal at a pilot of one's own; optional, and before sampling.

        Arguments:
            args: The model's arguments.
            pilot: Constrained parameter values. Without a call of this method they are found by a
                few steps of optimisation of the estimated likelihood times the prior.
            kwargs: The model's keyword arguments.
        """
        plan = self.plan(*args, **kwargs)
        needed = set(plan.structure.parameters) - set(plan.structure.placeholders)
        missing = sorted(needed - set(pilot))
        if missing:
            raise ValueError(f"`pilot` lacks a value for site '{missing[0]}'")
        sites: dict[Any, dict[str, LikelihoodSite]] = {}
        for group in plan.structure.groups if self.proposal == "laplace" else ():
            layout = plan.layouts[group.name]
            for stratum in layout.strata:
                evaluate = self._joint(group, stratum, pilot, *args, **kwargs)
                sites[group.name, stratum.components] = fit_sites(group, layout, evaluate)
        self._fit = Fit((args, kwargs), {name: v.detach() for name, v in pilot.items()}, sites)

    def _joint(
        self,
        group: Group,
        stratum: Stratum,
        parameters: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The log joint density of a group's elements, as a function of Gaussian coordinates."""
        plan = self.plan(*args, **kwargs)
        structure = plan.structure
        components = dict(stratum.components)
        parameters = {name: value.detach() for name, value in parameters.items()}

        def evaluate(coordinates: dict[str, Tensor] | None) -> Any:
            parts: list[Tensor] = []
            priors: dict[str, tuple[Tensor, Tensor]] = {}

            def choose(msg: Message) -> Tensor | None:
                name = msg["name"]
                if name not in group.sites:
                    return parameters.get(name, structure.placeholders.get(name))
                form = gaussian_form(name, msg["fn"], components.get(name))
                v = form.loc if coordinates is None else coordinates[name]
                frames = vectorized_frames(msg)
                density = log_gaussian(v, form)
                parts.append(sum_to_elements(density, frames, group.frames, structure.nesting))
                priors[name] = (form.loc, form.precision)
                return form.value(v)

            trace = run_with(self.model, choose, *args, **kwargs)
            for name in group.terms:
                site = trace.nodes[name]
                density, frames = log_density(site), vectorized_frames(site)
                parts.append(sum_to_elements(density, frames, group.frames, structure.nesting))
            return sum(parts[1:], start=parts[0]).reshape(group.shape), priors

        return evaluate

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        proposal = getattr(self.proposal, "__name__", self.proposal)
        return (
            f"marginalize({name}, {list(self.sites)}, num_particles={self.num_particles}, "
            f"proposal={proposal!r}, points={self.points!r})"
        )


@dataclass(frozen=True)
class Plan:
    """How a marginal model runs on arguments of one shape."""

    structure: Structure
    layouts: dict[str, Layout]


@dataclass(frozen=True)
class Fit:
    """A pilot, the sites of the ``"laplace"`` proposal fitted there, and to which arguments."""

    arguments: tuple[Any, Any]
    pilot: dict[str, Tensor]
    sites: dict[Any, dict[str, LikelihoodSite]]


class _HideLocalSites(Messenger):
    """Hides local sites, and what depends on them, from outer handlers; records the others."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if name in self.structure.hidden:
            if name in self.structure.placeholders:
                msg["value"] = self.structure.placeholders[name]
                msg["done"] = True
            msg["stop"] = True

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["name"] in self.structure.parameters:
            self.values[msg["name"]] = msg["value"]


class _InPlates(Messenger):
    """Puts sites into plates that the model has left."""

    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self.frames = frames

    def _pyro_sample(self, msg: Message) -> None:
        msg["cond_indep_stack"] = tuple(self.frames) + msg["cond_indep_stack"]


def _signature(argument: Any) -> Any:
    """What of an argument may change a model's structure."""
    if isinstance(argument, Tensor):
        return (tuple(argument.shape), argument.dtype, argument.device)
    try:
        hash(argument)
    except TypeError:
        return id(argument)
    return argument


def same_arguments(first: Any, second: Any) -> bool:
    """Whether two sets of arguments are equal, tensors by their values."""
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and first.equal(second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            same_arguments(first[k], second[k]) for k in first
        )
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_arguments, first, second))
    return type(first) is type(second) and bool(first == second)
