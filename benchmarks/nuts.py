"""NUTS: effective draws per second, beside NumPyro's and Pyro's on the same posteriors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyro
import torch

from benchmarks import competitors, models
from benchmarks.competitors import Run
from benchmarks.diagnostics import largest_rhat, largest_score, smallest_ess
from benchmarks.report import Row, Table, met
from benchmarks.timing import nothing_compiled, seconds
from pyro_hamflow import MCMC, NUTS, PseudoMarginalHMC, PseudoMarginalNUTS, marginalize
from pyro_hamflow.mcmc.kernels.base import Kernel
from tests.helpers.targets import glmm
from tests.reference.make_glmm import Marginal, make_data, prior_sd

ABOUT = "NUTS: effective draws per second"
_SPREADS = (3.0, 1.0)
_GOALS = {3.0: 500.0, 1.0: 30.0}


def measure(*, quick: bool) -> list[Table]:
    """Four posteriors against both competitors, then the GLMM."""
    tables = [_plain(quick=quick), _joint_glmm(quick=quick)]
    tables += [_glmm(spread, quick=quick) for spread in _SPREADS[: 1 if quick else 2]]
    return tables


def quality(run: Run) -> Row:
    """Smallest effective sample size, largest R-hat, and what they cost."""
    least = smallest_ess(run.draws)
    worst = largest_rhat(run.draws) if len(run.draws) > 1 else float("nan")
    whole = run.preparing + run.warming + run.sampling
    return {
        "steps per draw": run.steps,
        "preparing, s": run.preparing,
        "warm-up, s": run.warming,
        "sampling, s": run.sampling,
        "smallest ESS": least,
        "R-hat": worst,
        "ESS/s": least / run.sampling,
        "ESS/s in all": least / whole,
    }


def our_run(
    kernel: Kernel,
    arguments: tuple[Any, ...],
    *,
    chains: int,
    warmup: int | None,
    draws: int,
    start: Any = None,
) -> Run:
    """One of our kernels, compiled from nothing.

    A run of two draws that compiles everything is made first: its seconds are the preparation.
    """
    settings: dict[str, Any] = {
        "num_chains": chains,
        "initial_params": start,
        "seed": 0,
        "disable_progbar": True,
    }
    with nothing_compiled():
        preparing = seconds(lambda: MCMC(kernel, 2, 0, **settings).run(*arguments))[0]
        mcmc = MCMC(kernel, draws, warmup, **settings)
        mcmc.run(*arguments)
    stats = mcmc.draws.stats
    steps = float(stats["n_steps"].double().mean())
    return Run(mcmc.draws.position.numpy(), preparing, mcmc.warmup_time, mcmc.sampling_time, steps)


def _plain(*, quick: bool) -> Table:
    rows: list[Row] = []
    warmup, draws = (50, 50) if quick else (500, 500)
    cases: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
        "eight schools": (
            models.schools_noncentred,
            competitors.schools,
            models.schools_data(),
        ),
        "breast cancer, 31 parameters": (
            models.logistic,
            competitors.logistic,
            models.logistic_data(),
        ),
        "normal, 100 dimensions": (
            models.correlated,
            competitors.correlated,
            models.correlated_data(),
        ),
    }
    for name, (ours, theirs, arguments) in cases.items():
        plain = tuple(argument.numpy() for argument in arguments)
        pyro.set_rng_seed(0)
        few = (20, 10) if quick else (200, 100)
        best = [
            quality(competitors.pyro_run(ours, arguments, warmup=few[0], draws=few[1], dense=dense))
            for dense in ((True,) if quick else (False, True))
        ]
        stock = max(best, key=lambda row: row["ESS/s"])
        masses = (True,) if quick else (False, True)
        rows.append({"posterior": name, "sampler": "Pyro", "chains": 1} | stock | {"ours /": ""})
        for chains in (4, 64):
            kernel = NUTS(ours, jit_compile=True)
            run = our_run(kernel, arguments, chains=chains, warmup=warmup, draws=draws)
            mine = quality(run)
            tried = {
                dense: quality(
                    competitors.numpyro_run(
                        theirs, plain, chains=chains, warmup=warmup, draws=draws, dense=dense
                    )
                )
                for dense in masses
            }
            masses = (max(tried, key=lambda dense: tried[dense]["ESS/s"]),)
            other = tried[masses[0]]
            label = {"posterior": name, "chains": chains}
            versus = (
                f"{mine['ESS/s'] / other['ESS/s']:.3g}x NumPyro "
                f"({mine['ESS/s in all'] / other['ESS/s in all']:.3g}x in all), "
                f"{mine['ESS/s'] / stock['ESS/s']:.3g}x Pyro"
            )
            rows.append(label | {"sampler": "ours"} | mine | {"ours /": versus})
            rows.append(label | {"sampler": "NumPyro"} | other | {"ours /": ""})
    order = ("posterior", "chains", "sampler")
    rows = [{k: row[k] for k in (*order, *(k for k in row if k not in order))} for row in rows]
    return Table(
        "NUTS on three posteriors",
        rows,
        f"{warmup} iterations of warm-up and {draws} draws of every chain, all chains at once; one "
        f"chain of {few[0]} and {few[1]} for Pyro, whose chains cost the same each. Competitors "
        "ran with a diagonal and with a dense mass, and the better is shown. One thread each. "
        "Preparing is capture and compilation with empty caches; ESS/s counts sampling alone, the "
        "column after it everything.",
        _reach(rows),
    )


def _reach(rows: list[Row]) -> str:
    """What was to be reached on the three posteriors, and where it was."""
    rate = {(row["posterior"], row["sampler"], row["chains"]): row["ESS/s"] for row in rows}
    names = dict.fromkeys(row["posterior"] for row in rows)
    stock = [
        rate[name, "ours", chains] >= least * rate[name, "Pyro", 1]
        for name in names
        for chains, least in ((4, 10.0), (64, 50.0))
    ]
    short = [
        f"{name} with {chains} chains"
        for name in names
        for chains in (4, 64)
        if rate[name, "ours", chains] < rate[name, "NumPyro", chains]
    ]
    others = f"not reached for {', '.join(short)}; see the next topic" if short else met(True)
    return (
        f"at least 50 times Pyro's at 64 chains, 10 times at 4: {met(all(stock))}; and NumPyro's "
        f"at both: {others}."
    )


def _joint_glmm(*, quick: bool) -> Table:
    chains, (warmup, draws) = 4, ((50, 50) if quick else (300, 300))
    arguments = models.glmm_arguments(spread=1.0)
    plain = tuple(a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments)
    run = our_run(
        NUTS(models.joint_glmm, jit_compile=True),
        arguments,
        chains=chains,
        warmup=warmup,
        draws=draws,
    )
    mine = quality(run)
    other = quality(
        competitors.numpyro_run(
            competitors.joint_glmm, plain, chains=chains, warmup=warmup, draws=draws, dense=False
        )
    )
    return Table(
        "NUTS on the GLMM with its 500 effects as parameters, s = 1, 4 chains",
        [{"sampler": "ours"} | mine, {"sampler": "NumPyro"} | other],
        f"{warmup} iterations of warm-up and {draws} draws. Ours makes "
        f"{mine['ESS/s'] / other['ESS/s']:.3g} times the effective draws per second of NumPyro's.",
    )


def _glmm(spread: float, *, quick: bool) -> Table:
    arguments = models.glmm_arguments(spread=spread)
    reference = models.glmm_reference(spread)
    start = models.glmm_starts(4, spread)
    draws = 50 if quick else 500
    rows: list[Row] = []
    kernels = {
        "PseudoMarginalNUTS": (PseudoMarginalNUTS, {}, {}),
        "PseudoMarginalNUTS, 16 particles": (PseudoMarginalNUTS, {"num_particles": 16}, {}),
        "PseudoMarginalNUTS, joint": (PseudoMarginalNUTS, {}, {"method": "joint"}),
        "PseudoMarginalHMC": (PseudoMarginalHMC, {}, {}),
    }
    for name, (kind, estimate, settings) in kernels.items():
        marginal = marginalize(glmm, ["x"], **estimate)
        kernel = kind(marginal, jit_compile=True, **settings)
        run = our_run(
            kernel, arguments, chains=4, warmup=50 if quick else None, draws=draws, start=start
        )
        rows.append(
            {"sampler": name} | quality(run) | {"max |z|": largest_score(run.draws, reference)}
        )
    plain = tuple(a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments)
    joint_start = {k: jnp.asarray(v.numpy()) for k, v in start.items()}
    joint_start["x"] = jnp.zeros((4, 500))
    joint = competitors.numpyro_run(
        competitors.joint_glmm,
        plain,
        chains=4,
        warmup=50 if quick else 500,
        draws=draws,
        dense=False,
        start=joint_start,
    )
    rows.append({"sampler": "NumPyro, 513 parameters"} | quality(joint) | {"max |z|": "-"})
    expert = _expert(spread, start, warmup=50 if quick else 250, draws=50 if quick else 250)
    score = largest_score(expert.draws, reference)
    rows.append({"sampler": "NumPyro, quadrature by hand"} | quality(expert) | {"max |z|": score})
    mine = rows[0]["ESS/s"]
    against_joint, against_expert = mine / rows[-2]["ESS/s"], mine / rows[-1]["ESS/s"]
    return Table(
        f"The GLMM, priors with s = {spread:g}, 4 chains",
        rows,
        f"The default makes {against_joint:.3g} times the effective draws per second of NumPyro's "
        f"NUTS on the model with its random effects, and {against_expert:.3g} times those of "
        "NumPyro's NUTS on the marginal likelihood written by hand with quadrature. max |z| is the "
        "largest difference of the 13 means from quadrature, in standard errors.",
        f"at least {_GOALS[spread]:g} times the first: {met(against_joint >= _GOALS[spread])}; at "
        f"least twice the second: {met(against_expert >= 2)}.",
    )


def _expert(spread: float, start: dict[str, Any], *, warmup: int, draws: int) -> Run:
    """NumPyro's NUTS on the marginal likelihood by quadrature."""
    marginal = Marginal(make_data())
    scale = jnp.asarray(prior_sd(spread))
    names = ("beta", "mu", "log_precision", "logit_weight")
    rows = np.concatenate([start[name].reshape(4, -1).numpy() for name in names], -1)
    return competitors.numpyro_run(
        None,
        (),
        chains=4,
        warmup=warmup,
        draws=draws,
        dense=True,
        potential=lambda theta: 0.5 * jnp.sum((theta / scale) ** 2) - marginal.loglik(theta),
        start=jnp.asarray(rows),
    )
