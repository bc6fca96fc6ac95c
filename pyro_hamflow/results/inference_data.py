"""What a run found, as ArviZ InferenceData.

One builder makes plain xarray datasets, a group each; the last step wraps them as ``InferenceData``
for ArviZ 0.x or as xarray's ``DataTree`` for ArviZ 1.x.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import arviz
import numpy as np
import pyro
import torch
import xarray
from torch import Tensor

from pyro_hamflow.mcmc.hamiltonian_kernel import HamiltonianKernel
from pyro_hamflow.mcmc.record import Draws
from pyro_hamflow.model.capture import Program, batch, capture, loop
from pyro_hamflow.model.marginal import MarginalModel
from pyro_hamflow.model.structure import (
    depth_of,
    is_deterministic,
    is_latent,
    log_density,
    plate_shape,
    run_with,
    vectorized_frames,
)
from pyro_hamflow.model.validation import no_validation
from pyro_hamflow.results.importance import ImportanceSamples

Groups = dict[str, xarray.Dataset]
_CHUNK = 250


def to_inference_data(
    result: Any,
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    log_likelihood: bool = True,
    prior: Mapping[str, Tensor] | None = None,
    posterior_predictive: Mapping[str, Tensor] | None = None,
) -> Any:
    """Turns a run into ArviZ InferenceData, or a DataTree where ArviZ is 1.0 or later.

    Groups: ``posterior`` (sites in their supports, deterministic sites, and local sites that were
    integrated out, recovered), ``sample_stats``, ``log_likelihood``, ``observed_data``; those of
    the warm-up if it was saved. Plates become dimensions of their names.

    For a marginalised model ``log_likelihood`` holds one estimate for each independent element, so
    that leave-one-out cross-validation leaves out elements of the plates around the local sites,
    such as subjects. Under the extended target the mean of the inverse of such an estimate is the
    inverse likelihood's mean, which is all that importance-weighted leave-one-out needs.

    Weighted draws of :func:`~pyro_hamflow.importance_sample` become draws of equal weight, as many
    as they are effectively worth, picked at random; ``sample_stats`` keeps their log weights, and
    the attributes the evidence and Pareto's k.

    Arguments:
        result: A :class:`pyro_hamflow.MCMC` after its run, a :class:`pyro.infer.MCMC` after a run
            of one of this package's kernels, or what :func:`~pyro_hamflow.importance_sample`
            returns.
        coords: Coordinate values of dimensions, plates for instance.
        dims: Names for the dimensions of a site that are no plates, in order.
        log_likelihood: Whether to include that group.
        prior: Draws from the prior, draws first, for the group ``prior``.
        posterior_predictive: Predicted data, all draws of all chains first, for the group
            ``posterior_predictive``.

    Returns:
        The data; ``to_netcdf`` of it writes a file.

    Raises:
        TypeError: If the result is of no such kind.
        ValueError: If there are no draws, or draws of predicted data do not match them in number.

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
    groups, attributes = build_groups(
        result,
        coords=coords,
        dims=dims,
        log_likelihood=log_likelihood,
        prior=prior,
        posterior_predictive=posterior_predictive,
    )
    if int(arviz.__version__.split(".")[0]) >= 1:
        return to_datatree(groups, attributes)
    data = arviz.InferenceData(attrs=attributes)
    data.add_groups(groups, warn_on_custom_groups=False)
    return data


def to_datatree(groups: Groups, attributes: Mapping[str, Any]) -> xarray.DataTree:
    """Wraps groups as ArviZ 1.x wants them."""
    tree = xarray.DataTree.from_dict(dict(groups))
    tree.attrs.update(attributes)
    return tree


