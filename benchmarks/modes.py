"""Posteriors of several modes: what populations and jumps make of them, by all defaults."""

from __future__ import annotations

import math
import time

from torch import Tensor

from benchmarks.diagnostics import smallest_ess
from benchmarks.mode_targets import Target, exoplanet, funnel, many_well, mixture, phi_four
from benchmarks.models import logistic, logistic_data, schools_data, schools_noncentred
from benchmarks.report import Row, Table, met
from pyro_hamflow import MCMC, NUTS, AnnealedSampler, FlowNUTS, importance_sample
from tests.helpers.laws import scores

ABOUT = "Several modes: their weights and the evidence, nothing told, everything included"

_WEIGHT_ERROR = 0.02
_SECONDS = 60.0
_KEPT = 0.8  # of NUTS' effective draws
_FREE_ENERGY_ERROR = 0.02
_WEIGHTED = 40_000  # draws of a flow
_ESS_EACH = 0.05
_FREE_ENERGIES = {
    0.001: 0.012172,
    0.005: 0.278968,
    0.01: 0.916024,
    0.015: 1.670128,
    0.02: 2.454381,
    0.025: 3.247774,
}


def by_population(target: Target, *, quick: bool) -> Row:
    """What a population finds."""
    sampler = AnnealedSampler(target.model, num_particles=400 if quick else 2000, seed=0)
    began = time.process_time()
    sampler.run()
    took = time.process_time() - began
    found = sampler.mean(target.belongs(sampler.samples))
    return _row(target, "AnnealedSampler", found, took) | {
        "log Z, error": sampler.log_evidence - target.log_evidence,
        "its standard error": sampler.log_evidence_error,
        "effective draws": sampler.ess,
        "jumps accepted": math.nan,
    }


def by_jumps(target: Target, *, quick: bool) -> Row:
    """What chains find that jump by a flow."""
    kernel = FlowNUTS(target.model)
    mcmc = MCMC(kernel, 100 if quick else 1000, num_chains=10, seed=0, disable_progbar=True)
    began = time.process_time()
    mcmc.run()
    error = spread = math.nan
    if kernel.flow is not None:
        weighted = importance_sample(target.model, kernel.flow, seed=0)
        error, spread = weighted.log_evidence - target.log_evidence, weighted.log_evidence_error
    took = time.process_time() - began
    belongs = target.belongs(mcmc.get_samples())
    chains = belongs.reshape(10, -1, belongs.shape[-1]).mean(1)
    between = float(chains.var(0).mean())
    within = float((chains.mean(0) * (1.0 - chains.mean(0))).mean())
    stats = mcmc.draws.stats
    jumps = float(stats["global_accepted"].double().mean()) if "global_accepted" in stats else 0.0
    return _row(target, "FlowNUTS", chains.mean(0), took) | {
        "log Z, error": error,
        "its standard error": spread,
        "effective draws": 10.0 * within / between if between else math.nan,
        "jumps accepted": jumps,
    }


def _row(target: Target, name: str, found: Tensor, seconds: float) -> Row:
    wrong = (found - target.shares).abs()
    variation = 0.5 * float(wrong.sum()) if target.name == "exoplanet" else float(wrong.mean())
    return {
        "target": target.name,
        "method": name,
        "CPU seconds": seconds,
        "weights, error": variation,
    }


def measure(*, quick: bool) -> list[Table]:
    """All targets, by both methods."""
    targets = [mixture(2), mixture(16)] if quick else [mixture(d) for d in (2, 16, 64)]
    targets += [exoplanet(), phi_four(20 if quick else 100), many_well(3 if quick else 16)]
    rows = [way(target, quick=quick) for target in targets for way in (by_population, by_jumps)]
    mixtures = [r for r in rows if str(r["target"]).startswith("mixture")]
    reached = all(
        min(r["weights, error"] for r in mixtures if r["target"] == name) < _WEIGHT_ERROR
        and max(r["CPU seconds"] for r in mixtures if r["target"] == name) < _SECONDS
        for name in {r["target"] for r in mixtures}
    )
    says = (
        "Errors of weights are absolute, the mean over pairs for the many-well and the total "
        "variation over bins of the period for the exoplanet. Effective draws of chains are those "
        "of the weights, from how much ten chains differ; their evidence is that of the frozen "
        "flow's draws by importance weights."
    )
    reach = (
        f"weights of the mixture within {_WEIGHT_ERROR} in {_SECONDS:.0f} seconds: {met(reached)}."
    )
    weights = Table("Weights of modes and evidence", rows, says, reach)
    return [weights, _noticing(quick=quick), _tilted(quick=quick), _funnel(quick=quick)]


