# %% [markdown]
# # Who is a union member? A random-effects logit, the men integrated out
#
# 545 young men were asked in each of eight years whether they belong to a union (Vella and Verbeek,
# 1998). Some men are members nearly always, others never, for reasons that the data do not record:
# each man has an effect of his own. We integrate the 545 effects out by an unbiased estimate of
# each man's likelihood, sample the exact posterior of what is left, and recover the effects.

# %%
import sys

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from linearmodels.datasets import wage_panel

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## The data: 545 men x 8 years

# %%
panel = wage_panel.load().sort_values(["nr", "year"])
men, years = panel["nr"].unique(), panel["year"].unique()
names = ["educ", "exper", "black", "hisp", "married"]
scaled = (panel[names] - panel[names].mean()) / panel[names].std()
covariates = torch.tensor(scaled.to_numpy().reshape(len(men), len(years), -1))
union = torch.tensor(panel["union"].to_numpy(dtype=float).reshape(len(men), len(years)))


# %% [markdown]
# ## The model: an ordinary Pyro model


# %%
def membership(covariates, union):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 3.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([covariates.shape[-1]]).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(3.0))
    with pyro.plate("man", covariates.shape[0], dim=-2):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
        with pyro.plate("year", covariates.shape[1], dim=-1):
            logits = intercept + covariates @ slope + effect
            pyro.sample("union", dist.Bernoulli(logits=logits), obs=union)


# %% [markdown]
# ## The run
# `marginalize` replaces the effects by an estimate of each man's likelihood from 16 particles,
# drawn where a Laplace approximation of his likelihood says that they matter (the default for
# Gaussian effects).

# %%
marginal = phf.marginalize(membership, ["effect"], num_particles=16)
kernel = phf.PseudoMarginalHMC(marginal, full_mass=True)
mcmc = phf.MCMC(kernel, num_samples=800, warmup_steps=250, num_chains=4, seed=1)
mcmc.run(covariates, union)

coords = {"man": men, "year": years, "covariate": names}
idata = phf.to_inference_data(mcmc, coords=coords, dims={"slope": ["covariate"]})
idata.to_netcdf("quickstart.nc")

# %% [markdown]
# ## What was learned

# %%
parameters = ["intercept", "slope", "spread"]
summary = arviz.summary(idata, var_names=parameters, round_to="none")
print(summary.round(3).to_string())

posterior = idata.posterior
spread = float(posterior["spread"].mean())
share = float((posterior["spread"] ** 2 / (posterior["spread"] ** 2 + torch.pi**2 / 3)).mean())
print(
    f"\nWhat a man is like, beyond what was recorded of him, explains {share:.0%} of who is a "
    f"union member (standard deviation of the men's effects {spread:.2f} on the logit scale), far "
    "more than schooling, experience, origin or marriage do."
)

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
axes[0, 0].plot(posterior["spread"].values.T, lw=0.5)
axes[0, 0].set(title="The four chains", xlabel="draw", ylabel="spread of the effects")
slopes = posterior["slope"].quantile([0.05, 0.5, 0.95], ("chain", "draw")).values
axes[0, 1].errorbar(slopes[1], names, xerr=abs(slopes[[0, 2]] - slopes[1]), fmt="o")
axes[0, 1].axvline(0.0, color="black", lw=0.7)
axes[0, 1].set(title="Slopes, with their 90%", xlabel="logit, for a standard deviation")
effects = posterior["effect"].mean(("chain", "draw")).to_numpy().ravel()
axes[1, 0].hist(effects, bins=40)
axes[1, 0].set(title="Recovered effects, posterior means", xlabel="effect of a man (logit)")
years_in = union.sum(-1).numpy()
axes[1, 1].scatter(years_in, effects, s=8, alpha=0.5)
axes[1, 1].set(title="Effects against membership", xlabel="years in a union", ylabel="effect")
figure.savefig("quickstart.png", dpi=100)

# %% [markdown]
# ## What would look wrong
# R-hat above 1.01 or few effective draws: the chains have not met. Divergences, or a fraction of
# missing information (BFMI) below 0.3: the kernel does not follow the posterior's shape.

# %%
worst_rhat, fewest = summary["r_hat"].max(), summary["ess_bulk"].min()
diverging = int(idata.sample_stats["diverging"].sum())
bfmi = float(arviz.bfmi(idata.sample_stats["energy"].to_numpy()).min())
print(
    f"Diagnostics: R-hat at most {worst_rhat:.2f}, at least {fewest:.0f} effective draws, "
    f"{diverging} divergences, BFMI {bfmi:.2f}; written to quickstart.nc and quickstart.png."
)
if worst_rhat > 1.02 or fewest < 200 or diverging > 0 or bfmi < 0.3:
    sys.exit("The diagnostics are bad: do not use these draws.")
