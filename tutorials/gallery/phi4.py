# %% [markdown]
# # A field with two phases: both of them, and what a tilt costs
#
# A chain of 100 coupled double wells lies almost wholly at +1 or at -1. Between the phases its
# density is 4e-7 of what it is in them, so that no local move ever crosses, and a run of NUTS knows
# one phase alone. The prior of the model is a Gaussian that knows the coupling; a population that
# cools from it finds both phases, and a flow built on its draws and gradients jumps between them.
# The frozen flow then tells free energies without another run.

# %%
from __future__ import annotations

import os

import arviz
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
SMOKE = "SMOKE" in os.environ

# %% [markdown]
# ## The field: density exp(-beta U), its ends held at zero, tilted by b
# What bends the field is Gaussian, and so the prior; the wells are a factor.

# %%
SITES, SPACING, BETA = 100, 0.1, 20.0
LENGTH = SPACING * SITES
NEXT = torch.ones(SITES - 1).diag(1)
BENDING = LENGTH * (2.0 * torch.eye(SITES) - NEXT - NEXT.mT)
PRIOR = dist.MultivariateNormal(
    torch.zeros(SITES), precision_matrix=BETA * (BENDING + torch.eye(SITES) / LENGTH)
)


def energy(field, tilt):
    wells = ((1.0 - field.square()).square() / 4.0 + tilt * field).sum(-1) / LENGTH
    return 0.5 * (field * (field @ BENDING)).sum(-1) + wells


def scalar_field(tilt=0.0):
    field = pyro.sample("field", PRIOR)
    pyro.deterministic("mean", field.mean(-1))
    pyro.factor("boltzmann", -BETA * energy(field, tilt) - PRIOR.log_prob(field))


# %% [markdown]
# ## NUTS, and NUTS with jumps
# Each with 16 chains and nothing to tune.

# %%
DRAWS = 30 if SMOKE else 300
kernel = phf.FlowNUTS(scalar_field, num_particles=400 if SMOKE else 2000)
means = {}
for name, one in (("NUTS", phf.NUTS(scalar_field)), ("FlowNUTS", kernel)):
    mcmc = phf.MCMC(one, DRAWS, 100 if SMOKE else 500, num_chains=16, seed=0)
    mcmc.run()
    idata = phf.to_inference_data(mcmc)
    print(arviz.summary(idata, var_names=["mean"]).to_string())
    means[name] = torch.as_tensor(idata.posterior["mean"].values)
accepted = float(idata.sample_stats.global_accepted.mean())
share = float((means["FlowNUTS"] > 0).double().mean())
print(f"jumps accepted {accepted:.3f}; P(+) {share:.4f}, by symmetry .5")

# %% [markdown]
# ## Free energies: draws of the frozen flow, weighted anew for each tilt
# The truth, by the transfer operator on a grid: log Z(b) - log Z(0), P(+) and the mean.

# %%
LOG_Z = -196.91222
TRUTH = {
    0.001: (0.012172, 0.422686, -0.121230),
    0.005: (0.278968, 0.173823, -0.511990),
    0.010: (0.916024, 0.042394, -0.720350),
    0.015: (1.670128, 0.009231, -0.775481),
    0.020: (2.454381, 0.001958, -0.790211),
    0.025: (3.247774, 0.000413, -0.795969),
}


def weigh(tilt):
    many = 2000 if SMOKE else 40_000
    return phf.importance_sample(scalar_field, kernel.flow, tilt, num_samples=many, seed=0)


flat = weigh(0.0)
print(f"log Z {flat.log_evidence:.4f} +- {flat.log_evidence_error:.4f}, truth {LOG_Z}")
differences = {}
for tilt, (difference, positive, mean) in TRUTH.items():
    tilted = weigh(tilt)
    average = tilted.samples["field"].mean(-1)
    differences[tilt] = tilted.log_evidence - flat.log_evidence
    print(
        f"b {tilt:5.3f}: log Z(b) - log Z(0) {differences[tilt]:.4f} ({difference:.4f}), "
        f"P(+) {float(tilted.mean((average > 0).double())):.4f} ({positive:.4f}), "
        f"mean {float(tilted.mean(average)):.4f} ({mean:.4f})"
    )

# %% [markdown]
# ## The picture, and the check
# What would have looked wrong stands in the second panel: chains of NUTS are lines that never cross
# zero, an `r_hat` far above 1.01 of `mean` if they began in both phases, and nothing at all if they
# began in one.

# %%
figure, panels = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
panels[0].plot(flat.resample(60)["field"].mT, color="tab:blue", lw=0.3)
panels[0].set(xlabel="site", ylabel="field", title="draws")
for panel, (name, mean) in zip(panels[1:3], means.items(), strict=True):
    panel.plot(mean[:4].mT, lw=0.7)
    panel.set(xlabel="draw", ylabel="mean of the field", title=name, ylim=(-1.3, 1.3))
panels[3].plot(list(TRUTH), [truth[0] for truth in TRUTH.values()], "k-", label="transfer operator")
panels[3].plot(*zip(*differences.items(), strict=True), "o", label="weights of the flow")
panels[3].set(xlabel="tilt b", ylabel="log Z(b) - log Z(0)")
panels[3].legend()
figure.savefig("phi4.png", dpi=120)

crossed = int((means["NUTS"][:, 1:] * means["NUTS"][:, :-1] < 0).sum())
print(f"NUTS crossed {crossed} times")
error = float(arviz.mcse((means["FlowNUTS"] > 0).double().numpy()))
assert crossed == 0
assert abs(share - 0.5) < max(0.01, 4 * error)
assert abs(flat.log_evidence - LOG_Z) < (0.2 if SMOKE else 0.03)
allowed = 0.2 if SMOKE else 0.02
assert all(abs(differences[tilt] - truth[0]) < allowed for tilt, truth in TRUTH.items())
