r"""One step ahead: how well a time series was foretold, in place of leaving one observation out.

To leave out one observation of a series and keep its neighbours tells how well gaps are filled.
What will come is judged by leaving out all that comes later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.arviz_bridge import psislw
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.model.kinds import Args, Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.process import random_state_kept, undisturbed
from pyro_hamflow.results.pointwise import WANTED_ERROR
from pyro_hamflow.results.run import Run
from pyro_hamflow.smc.resampling import log_mean_exp

_REPLICATES = 8  # estimates of it at once
_MOST = 256


@dataclass(frozen=True)
class FutureLeftOut:
    """How well each of some observations was foretold by those before it.

    Attributes:
        times: How many observations came before.
        log_predictive: The log density of the next one given these, at each draw's parameters, of
            shape ``(draws, times)``.
        elpd: The same with parameters from their posterior given these observations alone, of shape
            ``(times,)``; its sum is the expected log predictive density by leaving out the future.
        pareto_k: The shape of the tail of the weights that make draws given all data into such.
            Above 0.7 ``elpd`` cannot be relied on there: run the sampler on fewer data, and begin
            later.
        error: The largest standard error of an estimated log likelihood, a root mean square over
            the draws; zero where nothing is estimated.
    """

    times: list[int]
    log_predictive: Tensor
    elpd: Tensor
    pareto_k: Tensor
    error: float

    def __repr__(self) -> str:
        return (
            f"FutureLeftOut(times {self.times[0]} to {self.times[-1]}, elpd="
            f"{float(self.elpd.sum()):.2f}, pareto_k={float(self.pareto_k.max()):.2f}, "
            f"error={self.error:.2g})"
        )


@undisturbed()
def leave_future_out(
    result: Any,
    prefix: Callable[[int], tuple[Any, ...]],
    times: Iterable[int],
    *,
    num_draws: int = 100,
) -> FutureLeftOut:
    r"""Foretells observations of a time series from those before them, one step ahead.

    For a draw of the parameters, :math:`p(y_{t+1} \mid y_{1:t}, \theta)` is the ratio of the
    likelihoods of :math:`t + 1` and of :math:`t` observations. That is a filter, and exact where
    these are, as of linear Gaussian paths. Others are estimated, from as much noise as brings their
    standard error below .05. Draws given all data are weighed by :math:`p(y_{1:t} \mid \theta) /
    p(y_{1:T} \mid \theta)`, smoothed as Pareto's tail is, to be draws given the first t.

    Each length of the data takes a fit and a program of its own: about a second for a path of some
    hundred times.

    Arguments:
        result: The run of a kernel on a model of a series; latent paths integrated out by
            :func:`~pyro_hamflow.marginalize`, since parameters must not depend on the length.
        prefix: From a number of observations to the model's arguments with so many, the first.
        times: After how many observations the next is foretold.
        num_draws: How many draws to take, spread over the run.

    Returns:
        The log predictive densities.

    Raises:
        ValueError: If parameters depend on the length, or there are no times.

    References:
        | Approximate leave-future-out cross-validation (Bürkner, Gabry, Vehtari, 2020)
        | https://arxiv.org/abs/1902.06281

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("time", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> y = torch.tensor([0.3, 1.1, 0.8, 0.2])
        >>> mcmc = MCMC(NUTS(model), 50, 50, seed=0, disable_progbar=True)
        >>> mcmc.run(y)
        >>> leave_future_out(mcmc, lambda t: (y[:t],), range(2, 4)).times
        [2, 3]
    """
    steps = sorted(set(times))
    if not steps or steps[0] < 1:
        raise ValueError(f"`times` are {steps}: expected numbers of observations, each at least 1")
    run = Run(result)
    source, model = run.kernel.potential, run.kernel.model
    flat = run.draws.position.flatten(0, 1)
    every = torch.linspace(0, len(flat) - 1, min(num_draws, len(flat)), device="cpu").round().long()
    position = flat[every].to(source.example.device)
    with random_state_kept():
        torch.manual_seed(int(run.seed or 0))
        whole, error = _log_likelihood(model, source, source.args, source.kwargs, position)
        known, errors = {}, [error]
        for length in sorted({*steps, *(step + 1 for step in steps)}):
            known[length], error = _log_likelihood(model, source, prefix(length), {}, position)
            errors.append(error)
    log_predictive = torch.stack([known[step + 1] - known[step] for step in steps], -1)
    elpd, shapes = [], []
    for step, ahead in zip(steps, log_predictive.unbind(-1), strict=True):
        log_ratios = known[step] - whole
        if float(log_ratios.max() - log_ratios.min()) > 0.0:
            smoothed, k = psislw(log_ratios.cpu().numpy())
        else:
            smoothed, k = log_ratios.cpu().numpy(), -math.inf
        log_weights = torch.as_tensor(smoothed).log_softmax(0).to(ahead)
        elpd.append((log_weights + ahead).logsumexp(0))
        shapes.append(k)
    return FutureLeftOut(
        steps, log_predictive, torch.stack(elpd), torch.tensor(shapes), float(max(errors))
    )


def _log_likelihood(
    model: Model, source: Potential, args: Args, kwargs: dict[str, Any], position: Tensor
) -> tuple[Tensor, float]:
    """The log likelihood of data at all draws, up to what does not depend on the data.

    Arguments:
        model: The model.
        source: The potential that the draws are positions of.
        args: The model's arguments with these data.
        kwargs: Its keyword arguments.
        position: The draws, ``(draws, dimension)``.

    Returns:
        Of shape ``(draws,)``; its standard error, a root mean square over the draws.
    """
    if isinstance(model, MarginalModel):
        proposal = model.proposal
        own = MarginalModel(
            model.model, model.sites, model.settled_particles, proposal, model.points
        )
        if proposal.needs_fit:
            own.fit(*args, pilot=source.constrain(position.mean(0)), **kwargs)
        model = own
    potential = Potential(model, args, kwargs, separate_noise=source.separate_noise)
    sites = [[(site.name, site.shape) for site in part.sites] for part in (source, potential)]
    if sites[0] != sites[1]:
        raise ValueError(
            f"the model's parameters with {len(args)} arguments of fewer data are {sites[1]}, and "
            f"those of the run {sites[0]}: expected the same, paths integrated out by `marginalize`"
        )
    logs: list[Tensor] = []
    while True:
        for _ in range(_REPLICATES if potential.noise_dimension else 1):
            noise = potential.draw_noise(len(position))
            logs.append(-potential.value(position, noise).double())
        estimates = torch.stack(logs)
        ratios = (estimates - estimates.amax(0)).exp()
        error = float((ratios.var(0, correction=0) / ratios.mean(0).square()).mean().sqrt())
        error /= math.sqrt(max(1, len(logs) - 1))
        if error <= WANTED_ERROR or not potential.noise_dimension or len(logs) >= _MOST:
            return log_mean_exp(estimates.T), error
