"""What guides made of a flow share: where they start, what they cover, how they are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import count
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_hamflow.flows.guided_sites import (
    is_noise,
    refuse_angles,
    refuse_local_subsampling,
    stays_out,
)
from pyro_hamflow.flows.standardised import standardise, standardised
from pyro_hamflow.flows.start import guide_start
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.model.kinds import Args, Model
from pyro_hamflow.model.sites import Site, constrain, split, stack_sites
from pyro_hamflow.programs.validation import no_validation

_STARTS = ("laplace", "prior")
_NUMBERS = count(1)


class FlowGuide(AutoContinuous):
    """A guide whose flow lives where the posterior is about standard.

    What is made of it says how the flow is made, in ``make_flow``, and draws from it: ``draw`` and
    ``log_ratio``, as :class:`~pyro_hamflow.model.guides.DensityGuide` asks, and ``sample_latent``
    or ``get_posterior``, as Pyro does.

    Arguments:
        model: A Pyro model.
        start: ``"laplace"``, ``"prior"`` or a distribution of positions.
        init_loc_fn: Where the search for the mode begins; one of Pyro's.

    Attributes:
        flow: The flow, once the model has been seen. Its ``base`` is what it starts from.
        loc: Where its coordinates have zero, of shape ``(dimension,)``.
        scale_tril: A unit of them, a lower triangle of shape ``(dimension, dimension)``.
    """

    flow: Any
    loc: Tensor
    scale_tril: Tensor

    _prototype_hide_fn = staticmethod(stays_out)

    def __init__(self, model: Model, start: Any, init_loc_fn: Callable[..., Any]) -> None:
        if not callable(model):
            raise TypeError(f"`model` is {model!r}: expected a Pyro model, a callable")
        if start not in _STARTS and not isinstance(start, torch.distributions.Distribution):
            raise ValueError(f"`start` is {start!r}: expected one of {_STARTS} or a distribution")
        super().__init__(model, init_loc_fn)
        self._take_new_name()
        self._plain_model = (model,)  # in a tuple, so as not to be taken for a part of the guide
        self._start = (start,)
        self._waiting: Mapping[str, Tensor] | None = None
        self._noise_sites: dict[str, Any] = {}

    def make_flow(self, position: Tensor, base: Any) -> Any:
        """The flow for positions like this one.

        Arguments:
            position: Of shape ``(dimension,)``.
            base: What it is to start from, in its own coordinates; ``None`` for a Gaussian, or
                whatever suits a posterior that is about standard.
        """
        raise NotImplementedError

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _take_new_name(self) -> None:
        """Guides of one name would share their parameters in Pyro's store."""
        number = next(_NUMBERS)
        self._pyro_name = type(self).__name__ + (f"_{number}" if number > 1 else "")

    # --- preparation ----------------------------------------------------------------------------

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Makes the flow for a model's parameters, unless it is made already.

        The first call of the guide does the same.

        Arguments:
            args: The model's arguments.
            kwargs: The model's keyword arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._set_up(args, kwargs)
        except BaseException:  # an interruption, too
            self.prototype_trace = None  # as if it had never been called
            raise

    def _set_up(self, args: Args, kwargs: dict[str, Any]) -> None:
        (model,), (start,) = self._plain_model, self._start
        pilot = None
        if isinstance(model, MarginalModel):
            with torch.enable_grad():
                pilot = model.prepare(args, kwargs).pilot
        with torch.no_grad(), poutine.block(), no_validation():
            whole = poutine.trace(model).get_trace(*args, **kwargs)
            refuse_local_subsampling(whole)
            refuse_angles(whole)
            super()._setup_prototype(*args, **kwargs)
            self._create_plates(*args, **kwargs)  # which Pyro asks for before the first call, too
            position = self._init_loc()
            if pilot is not None:
                free = [site.transform.inv(pilot[site.name]) for site in self._sites()]
                position = torch.cat([part.reshape(-1) for part in free]).to(position)
        self._noise_sites = {
            name: site for name, site in whole.iter_stochastic_nodes() if is_noise(site)
        }
        saved = None
        if self._waiting is not None:
            saved = tuple(self._waiting[name].to(position) for name in ("loc", "scale_tril"))
        with torch.enable_grad():
            loc, scale_tril, base = guide_start(
                start, model, args, kwargs, self._sites(), position, saved
            )
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)
        self.flow = self.make_flow(position, base)
        if self._waiting is not None:
            self.load_state_dict(self._waiting)
            self._waiting = None

    @property
    def dimension(self) -> int:
        """How many parameters there are on the real line."""
        if self.prototype_trace is None:
            raise RuntimeError("the guide has not seen its model yet: call `prepare` first")
        return len(self.loc)

    def _sites(self) -> list[Site]:
        """The parameters as parts of a position."""
        nodes: Any = self.prototype_trace.nodes  # type: ignore[attr-defined]
        return stack_sites(nodes, list(self._unconstrained_shapes))

    # --- coordinates ----------------------------------------------------------------------------

    def standardise(self, position: Tensor) -> Tensor:
        """Positions ``(*, dimension)`` in the flow's coordinates."""
        return standardise(position, self.loc, self.scale_tril)

    def to_position(self, q: Tensor) -> Tensor:
        """Positions on the real line, from the flow's coordinates ``(*, dimension)``."""
        return self.loc + q @ self.scale_tril.mT

    def log_volume(self) -> Tensor:
        """The logarithm of the volume of a unit cube of the flow's coordinates."""
        return self.scale_tril.diagonal().log().sum()

    # --- what Pyro calls ------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        result = super().forward(*args, **kwargs)
        for name, site in self._noise_sites.items():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    own = pyro.plate(frame.name, frame.size, dim=frame.dim)
                    stack.enter_context(self.plates.get(frame.name, own))
                result[name] = pyro.sample(name, site["fn"], infer={"noise": True})
        return result

    @torch.no_grad()
    def quantiles(
        self, quantiles: Iterable[float], *args: Any, num_samples: int = 10_000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of each site, by Monte Carlo.

        Arguments:
            quantiles: Which.
            args: The model's arguments, needed before the first call only.
            num_samples: From how many draws they are taken.
            kwargs: The model's keyword arguments.
        """
        self.prepare(*args, **kwargs)
        position, _ = self.draw(num_samples)
        levels = torch.as_tensor(quantiles).to(position)
        sites = self._sites()
        values = constrain(sites, split(sites, position))
        return {name: value.quantile(levels, 0) for name, value in values.items()}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each site, by Monte Carlo."""
        return {n: v[0] for n, v in self.quantiles([0.5], *args, **kwargs).items()}

    # --- saving and copying ---------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads what ``state_dict`` saved, now or, before the first call, once the flow is made.

        Raises:
            ValueError: If it is the state of something else.
        """
        if not {"loc", "scale_tril"} <= state_dict.keys():
            raise ValueError(
                f"the state has {sorted(state_dict)[:4]} and so on: expected that of a "
                f"{type(self).__name__}, with `loc` and `scale_tril` of what it is moved and "
                "scaled by"
            )
        if self.prototype_trace is None:
            self._waiting = dict(state_dict)
            return torch.nn.modules.module._IncompatibleKeys([], [])
        result = super().load_state_dict(state_dict, *args, **kwargs)
        (start,) = self._start
        if start != "laplace":
            given = self.flow.base.base_dist
            self.flow.base = standardised(given, self.loc, self.scale_tril.diagonal())
        return result

    def __getstate__(self) -> dict[str, Any]:
        """What to pickle: all but the model, which stays in place here."""
        for parameter in self.parameters():  # weak references, which Pyro sets again when needed
            parameter.__dict__.pop("unconstrained", None)
        return self.__dict__ | {"_model": None, "_plain_model": None, "master": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowGuide:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            shared = name in ("_model", "_plain_model", "_start", "master")
            copied.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        copied._take_new_name()
        return copied
