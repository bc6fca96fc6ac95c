"""A model whose estimator of the likelihood is fitted to data, and tuned.

What is known of the estimator is one value, :class:`Prepared`, that belongs to what the model does
with its data. The methods here replace it; what decides on them lies in the modules that take such
a model: :mod:`~pyro_hamflow.marginal.pilot`, :mod:`~pyro_hamflow.marginal.settle` and
:mod:`~pyro_hamflow.marginal.mending`, which :mod:`~pyro_hamflow.marginal.preparation` puts in
order.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from torch import Tensor

from pyro_hamflow.marginal.dependence import Run, analyse
from pyro_hamflow.marginal.estimator import Estimate, estimate
from pyro_hamflow.marginal.lay_out import lay_out, look_at
from pyro_hamflow.marginal.noise_layout import Layout
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.proposals.base import Proposal
from pyro_hamflow.marginal.proposals.choice import choose_proposal, suited
from pyro_hamflow.marginal.structure import Group, Structure
from pyro_hamflow.model.kinds import Args, Kwargs, Model
from pyro_hamflow.programs.vectorize import Vectorized


@dataclass(frozen=True)
class Prepared:
    """What a model's estimator is, and what it was fitted to.

    Attributes:
        proposal: Where particles come from, with all that was fitted of it; none while it is left
            to be chosen.
        num_particles: How many each element has; ``None`` if as many as serve the proposal well.
        key: Of the structure of the model and data that it was fitted to; none before that.
        pilot: The constrained parameter values that it was fitted at.
        distance: How far these may be from the posterior's top, in its standard deviations.
        remark: What the proposal misses there, or what the search found, in a sentence.
        other_modes: How high other modes' tops are beside the pilot's, as ratios of densities.
        covariance: Roughly the posterior's about the pilot, of unconstrained values; none if
            nothing is known.
    """

    proposal: Proposal | None
    num_particles: int | None
    key: str | None = None
    pilot: dict[str, Tensor] = field(default_factory=dict)
    distance: float = 0.0
    remark: str | None = None
    other_modes: tuple[float, ...] = ()
    covariance: Tensor | None = None


class TunedEstimator(ABC):
    """A model with local sites to be integrated out, and the estimator that does it.

    Arguments:
        model: A Pyro model.
        sites: The names of its local sites.
        num_particles: How many particles each element has, if that is given.
        proposal: Where they come from; ``None`` if that is to be chosen by the model.
        points: ``"iid"``, ``"antithetic"`` or ``"rqmc"``.
        follows: How Gaussian paths follow the parameters; ``"auto"`` if that is to be chosen.

    Attributes:
        prepared: What is known of the estimator; replaced as a whole.
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[str],
        num_particles: int | None,
        proposal: Proposal | None,
        points: str,
        follows: str,
    ) -> None:
        self.model = model
        self.sites = tuple(dict.fromkeys(sites))
        self.num_particles = num_particles
        self.points = points
        self.follows = follows
        self.prepared = Prepared(proposal, num_particles)
        self._given = proposal
        self._structure: Structure | None = None
        self._layouts: dict[str, Layout] = {}
        self._is_held = False
        self._untuned: Prepared | None = None  # as it was before warm-up tuned it
        self._each_particle = Vectorized(f"Particles of {list(self.sites)}")

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model with estimates in place of its local sites."""

    @property
    def proposal(self) -> Proposal:
        """Where particles come from."""
        if self.prepared.proposal is None:
            raise RuntimeError("the proposal is not chosen yet: call `plan` with the model's data")
        return self.prepared.proposal

    @property
    def may_choose_proposal(self) -> bool:
        """Whether the proposal was left to be chosen."""
        return self._given is None

    @property
    def settled_particles(self) -> int | None:
        """How many particles each element has; none if as many as serve the proposal well."""
        return self.prepared.num_particles

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
            if self.may_choose_proposal:
                self.prepared = Prepared(None, self.num_particles)
        plan = Plan(self.model, args, kwargs, structure, self._layouts)
        if self._layouts:
            return plan
        given = self.prepared.proposal
        choose = choose_proposal if given is None else partial(suited, proposal=given)
        chosen = choose(plan, follow=self.follows)
        if chosen is not given:
            self.prepared = replace(self.prepared, proposal=chosen)
        trace, proposal, count = look_at(plan), self.proposal, self.prepared.num_particles
        self._layouts = {
            group.name: lay_out(plan, group, trace, proposal, count, self.points)
            for group in structure.groups
        }
        return replace(plan, layouts=self._layouts)

    def _is_current(self, structure: Structure, args: Args, kwargs: Kwargs) -> bool:
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
        return estimate(plan, self.proposal, group, u, parameters, self._each_particle)

    def fit(self, *args: Any, pilot: dict[str, Tensor], **kwargs: Any) -> None:
        """Fits the proposal at a pilot of one's own; optional, and before sampling.

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
        old, new = self.proposal, self.proposal.fit(plan, pilot)
        self._note_fit(plan, pilot, new)
        if any(new.modes(group) != old.modes(group) for group in plan.structure.groups):
            self._layouts = {}

    def follow(self, pilot: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Fits the proposal for parameter values close to the last ones, and for them alone.

        Arguments:
            pilot: Constrained parameter values.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
        """
        plan = self.plan(*args, **kwargs)
        self._note_fit(plan, pilot, self.proposal.follow(plan, pilot))

    def _note_fit(self, plan: Plan, pilot: dict[str, Tensor], proposal: Proposal) -> None:
        """Notes that a proposal was fitted at a pilot."""
        values = {name: value.detach() for name, value in pilot.items()}
        key = plan.structure.key
        self.prepared = replace(self.prepared, proposal=proposal, key=key, pilot=values)

    def stretch(self, tails: Mapping[str, Tensor]) -> None:
        """Takes other tails for the proposal.

        Arguments:
            tails: For each group, by how much the noise is stretched, of shape ``(*group.shape)``.
        """
        self.prepared = replace(self.prepared, proposal=self.proposal.stretched(tails))

    def take(self, proposal: Proposal, num_particles: int | None = None) -> None:
        """Draws particles from another proposal, so many where no number was given."""
        count = self.num_particles or num_particles
        self.take_over(replace(self.prepared, proposal=proposal, num_particles=count))

    def settle(self, num_particles: int | None) -> None:
        """Changes the number of particles where none was given."""
        if num_particles != self.settled_particles:
            self.take_over(replace(self.prepared, num_particles=num_particles))

    def take_over(self, prepared: Prepared) -> None:
        """Takes the estimator of another model that does the same."""
        self.prepared, self._layouts = prepared, {}

    def adopt(self, other: TunedEstimator) -> None:
        """Takes over another's fitted proposal and number of particles, until :meth:`untune`."""
        if self._untuned is None:
            self._untuned = self.prepared
        self.take_over(other.prepared)

    def untune(self) -> None:
        """Goes back to what was found before any run, so that a run repeats itself."""
        if self._untuned is not None:
            self.take_over(self._untuned)
            self._untuned = None

    @property
    def fitted(self) -> tuple[Prepared, Prepared | None]:
        """What is known of the estimator, and what was before warm-up tuned it, if it did."""
        return self.prepared, self._untuned

    def take_fitted(self, fitted: tuple[Prepared, Prepared | None], structure: Structure) -> None:
        """Takes over what was :attr:`fitted` to the same model and data in another process."""
        prepared, untuned = (
            part and replace(part, key=part.key and structure.key) for part in fitted
        )
        if prepared is not None:
            self.take_over(prepared)
        self._untuned = untuned

    def refined(self, num_particles: int, points: str) -> Self:
        """The same model and fitted proposal, with other particles.

        Arguments:
            num_particles: How many each element has.
            points: ``"iid"``, ``"antithetic"`` or ``"rqmc"``.
        """
        other = copy.copy(self)
        other.num_particles, other.points = num_particles, points
        other.take(self.proposal)
        return other
