"""Paths and vectors as white noise: a change of variables by Gaussian sites of the likelihood.

:func:`whiten` takes a Pyro model and returns another one with the same joint density. In place of
some sites it has noise of their posterior's shape, so that samplers of all variables together, as
NUTS is one, need few steps for many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves

from pyro_hamflow.marginal.whitening.fit import WhiteningFit, fit_whitening, log_prob_of
from pyro_hamflow.marginal.whitening.handlers import WithPath, values_before
from pyro_hamflow.model.kinds import Arguments, Model
from pyro_hamflow.model.look import plain_run
from pyro_hamflow.process import random_state_kept


def whiten(model: Model, sites: Sequence[str]) -> WhitenedModel:
    r"""Takes a latent path or vector to white noise by Gaussian sites of its likelihood.

    Let x be the path, of all named sites on the real line, and :math:`\theta` the sites that the
    model draws before it. The noise z, one site in their place, gives the path

    .. math:: x = m(\theta) + L(\theta) z, \quad
        L L^\top = (P(\theta) + \Lambda(\theta))^{-1}, \quad
        m = L L^\top (P \mu + \eta)(\theta),

    where P and :math:`\mu` are the precision and mean of the path's prior given :math:`\theta`, and
    :math:`\Lambda` and :math:`\eta` are Gaussian sites of all else that depends on the path, fitted
    at a mode when the model is first run and moved with :math:`\theta` to first order. The density
    of z is that of x times the change of volume. The joint density is the model's own for any
    sites; they matter for how white z is under the posterior: exactly where all is Gaussian.

    A path has few bands in its precision where each variable depends on the last few: as a
    :func:`pyro.markov` loop or as one site of many times, of several states, or in plates. Then
    time and memory grow in proportion to its length. Other vectors, such as Gaussian processes,
    take time in proportion to the cube of theirs.

    Arguments:
        model: A Pyro model.
        sites: Names of the sites of one path; ``x`` stands for a loop of sites ``x_0``, ``x_1`` and
            so on.

    Returns:
        The whitened model, a Pyro model with the same arguments. Names in it: where ``x`` is the
        first of the sites in the model, the noise is ``x_white``; the sites themselves are
        deterministic.

    Raises:
        ValueError: If no names are given. Faults of the sites are found when the model is first
            run, and raise a ValueError that names the site.

    Invariant:
        The density of parameters and noise is the model's, of the path that the noise leads to,
        times the change of volume.

    Example:
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     x = torch.zeros(())
        ...     for t in pyro.markov(range(len(y))):
        ...         x = pyro.sample(f"x_{t}", dist.Normal(x, scale))
        ...         pyro.sample(f"y_{t}", dist.Poisson(x.exp()), obs=y[t])
        >>> y = torch.tensor([2.0, 0.0, 1.0])
        >>> whitened = whiten(model, ["x"])
        >>> trace = pyro.poutine.trace(whitened).get_trace(y)
        >>> trace.stochastic_nodes
        ['scale', 'x_0_white']
        >>> mcmc = MCMC(NUTS(whitened), num_samples=100, warmup_steps=100)
    """
    return WhitenedModel(model, sites)


class WhitenedModel:
    """A Pyro model in which a path is a map of white noise; made by :func:`whiten`."""

    def __init__(self, model: Model, sites: Sequence[str]) -> None:
        if isinstance(sites, str) or not list(sites):
            raise ValueError(f"`sites` is {sites!r}: expected a list of names of a path's sites")
        self.model = model
        self.sites = tuple(dict.fromkeys(sites))
        self._fit: WhiteningFit | None = None
        self._seen: list[tuple[Any, int | None]] = []
        self._observed: dict[str, Tensor] = {}
        self._is_held = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; its sites are fitted first, if they are not yet."""
        fit = self.fit(*args, **kwargs)
        before = values_before(fit.prior.layout.names, self.model, *args, **kwargs)
        path = self._draw(fit, before)
        with WithPath(path, before):
            return self.model(*args, **kwargs)

    def _draw(self, fit: WhiteningFit, before: Mapping[str, Any]) -> dict[str, Tensor]:
        """The path's values, given those of all sites before it."""
        others, layout = fit.prior.others, fit.prior.layout
        parameters = {name: before[name] for name in before if name in others}
        for name, value in parameters.items():
            if value.shape != others[name].shape:
                raise ValueError(
                    f"site '{name}' has shape {tuple(value.shape)}, and had "
                    f"{tuple(others[name].shape)} where its path was fitted: expected runs of a "
                    "whitened model one by one, without plates around it"
                )
        noise = _PathNoise(fit, parameters)
        z = pyro.sample(f"{layout.names[0]}_white", noise)
        if z.shape != noise.event_shape:
            raise ValueError(
                f"the noise of the path {list(self.sites)} has shape {tuple(z.shape)}: expected "
                f"{tuple(noise.event_shape)}, from a run with a path of the same length"
            )
        return layout.values(noise.path.forward(z))

    def fit(self, *args: Any, **kwargs: Any) -> WhiteningFit:
        """Fits the sites to the model's data, unless they are fitted to these already.

        Without data, as when these are to be predicted, the sites are those of the last.
        """
        if self._fit is not None:
            self._fit.split.restore()
            if self._is_held:
                return self._fit
        data, before = Arguments(args, kwargs), self._fit
        leaves = tree_leaves(data)
        seen = [(leaf, getattr(leaf, "_version", None)) for leaf in leaves]
        same = len(seen) == len(self._seen) and all(
            old[0] is new[0] and old[1] == new[1] for old, new in zip(self._seen, seen, strict=True)
        )
        if before is None or not (same or self._is_fitted(data, before)):
            with random_state_kept(), poutine.block(), torch.enable_grad():
                torch.manual_seed(0)
                before = self._fit = fit_whitening(self.model, data, self.sites)
                self._observed = _observed(self._look(data))
        self._seen = seen
        return before

    def _look(self, data: Arguments) -> poutine.Trace:
        return plain_run(self.model, data.args, data.kwargs)

    def _is_fitted(self, data: Arguments, fit: WhiteningFit) -> bool:
        """Whether a fit's path is that of these data, and fitted to them where there are any."""
        trace = self._look(data)
        now = _observed(trace)
        for name in fit.prior.layout.names:
            if (
                name not in trace
                or trace.nodes[name]["value"].shape != fit.prior.others[name].shape
            ):
                return False
        return not now or (
            now.keys() == self._observed.keys()
            and all(torch.equal(value, self._observed[name]) for name, value in now.items())
        )

    def holding(self, *args: Any, **kwargs: Any) -> Callable[[], AbstractContextManager[None]]:
        """What holds the model to the sites that it has for these arguments."""
        return partial(self._hold, self.fit(*args, **kwargs))

    def starts(self, num_chains: int) -> list[dict[str, Tensor]]:
        """Values of parameters and noise for chains to start from, spread as their posterior is."""
        if self._fit is None:
            raise RuntimeError("the model has not been run: call it with its data first")
        name, example = f"{self._fit.prior.layout.names[0]}_white", self._fit.u
        places = [self._fit.starts[chain % len(self._fit.starts)] for chain in range(num_chains)]
        return [place | {name: torch.randn_like(example)} for place in places]

    @property
    def other_modes(self) -> tuple[float, ...]:
        """How high modes are beside that near which chains start, as ratios of densities."""
        return () if self._fit is None else self._fit.other_modes

    @contextmanager
    def _hold(self, fit: WhiteningFit) -> Iterator[None]:
        before = self._is_held, self._fit
        self._is_held, self._fit = True, fit
        try:
            yield
        finally:
            self._is_held, self._fit = before

    def __getstate__(self) -> dict[str, Any]:
        """The data are looked at again in another process."""
        return self.__dict__ | {"_seen": []}

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        return f"whiten({name}, {list(self.sites)})"


class _PathNoise(TorchDistribution):
    """The prior of a path as the distribution of its noise, given parameters."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, fit: WhiteningFit, parameters: dict[str, Tensor]) -> None:
        self.fit, self.parameters = fit, parameters
        self.path = fit.map(parameters)
        super().__init__(event_shape=fit.u.shape, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if sample_shape:
            raise ValueError(f"`sample_shape` is {tuple(sample_shape)}: expected one draw")
        with torch.no_grad():
            return self.path.inverse(self.fit.prior.draw(self.parameters))

    def log_prob(self, value: Tensor) -> Tensor:
        return log_prob_of(self.fit.prior, self.path, value, self.parameters)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> TorchDistribution:
        if tuple(batch_shape):
            raise ValueError(
                f"a whitened model runs inside plates of sizes {tuple(batch_shape)}: expected "
                "runs one by one"
            )
        return self


def _observed(trace: poutine.Trace) -> dict[str, Tensor]:
    """The data of a model."""
    nodes = trace.nodes.items()
    given = {n: s["value"] for n, s in nodes if s["type"] == "sample" and s["is_observed"]}
    return {n: value for n, value in given.items() if isinstance(value, Tensor)}
