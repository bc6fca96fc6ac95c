"""Learned energies: effective draws per second and per gradient, training included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from benchmarks import competitors, models
from benchmarks.diagnostics import largest_rhat, largest_score, smallest_ess
from benchmarks.lynx import lotka_volterra, lynx_starts, pelts
from benchmarks.report import Row, Table, met
from benchmarks.timing import nothing_compiled
from pyro_hamflow import (
    HNNHMC,
    HNNNUTS,
    MCMC,
    NUTS,
    PseudoMarginalHMC,
    PseudoMarginalNUTS,
    marginalize,
)
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.kernels.base import Kernel
from tests.helpers.targets import glmm

ABOUT = "Learned energies: effective draws, training included"
_DENSITY = 1.0 / 3.0  # of a gradient
_ROUNDS = 3
_ESS, _IN_ALL = "smallest ESS", "ESS/s in all"


def measure(*, quick: bool) -> list[Table]:
    """A costly gradient, two valleys, an estimated likelihood, and gradients too cheap to learn."""
    return [
        _lynx(quick=quick),
        *(_rosenbrock(dimension, quick=quick) for dimension in ((3,) if quick else (3, 10))),
        _glmm(quick=quick),
        _cheap(quick=quick),
    ]


def rosenbrock(dimension: int) -> None:
    """The valley of the literature, its energy divided by twenty."""
    flat = dist.Normal(torch.zeros(dimension), 1.0).mask(False)  # noqa: FBT003
    x = pyro.sample("x", flat.to_event(1))
    bends = 100.0 * (x[1:] - x[:-1].square()).square() + (1.0 - x[:-1]).square()
    pyro.factor("energy", -bends.sum() / 20.0)


def ours(
    kernel: Kernel,
    arguments: tuple[Any, ...],
    *,
    draws: int,
    start: Any = None,
    warmup: int | None = None,
    seed: int = 0,
) -> tuple[Row, Draws]:
    """One run of a kernel, four chains: every second and every gradient from the model on."""
    mcmc = MCMC(
        kernel,
        draws,
        warmup,
        num_chains=4,
        initial_params=start,
        seed=seed,
        save_warmup=True,
        disable_progbar=True,
    )
    with nothing_compiled():
        began = time.perf_counter()
        mcmc.run(*arguments)
        whole = time.perf_counter() - began
    least = smallest_ess(mcmc.draws.position.numpy())
    stats = [mcmc.draws.stats, *([mcmc.warmup_draws.stats] if mcmc.warmup_draws else [])]
    gradients = sum(float(part["n_gradients"].double().sum()) for part in stats)
    densities = sum(float(part["n_densities"].double().sum()) for part in stats)
    report = getattr(kernel, "report", None)
    row: Row = {
        "follows": report.following if report else "true gradients",
        "before, s": whole - mcmc.sampling_time,
        "sampling, s": mcmc.sampling_time,
        "training, s": sum(t.seconds for t in report.trainings) if report else 0.0,
        "accepted": float(mcmc.draws.stats["acceptance_rate"].mean()),
        "gradients": gradients,
        "densities": densities,
        _ESS: least,
        "R-hat": largest_rhat(mcmc.draws.position.numpy()),
        _IN_ALL: least / whole,
        "ESS/s": least / mcmc.sampling_time,
        "ESS per 1,000 gradients": 1000 * least / (gradients + _DENSITY * densities),
    }
    return row, mcmc.draws


def _versus(rows: list[Row], name: str) -> float:
    """How many times the second row's figure the first one's is."""
    return rows[0][name] / rows[1][name]


def _over_seeds(rows: list[Row], one: str, other: str) -> tuple[float, str]:
    """How many times the effective draws per second: of all seeds together, and of each."""
    pairs = [[row for row in rows if row["sampler"] == name] for name in (one, other)]
    both = [
        sum(row[_ESS] for row in found)
        / sum(row["before, s"] + row["sampling, s"] for row in found)
        for found in pairs
    ]
    each = [a[_IN_ALL] / b[_IN_ALL] for a, b in zip(*pairs, strict=True)]
    return both[0] / both[1], ", ".join(f"{ratio:.3g}" for ratio in each)


def _says(rows: list[Row]) -> str:
    return (
        f"{rows[0]['sampler']} makes {_versus(rows, _IN_ALL):.3g} times the effective draws "
        f"of {rows[1]['sampler']} per second with everything counted, "
        f"{_versus(rows, 'ESS/s'):.3g} times in sampling alone, "
        f"and {_versus(rows, 'ESS per 1,000 gradients'):.3g} times per gradient, those of warm-up "
        "and training included, a density counted as a third."
    )


def _lynx(*, quick: bool) -> Table:
    draws, arguments = 100 if quick else 1000, (pelts(),)
    start = lynx_starts(4)
    learning: dict[str, Any] = {"num_proposals": 48, "rounds": 1, "training_steps": 600}
    kernels: dict[str, Callable[[], Kernel]] = {
        "HNNHMC": lambda: HNNHMC(
            lotka_volterra, num_transitions=5, training_points=450, **learning
        ),
        "NUTS": lambda: NUTS(lotka_volterra),
        "HNNNUTS": lambda: HNNNUTS(lotka_volterra, **learning),
    }
    rows = []
    found = {}
    for seed in (0,) if quick else (0, 1, 2):
        for name, make in kernels.items():
            row, kept = ours(make(), arguments, draws=draws, start=start, seed=seed)
            found[name] = kept.position.numpy()
            rows.append({"sampler": name, "seed": seed} | row)
    few = 10 if quick else 30
    times: list[float] = []
    stock = competitors.PyroNUTS(lotka_volterra, full_mass=True)
    begun = {key: value[0] for key, value in start.items()}
    mcmc = competitors.PyroMCMC(
        stock,
        num_samples=few,
        warmup_steps=few,
        initial_params=begun,
        disable_progbar=True,
        hook_fn=lambda *_: times.append(time.perf_counter()),
    )
    with pyro.validation_enabled(False):  # noqa: FBT003
        mcmc.run(*arguments)
    each = (times[-1] - times[few - 1]) / few
    apart = found["HNNHMC"].mean((0, 1)) - found["NUTS"].mean((0, 1))
    apart = np.abs(apart / found["NUTS"].std((0, 1))).max()
    gain, gains = _over_seeds(rows, "HNNHMC", "NUTS")
    other, others = _over_seeds(rows, "HNNNUTS", "NUTS")
    return Table(
        "Lotka-Volterra, lynx and hare, 8 parameters, 4 chains, nothing compiled",
        rows,
        f"{draws} draws of each chain, 250 iterations of warm-up; stars of 48 proposals, for they "
        f"take hardly longer than a few, and one refit. {_says(rows)} Over all seeds, HNNHMC makes "
        f"{gain:.3g} times the effective draws of NUTS per second ({gains} with each), HNNNUTS "
        f"{other:.3g} times ({others}): to grow trees takes longer than to follow the network. "
        f"The means of HNNHMC and NUTS differ by {apart:.2g} posterior standard "
        f"deviations at most. Pyro's NUTS, tuned for {few} iterations only, takes {each:.3g} "
        "seconds for a draw of one chain, where one of all four takes HNNHMC "
        f"{rows[0]['sampling, s'] / draws:.2g}.",
        f"at least 10 times NUTS per second: {met(gain >= 10)} ({gain:.3g}).",
    )


def _rosenbrock(dimension: int, *, quick: bool) -> Table:
    draws = 100 if quick else 500
    kernels: dict[str, Kernel] = {
        "HNNNUTS": HNNNUTS(rosenbrock, fallback=False, num_transitions=5),
        "NUTS": NUTS(rosenbrock),
    }
    rows = [
        {"sampler": name} | ours(kernel, (dimension,), draws=draws)[0]
        for name, kernel in kernels.items()
    ]
    gain = _versus(rows, "ESS per 1,000 gradients")
    reach = "" if dimension != 3 else f"at least 10 times per gradient: {met(gain >= 10)}."
    return Table(
        f"The Rosenbrock density in {dimension} dimensions, 4 chains",
        rows,
        f"{draws} draws of each chain, five surrogate transitions to the centre of a star and five "
        "from there, the surrogate followed although gradients are cheap. "
        f"{_says(rows)} No sampler with one step size "
        "reaches the far ends of this valley: these figures compare samplers of what they reach.",
        reach,
    )


def _glmm(*, quick: bool) -> Table:
    draws, seeds = (50, (0,)) if quick else (5000, (0, 1, 2))
    arguments, reference = models.glmm_arguments(), models.glmm_reference()
    plain, compiled = marginalize(glmm, ["x"]), not quick
    lattice = marginalize(glmm, ["x"], num_particles=8, points="rqmc")

    def learned_kernel() -> HNNHMC:
        return HNNHMC(
            lattice,
            jit_compile=compiled,
            fallback=False,
            target_accept_prob=0.9,
            num_transitions=8,
            true_share=0.25,
            rounds=4,
            training_points=3000,
            training_steps=2000,
        )

    kernels: dict[str, tuple[Callable[[], Kernel], int | None]] = {
        "HNNHMC, 8 particles": (learned_kernel, 500),
        "HNNNUTS": (lambda: HNNNUTS(plain, jit_compile=compiled), None),
        "PseudoMarginalNUTS": (lambda: PseudoMarginalNUTS(plain, jit_compile=compiled), None),
        "PseudoMarginalHMC": (lambda: PseudoMarginalHMC(plain, jit_compile=compiled), None),
    }
    rows = []
    for seed in seeds:
        for name, (make, warmup) in kernels.items():
            start = models.glmm_starts(4)
            row, kept = ours(make(), arguments, draws=draws, start=start, warmup=warmup, seed=seed)
            score = largest_score(kept.position.numpy(), reference)
            rows.append({"sampler": name, "seed": seed} | row | {"max |z|": score})

    learned, default, true, short = kernels
    gain, gains = _over_seeds(rows, learned, true)
    quicker, _ = _over_seeds(rows, learned, short)
    held, helds = _over_seeds(rows, default, true)
    return Table(
        "The GLMM, s = 3, 4 chains, compiled",
        rows,
        f"{draws} draws of each chain. As many particles as the proposal chooses, except in the "
        "first row, where the surrogate is followed whatever it costs, eight transitions to the "
        "centre of a star and eight from there, after 500 iterations of warm-up: eight particles "
        "on a lattice make a noise that lets it be judged, and one transition of true gradients "
        f"to four stars leads out of where it is large. {_says([rows[0], rows[2]])} Over all seeds "
        f"it makes {gain:.3g} times the effective draws of PseudoMarginalNUTS per second with "
        f"everything counted ({gains} with each), and {quicker:.3g} times those "
        f"of PseudoMarginalHMC. By default, HNNNUTS makes {held:.3g} times those of "
        f"PseudoMarginalNUTS ({helds}): what differs there from run to run is the step that a "
        "warm-up finds.",
        f"at least 3 times per second, training included: {met(gain >= 3)} ({gain:.3g}); by "
        f"default never below 0.9: {met(held >= 0.9)} ({held:.3g}).",
    )


def _cheap(*, quick: bool) -> Table:
    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "eight schools": (models.schools_noncentred, models.schools_data()),
        "breast cancer": (models.logistic, models.logistic_data()),
    }
    rows, ratios = [], []
    for name, (model, arguments) in cases.items():
        rounds = [
            [
                ours(kind(model), arguments, draws=50 if quick else 1000)[0]
                for kind in (HNNNUTS, NUTS)
            ]
            for _ in range(1 if quick else _ROUNDS)
        ]
        ratios.append(statistics.median(_versus(pair, _IN_ALL) for pair in rounds))
        for kind, row in zip(("HNNNUTS", "NUTS"), rounds[-1], strict=True):
            rows.append({"posterior": name, "sampler": kind} | row)
    worst = min(ratios)
    return Table(
        "Where it would not pay, 4 chains, nothing compiled",
        rows,
        f"HNNNUTS measures, and follows true gradients: {', '.join(f'{r:.2g}' for r in ratios)} "
        f"times the effective draws of NUTS per second, the median of {_ROUNDS} rounds.",
        f"never below 0.9: {met(worst >= 0.9)} ({worst:.2g}).",
    )
