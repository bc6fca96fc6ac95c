"""Mixed models of the textbooks by all defaults, beside their posteriors by quadrature."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.report import Row, Table, met
from benchmarks.timing import seconds
from pyro_hamflow import MCMC, PseudoMarginalNUTS, marginalize
from tests.mixed_models import MIXED_MODELS
from tests.mixed_models.verdict import judge

ABOUT = "Mixed models of the textbooks, by all defaults"
_REFERENCE = Path(__file__).parent.parent / "tests" / "reference" / "mixed_models.json"
_LARGEST_SCORE, _LARGEST_RHAT, _FEWEST = 4.0, 1.02, 400


def measure(*, quick: bool) -> list[Table]:
    """One run of each model."""
    references = json.loads(_REFERENCE.read_text())
    names = list(references)[:1] if quick else list(references)
    rows = [_row(name, references[name]) for name in names]
    passed = [
        row["max abs z"] < _LARGEST_SCORE
        and row["R-hat"] < _LARGEST_RHAT
        and row["smallest ESS"] >= _FEWEST
        for row in rows
    ]
    table = Table(
        "Four chains of 500 draws after the default warm-up",
        rows,
        "Each model is given to `PseudoMarginalNUTS(marginalize(model, sites))` with its data and "
        "nothing else. max abs z is the largest distance of a parameter's mean or standard "
        "deviation from that by quadrature, in combined standard errors; R-hat is rank-normalised, "
        "ESS in the bulk, both of the worst parameter; the variance is of the log estimate, where "
        "the kernel measured it. Seconds are of the whole run: pilot, capture, warm-up and draws.",
        f"every model with max abs z below {_LARGEST_SCORE:.0f}, R-hat below {_LARGEST_RHAT} and "
        f"an ESS of {_FEWEST} or more: {met(all(passed))} ({sum(passed)} of {len(passed)}).",
    )
    return [table]


def _row(name: str, reference: dict[str, Any]) -> Row:
    case = MIXED_MODELS[name]
    arguments, shape = case.arguments(), case.data()[-1].shape
    marginal = marginalize(case.model, list(case.sites))
    mcmc = MCMC(
        PseudoMarginalNUTS(marginal), num_samples=500, num_chains=4, seed=0, disable_progbar=True
    )
    taken, _ = seconds(lambda: mcmc.run(*arguments))
    verdict = judge(case.truth, mcmc.get_samples(group_by_chain=True), reference)
    settings = mcmc.kernel.settings
    layouts = marginal.plan(*arguments).layouts.values()
    return {
        "model": name,
        "family": case.family,
        "elements": shape[0],
        "visits": shape[1] if len(shape) > 1 else 1,
        "parameters": len(reference["names"]),
        "max abs z": verdict.worst,
        "R-hat": verdict.rhat,
        "smallest ESS": verdict.ess,
        "variance": settings["log_likelihood_variance"],
        "particles": max(layout.num_particles for layout in layouts),
        "Pareto k": settings.get("max_pareto_k", math.nan),
        "seconds": taken,
    }
