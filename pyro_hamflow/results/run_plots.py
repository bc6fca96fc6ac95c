"""Pictures of runs, of what ArviZ has none for: surrogates, modes, populations, estimates.

Matplotlib draws them, in the style that is set, ArviZ's for instance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.quality import estimator_quality
from pyro_hamflow.mcmc.mcmc import MCMC
from pyro_hamflow.results.plots import axes_for
from pyro_hamflow.smc.sampler import AnnealedSampler


def plot_surrogate(mcmc: MCMC, *, axes: Any = None) -> Any:
    """The energy that a surrogate has learned against the model's, at the draws.

    Points on the line are learned; a constant between the two does not matter, and is taken out.
    Points below it lie where the network's energy is too low: chains are led there in vain.

    Arguments:
        mcmc: A run of :class:`~pyro_hamflow.HNNNUTS` or :class:`~pyro_hamflow.HNNHMC`.
        axes: Matplotlib's axes; made if not given.

    Returns:
        The axes.

    Raises:
        ValueError: If the run's kernel has no surrogate.

    Example:
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> kernel = HNNNUTS(model, fallback=False, training_steps=50)
        >>> mcmc = MCMC(kernel, 50, 100, num_chains=4, disable_progbar=True)
        >>> mcmc.run()
        >>> plot_surrogate(mcmc).get_xlabel()
        "the model's energy"
    """
    surrogate = getattr(mcmc.kernel, "surrogate", None)
    if surrogate is None:
        raise ValueError(f"the run's kernel is a {type(mcmc.kernel).__name__} without a surrogate")
    position = mcmc.draws.position.flatten(0, 1)
    true = -mcmc.draws.stats["lp"].flatten()
    with torch.no_grad():
        learned = surrogate(position.to(next(surrogate.parameters()))).cpu().to(true)
    learned = learned + (true - learned).median()
    (axis,) = axes_for(axes, 1)
    axis.scatter(true, learned, s=4, alpha=0.3)
    axis.axline((float(true.mean()),) * 2, slope=1.0, color="black", lw=0.7)
    axis.set(xlabel="the model's energy", ylabel="the network's", title="energy of draws")
    return axis


def plot_modes(
    mcmc: MCMC, mode_of: Callable[[dict[str, Tensor]], Tensor], *, axes: Any = None
) -> Any:
    """Which share of its draws each chain spends in each mode.

    Chains whose bars differ have not been to all modes by their weights. The dashed lines are the
    shares of all draws.

    Arguments:
        mcmc: A run.
        mode_of: Numbers the modes: it takes samples, chains and draws first, and returns whole
            numbers from 0 on of shape ``(chains, draws)``, such as
            ``lambda samples: (samples["x"] > 0).long()``.
        axes: Matplotlib's axes; made if not given.

    Returns:
        The axes.

    Raises:
        ValueError: If the numbers have another shape.
    """
    samples = mcmc.get_samples(group_by_chain=True)
    modes = torch.as_tensor(mode_of(samples)).cpu().long()
    expected = mcmc.draws.position.shape[:2]
    if modes.shape != expected:
        raise ValueError(
            f"`mode_of` returns shape {tuple(modes.shape)}: expected {tuple(expected)}, a number "
            "for each draw of each chain"
        )
    share = torch.nn.functional.one_hot(modes).double().mean(1)  # (chains, modes)
    (axis,) = axes_for(axes, 1)
    below = torch.zeros(len(share))
    for mode, part in enumerate(share.mT):
        axis.bar(range(len(share)), part, bottom=below, label=f"mode {mode}")
        below = below + part
    for level in share.mean(0).cumsum(0)[:-1]:
        axis.axhline(float(level), color="black", lw=0.8, ls="--")
    axis.set(xlabel="chain", ylabel="share of its draws", ylim=(0.0, 1.0), title="modes")
    axis.set_xticks(range(len(share)))
    axis.legend()
    return axis


def plot_weights(sampler: AnnealedSampler, *, axes: Any = None) -> Any:
    """What a population's weights were worth at each temperature, and what they are at the end.

    On the left the effective sample size, as a share of the particles, on reaching each inverse
    temperature, and the acceptance rate of the moves there; on the right the weights at the end,
    against equal ones. A size that falls for long was not resampled in time; rates near zero leave
    copies where they are.

    Arguments:
        sampler: After its run.
        axes: Matplotlib's two axes; made if not given.

    Returns:
        The axes.
    """
    passages = sampler.population.passages
    temperatures = [passage.inverse_temperature for passage in passages]
    left, right = shown = axes_for(axes, 2)
    left.plot(temperatures, [passage.ess for passage in passages], "o-", label="effective size")
    rates = [passage.acceptance_rate for passage in passages]
    left.plot(temperatures, rates, "s--", label="acceptance rate")
    least = min((value for value in temperatures if value > 0.0), default=1.0)
    left.set_xscale("symlog", linthresh=least)
    left.set(xlabel="inverse temperature", ylim=(0.0, 1.05), title="on the way")
    left.legend()
    relative = (sampler.log_weights - sampler.log_evidence).detach().cpu()
    right.hist(relative[relative.isfinite()].numpy(), bins=40)
    right.axvline(0.0, color="black", lw=0.7)
    right.set(xlabel="log weight, less the log evidence", title="weights at the end")
    return shown


def plot_estimator(
    marginals: Sequence[MarginalModel],
    parameters: Mapping[str, Tensor],
    *args: Any,
    num_replicates: int = 100,
    axes: Any = None,
    **kwargs: Any,
) -> Any:
    """The standard deviation of a log-likelihood estimate against its number of particles.

    It falls as one over the root of the number for independent points, and faster on a lattice.
    Near the dashed line, at one, chains move freely and no particle is wasted.

    Arguments:
        marginals: The same model, marginalised with different numbers of particles.
        parameters: Constrained values of the sites that are not integrated out.
        args: The model's arguments.
        num_replicates: How many estimates are made of each.
        axes: Matplotlib's axes; made if not given.
        kwargs: The model's keyword arguments.

    Returns:
        The axes.
    """
    found = [
        estimator_quality(marginal, parameters, *args, num_replicates=num_replicates, **kwargs)
        for marginal in marginals
    ]
    counts = [quality.num_particles for quality in found]
    (axis,) = axes_for(axes, 1)
    axis.loglog(counts, [part.standard_deviation for part in found], "o-", label="all elements")
    axis.loglog(counts, [part.worst_element for part in found], "s--", label="the noisiest one")
    axis.axhline(1.0, color="black", lw=0.8, ls="--")
    axis.set(xlabel="particles", ylabel="standard deviation", title="log-likelihood estimate")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.legend()
    return axis
