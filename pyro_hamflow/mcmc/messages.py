"""What a run's statistics mean for its result, in one sentence each; none if all is well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_hamflow import arviz_bridge
from pyro_hamflow.mcmc.diagnosis import halved, judged, worst
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.necks import find_neck, name_of, neck_message
from pyro_hamflow.model.sites import Site

FEWEST = 50  # draws of each chain that can be judged
_LARGEST_RHAT = 1.01  # of parameters
_LARGEST_APART = 1.1  # of log densities and their estimates
_FAR = 1.5  # standard deviations of the log density between chains
_FEWEST_EFFECTIVE = 100  # of each chain
_MOST_COMPARED = 4000  # draws that are compared with what was explored before
_WORTH = 0.2  # of explored places, which were moved apart from few: of independent ones
_ERRORS = 4.5  # of a difference between both; looked at in many places
_SMALLEST_BFMI = 0.3  # as Stan's
_SMALLEST_RATE = 0.3  # of proposals accepted, and of noise renewed; not tuned
_LONGEST_STAY = 0.02  # of a chain's draws, for which noise that is one block may stay as it is
_MANY_TRIALS = 12.0  # expected acceptances in such a stay: by chance one of 160,000 is so long
_SMALLEST_SHARE = 0.5  # of the rate that was aimed for, where that is low: a random walk's


@dataclass
class Report:
    """What was found of a run.

    Attributes:
        messages: Sentences for the user.
        values: The numbers behind them, by name.
    """

    messages: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def report(
    draws: Draws, sites: Sequence[Site], explored: Tensor | None = None, aim: float = 1.0
) -> Report:
    """Looks at the draws of a run, and at their statistics.

    R-hat, effective sample sizes and BFMI are ArviZ's, of parameters on the real line. Where there
    are many parameters, they are those of the worst: by split R-hat, and by the correlation of
    successive draws. A single chain is compared with itself, by halves. Fewer than 50 draws of each
    chain are not judged.

    Arguments:
        draws: Of the run.
        sites: Of the model.
        explored: Draws about from the posterior, ``(places, dimension)``, that were found before
            chains began, if any were: all chains together may have lost what these have.
        aim: The share of proposals that warm-up wanted to be accepted.
    """
    result = Report()
    if draws.extent[1] >= FEWEST:
        _look_at_parameters(result, draws, sites)
        _look_at_energies(result, draws.stats)
        if explored is not None and draws.position.shape[2]:
            _compare(result, draws.position, explored, sites)
    _look_at_trajectories(result, draws.stats, aim)
    _look_for_necks(result, draws, sites)
    return result


def _look_at_parameters(result: Report, draws: Draws, sites: Sequence[Site]) -> None:
    chains, _, dimension = draws.extent
    if not dimension:
        return
    columns = worst(draws)
    found = judged(draws, columns)
    for kind, values in found.items():
        place = int(np.argmax(values) if kind == "rhat" else np.nanargmin([*values, np.inf]))
        extreme = "max" if kind == "rhat" else "min"
        if place == len(values):  # no number at all
            continue
        name = name_of(sites, columns[place])
        if kind == "rhat" and _LARGEST_RHAT < values[place] < np.inf:
            rows = draws.columns([columns[place]]).double().numpy()
            _look_for_clusters(result, rows[..., 0], name)
        result.values[f"{extreme}_{kind}"] = float(values[place])
        result.values[f"{extreme}_{kind}_parameter"] = name
        if kind == "rhat" and values[place] > _LARGEST_RHAT:
            result.messages.append(
                f"R-hat of '{name}' is {values[place]:.4g}, above {_LARGEST_RHAT}: its chains "
                "have not mixed; warm up for longer, draw more, or reparametrise the model."
            )
        elif kind != "rhat" and values[place] < _FEWEST_EFFECTIVE * chains:
            result.messages.append(
                f"The effective sample size of '{name}' ({kind[4:]}) is {values[place]:.0f}, below "
                f"{_FEWEST_EFFECTIVE} for each chain: draw more."
            )


def _look_for_clusters(result: Report, values: np.ndarray, name: str) -> None:
    """Says if chains fall into groups whose draws of a parameter, ``(chains, draws)``, are apart.

    Each group's draws lie between its least and its largest, and none of another's do.
    """
    groups: list[int] = []
    reached = -np.inf
    for chain in values[values.min(1).argsort()]:
        if chain.min() > reached:
            groups.append(0)
        groups[-1] += 1
        reached = max(reached, chain.max())
    result.values["clusters"] = len(groups)
    if len(groups) > 1:
        result.messages.append(
            f"No chain ever crosses between {len(groups)} clusters of draws of '{name}' (with "
            f"{', '.join(map(str, groups))} chains): the shares of the draws are not their "
            "probabilities; use `FlowNUTS`, or if this was one, more of its particles."
        )


def _compare(result: Report, position: Tensor, explored: Tensor, sites: Sequence[Site]) -> None:
    """Says where the draws' shares are others than those of what was explored before.

    At all explored values of each parameter, by the difference of both distribution functions.
    """
    chains, count, dimension = position.shape
    rows = position[:, :: -(-chains * count // _MOST_COMPARED)].reshape(-1, dimension)
    values = explored.to(rows).mT.contiguous().sort(1).values
    number = values.shape[1]
    before = torch.arange(1, number + 1, device=rows.device).double() / number
    below = torch.searchsorted(rows.mT.contiguous().sort(1).values, values, right=True)
    after = below.double() / len(rows)
    middle = 0.5 * (before + after)
    variance = (middle * (1.0 - middle)).clamp(min=1.0 / number) / (_WORTH * number)
    place = int(((after - before).square() / variance).argmax())
    column = place // number
    limit = float(values.flatten()[place])
    is_below = (position[..., column].double() <= limit).double().cpu().numpy()
    error = float(variance.flatten()[place])
    if is_below.std() > 0.0:
        error += float(is_below.var() / arviz_bridge.ess(is_below[..., None])[0])
    shares = float(before[place % number]), float(is_below.mean())
    result.values["explored_gap"] = abs(shares[1] - shares[0]) / error**0.5
    if result.values["explored_gap"] > _ERRORS:
        name = name_of(sites, column)
        result.messages.append(
            f"{shares[0]:.0%} of the population that chains started from have '{name}' below "
            f"{limit:.3g} (on the real line), but {shares[1]:.0%} of the draws, so that shares of "
            "modes among the draws need not be their probabilities: draw more, or take more "
            "particles."
        )


def _look_at_energies(result: Report, stats: Mapping[str, Tensor]) -> None:
    log_density = stats["lp"].double().numpy()
    rhat = _rhat(log_density)
    result.values["rhat_lp"] = rhat
    means = log_density.mean(1)
    if rhat > _LARGEST_APART and np.ptp(means) > _FAR * log_density.std(1).mean():
        result.messages.append(
            f"The chains are at different levels of the log density (from {means.min():.4g} to "
            f"{means.max():.4g} on average): they may be in different modes, and their shares of "
            "the draws are not the modes' probabilities."
        )
    if bool(stats["n_steps"].any()):  # else no momentum gives it energy
        with np.errstate(all="ignore"):  # no energy varies of a model without parameters
            bfmi = arviz_bridge.bfmi(stats["energy"].double().numpy())
        result.values["min_bfmi"] = float(bfmi.min())
        if bfmi.min() < _SMALLEST_BFMI:
            result.messages.append(
                f"BFMI of chain {int(bfmi.argmin())} is {bfmi.min():.2f}, below {_SMALLEST_BFMI}: "
                "energies are explored slowly, as in a funnel or heavy tails; reparametrise the "
                "model."
            )
    estimates = stats.get("log_likelihood_estimate")
    if estimates is not None and len(estimates) > 1:
        apart = _rhat(estimates.double().numpy())
        result.values["rhat_log_likelihood"] = apart
        if apart > _LARGEST_APART:
            result.messages.append(
                f"The chains disagree about the log-likelihood (R-hat {apart:.2f} of its "
                "estimate): take more particles or another proposal, or warm up for longer."
            )


def _look_at_trajectories(result: Report, stats: Mapping[str, Tensor], aim: float) -> None:
    total = stats["diverging"].numel()
    result.values["divergences"] = diverging = int(stats["diverging"].sum())
    if diverging:
        result.messages.append(
            f"{diverging} of {total} transitions diverged: raise `target_accept_prob`, or "
            "reparametrise the model."
        )
    if "reached_max_treedepth" in stats:
        result.values["trees_cut"] = full = int(stats["reached_max_treedepth"].sum())
        if full:
            result.messages.append(
                f"{full} of {total} trajectories reached `max_tree_depth` before they turned back: "
                "warm up for longer, or reparametrise the model."
            )
    result.values["acceptance_rate"] = accepted = float(stats["acceptance_rate"].mean())
    if accepted < min(_SMALLEST_RATE, _SMALLEST_SHARE * aim):
        result.messages.append(
            f"Only {accepted:.0%} of the proposals were accepted: warm up for longer, or take more "
            "particles."
        )
    refreshed = float(stats["refresh_rate"].mean()) if "refresh_rate" in stats else 1.0
    if refreshed < _SMALLEST_RATE:
        result.messages.append(
            f"Only {refreshed:.0%} of the noise was renewed in each draw: take more particles, or "
            "a `CorrelatedRefresh`."
        )
    if "refresh_rate" in stats:
        _look_for_stays(result, stats["refresh_rate"])


def _look_for_stays(result: Report, renewed: Tensor) -> None:
    """Says where noise that is accepted as a whole stayed for long, by what was renewed of it.

    It does where its estimate is far above others: where the proposal is too narrow for what the
    posterior has there. However many draws, they are one by what was integrated out.
    """
    chains, count = renewed.shape
    if count < FEWEST or not bool(((renewed == 0.0) | (renewed == 1.0)).all()):
        return
    place = torch.arange(1, count + 1, device=renewed.device).expand(chains, count)
    since = torch.where(renewed > 0.0, place, 0).cummax(1).values
    stays = (place - since).amax(1)
    chain = int(stays.argmax())
    result.values["longest_stay"] = stay = int(stays[chain])
    rate = float(renewed.double().mean())
    if stay > _LONGEST_STAY * count and stay * rate > _MANY_TRIALS:
        result.messages.append(
            f"Chain {chain} kept the noise of its estimate for {stay} draws in a row, though "
            f"{rate:.0%} of proposals of new noise were accepted: the estimate is far too high "
            "there, as where a proposal is too narrow, and what was integrated out is worth one "
            "draw of these; take more particles, or `NUTS` with `whiten` for paths."
        )


def _look_for_necks(result: Report, draws: Draws, sites: Sequence[Site]) -> None:
    """Says which parameter's end trajectories diverge at."""
    neck = find_neck(draws, sites)
    if neck is not None:
        result.values["diverging_at"] = name_of(sites, neck.column)
        result.messages.append(neck_message(neck, sites))


def _rhat(values: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(arviz_bridge.rhat(halved(values)))