def build_groups(
    result: Any,
    *,
    coords: Mapping[str, Sequence[Any]] | None,
    dims: Mapping[str, Sequence[str]] | None,
    log_likelihood: bool,
    prior: Mapping[str, Tensor] | None,
    posterior_predictive: Mapping[str, Tensor] | None,
) -> tuple[Groups, dict[str, Any]]:
    """The groups of :func:`to_inference_data` as datasets, and the attributes of the whole."""
    run = _Run(result)
    model = _Model(run.kernel, dims or {}, coords or {})
    groups: Groups = {}
    for prefix, draws in (("", run.draws), ("warmup_", run.warmup_draws)):
        if draws is None:
            continue
        values, densities = model.observe(draws, pointwise=log_likelihood)
        groups[f"{prefix}posterior"] = model.dataset(values)
        groups[f"{prefix}sample_stats"] = _stats(draws)
        if log_likelihood and densities:
            groups[f"{prefix}log_likelihood"] = model.dataset(densities)
    groups["observed_data"] = model.observed_data()
    if prior is not None:
        groups["prior"] = model.dataset({name: _lead(value) for name, value in prior.items()})
    if posterior_predictive is not None:
        shape = tuple(run.draws.position.shape[:2])
        predicted = {}
        for name, value in posterior_predictive.items():
            if value.shape[0] != shape[0] * shape[1]:
                raise ValueError(
                    f"`posterior_predictive` of site '{name}' has {value.shape[0]} draws: "
                    f"expected {shape[0] * shape[1]}, all draws of all chains"
                )
            predicted[name] = value.detach().cpu().reshape(shape + tuple(value.shape[1:]))
        groups["posterior_predictive"] = model.dataset(predicted)
    attributes = _attributes(run)
    for name in ("posterior", "sample_stats"):
        groups[name].attrs.update(attributes)
    return groups, attributes


class _Run:
    """The draws of a run, whoever ran it."""

    kernel: Any
    warmup_draws: Draws | None = None
    sampling_time: float | None = None
    seed: int | None = None

    def __init__(self, result: Any) -> None:
        if isinstance(result, ImportanceSamples):
            self.kernel, self.tuning_steps = result, 0
            self.draws = _picked(result)
            return
        kernel = getattr(result, "kernel", None)
        if not isinstance(kernel, HamiltonianKernel):
            raise TypeError(
                f"the result is a {type(result).__name__} without a kernel of pyro_hamflow: "
                "expected an MCMC object that ran one"
            )
        self.kernel = kernel
        self.tuning_steps = result.warmup_steps
        if hasattr(result, "draws"):
            self.draws = result.draws
            self.warmup_draws = result.warmup_draws
            self.sampling_time = result.sampling_time
            self.seed = result.seed
        else:  # Pyro's runner
            records = [part["record"] for part in result._diagnostics if part is not None]
            if not records:
                raise ValueError("there are no draws yet: call `run` first")
            self.draws = Draws.join([record.stacked() for record in records])
        self.kernel.prepare(result._args, result._kwargs)


def _picked(result: ImportanceSamples) -> Draws:
    """Draws of equal weight, as many as the weighted ones are worth."""
    picked = result.pick(max(1, int(result.ess)))

    def one_chain(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _lead(part[picked]) for name, part in parts.items()}

    stats = one_chain({"log_weight": result.log_weights})
    position = _lead(result.position[picked])
    return Draws(position, stats, one_chain(result.local), one_chain(result.log_likelihood))


