"""Posteriors of several modes: what populations and jumps make of them, by all defaults."""

from __future__ import annotations

import math
import time

import arviz
import torch
from torch import Tensor

from benchmarks.diagnostics import smallest_ess
from benchmarks.mode_targets import (
    MEAN_SIZES,
    Target,
    exoplanet,
    funnel,
    many_well,
    mixture,
    phi_four,
    torus,
)
from benchmarks.models import logistic, logistic_data, schools_data, schools_noncentred
from benchmarks.report import Row, Table, met
from pyro_hamflow import MCMC, NUTS, AnnealedSampler, FlowNUTS, importance_sample
from tests.helpers.laws import scores

ABOUT = "Several modes: their weights and the evidence, nothing told, everything included"

_WEIGHT_ERROR = 0.02
_SECONDS = 60.0
_KEPT = 0.8  # of NUTS' effective draws
_SEEDS = 3  # by which that is told
_FREE_ENERGY_ERROR = 0.02
_VARIATION = 0.02
_EVIDENCE_ERROR = 0.05
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
    return row_of(target, "AnnealedSampler", found, took, sampler.ess) | {
        "log Z, error": sampler.log_evidence - target.log_evidence,
        "its standard error": sampler.log_evidence_error,
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
    stats = mcmc.draws.stats
    jumps = float(stats["global_accepted"].double().mean()) if "global_accepted" in stats else 0.0
    return row_of(target, "FlowNUTS", chains.mean(0), took, worth_of(chains), jumps) | {
        "log Z, error": error,
        "its standard error": spread,
    }


def worth_of(groups: Tensor) -> float:
    """Effective draws of shares, by how much those of ten groups of chains differ."""
    between = float(groups.var(0).mean())
    within = float((groups.mean(0) * (1.0 - groups.mean(0))).mean())
    return len(groups) * within / between if between else math.nan


def row_of(
    target: Target,
    method: str,
    shares: Tensor | None,
    seconds: float,
    worth: float = math.nan,
    jumps: float = math.nan,
) -> Row:
    """A row of the table of modes, but for the evidence."""
    wrong = torch.full((1,), math.nan) if shares is None else (shares - target.shares).abs()
    variation = 0.5 * wrong.sum() if target.name == "exoplanet" else wrong.mean()
    return {
        "target": target.name,
        "method": method,
        "CPU seconds": seconds,
        "shares, error": float(wrong.max()),
        "total variation": float(variation),
        "log Z, error": math.nan,
        "its standard error": math.nan,
        "effective draws": worth,
        "of them per second": worth / seconds,
        "jumps accepted": jumps,
    }


def measure(*, quick: bool) -> list[Table]:
    """All targets, by both methods and by peers."""
    targets = [mixture(2), mixture(16)] if quick else [mixture(d) for d in (2, 16, 64)]
    targets += [exoplanet(), phi_four(20 if quick else 100), many_well(3 if quick else 16)]
    rows = [way(target, quick=quick) for target in targets for way in (by_population, by_jumps)]
    says = (
        "Errors of shares are the largest; the total variation is the mean error over pairs for "
        "the many-well, and that over bins of the period for the exoplanet. Effective draws of "
        "chains are those of the shares, from how much ten chains differ; their evidence is that "
        "of the frozen flow's draws by importance weights."
    )
    weights = Table("Weights of modes and evidence", rows, says, _reached(rows))
    parts = (_noticing, _tilted, _plane, _funnel)
    return [weights, *(part(quick=quick) for part in parts)]


def _reached(rows: list[Row]) -> str:
    jumps = {str(row["target"]): row for row in rows if row["method"] == "FlowNUTS"}
    mixtures = [row for name, row in jumps.items() if name.startswith("mixture")]
    near = all(row["shares, error"] < _WEIGHT_ERROR for row in mixtures)
    soon = all(row["CPU seconds"] < _SECONDS for row in mixtures)
    star = jumps["exoplanet"]
    right = star["total variation"] < _VARIATION and abs(star["log Z, error"]) < _EVIDENCE_ERROR
    return (
        f"weights of the mixture within {_WEIGHT_ERROR} in {_SECONDS:.0f} seconds: "
        f"{met(near and soon)}; the exoplanet's total variation below {_VARIATION}, log Z within "
        f"{_EVIDENCE_ERROR}: {met(right)}."
    )


# --- posteriors of one mode ---------------------------------------------------------------------


def _noticing(*, quick: bool) -> Table:
    """What it costs to look for modes where there is one."""
    cases = {
        "eight schools": (schools_noncentred, schools_data()),
        "breast cancer": (logistic, logistic_data()),
    }
    rows, kept = [], []
    for name, (model, data) in cases.items():
        draws, rates = 100 if quick else 4000, {}
        for kernel in (NUTS, FlowNUTS):
            effective = seconds = 0.0
            for seed in range(1 if quick else _SEEDS):
                mcmc = MCMC(kernel(model), draws, num_chains=4, seed=seed, disable_progbar=True)
                began = time.process_time()
                mcmc.run(*data)
                seconds += time.process_time() - began
                effective += smallest_ess(mcmc.draws.position.numpy())
            rates[kernel] = effective / seconds
        kept.append(rates[FlowNUTS] / rates[NUTS])
        rows.append(
            {
                "target": name,
                "NUTS, ESS / CPU s": rates[NUTS],
                "FlowNUTS, ESS / CPU s": rates[FlowNUTS],
                "of it": kept[-1],
            }
        )
    says = (
        "The smallest effective sample size, by CPU seconds with everything included; four chains "
        f"of 4,000 draws, and {_SEEDS} seeds."
    )
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


# --- a field on a torus -------------------------------------------------------------------------


def _plane(*, quick: bool) -> Table:
    """The mean's size in both phases, by a flow that knows nothing of a lattice."""
    rows = []
    for coupling, (truth, error) in MEAN_SIZES.items():
        kernel = FlowNUTS(torus)
        mcmc = MCMC(kernel, 20 if quick else 250, num_chains=16, seed=1, disable_progbar=True)
        began = time.process_time()
        mcmc.run(4 if quick else 8, coupling)
        took = time.process_time() - began
        means = mcmc.get_samples(group_by_chain=True)["field"].mean((-1, -2))
        size = means.abs().numpy()
        spread, stats = math.hypot(error, float(arviz.mcse(size))), mcmc.draws.stats
        jumps = "global_accepted" in stats
        rows.append(
            {
                "coupling": coupling,
                "E|m|": float(size.mean()),
                "exact": math.nan if quick else truth,
                "z": math.nan if quick else (float(size.mean()) - truth) / spread,
                "P(m > 0)": float((means > 0.0).double().mean()),
                "jumps accepted": float(stats["global_accepted"].double().mean()) if jumps else 0.0,
                "of proposals": kernel.settings["num_proposals"] if jumps else 0,
                "CPU seconds": took,
            }
        )
    right = all(abs(row["z"]) < 3.0 for row in rows)
    says = (
        "z is in standard errors; the exact ones are by a cluster algorithm. Where local moves do, "
        "there are no jumps. Sizes up to L = 14, and flows that know the lattice, of whose single "
        "jumps half and more are accepted at L = 8: `python tutorials/lecture/phi4_plane.py`."
    )
    reach = f"E|m| within 3 standard errors: {met(right)}."
    return Table("phi^4 on a torus, L = 8", rows, says, reach)


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
