"""A user's model, or potential function, as the target of runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.checks import flag, whole
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.whiten import WhitenedModel
from pyro_hamflow.model.function import FunctionPotential, PotentialFunction
from pyro_hamflow.model.kinds import Args, Kwargs, Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import Strategy, find_start

_PILOT_RADIUS = 0.1  # about the pilot, within which chains start


class ModelTarget:
    """What the user gave for a target; captured when it is run, and kept while it stays the same.

    Arguments:
        model: A Pyro model.
        potential_fn: In place of a model, minus a log density of values on the real line, by the
            names of parameters; it needs ``initial_params``.
        separate_noise: Whether noise sites are apart from the parameters.
        transforms: From the support of a site to the real line, by name, where it is not to be
            the map that is registered for the support. Parameters of a ``potential_fn`` are on the
            real line: their draws are taken back by these.
        max_plate_nesting: How many dimensions, counted from the right, may be plates, where
            discrete sites are summed out; found by a run of the model if not given.
        jit_compile: Whether to compile programs to machine code, which takes tens of seconds and
            makes long runs several times faster.
        init_strategy: Where chains start, as Pyro's guides take it:
            :func:`~pyro.infer.autoguide.initialization.init_to_median` and its kin. If not given,
            near the pilot of a marginal model, where the posterior of a whitened one is, and within
            two units around zero elsewhere, whence those come down that are far out.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If there is no model, or two.
    """

    def __init__(
        self,
        model: Model | None,
        *,
        potential_fn: PotentialFunction | None = None,
        separate_noise: bool = False,
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,
        init_strategy: Strategy | None = None,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("expected one of `model` and `potential_fn`")
        if not callable(model or potential_fn):
            name = "`potential_fn`" if model is None else "`model`"
            kind = "a function of parameters" if model is None else "a Pyro model, a callable"
            raise TypeError(f"{name} is {model or potential_fn!r}: expected {kind}")
        for name, transform in (transforms or {}).items():
            if not hasattr(transform, "log_abs_det_jacobian"):
                raise TypeError(
                    f"`transforms` of site '{name}' is {transform!r}: expected a torch Transform"
                )
        if init_strategy is not None and not callable(init_strategy):
            raise TypeError(f"`init_strategy` is {init_strategy!r}: expected a function of a site")
        if max_plate_nesting is not None:
            whole("max_plate_nesting", max_plate_nesting, 0)
        flag("jit_compile", jit_compile)
        self.model = model
        self.potential_fn = potential_fn
        self.separate_noise = separate_noise
        self.given_transforms = None if transforms is None else dict(transforms)
        self.max_plate_nesting = max_plate_nesting
        self.jit_compile = jit_compile
        self.init_strategy = init_strategy
        self._potential: Potential | None = None
        self._pilot: dict[str, Tensor] | None = None
        self._example: dict[str, Tensor] | None = None  # of the parameters of a function

    @property
    def potential(self) -> Potential:
        """The target of the latest run."""
        if self._potential is None:
            raise RuntimeError("the kernel has not been set up: run it first")
        return self._potential

    def prepare(
        self,
        args: Args,
        kwargs: Kwargs,
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> Potential:
        """Captures the model, unless it is captured already and has not changed since."""
        self._pilot = None
        if self.potential_fn is not None:
            return self._prepare_function(self.potential_fn, initial_params)
        model = self.model
        if self.separate_noise and isinstance(model, MarginalModel):
            model.plan(*args, **kwargs)  # finds faults of the sites, settles the proposal
            if initial_params is None or model.proposal.needs_fit:
                start = None
                if initial_params is not None:
                    start = {name: value.mean(0) for name, value in initial_params.items()}
                self._pilot = model.prepare(args, kwargs, start, moves=True).pilot
        if self._potential is not None and self._potential.renew(args, kwargs):
            self._potential.programs.start_counting()
            return self._potential
        potential = self.capture(args, kwargs)
        if not potential.sites and not potential.noise_sites:
            warnings.warn(
                "the model has no continuous latent site, so that there is nothing to sample; what "
                "is not known is a `pyro.sample` without `obs`",
                UserWarning,
                stacklevel=2,
            )
        return potential

    def capture(self, args: Args, kwargs: Kwargs) -> Potential:
        """Captures the model as it is now."""
        if self.model is None:
            raise RuntimeError("a potential function is captured by its parameters")
        self._potential = Potential(
            self.model,
            args,
            kwargs,
            separate_noise=self.separate_noise,
            compile_graphs=self.jit_compile,
            transforms=self.given_transforms,
            max_plate_nesting=self.max_plate_nesting,
        )
        return self._potential

    def _prepare_function(
        self, function: PotentialFunction, initial_params: Mapping[str, Tensor] | None
    ) -> Potential:
        """The same of a potential that is a function: starting values say what it is of."""
        if initial_params is not None:
            example = {name: value[0] for name, value in initial_params.items()}
            self._example = {
                name: value if value.is_floating_point() else value.to(torch.get_default_dtype())
                for name, value in example.items()
            }
        if self._example is None:
            raise ValueError(
                "`initial_params` is None: expected values to start from, as the names and shapes "
                "of the parameters of `potential_fn` are theirs"
            )
        old, shapes = self._potential, {name: v.shape for name, v in self._example.items()}
        if old is not None and {site.name: site.shape for site in old.sites} == shapes:
            if old.renew((), {}):
                old.programs.start_counting()
                return old
        self._potential = FunctionPotential(
            function,
            self._example,
            compile_graphs=self.jit_compile,
            transforms=self.given_transforms,
        )
        return self._potential

    def start(
        self, num_chains: int, initial_params: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Where chains start, and their noise.

        Raises:
            ValueError: If values that were given are not finite, or have no density.
        """
        potential = self.potential
        if initial_params is None:
            if isinstance(self.model, WhitenedModel) and self.init_strategy is None:
                places = [potential.flatten(values) for values in self.model.starts(num_chains)]
                return find_start(potential, num_chains, torch.stack(places), 0.0)
            if self._pilot is None or self.init_strategy is not None:
                return find_start(potential, num_chains, strategy=self.init_strategy)
            place, around = potential.flatten(self._pilot), self._covariance(potential.dimension)
            return find_start(potential, num_chains, place, _PILOT_RADIUS, covariance=around)
        for name, value in initial_params.items():
            if not bool(torch.as_tensor(value).isfinite().all()):
                raise ValueError(
                    f"`initial_params` of site '{name}' is not finite: expected finite numbers"
                )
        return find_start(potential, num_chains, potential.ravel(initial_params, num_chains), 0.0)

    def _covariance(self, dimension: int) -> Tensor | None:
        """That of the posterior about the pilot, roughly; none if it is not known.

        That is of as many numbers on the real line, where no other maps lead than the pilot's own.
        """
        known = None
        if isinstance(self.model, MarginalModel) and self.given_transforms is None:
            known = self.model.prepared.covariance
        return known if known is not None and len(known) == dimension else None

    @property
    def other_modes(self) -> tuple[float, ...]:
        """How high modes are beside that near which chains start, as ratios of densities."""
        if isinstance(self.model, MarginalModel) and self._pilot is not None:
            return self.model.prepared.other_modes
        return self.model.other_modes if isinstance(self.model, WhitenedModel) else ()

    @property
    def transforms(self) -> dict[str, Any] | None:
        """From each site's support to the real line; nothing before a model has run."""
        if self._potential is not None:
            return self._potential.transforms
        return dict(self.given_transforms or {}) if self.model is None else None

    def transform_by(self, transforms: Mapping[str, Any]) -> None:
        """Takes other maps from supports to the real line, from the next run on."""
        self.given_transforms = dict(transforms)
        self._potential = None

    def __getstate__(self) -> dict[str, Any]:
        """Graphs and compiled programs stay in the process that made them."""
        return self.__dict__ | {"_potential": None}