class _Model:
    """The names and shapes of a model's sites, and what can be computed from draws of them."""

    def __init__(
        self,
        kernel: Any,
        dims: Mapping[str, Sequence[str]],
        coords: Mapping[str, Sequence[Any]],
    ) -> None:
        self.potential = kernel.potential
        self.marginal = kernel.model if isinstance(kernel.model, MarginalModel) else None
        self.separate_noise = kernel.separate_noise
        self.model = self.marginal.model if self.marginal else self.potential.model
        self.args, self.kwargs = self.potential.args, self.potential.kwargs
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.trace = run_with(self.model, lambda msg: None, *self.args, **self.kwargs)
        self.dims, self.coords = dims, dict(coords)

    def observe(
        self, draws: Draws, *, pointwise: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sites' values, and log-likelihoods, at all draws."""
        values = dict(self.potential.constrain(draws.position.to(self.potential.example.device)))
        values |= draws.local
        hidden = {site.name for site in self.potential.noise_sites}
        values = {name: value.detach().cpu() for name, value in values.items()}
        values = {name: value for name, value in values.items() if name not in hidden}
        names = [n for n, s in self.trace.nodes.items() if s["type"] == "sample"]
        deterministic = [n for n in names if is_deterministic(self.trace.nodes[n])]
        known = all(n in values for n in names if is_latent(self.trace.nodes[n]))
        observed = [
            name
            for name in names
            if self.trace.nodes[name]["is_observed"] and name not in deterministic
        ]
        densities = {}
        for group in self._groups():
            if group.name in draws.log_likelihood:
                part = draws.log_likelihood[group.name]
                name = "_".join(group.terms) or group.name
                shape = list(group.shape)
                if name in self.trace.nodes:  # plates inside the group's are summed over
                    frames = vectorized_frames(self.trace.nodes[name])
                    shape = plate_shape(group.frames, depth_of(frames))
                densities[name] = part.reshape([*part.shape[:2], *shape])
                observed = [name for name in observed if name not in group.terms]
        wanted = (deterministic, observed if pointwise and self._plain() else [])
        if known and any(wanted):
            extra = self._compute(values, *wanted)
            values |= {name: extra[name] for name in deterministic}
            densities |= {name: extra[name] for name in wanted[1]}
        return values, densities

    def _plain(self) -> bool:
        """Whether nothing is summed over, so that densities given all sites are the model's."""
        latent = [s for s in self.trace.nodes.values() if is_latent(s)]
        return not any(getattr(s["fn"], "has_enumerate_support", False) for s in latent)

    def _groups(self) -> Sequence[Any]:
        if self.marginal is None:
            return ()
        return self.marginal.plan(*self.args, **self.kwargs).structure.groups

    def _compute(
        self, values: dict[str, Tensor], deterministic: list[str], observed: list[str]
    ) -> dict[str, Tensor]:
        """Runs the model at every draw, captured once; in Python where that fails."""
        names = [name for name in values if name in self.trace.nodes]
        device = self.potential.example.device

        def once(*parts: Tensor) -> tuple[Tensor, ...]:
            known = dict(zip(names, parts, strict=True))
            run = run_with(
                self.model, lambda msg: known.get(msg["name"]), *self.args, **self.kwargs
            )
            with no_validation():
                densities = [log_density(run.nodes[name]) for name in observed]
            return *[run.nodes[name]["value"] for name in deterministic], *densities

        lead = next(iter(values.values())).shape[:2]
        flat = [values[name].flatten(0, 1).to(device) for name in names]
        chunk = min(_CHUNK, len(flat[0]))
        try:
            with torch.no_grad():
                graph = capture(once, *[part[0] for part in flat])
                program: Program = batch(graph, *[part[:chunk] for part in flat])
        except Exception:  # whatever a model's own code may raise while it is traced
            program = loop(once)

        pieces: list[Any] = []
        with torch.no_grad():
            for start in range(0, len(flat[0]), chunk):
                begin = min(start, len(flat[0]) - chunk)  # the last chunk overlaps its predecessor
                parts = program(*[part[begin : begin + chunk] for part in flat])
                pieces.append([part[start - begin :].cpu() for part in parts])
        joined = [torch.cat(part) for part in zip(*pieces, strict=True)]
        return {
            name: part.reshape(lead + part.shape[1:])
            for name, part in zip(deterministic + observed, joined, strict=True)
        }

    def dataset(self, values: Mapping[str, Tensor]) -> xarray.Dataset:
        """Values of shape ``(chains, draws, *)``, dimensions named."""
        return self._dataset(values, ("chain", "draw"))

    def observed_data(self) -> xarray.Dataset:
        """The data."""
        values = {
            name: site["value"]
            for name, site in self.trace.nodes.items()
            if site["type"] == "sample" and site["is_observed"] and not is_deterministic(site)
            if isinstance(site["value"], Tensor) and "_log_likelihood" not in name
        }
        return self._dataset(values, ())

    def _dataset(self, values: Mapping[str, Tensor], lead: tuple[str, ...]) -> xarray.Dataset:
        arrays = {}
        for name, value in values.items():
            array, names = self._named(name, value.detach().cpu().numpy(), len(lead))
            sizes = dict(zip(lead + names, array.shape, strict=True))
            coords = {
                dim: np.asarray(self.coords.get(dim, np.arange(size)))
                for dim, size in sizes.items()
            }
            for dim, size in sizes.items():
                if len(coords[dim]) != size:
                    raise ValueError(
                        f"`coords` of dimension '{dim}' has {len(coords[dim])} values: expected "
                        f"{size}, as site '{name}' has"
                    )
            arrays[name] = xarray.DataArray(array, coords, lead + names)
        return xarray.Dataset(arrays)

    def _named(self, name: str, array: np.ndarray, lead: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """Drops plate dimensions of size one that stand for no plate, and names the others."""
        frames, event_dim = self._frames(name)
        shape = array.shape[lead:]
        if event_dim is None:
            batch_dim, frames_by_dim = len(frames), {i: f for i, f in enumerate(frames)}
            if batch_dim != len(shape):
                batch_dim, frames_by_dim = 0, {}
        else:
            batch_dim = max(0, len(shape) - event_dim)
            frames_by_dim = {batch_dim + frame.dim: frame for frame in frames}
        names: list[str] = []
        kept: list[int] = list(array.shape[:lead])
        given = list(self.dims.get(name, ()))
        for i, size in enumerate(shape):
            frame = frames_by_dim.get(i)
            if frame is not None and frame.size == size:
                names.append(frame.name)
            elif i < batch_dim and size == 1:
                continue
            else:
                names.append(given.pop(0) if given else f"{name}_dim_{i - batch_dim}")
            kept.append(size)
        taken = {name} & set(names)
        return array.reshape(kept), tuple(f"{n}_dim" if n in taken else n for n in names)

    def _frames(self, name: str) -> tuple[Any, int | None]:
        for group in self._groups():
            if name == ("_".join(group.terms) or group.name) and name not in self.trace.nodes:
                return group.frames, None
        if name not in self.trace.nodes:
            return (), 0
        site = self.trace.nodes[name]
        frames, event_dim = vectorized_frames(site), site["fn"].event_dim
        if is_deterministic(site) and frames:
            # Pyro counts all dimensions of a deterministic site as its event's: find the plates.
            shape = site["value"].shape
            for right in range(len(shape)):
                batch = shape[: len(shape) - right]
                if all(-f.dim <= len(batch) and batch[f.dim] == f.size for f in frames):
                    return frames, right
        return frames, event_dim


def _stats(draws: Draws) -> xarray.Dataset:
    arrays = {name: (("chain", "draw"), value.numpy()) for name, value in draws.stats.items()}
    chains, length = draws.position.shape[:2]
    coords = {"chain": np.arange(chains), "draw": np.arange(length)}
    return xarray.Dataset(arrays, coords)


def _attributes(run: _Run) -> dict[str, Any]:
    import pyro_hamflow

    attributes: dict[str, Any] = {
        "inference_library": "pyro_hamflow",
        "inference_library_version": pyro_hamflow.__version__,
        "torch_version": str(torch.__version__),
        "pyro_version": str(pyro.__version__),
        "tuning_steps": run.tuning_steps,
        "kernel_settings": json.dumps(run.kernel.settings),
    }
    if isinstance(run.kernel, ImportanceSamples):
        for name in ("log_evidence", "log_evidence_error", "pareto_k", "ess"):
            attributes[name] = float(getattr(run.kernel, name))
    if run.sampling_time is not None:
        attributes["sampling_time"] = run.sampling_time
    if run.seed is not None:
        attributes["seed"] = run.seed
    return attributes


def _lead(value: Tensor) -> Tensor:
    return value.detach().cpu()[None]
