"""Statistics of runs that are healthy, and of others that are sick: ``make gallery``.

A funnel, by NUTS as it is and written non-centred; and two modes, by NUTS and by FlowNUTS.
"""

from __future__ import annotations

from pathlib import Path

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf


def funnel() -> None:
    """The width of eight normals varies by e to the power of three, either way."""
    log_width = pyro.sample("log_width", dist.Normal(0.0, 3.0))
    with pyro.plate("row", 8):
        pyro.sample("x", dist.Normal(0.0, log_width.exp()))


def apart() -> None:
    """The same funnel, its width and its shape apart."""
    log_width = pyro.sample("log_width", dist.Normal(0.0, 3.0))
    with pyro.plate("row", 8):
        shape = pyro.sample("shape", dist.Normal(0.0, 1.0))
        pyro.deterministic("x", shape * log_width.exp())


def two_modes() -> None:
    """Three quarters of the mass at 3, one quarter at -3."""
    sides = dist.Categorical(torch.tensor([0.25, 0.75]))
    law = dist.MixtureSameFamily(sides, dist.Normal(torch.tensor([-3.0, 3.0]), 0.5))
    pyro.sample("side", law)


def run(kernel: phf.NUTS | phf.FlowNUTS) -> phf.MCMC:
    mcmc = phf.MCMC(kernel, 500, 300, num_chains=4, seed=3)
    mcmc.run()
    return mcmc


def main() -> None:
    torch.set_default_dtype(torch.float64)
    runs = {
        "funnel, sick: NUTS": run(phf.NUTS(funnel, max_tree_depth=6)),
        "funnel, healthy: non-centred": run(phf.NUTS(apart)),
        "two modes, sick: NUTS": run(phf.NUTS(two_modes)),
        "two modes, healthy: FlowNUTS": run(phf.FlowNUTS(two_modes)),
    }
    figure, axes = plt.subplots(4, 3, figsize=(11, 10), constrained_layout=True)
    for row, (name, mcmc) in zip(axes, runs.items(), strict=True):
        stats, colour = mcmc.draws.stats, "C3" if "sick" in name else "C0"
        energy = stats["energy"]
        parameter = mcmc.draws.position[..., 0]
        row[0].plot(parameter.mT, lw=0.5)
        row[0].set(title=name, xlabel="draw", ylabel=next(iter(mcmc.get_samples())))
        centred = (energy - energy.mean()).flatten()
        bins = torch.linspace(float(centred.min()), float(centred.max()), 40).numpy()
        row[1].hist(centred, bins, density=True, alpha=0.4, color=colour, label="energy")
        steps = energy.diff(dim=-1).flatten()
        row[1].hist(steps, bins, density=True, histtype="step", color="k", label="its steps")
        row[1].set(title=f"energy; smallest BFMI {arviz.bfmi(energy.numpy()).min():.2f}")
        row[1].legend()
        row[2].hist(stats["tree_depth"].flatten(), bins=range(12), color=colour, align="left")
        diverging = int(stats["diverging"].sum())
        row[2].set(title=f"tree_depth; {diverging} of 2,000 diverging", xlabel="depth")
        print(name, *(mcmc.messages or ["nothing is wrong"]), sep="\n  ")
        print("  " + ", ".join(f"{k} {float(v.double().mean()):.3g}" for k, v in stats.items()))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
