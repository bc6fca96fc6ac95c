"""The guide whose density is a Neural Hamiltonian Flow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoContinuous, init_to_median
from torch import Tensor

from pyro_hamflow.flows.guided_sites import (
    is_noise,
    refuse_angles,
    refuse_local_subsampling,
    stays_out,
)
from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow
from pyro_hamflow.flows.phases import PhaseDistribution
from pyro_hamflow.flows.standardised import StandardisedFlow, standardised
from pyro_hamflow.flows.start import find_start
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.model.sites import Site, constrain, split, stack_sites
from pyro_hamflow.networks.kinetic import LearnedGaussianKinetic, LearnedKinetic
from pyro_hamflow.programs.validation import no_validation

_STARTS = ("laplace", "prior")
_NUMBERS = count(1)


class AutoNeuralHamiltonianFlow(StandardisedFlow, AutoContinuous):
    r"""A guide that moves positions from a Gaussian, or from the prior, by Hamiltonian motion.

    Trains by :func:`~pyro_hamflow.fit_guide`, or as any guide does: with :class:`pyro.infer.SVI` or
    as an ``ELBOModule``, on whole data or subsampled. The flow lives on the phases of all
    parameters, moved to the real line and standardised; the density of their momenta is part of the
    bound:

    .. math:: \mathrm{ELBO} = E_M [\log p(\theta, y) + \log r(p_T \mid q_T) - \log M(q_T, p_T)].

    What it leaves of the posterior's shape, :func:`~pyro_hamflow.importance_sample` and
    :class:`~pyro_hamflow.FlowMH` correct. On a model with noise sites the flow covers the
    parameters, and the noise is drawn afresh from N(0, I), its own law. A noisy estimate draws the
    guide to where it is less noisy, and its noise is part of the weights besides: have
    :func:`~pyro_hamflow.estimator_quality` tell of a standard deviation of some 0.5 or less rather
    than of the 1 that :func:`~pyro_hamflow.marginalize` aims at for chains. Few local variables are
    served best by a lattice, ``points="rqmc"``; where k stays above 0.7, take more particles, or
    ``proposal="prior"``. Discrete sites that can be enumerated are left to enumeration.

    Arguments:
        model: A Pyro model.
        start: Where the flow begins. ``"laplace"``: around the posterior's mode, with the
            covariance of a Gaussian fitted there and the tails of Student's t with 20 degrees of
            freedom, since thinner ones than the posterior's cannot be corrected. ``"prior"``: at
            the prior. Or a distribution of all parameters on the real line, with event shape
            ``(dimension,)``, such as a Gaussian whose coupling is known.
        kinetic: As in :class:`~pyro_hamflow.NeuralHamiltonianFlow`.
        hidden: The widths of the hidden layers of the networks.
        num_steps: The number of leapfrog steps.
        time: How long the motion takes.
        reverse_encoder: Whether r(p | q) is learned, rather than N(0, I). It tightens the bound.
        symmetric: Whether the flow is symmetric about where it starts.
        stiffness: As in :class:`~pyro_hamflow.NeuralHamiltonianFlow`.
        init_loc_fn: Where the search for the mode begins; one of Pyro's.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If an argument lies outside its range; at the first call, if a latent site lies
            in a subsampled plate, or the model has one of the faults that
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    References:
        | Fixed-kinetic Neural Hamiltonian Flows (Souveton et al., 2023), section 6
        | https://hal.science/hal-03976501

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> guide = AutoNeuralHamiltonianFlow(model, hidden=(8, 8))
        >>> adam = pyro.optim.Adam({"lr": 1e-3})
        >>> svi = pyro.infer.SVI(model, guide, adam, pyro.infer.Trace_ELBO())
        >>> svi.step(torch.ones(3)) < 10.0
        True
    """

    _prototype_hide_fn = staticmethod(stays_out)

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        start: Any = "laplace",
        kinetic: Callable[[int], LearnedKinetic] = LearnedGaussianKinetic,
        hidden: Sequence[int] = (32, 32),
        num_steps: int = 5,
        time: float = 1.0,
        reverse_encoder: bool = False,
        symmetric: bool = False,
        stiffness: float | None = 1.0,
        init_loc_fn: Callable[..., Any] = init_to_median,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` is {model!r}: expected a Pyro model, a callable")
        if start not in _STARTS and not isinstance(start, torch.distributions.Distribution):
            raise ValueError(f"`start` is {start!r}: expected one of {_STARTS} or a distribution")
        super().__init__(model, init_loc_fn)
        self._take_new_name()
        self._plain_model = (model,)  # in a tuple, so as not to be taken for a part of the guide
        self._start = (start,)
        self._settings: dict[str, Any] = {
            "kinetic": kinetic,
            "hidden": tuple(hidden),
            "num_steps": num_steps,
            "time": time,
            "encode_start": True,
            "encode_end": reverse_encoder,
            "symmetric": symmetric,
            "stiffness": stiffness,
        }
        NeuralHamiltonianFlow(1, **self._settings)  # refuses bad settings now
        self._waiting: Mapping[str, Tensor] | None = None
        self._noise_sites: dict[str, Any] = {}

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
            position = self._init_loc()
            if pilot is not None:
                free = [site.transform.inv(pilot[site.name]) for site in self._sites()]
                position = torch.cat([part.reshape(-1) for part in free]).to(position)
        self._noise_sites = {
            name: site for name, site in whole.iter_stochastic_nodes() if is_noise(site)
        }
        saved = None
        try:
            if self._waiting is not None:
                saved = tuple(self._waiting[name].to(position) for name in ("loc", "scale_tril"))
            with torch.enable_grad():
                loc, scale_tril, base = find_start(
                    start, model, args, kwargs, self._sites(), position, saved
                )
        except Exception:
            self.prototype_trace = None  # as if it had never been called
            raise
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)
        self.flow = NeuralHamiltonianFlow(len(position), base=base, **self._settings)
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.load_state_dict(waiting)

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

    # --- what Pyro calls ------------------------------------------------------------------------

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        flow = self.flow  # asked for once: Pyro registers its parameters each time
        phase = pyro.sample(
            f"_{self._pyro_name}_phase", PhaseDistribution(flow), infer={"is_auxiliary": True}
        )
        q, p = phase.chunk(2, -1)
        if poutine.get_mask() is not False:
            # A factor, but without a warning where the guide is called by hand.
            surplus = flow.end_momenta.log_density(q, p) + self.log_volume()
            nothing = dist.Delta(torch.zeros_like(surplus), log_density=-surplus)
            pyro.sample(f"_{self._pyro_name}_momenta", nothing, infer={"is_auxiliary": True})
        return self.to_position(q)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        result = super().forward(*args, **kwargs)
        for name, site in self._noise_sites.items():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    own = pyro.plate(frame.name, frame.size, dim=frame.dim)
                    stack.enter_context(self.plates.get(frame.name, own))
                result[name] = pyro.sample(name, site["fn"], infer={"noise": True})
        return result

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The distribution of phases: standardised positions, and their momenta behind them."""
        return PhaseDistribution(self.flow)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} has no map of positions alone, its flow moves positions with "
            "momenta: NeuTra needs another guide; to correct this one use `importance_sample` or "
            "`FlowMH`"
        )

    get_base_dist = get_transform

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
        """Loads what ``state_dict`` saved, now or, before the first call, once the flow is made."""
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

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoNeuralHamiltonianFlow:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            shared = name in ("_model", "_plain_model", "_start", "master")
            copied.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        copied._take_new_name()
        return copied
