"""Models whose local latent variables are integrated out by an unbiased estimate.

:func:`marginalize` takes a Pyro model and returns another one. In place of the local sites it has
one noise site, and in place of the likelihood terms that depend on them the logarithm of an
importance-sampling estimate, which is a smooth function of parameters and noise. The estimate is
unbiased, and the noise is part of the state: whatever leaves the joint density of parameters and
noise invariant samples the exact posterior of the parameters, for any number of particles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hamflow.marginal.hidden_sites import HideLocalSites, InPlates
from pyro_hamflow.marginal.points import POINTS
from pyro_hamflow.marginal.preparation import prepare
from pyro_hamflow.marginal.proposals.base import Proposal
from pyro_hamflow.marginal.proposals.choice import AUTO, proposal_of
from pyro_hamflow.marginal.tuned_estimator import Prepared, TunedEstimator
from pyro_hamflow.model.kinds import Args, Arguments, Kwargs, Model


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
    proposal: str | Proposal | Callable[..., Any] = "auto",
    points: str = "iid",
    follow: str = "auto",
) -> MarginalModel:
    r"""Integrates local latent sites out of a model by an unbiased likelihood estimate.

    Let :math:`x_t` be the local sites at one element :math:`t` of the plates around them. Its share
    of the likelihood is estimated from N particles,

    .. math:: \hat p(y_t \mid \theta, u_t) = \frac1N \sum_{i=1}^N
        \frac{p(x_t^i \mid \theta)}{q(x_t^i)} \, p(y_t \mid x_t^i, \theta),
        \quad x_t^i = g_\theta(u_t^i), \; u_t^i \sim N(0, I),

    which is unbiased for every N. Terms in plates inside those of the local sites are multiplied
    into it; sites in the same plates are integrated together; sites in no plate form one estimate.

    What has many numbers in one estimate is taken for a latent *path*: a loop of sites ``x_0``,
    ``x_1`` and so on (``sites=["x"]`` names them all), one vector, or the elements of a long plate
    that depend on each other, as steps do that a model sums up. Particles are whole paths then,
    from a Gaussian approximation of the path's posterior that follows the parameters, in time and
    memory proportional to the length where each state meets a few before it; a path in plates is
    one estimate for each of their elements. Where all is Gaussian, one particle is exact. Particle
    filters are no alternative here: their estimates are no smooth functions of the parameters.
    Where the estimate of a long path varies too much for its noise to be renewed at once,
    :class:`~pyro_hamflow.StretchRefresh` renews it stretch by stretch.

    Arguments:
        model: A Pyro model.
        sites: Names of the local latent sites.
        num_particles: N, the number of particles of each element; components of a mixture prior
            share them. With ``"laplace"`` one of each component's, and every eighth, is drawn from
            the prior, but none where a component has only one. If N is not given, it is 32, for
            ``"prior"`` up to 512 once warm-up finds that the estimate varies much, and for
            ``"laplace"`` as many of 2, 4, 8 or 16 (of paths, one may do) as bring the variance of
            the log estimate to one where the proposal is fitted (to three for a path under a
            kernel, whose noise moves with the parameters); at least two for each component, or one
            with ``"prior"``. See :func:`~pyro_hamflow.estimator_quality`.
        proposal: ``"prior"`` draws particles from the prior; ``"laplace"`` from the prior times a
            Gaussian approximation of the likelihood, fitted before sampling, and a few from the
            prior itself, so that no weight exceeds the likelihood a hundredfold; a function
            ``(parameters, *model_args)`` from the sites that it samples as a Pyro program; a
            :class:`~pyro_hamflow.marginal.proposals.base.Proposal` from where that says; ``"auto"``
            takes ``"laplace"``, for priors that are no Gaussians in their normal scores,
            with several modes for each element where one misses something, and ``"prior"`` where
            these do.
        points: ``"iid"`` for independent particles, ``"antithetic"`` for pairs of opposite noise,
            which suit paths, ``"rqmc"`` for a randomly shifted lattice, which suits a few numbers.
        follow: How the Gaussian approximation of a path follows the parameters, from what costs
            least to what serves furthest: ``"prior"`` holds that of the likelihood as it was at the
            pilot, under each value's own prior; ``"linear"`` takes it where the path's mode moves
            to first order; ``"newton"`` a differentiable Newton step from there, which moves the
            mode itself. Warm-up still fits it anew at its own draws. ``"auto"`` begins with the
            first that does for the likelihood's form, and goes on in warm-up where estimates vary
            too much at draws and beyond them, to that by which chains take the least time. Kinks
            take ``"linear"`` at least; where all is Gaussian, each is exact.

    Returns:
        The marginal model, a Pyro model with the same arguments. Names in it: for local site
        ``x``, the noise is ``x_noise`` and the estimate ``x_log_likelihood``.

    Raises:
        ValueError: If an argument is none of the above; faults of the sites, and another `follow`
            than ``"auto"`` for sites that are no path, are found when the model is first run, and
            raise a ValueError that names the site.

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
    return MarginalModel(model, sites, num_particles, proposal, points, follow)


