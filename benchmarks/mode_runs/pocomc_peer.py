"""pocoMC by its defaults, as :mod:`.told` has it."""

from __future__ import annotations

import numpy as np
import pocomc
from scipy import stats

from benchmarks.mode_runs.told import asked, tell

if __name__ == "__main__":
    told = asked()
    target = told.density
    prior = [
        stats.norm(first, second) if family == "normal" else stats.uniform(first, second - first)
        for family, first, second in target.prior
    ]
    few = {"n_effective": 128, "n_active": 64} if told.quick else {}
    sampler = pocomc.Sampler(
        pocomc.Prior(prior),
        lambda x: target.log_likelihood(np, x),
        vectorize=True,
        periodic=list(target.periodic) or None,
        random_state=0,
        **few,
    )
    totals = {"n_total": 256, "n_evidence": 256} if told.quick else {}
    sampler.run(progress=False, **totals)
    samples, weights, _, _ = sampler.posterior()
    log_evidence, error = sampler.evidence()
    numbers = {"log_evidence": float(log_evidence), "error": float(error)}
    tell(told, samples[None], weights, **numbers)
