# SPDX-License-Identifier: Apache-2.0
"""Remake ``mixed_models.json``: the posteriors of the mixed models of ``tests/mixed_models``.

For each model the means, standard deviations and kurtoses of its unconstrained parameters
(logarithms of positive ones, logits of probabilities, inverse hyperbolic tangents of correlations,
the first of ordered numbers and the logarithms of their gaps), and the standard errors of the first
two, from at least 20,000 effective draws by importance (``tests/mixed_models/importance.py``),
weighed by quadrature (``tests/mixed_models/quadrature.py``).
``quadrature_error`` is the largest difference of the log marginal likelihood, less its mean, from
that by twice the nodes, over eight draws of the posterior.

``python -m tests.reference.make_mixed_models [NAME ...]`` makes all models, or those named, anew.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tests.mixed_models import MIXED_MODELS
from tests.mixed_models.importance import posterior
from tests.mixed_models.quadrature import Marginal

PATH = Path(__file__).parent / "mixed_models.json"


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name in sys.argv[1:] or MIXED_MODELS:
        began = time.perf_counter()
        case = MIXED_MODELS[name]
        made = posterior(Marginal(case.truth, case.data()))
        stored = json.loads(PATH.read_text()) if PATH.exists() else {}
        stored[name] = asdict(made)
        ordered = {key: stored[key] for key in MIXED_MODELS if key in stored}
        PATH.write_text(json.dumps(ordered, indent=1) + "\n")
        seconds = time.perf_counter() - began
        print(
            f"{name}: {made.ess:.0f} of {made.num_draws} draws, Pareto k {made.pareto_k:.2f}, "
            f"quadrature off by {made.quadrature_error:.1e}; {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