class MarginalModel(TunedEstimator):
    """A Pyro model in which local sites are integrated out; made by :func:`marginalize`."""

    def __init__(
        self,
        model: Model,
        sites: Sequence[str],
        num_particles: int | None,
        proposal: str | Proposal | Callable[..., Any],
        points: str,
        follow: str = AUTO,
    ) -> None:
        if isinstance(sites, str) or not list(sites):
            raise ValueError(f"`sites` is {sites!r}: expected a list of names of local sites")
        if isinstance(num_particles, bool) or not isinstance(num_particles, int | None):
            raise TypeError(f"`num_particles` is {num_particles!r}: expected an integer")
        if num_particles is not None and num_particles < 1:
            raise ValueError(f"`num_particles` is {num_particles}: expected 1 or more")
        given = proposal_of(proposal, follow)
        if points not in POINTS:
            expected = ", ".join(map(repr, POINTS))
            raise ValueError(f"`points` is {points!r}: expected one of {expected}")
        super().__init__(model, sites, num_particles, given, points, follow)

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions the plates of the original model take, hidden ones included."""
        return self._structure.nesting if self._structure else 0

    @property
    def model_of_data(self) -> Model:
        """The model whose observed sites are those of the data."""
        return self.model

    def holding(self, *args: Any, **kwargs: Any) -> Callable[[], AbstractContextManager[None]]:
        """What :meth:`hold` does with the structure that the model has for these arguments."""
        return partial(self.hold, self.plan(*args, **kwargs).structure)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; one that needs a fit is prepared first, if it is not yet."""
        with self.hold(self.plan(*args, **kwargs).structure):
            if self.proposal.needs_fit:
                self.prepare(args, kwargs)
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.plan(*args, **kwargs)
        with HideLocalSites(plan.structure) as handler:
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
            with InPlates(group.frames):
                pyro.sample(
                    f"{group.name}_log_likelihood",
                    factor,
                    obs=factor.sample(),
                    infer={"is_auxiliary": True, "estimate": estimate},
                )
        return result

    def prepare(
        self,
        args: Args,
        kwargs: Kwargs,
        start: dict[str, Tensor] | None = None,
        *,
        moves: bool = False,
    ) -> Prepared:
        """Fits the estimator to the data, unless it is fitted to the same model and data already.

        Arguments:
            args: The model's arguments.
            kwargs: The model's keyword arguments.
            start: Unconstrained values to begin the search for a pilot at.
            moves: Whether the noise is to move together with the parameters: fewer particles of a
                path do then.

        Returns:
            What was found.
        """
        structure = self.plan(*args, **kwargs).structure
        if self.prepared.key != structure.key:
            draft = copy.copy(self)
            with draft.hold(structure):
                prepare(draft, Arguments(args, kwargs), start, moves=moves)
            self.prepared, self._layouts = draft.prepared, draft._layouts
        return self.prepared

    def pilot(self, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
        """The constrained parameter values of high posterior density that :meth:`prepare` finds."""
        return self.prepare(args, kwargs).pilot

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        proposal = AUTO if self.prepared.proposal is None else self.prepared.proposal.name
        return (
            f"marginalize({name}, {list(self.sites)}, num_particles={self.settled_particles}, "
            f"proposal={proposal!r}, points={self.points!r})"
        )
