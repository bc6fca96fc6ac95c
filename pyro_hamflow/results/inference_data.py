"""What a run found, as ArviZ InferenceData.

One builder makes plain xarray datasets, a group each; the last step wraps them as ``InferenceData``
for ArviZ 0.x or as xarray's ``DataTree`` for ArviZ 1.x.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_hamflow import arviz_bridge
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.structure import sites_named
from pyro_hamflow.marginal.whiten import WhitenedModel
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.model.trace import is_computed, is_latent, run_with, vectorized_frames
from pyro_hamflow.process import random_state_kept, undisturbed
from pyro_hamflow.results.datasets import Array, Datasets, array_of, to_numpy
from pyro_hamflow.results.deterministic import deterministic_values
from pyro_hamflow.results.given_draws import by_chain, of_one_chain
from pyro_hamflow.results.loops import find_loops, stacked
from pyro_hamflow.results.names import Names
from pyro_hamflow.results.pointwise import Pointwise, pointwise
from pyro_hamflow.results.run import Run
from pyro_hamflow.results.stored import stored_groups

if TYPE_CHECKING:
    import xarray

Groups = dict[str, "xarray.Dataset"]


def to_inference_data(
    result: Any,
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    log_likelihood: bool = True,
    prior: Mapping[str, Tensor] | None = None,
    posterior_predictive: Mapping[str, Tensor] | None = None,
) -> Any:
    """Turns a run into ArviZ InferenceData, or a DataTree where ArviZ is 1.0 or later.

    Groups: ``posterior`` (sites in their supports, deterministic sites, and local sites that were
    integrated out, recovered), ``sample_stats``, ``log_likelihood`` and ``observed_data``; the
    first two of the warm-up as well, if it was saved. Discrete sites that were summed out are in no
    group; a warning tells of deterministic sites that depend on them, and of all else that cannot
    be given.

    ``log_likelihood`` has an entry for each observation, given all continuous sites of the
    posterior. Where local sites are integrated out, it has one for each element of the plates
    around them, so that leave-one-out cross-validation leaves out subjects, say; rows of long data
    that no local site enters keep their site's name, along a dimension ``SITE_dim_0`` of their
    numbers, and the elements are called after the local sites as well; and where discrete
    sites are summed out, one for each element of the plates around these. Estimated likelihoods are
    estimated anew, from noise that the chain has not seen: those that it has accepted
    (``log_likelihood_estimate`` in ``sample_stats``) are too high for having been accepted. They
    are averaged over more points, placed where the element's own are found to matter, and 1,024 at
    most, where the standard error of an element is not below 0.05, as a root mean square over the
    draws; the attribute ``log_likelihood_error`` is the largest, ``log_likelihood_points`` the mean
    number of points.

    Names: a site keeps its name, and the dimension of a plate the plate's. Slashes become dots. A
    site called ``chain``, ``draw`` or ``sample`` comes out as ``chain_site`` and so on; a dimension
    called so, or like a site, or as ArviZ calls dimensions of its own (``hdi``, ``metric``,
    ``variable``, ``label``, ``summary``, ``ci_bound``, ``__sample__``) ends in ``_dim``. Dimensions
    without a plate are called as ``dims`` says, or ``SITE_dim_0``, ``SITE_dim_1`` and so on,
    counted from the left among those of the site that are no plates, event dimensions included. A
    name that is still taken gets its ending once more.

    Sites of a loop, ``x_1``, ``x_2`` and so on, are one variable ``x`` with a dimension ``x_time``,
    whose coordinates are the numbers: where each depends on the one before it, or belongs to such a
    path as its data do, there are three or more, no number is missing, all are latent, observed or
    deterministic alike, in the same plates and of the same shape, and no site is called ``x``.
    Numbered sites that are no path, such as coefficients of a regression, keep their names. The
    dimension comes after the plates and counts as the first of the others, so that
    ``dims={"x": ["day"]}`` names it; where ``dims`` names ``x_1`` itself, sites stay apart. A run's
    ``get_samples`` and a checkpoint have them by their own names.

    Weighted draws of :func:`~pyro_hamflow.importance_sample` and of a
    :class:`~pyro_hamflow.AnnealedSampler` become draws of equal weight, as many as their weights
    are worth: of the former one chain, picked at random; of the latter each part of the population
    is one, in which draws that descend from the same follow each other, so that ArviZ sees how
    alike they are. ``sample_stats`` keeps their log weights, and the attributes the evidence and,
    of the former, Pareto's k.

    Arguments:
        result: The path of a checkpoint (``MCMC(..., checkpoint=...)``), whose draws are then read
            when they are asked for: sites in their supports and on the real line, and
            ``sample_stats``, without what needs the model. Or a :class:`pyro_hamflow.MCMC` after
            its run, a :class:`pyro.infer.MCMC` after a run of one of this package's kernels, what
            :func:`~pyro_hamflow.importance_sample` returns, or a
            :class:`pyro_hamflow.AnnealedSampler` after its run.
        coords: Coordinate values of dimensions, under the name of the plate or of the result.
        dims: Names for the dimensions of a site that are no plates, in order.
        log_likelihood: Whether to include that group, which takes time where likelihoods are
            estimated.
        prior: Draws from the prior, draws first, for the group ``prior``.
        posterior_predictive: Predicted data, all draws of all chains first, for the group
            ``posterior_predictive``.

    Returns:
        The data; ``to_netcdf`` of it writes a file.

    Raises:
        TypeError: If the result is of no such kind.
        ValueError: If there are no draws, draws of predicted data do not match them in number, or
            ``dims`` and ``coords`` do not fit the sites' shapes or name what there is not.

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("day", 3):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> mcmc = MCMC(HMC(model), num_samples=100, num_chains=2, disable_progbar=True)
        >>> mcmc.run(torch.ones(3))
        >>> dict(to_inference_data(mcmc).log_likelihood.sizes)
        {'chain': 2, 'draw': 100, 'day': 3}
    """
    given: dict[str, Any] = {"coords": coords, "dims": dims}
    given |= {"prior": prior, "posterior_predictive": posterior_predictive}
    if isinstance(result, str | os.PathLike):
        for name, part in given.items():
            if part is not None:
                raise ValueError(f"`{name}` is given with a path: expected a run")
        groups, attributes = stored_groups(result)
    else:
        with undisturbed():
            groups, attributes = build_groups(result, log_likelihood=log_likelihood, **given)
    if arviz_bridge.has_trees():
        return to_datatree(groups, attributes)
    return arviz_bridge.inference_data(groups, attributes)


def to_datatree(groups: Groups, attributes: Mapping[str, Any]) -> xarray.DataTree:
    """Wraps groups as ArviZ 1.x wants them."""
    import xarray  # imports pandas

    tree = xarray.DataTree.from_dict(dict(groups))
    tree.attrs.update(attributes)
    return tree


def build_groups(
    result: Any,
    *,
    coords: Mapping[str, Sequence[Any]] | None,
    dims: Mapping[str, Sequence[str | None]] | None,
    log_likelihood: bool,
    prior: Mapping[str, Tensor] | None,
    posterior_predictive: Mapping[str, Tensor] | None,
) -> tuple[Groups, dict[str, Any]]:
    """The groups of :func:`to_inference_data` as datasets, and the attributes of the whole."""
    run = Run(result)
    attributes = run.attributes()
    model = _Model(run.kernel, apart=dims or {})
    datasets = Datasets(model.names, dims or {}, coords or {})
    groups: Groups = {}
    for prefix, draws in (("", run.draws), ("warmup_", run.warmup_draws)):
        if draws is not None:
            groups[f"{prefix}posterior"] = datasets.make(model.posterior(draws), drawn=True)
            groups[f"{prefix}sample_stats"] = _stats(draws)
    if log_likelihood:
        found = model.log_likelihood(run.draws, run.seed)
        if found.terms:
            groups["log_likelihood"] = datasets.make(model.densities(found), drawn=True)
            if found.error is not None:
                own = {"log_likelihood_error": found.error, "log_likelihood_points": found.points}
                groups["log_likelihood"].attrs.update(own)
    groups["observed_data"] = datasets.make(model.observed(), drawn=False)
    if prior is not None:
        values = of_one_chain(prior)
        groups["prior"] = datasets.make(model.arrays(values), drawn=True)
    if posterior_predictive is not None:
        values = by_chain(posterior_predictive, run.draws.position.shape[:2])
        groups["posterior_predictive"] = datasets.make(model.arrays(values), drawn=True)
    datasets.refuse_unknown()
    for note in model.notes:
        warnings.warn(note, RuntimeWarning, stacklevel=3)
    if model.notes:
        attributes["notes"] = " ".join(model.notes)
    for name in ("posterior", "sample_stats"):
        groups[name].attrs.update(attributes)
    return groups, attributes


class _Model:
    """A model's sites, and what can be computed from draws of them.

    Arguments:
        kernel: What was run.
        apart: Sites that are not to be joined with others of a loop.

    Attributes:
        names: Under which names they come out.
        notes: What the user should know, a sentence each.
    """

    def __init__(self, kernel: Any, apart: Collection[str]) -> None:
        self.potential, self.sampled = kernel.potential, kernel.model
        marginal = isinstance(self.sampled, MarginalModel)
        self.model = self.sampled.model if marginal else self.sampled
        args, kwargs = self.potential.args, self.potential.kwargs
        with random_state_kept():
            torch.manual_seed(0)
            self.trace = run_with(self.model, lambda msg: None, *args, **kwargs)
        self.nodes = {
            name: site
            for name, site in (self.potential.plain_trace.nodes | self.trace.nodes).items()
            if site["type"] == "sample" and (site["is_observed"] or is_latent(site))
        }
        written = self.model
        while isinstance(written, MarginalModel | WhitenedModel):
            written = written.model
        with random_state_kept():
            self._loops = find_loops(self.nodes, apart, lambda: written(*args, **kwargs))
        frames = {frame.name: frame for n in self.nodes.values() for frame in vectorized_frames(n)}
        joined = {site: loop.stem for loop in self._loops for site in loop.sites}
        self.names = Names([joined.get(name, name) for name in self.nodes], frames)
        self.notes: list[str] = []

    def posterior(self, draws: Draws) -> list[Array]:
        """Latent sites, recovered ones included, and deterministic ones."""
        values = dict(self.potential.constrain(draws.position.to(self.potential.example.device)))
        values |= draws.local
        found = deterministic_values(self.potential, self.model, self.trace, draws.position, values)
        integrated = self.sampled.sites if isinstance(self.sampled, MarginalModel) else ()
        local = [site for name in integrated for site in sites_named(name, self.nodes)]
        lost = [name for name in local if name not in values] + found.missing
        if lost:
            self._note(
                f"The posterior lacks {lost}: what was integrated out and not recovered, and what "
                "follows from it or from discrete sites that were summed out, or changes its shape "
                "from draw to draw."
            )
        if found.failures:
            self._note(
                f"The model raised an error at {found.failures} draws; deterministic sites are NaN."
            )
        return self.arrays(values | found.values)

    def log_likelihood(self, draws: Draws, seed: int | None) -> Pointwise:
        """The log-likelihood of each observation, or of what is independent."""
        found = pointwise(self.potential, self.sampled, draws.position, seed)
        for note in found.notes:
            self._note(note)
        return found

    def densities(self, found: Pointwise) -> list[Array]:
        """Log-likelihoods under the names of what was observed."""
        arrays = []
        for term, value in zip(found.terms, found.values, strict=True):
            labels = tuple(n for n in term.labels if not is_computed(self.nodes[n]))
            arrays.append(Array(labels, value.cpu(), term.frames, 0, True, term.entries))
        return stacked(arrays, self._loops)

    def observed(self) -> list[Array]:
        """The data, as many as there are densities of; factors have none."""
        arrays = []
        for name, node in self.trace.nodes.items():
            if name not in self.nodes or not node["is_observed"] or is_computed(node):
                continue
            value, shape = torch.as_tensor(node["value"]), node["fn"].shape()
            if 0 not in node["fn"].event_shape:
                value = value.expand(torch.broadcast_shapes(value.shape, shape))
                arrays.append(array_of(name, value, node, 0))
        return stacked(arrays, self._loops)

    def arrays(self, values: Mapping[str, Any]) -> list[Array]:
        """Values of sites, chains and draws first."""
        arrays = [array_of(name, v, self.nodes.get(name), 2) for name, v in values.items()]
        return stacked(arrays, self._loops)

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def _stats(draws: Draws) -> xarray.Dataset:
    import xarray  # imports pandas

    arrays = {name: (("chain", "draw"), to_numpy(value)) for name, value in draws.stats.items()}
    chains, length = draws.position.shape[:2]
    return xarray.Dataset(arrays, {"chain": range(chains), "draw": range(length)})
