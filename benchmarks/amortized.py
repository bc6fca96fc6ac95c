"""A learned energy for all data sets of a model: when its training is paid back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor

from benchmarks.report import Row, Table, met
from benchmarks.surrogate import ours
from pyro_hamflow import HNNNUTS, NUTS, AmortizedSurrogate, learn_surrogate
from pyro_hamflow.mcmc.kernels.base import Kernel

ABOUT = "Amortised surrogates: one training for all patients"
HOURS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
DOSE = 100.0  # milligrams
_PATIENTS_SEED = 1
_WARMUP = 60  # iterations, along a surrogate that is there already


def concentrations(absorption: Tensor, volume: Tensor, fastest: Tensor, half: Tensor) -> Tensor:
    """Milligrams per litre at each of the hours, by the classical Runge-Kutta method.

    One compartment, which a dose enters in proportion to what is left of it, and leaves by an
    enzyme that saturates (Michaelis-Menten). A step for each concentration is right to 0.1 per cent
    for most patients of the prior; where all is eliminated at once, the model is the step's.

    Arguments:
        absorption: The rate of absorption, per hour.
        volume: Of the compartment, in litres.
        fastest: The greatest rate of elimination, in milligrams per litre and hour.
        half: The concentration at which elimination is half as fast.
    """

    def rate(c: Tensor, hour: float) -> Tensor:
        inflow = DOSE / volume * absorption * torch.exp(-absorption * hour)
        return inflow - fastest * c / (half + c)

    c, at, path = torch.zeros_like(absorption), 0.0, []
    for hour in HOURS:
        step = hour - at
        k1 = rate(c, at)
        k2 = rate(c + 0.5 * step * k1, at + 0.5 * step)
        k3 = rate(c + 0.5 * step * k2, at + 0.5 * step)
        k4 = rate(c + step * k3, hour)
        c, at = c + step / 6.0 * (k1 + 2.0 * (k2 + k3) + k4), hour
        path.append(c)
    return torch.stack(path)


def patient(y: Tensor) -> None:
    """Concentrations of one patient, of shape ``(10,)``; five parameters."""
    one = y.new_ones(())
    absorption = pyro.sample("absorption", dist.LogNormal(0.0 * one, 0.4))
    volume = pyro.sample("volume", dist.LogNormal((20.0 * one).log(), 0.3))
    fastest = pyro.sample("fastest", dist.LogNormal(0.0 * one, 0.3))
    half = pyro.sample("half", dist.LogNormal((3.0 * one).log(), 0.4))
    spread = pyro.sample("spread", dist.LogNormal((0.1 * one).log(), 0.3))
    expected = concentrations(absorption, volume, fastest, half)
    pyro.sample("y", dist.LogNormal(expected.log(), spread).to_event(1), obs=y)


def patients(count: int) -> list[Tensor]:
    """Data sets simulated from the prior."""
    pyro.set_rng_seed(_PATIENTS_SEED)
    free = poutine.uncondition(patient)
    blank = torch.ones(len(HOURS))
    return [poutine.trace(free).get_trace(blank).nodes["y"]["value"] for _ in range(count)]


def logarithms(data: Mapping[str, Tensor]) -> Tensor:
    """What the surrogate sees of a patient."""
    return data["y"].log()


def measure(*, quick: bool) -> list[Table]:
    """The same model, patient after patient; then compiled."""
    pyro.set_rng_seed(0)
    began = time.perf_counter()
    sizes: dict[str, Any] = {"num_sets": 256, "training_steps": 100} if quick else {}
    surrogate = learn_surrogate(
        patient, torch.ones(len(HOURS)), summary=logarithms, disable_progbar=True, **sizes
    )
    seconds = time.perf_counter() - began
    return [
        *_patient_after_patient(surrogate, seconds, quick=quick),
        _compiled(surrogate, quick=quick),
    ]


def _run(kernel: Kernel, y: Tensor, draws: int, warmup: int | None) -> tuple[Row, np.ndarray]:
    row, kept = ours(kernel, (y,), draws=draws, warmup=warmup)
    row["in all, s"] = row["before, s"] + row["sampling, s"]
    row["gradients in all"] = 1000 * row["smallest ESS"] / row["ESS per 1,000 gradients"]
    if isinstance(kernel, HNNNUTS) and isinstance(kernel.given, AmortizedSurrogate):
        row["gradients in all"] += kernel.given.n_probes  # before the first iteration
    row["ESS per 1,000 gradients"] = 1000 * row["smallest ESS"] / row["gradients in all"]
    return row, kept.position.numpy()


def _samplers(
    surrogate: AmortizedSurrogate, **settings: Any
) -> dict[str, tuple[Kernel, int | None]]:
    """Each with its warm-up."""
    return {
        "NUTS": (NUTS(patient, **settings), None),
        "HNNNUTS, learning anew": (HNNNUTS(patient, **settings), None),
        "HNNNUTS, amortised": (
            HNNNUTS(patient, surrogate=surrogate, adapt_mass_matrix=False, **settings),
            _WARMUP,
        ),
    }


def _patient_after_patient(
    surrogate: AmortizedSurrogate, seconds: float, *, quick: bool
) -> list[Table]:
    draws, count, compared = (50, 2, 1) if quick else (1000, 8, 3)
    amortised = "HNNNUTS, amortised"
    found: dict[str, list[Row]] = {}
    apart = []
    for i, y in enumerate(patients(count)):
        means: dict[str, np.ndarray] = {}
        spread = np.ones(1)
        for name, (kernel, warmup) in _samplers(surrogate).items():
            if i >= compared and name != amortised:
                continue
            row, position = _run(kernel, y, draws, warmup)
            found.setdefault(name, []).append(row)
            means[name] = position.mean((0, 1))
            spread = position.std((0, 1)) if name == "NUTS" else spread
        if i < compared:
            for name in list(means)[1:]:
                apart.append(float(np.abs((means[name] - means["NUTS"]) / spread).max()))
    rows = [_summarised(name, part[:compared]) for name, part in found.items()]
    rows.append(_summarised(f"{amortised}, all {count}", found[amortised]))
    middle = {name: _medians(part[:compared]) for name, part in found.items()}
    mine = middle.pop(amortised)
    paid: list[Row] = []
    for name, other in middle.items():
        saved = other["in all, s"] - mine["in all, s"]
        spared = other["gradients in all"] - mine["gradients in all"]
        paid.append(
            {
                "instead of": name,
                "seconds saved by each patient": saved,
                "training paid back in seconds after patients": seconds / saved,
                "gradients saved by each patient": spared,
                "training paid back in gradients after patients": surrogate.n_gradients / spared,
            }
        )
    worst = min(row["accepted"] for row in found[amortised])
    gains = [mine["ESS/s in all"] / other["ESS/s in all"] for other in middle.values()]
    alone = [mine["ESS/s"] / other["ESS/s"] for other in middle.values()]
    each = [
        mine["ESS per 1,000 gradients"] / other["ESS per 1,000 gradients"]
        for other in middle.values()
    ]
    return [
        Table(
            "Concentrations of a drug that an enzyme eliminates, 5 parameters, 4 chains, nothing "
            "compiled",
            rows,
            f"Medians over {compared} patients; {draws} draws of each chain. Gradients in all "
            "hold those of warm-up, and a density as a third of one. Warm-up takes 250 "
            f"iterations, {_WARMUP} with the amortised surrogate, trained once on simulated "
            "patients before. Beside NUTS and beside learning anew, it makes "
            f"{_both(gains)} times the effective draws per second with everything but that "
            f"training counted, {_both(alone)} times in sampling alone, and {_both(each)} times "
            "per gradient. Before sampling, most of a run is the "
            "capture of the model, made for each data set. Means differ from those of NUTS by "
            f"{max(apart):.2g} posterior standard deviations at most.",
            f"above 0.6 of proposals accepted for the worst of {count} patients: "
            f"{met(worst > 0.6)} ({worst:.2g}).",
        ),
        Table(
            "What the training costs, and when it is paid back",
            paid,
            f"It took {seconds:.3g} seconds, {surrogate.training.seconds:.3g} of them to fit the "
            f"energy, and {surrogate.n_gradients:,} true gradients, computed 64 at a time. A "
            f"patient takes {mine['in all, s']:.3g} seconds and "
            f"{mine['gradients in all']:,.0f} gradients or as much in densities.",
        ),
    ]


def _medians(rows: list[Row]) -> Row:
    return {
        name: statistics.median(row[name] for row in rows)
        for name, value in rows[0].items()
        if not isinstance(value, str)
    }


def _summarised(name: str, rows: list[Row]) -> Row:
    """Medians over patients, and what was worst."""
    middle = _medians(rows)
    columns = (
        "before, s",
        "sampling, s",
        "training, s",
        "gradients in all",
        "smallest ESS",
        "ESS/s in all",
        "ESS/s",
        "ESS per 1,000 gradients",
        "accepted",
    )
    return {
        "sampler": name,
        "patients": len(rows),
        **{column: middle[column] for column in columns},
        "accepted, worst": min(row["accepted"] for row in rows),
        "ESS/s in all, worst": min(row["ESS/s in all"] for row in rows),
        "R-hat, worst": max(row["R-hat"] for row in rows),
    }


def _both(ratios: list[float]) -> str:
    return " and ".join(f"{ratio:.3g}" for ratio in ratios)


def _compiled(surrogate: AmortizedSurrogate, *, quick: bool) -> Table:
    draws, y = 50 if quick else 1000, patients(1)[0]
    rows = [
        {"sampler": name} | _run(kernel, y, draws, warmup)[0]
        for name, (kernel, warmup) in _samplers(surrogate, jit_compile=not quick).items()
        if name != "HNNNUTS, learning anew"
    ]
    plain, mine = rows
    return Table(
        "The same, compiled, one patient",
        rows,
        f"{draws} draws of each chain. Compiling takes most of the time, for every data set anew. "
        f"The surrogate makes {mine['ESS/s in all'] / plain['ESS/s in all']:.3g} times the "
        "effective draws of NUTS per second with everything but its training counted, and "
        f"{mine['ESS/s'] / plain['ESS/s']:.3g} times in sampling alone.",
    )
