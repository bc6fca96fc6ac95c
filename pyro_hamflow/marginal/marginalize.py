"""Models whose local latent variables are integrated out by an unbiased estimate.

:func:`marginalize` takes a Pyro model and returns another one. In place of the local sites it has
one noise site, and in place of the likelihood terms that depend on them the logarithm of an
importance-sampling estimate, which is a smooth function of parameters and noise. The estimate is
unbiased, and the noise is part of the state: whatever leaves the joint density of parameters and
noise invariant samples the exact posterior of the parameters, for any number of particles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_hamflow.marginal.dependence import Run, analyse
from pyro_hamflow.marginal.modes import MOST_MODES, find_modes
from pyro_hamflow.marginal.noise_layout import Components, Layout, Stratum, lay_out
from pyro_hamflow.marginal.particles import (
    Estimate,
    Plan,
    draw_particle,
    joint_density,
    references,
    run_program,
)
from pyro_hamflow.marginal.points import place_points
from pyro_hamflow.marginal.proposals.base import Proposal
from pyro_hamflow.marginal.proposals.laplace import LaplaceProposal, Spread
from pyro_hamflow.marginal.proposals.mixture import MixtureProposal
from pyro_hamflow.marginal.proposals.prior import PriorProposal
from pyro_hamflow.marginal.scores import Reference
from pyro_hamflow.marginal.site_fit import Anchor, Fitted, fit_modes, fit_sites, keep_what_moves
from pyro_hamflow.marginal.structure import Group, Structure
from pyro_hamflow.model.trace import Frames, run_with
from pyro_hamflow.programs.vectorize import Vectorized

Model = Callable[..., Any]

_TAIL = 0.5  # of several modes, until it is settled
_FAR = 1.0  # posterior standard deviations


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
    num_particles: int | None = None,
    proposal: str | Callable[..., Any] = "auto",
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
            share them. With ``"laplace"`` one of each component's, and every eighth, is drawn from
            the prior, but none where a component has only one. If N is not given, it is 32, for
            ``"prior"`` up to 512 once warm-up finds that the estimate varies much, and for
            ``"laplace"`` as many of 2, 4, 8 or 16 as bring the variance of the log estimate to one
            where the proposal is fitted; at least two for each component, or one with ``"prior"``.
            See :func:`~pyro_hamflow.estimator_quality`.
        proposal: ``"prior"`` draws particles from the prior; ``"laplace"`` from the prior times a
            Gaussian approximation of the likelihood, fitted before sampling, and a few from the
            prior itself, so that no weight exceeds the likelihood a hundredfold; a function
            ``(parameters, *model_args)`` from the sites that it samples as a Pyro program;
            ``"auto"`` takes ``"laplace"``, for priors that are no Gaussians in their normal scores,
            with several modes for each element where one misses something, and ``"prior"`` where
            these do.
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


class MarginalModel:
    """A Pyro model in which local sites are integrated out; made by :func:`marginalize`."""

    def __init__(
        self,
        model: Model,
        sites: Sequence[str],
        num_particles: int | None,
        proposal: str | Callable[..., Any],
        points: str,
    ) -> None:
        if isinstance(sites, str) or not list(sites):
            raise ValueError(f"`sites` is {sites!r}: expected a list of names of local sites")
        if isinstance(num_particles, bool) or not isinstance(num_particles, int | None):
            raise TypeError(f"`num_particles` is {num_particles!r}: expected an integer")
        if num_particles is not None and num_particles < 1:
            raise ValueError(f"`num_particles` is {num_particles}: expected 1 or more")
        if not callable(proposal) and proposal not in ("auto", "prior", "laplace"):
            raise ValueError(
                f"`proposal` is {proposal!r}: expected 'auto', 'prior', 'laplace' or a function"
            )
        if points not in ("iid", "rqmc"):
            raise ValueError(f"`points` is {points!r}: expected 'iid' or 'rqmc'")
        self.model = model
        self.sites = tuple(dict.fromkeys(sites))
        self.num_particles = num_particles
        self.settled_particles = num_particles
        self.proposal = proposal
        self.points = points
        self._chooses_proposal = proposal == "auto"
        self._structure: Structure | None = None
        self._layouts: dict[str, Layout] = {}
        self._is_held = False
        self._fit: Fit | None = None
        self._untuned: MarginalModel | None = None  # as it was before warm-up tuned it
        self._each_particle = Vectorized(f"Particles of {list(self.sites)}")
        self.pilot_distance = 0.0  # of the pilot from the top, in posterior standard deviations
        self.remark: str | None = None  # on what the proposal misses
        self.tells_origins = False  # of particles, if the proposal can
        self.finds_modes = False  # of a Gaussian proposal, several for each element
        self.is_defended = True  # by particles of the prior, if it is Gaussian

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions the plates of the original model take, hidden ones included."""
        return self._structure.nesting if self._structure else 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.hold(self.plan(*args, **kwargs).structure):
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.proposal == "laplace":
            self.pilot(args, kwargs)
        plan = self.plan(*args, **kwargs)  # with the particles that the pilot found enough
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
        """The model bound to its arguments, its structure, and the layout of its noise.

        What was found out about the model holds as long as it does the same with the same data.
        That is looked at again each time: nothing else tells, since a model may read what is no
        argument of it, and arguments may change in place. :meth:`hold` spares the look.
        """
        structure = self._structure
        if structure is None or not (self._is_held or self._is_current(structure, args, kwargs)):
            structure = analyse(self.model, self.sites, *args, **kwargs)
            self._structure, self._layouts = structure, {}
            if self._chooses_proposal:
                self.proposal = "auto"
                self.finds_modes = False
        plan = Plan(self.model, args, kwargs, structure, self._layouts)
        if not self._layouts:
            if self.proposal == "auto":
                self.proposal = "laplace"
                try:
                    self._lay_out(plan)
                except ValueError:  # a prior is no transform of noise; faults will come up again
                    self.proposal = "prior"
            self._lay_out(plan)
        return plan

    def _is_current(
        self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether the model does with these arguments what it did when it was analysed."""
        try:
            return Run(self.model, args, kwargs, structure.values).look().key == structure.key
        except Exception:  # whatever a model's own code may raise at values of other shapes
            return False

    @property
    def model_of_data(self) -> Model:
        """The model whose observed sites are those of the data."""
        return self.model

    def holding(self, *args: Any, **kwargs: Any) -> Callable[[], AbstractContextManager[None]]:
        """What :meth:`hold` does with the structure that the model has for these arguments."""
        return partial(self.hold, self.plan(*args, **kwargs).structure)

    @contextmanager
    def hold(self, structure: Structure) -> Iterator[None]:
        """While this lasts, the model is taken to have a structure that it once had."""
        before = self._is_held, self._structure
        self._take(structure)
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = before[0]
            self._take(before[1])

    def _take(self, structure: Structure | None) -> None:
        if structure is not self._structure:
            self._structure, self._layouts = structure, {}

    def _lay_out(self, plan: Plan) -> None:
        """Shares the noise of each group out among its sites and particles."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trace = run_with(self.model, lambda msg: None, *plan.args, **plan.kwargs)
        parameters = {n: trace.nodes[n]["value"] for n in plan.structure.parameters}
        for group in plan.structure.groups:
            proposal = self._proposal(plan, group, None, None, parameters)
            plan.layouts[group.name] = lay_out(
                group, trace, proposal, self.settled_particles, self.points, self._modes(group)
            )

    def _modes(self, group: Group) -> dict[Components, int]:
        """How many modes the proposal has, for each choice of components of a group."""
        if not self.finds_modes or self.proposal != "laplace" or self._fit is None:
            return {}
        fits = self._fit.sites.items()
        return {
            components: len(fit.sites) for (name, components), fit in fits if name == group.name
        }

    def lay_out_anew(self, num_particles: int | None) -> None:
        """Changes the number of particles where none was given."""
        if num_particles != self.settled_particles:
            self.settled_particles = num_particles
            self._layouts = {}

    @property
    def may_choose_proposal(self) -> bool:
        """Whether the proposal was left to be chosen."""
        return self._chooses_proposal

    def fit_modes(
        self, pilot: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Fits a Gaussian proposal with several modes for each element, from now on.

        Arguments:
            pilot: Constrained parameter values.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
        """
        self.finds_modes = True
        if self.num_particles is None:
            self.lay_out_anew(None)
        self.fit(*args, pilot=pilot, **kwargs)

    def stretch(self, tails: Mapping[str, Tensor]) -> None:
        """Takes other tails for the several modes of each element.

        Arguments:
            tails: For each group, by how much the noise is stretched, of shape ``(*group.shape)``.
        """
        if self._fit is not None:
            sites = {
                key: fit._replace(spread=fit.spread and fit.spread._replace(tail=tails[key[0]]))
                for key, fit in self._fit.sites.items()
            }
            self._fit = replace(self._fit, sites=sites)

    def take_modes(self, other: MarginalModel, num_particles: int) -> None:
        """Takes over another's several modes, and so many particles where no number was given."""
        self._take_over(other)
        self.settled_particles = self.num_particles or num_particles

    def take_prior(self, num_particles: int) -> None:
        """Draws particles from the prior from now on, so many where no number was given."""
        self.proposal, self._layouts = "prior", {}
        self.settled_particles = self.num_particles or num_particles

    def adopt(self, other: MarginalModel) -> None:
        """Takes over another's fitted proposal and number of particles, until :meth:`untune`."""
        if self._untuned is None:
            self._untuned = copy.copy(self)
        self._take_over(other)

    def untune(self) -> None:
        """Goes back to what was found before any run, so that a run repeats itself."""
        if self._untuned is not None:
            self._take_over(self._untuned)
            self._untuned = None

    def _take_over(self, other: MarginalModel) -> None:
        self._fit, self.proposal = other._fit, other.proposal
        self.finds_modes = other.finds_modes
        self.settled_particles, self._layouts = other.settled_particles, {}

    def refined(self, num_particles: int, points: str) -> MarginalModel:
        """The same model and fitted proposal, with other particles.

        Arguments:
            num_particles: How many each element has.
            points: As in :func:`marginalize`.
        """
        other = copy.copy(self)
        other.num_particles = other.settled_particles = num_particles
        other.points = points
        other._layouts = {}
        return other

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
        log_weights, values, origins, start = [], [], [], 0
        parts = zip(layout.strata, layout.split(u.to(layout.example)), strict=True)
        for _, alike in groupby(parts, lambda pair: pair[0].components):
            strata, parts_alike = zip(*alike, strict=True)
            points = [
                place_points(self.points, stratum.count, part)
                for stratum, part in zip(strata, parts_alike, strict=True)
            ]
            rows = [torch.cat(points)]
            stop = start + len(rows[0])
            if self.finds_modes:
                rows.append(layout.sources[start:stop])
            elif strata[0].is_shared:
                rows.append(layout.from_prior[start:stop])

            def particle(
                coordinates: Tensor,
                source: Tensor | None = None,
                stratum: Stratum = strata[0],
            ) -> Any:
                proposal = self._proposal(plan, group, stratum, coordinates, parameters, source)
                return draw_particle(plan, group, stratum, coordinates, proposal, parameters)

            weights, value, origin = self._each_particle(particle, *rows)
            log_weights.append(weights)
            values.append(value)
            origins.append(origin)
            start = stop
        weights = torch.cat(log_weights)
        factors = layout.log_factors.reshape(-1, *[1] * (weights.dim() - 1))
        joined, noise = (
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            for parts in (values, origins)
        )
        return Estimate(group, weights + factors, joined, noise)

    def _proposal(
        self,
        plan: Plan,
        group: Group,
        stratum: Stratum | None,
        coordinates: Tensor | None,
        parameters: dict[str, Tensor],
        source: Tensor | None = None,
    ) -> Proposal:
        """The proposal of one particle; without a stratum, for its noise shapes alone."""
        if callable(self.proposal):
            return run_program(self.proposal, plan, group, coordinates, parameters)
        if self.proposal == "prior":
            return PriorProposal()
        if stratum is None:
            proposal = LaplaceProposal(group, {}, {})
            proposal.is_defended = self.is_defended
            return proposal
        if self._fit is None:
            raise RuntimeError("the proposal is not fitted yet: call `fit` with the model's data")
        blocks, fit = plan.layouts[group.name].blocks, self._fit
        found, shift = fit.sites[group.name, stratum.components], fit.anchor.shift(parameters)
        tells = self.tells_origins
        if found.spread is not None and source is not None:
            modes, spread = found.sites, found.spread
            return MixtureProposal(group, blocks, modes, spread, shift, source, tells_origins=tells)
        return LaplaceProposal(group, blocks, found.sites[0], shift, source, tells_origins=tells)

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
            Constrained parameter values of high posterior density.
        """
        plan = self.plan(*args, **kwargs)
        if self._fit is None or self._fit.key != plan.structure.key:
            from pyro_hamflow.marginal.pilot import find_pilot  # which runs marginal models
            from pyro_hamflow.marginal.quality import settle_particles
            from pyro_hamflow.marginal.scrutiny import mend_proposal

            with self.hold(plan.structure):
                if self.num_particles is None:
                    self.lay_out_anew(None)
                found = find_pilot(self, args, kwargs, start)
                self.fit(*args, pilot=found.values, **kwargs)
                self.pilot_distance = found.distance
                if self.num_particles is None and self.proposal == "laplace":
                    settle_particles(self, args, kwargs)
                self.remark = None
                if found.distance <= _FAR:  # a proposal fitted far away misses this and that
                    self.remark = mend_proposal(self, [found.values], args, kwargs)
        return self._fit.anchor.values  # type: ignore[union-attr]

    def fit(self, *args: Any, pilot: dict[str, Tensor], **kwargs: Any) -> None:
        """Fits the ``"laplace"`` proposal at a pilot of one's own; optional, and before sampling.

        Arguments:
            args: The model's arguments.
            pilot: Constrained parameter values. Without a call of this method they are found by
                optimisation of the estimated likelihood times the prior.
            kwargs: The model's keyword arguments.
        """
        plan = self.plan(*args, **kwargs)
        needed = set(plan.structure.parameters) - set(plan.structure.placeholders)
        missing = sorted(needed - set(pilot))
        if missing:
            raise ValueError(f"`pilot` lacks a value for site '{missing[0]}'")
        self._fit = self._fitted(plan, pilot, None)
        if self.finds_modes:
            self._layouts = {}

    def follow(self, pilot: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Fits the proposal for parameter values close to the last ones, and for them alone.

        Arguments:
            pilot: Constrained parameter values.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
        """
        self._fit = self._fitted(self.plan(*args, **kwargs), pilot, self._fit)

    def _fitted(self, plan: Plan, pilot: dict[str, Tensor], near: Fit | None) -> Fit:
        values = {name: value.detach() for name, value in pilot.items()}
        anchor = Anchor(values, ())
        if near is None and self.proposal == "laplace":
            continuous = set(plan.structure.parameters) - set(plan.structure.placeholders)
            anchor = Anchor(values, tuple(name for name in values if name in continuous))
        sites: dict[tuple[str, Components], Fitted] = {}
        for group in plan.structure.groups if self.proposal == "laplace" else ():
            layout = plan.layouts[group.name]
            for stratum in layout.strata:
                key = group.name, stratum.components
                if key in sites:
                    continue
                start = None if near is None else near.sites[key].mode
                joint = partial(joint_density, plan, group, stratum, {})
                held: dict[str, Reference] = {}
                if near is None and references(plan, group, stratum, values, None):
                    mode = fit_sites(group, layout, joint, Anchor(values, ()), None, held).mode
                    held = references(plan, group, stratum, values, mode)
                    joint = partial(joint_density, plan, group, stratum, held)
                if self.finds_modes and near is None:
                    places, shares = find_modes(group, layout, joint, values, self._most(layout))
                    spread = Spread(shares, torch.full_like(shares[0], _TAIL))
                    sites[key] = fit_modes(group, layout, joint, anchor, places, spread, held)
                else:
                    sites[key] = fit_sites(group, layout, joint, anchor, start, held)
        return Fit(plan.structure.key, *keep_what_moves(anchor, sites))

    def _most(self, layout: Layout) -> int:
        """How many modes have particles, and one is left for the prior."""
        if self.num_particles is None:
            return MOST_MODES
        choices = len({stratum.components for stratum in layout.strata})
        return max(1, min(MOST_MODES, self.num_particles // choices - 1))

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        proposal = getattr(self.proposal, "__name__", self.proposal)
        return (
            f"marginalize({name}, {list(self.sites)}, num_particles={self.settled_particles}, "
            f"proposal={proposal!r}, points={self.points!r})"
        )


@dataclass(frozen=True)
class Fit:
    """A pilot, the sites of the ``"laplace"`` proposal fitted there, and to what model and data."""

    key: str
    anchor: Anchor
    sites: dict[tuple[str, Components], Fitted]


class _HideLocalSites(Messenger):
    """Hides local sites, and what depends on them, from outer handlers; records the others."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        rest = self.structure.rest.get(name)
        if rest is not None:  # counted here, and not in an estimate
            msg["mask"] = rest if msg["mask"] is None else msg["mask"] & rest
            msg["infer"] = {**(msg["infer"] or {}), "rest": rest}
        elif name in self.structure.hidden:
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