# --- posteriors of one mode ---------------------------------------------------------------------


def _noticing(*, quick: bool) -> Table:
    """What it costs to look for modes where there is one."""
    cases = {
        "eight schools": (schools_noncentred, schools_data()),
        "breast cancer": (logistic, logistic_data()),
    }
    rows, kept = [], []
    for name, (model, data) in cases.items():
        rates = {}
        for kernel in (NUTS, FlowNUTS):
            mcmc = MCMC(
                kernel(model),
                100 if quick else 4000,
                num_chains=4,
                seed=0,
                disable_progbar=True,
            )
            began = time.process_time()
            mcmc.run(*data)
            took = time.process_time() - began
            rates[kernel] = smallest_ess(mcmc.draws.position.numpy()) / took
        kept.append(rates[FlowNUTS] / rates[NUTS])
        rows.append(
            {
                "target": name,
                "NUTS, ESS / CPU s": rates[NUTS],
                "FlowNUTS, ESS / CPU s": rates[FlowNUTS],
                "of it": kept[-1],
            }
        )
    says = "The smallest effective sample size, by CPU seconds with everything included."
    reach = f"FlowNUTS never below {_KEPT} of NUTS: {met(min(kept) >= _KEPT)} ({min(kept):.2f})."
    return Table("What it costs to notice that there is one mode", rows, says, reach)


# --- free energies ------------------------------------------------------------------------------


def _tilted(*, quick: bool) -> Table:
    """Differences of free energy, by one frozen flow's draws weighted for each tilt."""
    model = phi_four(20 if quick else 100).model
    kernel = FlowNUTS(model)
    mcmc = MCMC(kernel, 20, num_chains=10, seed=0, disable_progbar=True)
    mcmc.run()
    rows: list[Row] = []
    if kernel.flow is not None:
        flat = importance_sample(model, kernel.flow, num_samples=_WEIGHTED, seed=0)
        for tilt, truth in _FREE_ENERGIES.items():
            tilted = importance_sample(model, kernel.flow, tilt, num_samples=_WEIGHTED, seed=0)
            found = tilted.log_evidence - flat.log_evidence
            exact = math.nan if quick else truth
            rows.append({"tilt": tilt, "found": found, "exact": exact, "error": found - exact})
    worst = max((abs(float(row["error"])) for row in rows), default=math.inf)
    says = (
        "The exact ones by the transfer operator on a grid; both signs are equally likely at none."
    )
    reach = f"all within {_FREE_ENERGY_ERROR}: {met(worst < _FREE_ENERGY_ERROR)} ({worst:.4f})."
    return Table("phi^4, N = 100: log Z(b) - log Z(0)", rows, says, reach)


# --- a funnel -----------------------------------------------------------------------------------


def _funnel(*, quick: bool) -> Table:
    """NUTS in a learned map's coordinates: effective draws by gradient, training included."""
    kernel = NUTS(funnel(5 if quick else 101), transport="flow")
    mcmc = MCMC(
        kernel, 50 if quick else 1000, num_chains=4, seed=0, save_warmup=True, disable_progbar=True
    )
    mcmc.run()
    parts = (mcmc.warmup_draws, mcmc.draws)
    gradients = sum(int(part.stats["n_gradients"].sum()) for part in parts if part is not None)
    draws = mcmc.draws.position.double().numpy()
    scale, least = draws[..., :1], smallest_ess(draws)
    tail = 0.5 * math.erfc(math.sqrt(2.0))
    scored = {
        "E scale^2, z": (scale**2, 9.0),
        "P(scale < -6), z": (1.0 * (scale < -6.0), tail),
        "P(scale > 6), z": (1.0 * (scale > 6.0), tail),
    }
    row: Row = {"gradients": gradients, "smallest ESS": least, "ESS / gradient": least / gradients}
    row |= {name: float(scores(*pair)[0]) for name, pair in scored.items()}
    says = "Gradients of warm-up and of training count; z is in standard errors."
    reach = f"{_ESS_EACH} of a draw by gradient: {met(least / gradients >= _ESS_EACH)}."
    return Table("Funnel in 101 dimensions, NUTS(transport='flow')", [row], says, reach)
