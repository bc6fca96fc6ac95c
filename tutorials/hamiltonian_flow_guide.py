# %% [markdown]
# # A guide by Hamiltonian motion, and whether to trust it
# Variational inference fits a distribution that one can draw from, and says nothing about how far
# it is from the posterior. Here the distribution is a Neural Hamiltonian Flow (Souveton et al.,
# 2023); importance weights tell how far it is, correct what it draws, and give the evidence.

# %%
import os

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
pyro.set_rng_seed(0)
smoke = os.environ.get("SMOKE") == "1"  # small and fast, and nothing is learned
steps, draws = (20, 500) if smoke else (1500, 20_000)

# %% [markdown]
# ## A real model: eight schools
# Eight schools coached pupils for a test; we know each one's estimated effect and its standard
# error (Rubin, 1981). How much do schools differ? The posterior of their spread `tau` is skewed,
# with a long tail, and what it is decides how far each school's effect is drawn to the mean.

# %%
effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(errors, effects):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(errors)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


# %% [markdown]
# ## The guide, trained by Pyro's SVI
# Positions from a Laplace approximation are given momenta, and both follow leapfrog steps of a
# learned Hamiltonian, which preserve volume: densities stay known. It is a guide like any other.

# %%
by_svi = phf.AutoNeuralHamiltonianFlow(schools)
elbo = pyro.infer.Trace_ELBO(num_particles=16, vectorize_particles=True)
svi = pyro.infer.SVI(schools, by_svi, pyro.optim.Adam({"lr": 5e-3}), elbo)
for _ in range(5 if smoke else 300):
    loss = svi.step(errors, effects)
print(f"SVI: minus the bound, at the last step: {loss:.2f}")

# %% [markdown]
# ## The same in one call, faster
# `fit_guide` captures the model once and keeps the best state. `reverse_encoder=True` learns what
# momenta the motion ends with: without it, they must end as N(0, I), which costs part of the bound.

# %%
guides = {"fixed": phf.AutoNeuralHamiltonianFlow(schools)}
guides["learned"] = phf.AutoNeuralHamiltonianFlow(schools, reverse_encoder=True)
for name, guide in guides.items():
    before = phf.importance_sample(schools, guide, errors, effects, num_samples=draws)
    print(f"last momenta {name}, untrained: {before}")
    print(phf.fit_guide(schools, guide, errors, effects, num_steps=steps, seed=0))

# %% [markdown]
# ## Whether to trust it: k, and the correction
# The weights' tail has shape k: below 0.7, weighted draws can be relied on. The bound lies below
# the log evidence by all that the guide misses, its momenta included; the weights' mean does not:
# by quadrature the log evidence is -31.3114.

# %%
found = {
    name: phf.importance_sample(schools, guide, errors, effects, num_samples=draws, seed=1)
    for name, guide in guides.items()
}
for name, result in found.items():
    print(f"last momenta {name}: {result}\n  {result.message}")
best = found["learned"]
raw, tau = best.samples["tau"].mean(), best.samples["tau"]
corrected = best.mean(tau)
print(f"tau: guide alone {raw:.2f}, corrected {corrected:.2f}, by quadrature 3.60")

# %% [markdown]
# ## The guide as a proposal
# `FlowMH` accepts or rejects the guide's draws: chains that are exact without weights, no gradient
# evaluated. Where k is far above 0.7 they would stand still for long, and R-hat would say so.

# %%
kernel = phf.FlowMH(schools, guides["learned"])
mcmc = phf.MCMC(kernel, num_samples=50 if smoke else 2000, warmup_steps=0, num_chains=4, seed=2)
mcmc.run(errors, effects)
print(f"FlowMH: {mcmc.draws.stats['acceptance_rate'].mean():.0%} of the proposals accepted")
mcmc.summary()

# %% [markdown]
# ## ArviZ, and what was learned
# Weighted draws become as many draws of equal weight as they are effectively worth. The potential,
# here in the plane of mu and log tau, is what the motion follows.

# %%
idata = phf.to_inference_data(best)
figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
at = [guides["learned"].loc[i].item() for i in (0, 1)]
extent = (at[0] - 10.0, at[0] + 10.0, at[1] - 5.0, at[1] + 5.0)
phf.plot_potential(guides["learned"], extent=extent, axes=axes[0])
axes[0].set(xlabel="mu", ylabel="log tau", aspect="auto")
axes[1].hist(tau.clamp(max=20), bins=60, density=True, alpha=0.5, label="guide alone")
weights = best.weights / best.weights.sum()
axes[1].hist(
    tau.clamp(max=20), 60, weights=weights, density=True, histtype="step", label="weighted"
)
axes[1].set(xlabel="tau")
axes[1].legend()
axes[2].hist(best.log_weights - best.log_evidence, bins=100)
axes[2].set(xlabel="log weight, less the log evidence", yscale="log")
figure.savefig("hamiltonian_flow_guide.png", dpi=100)
print(arviz.summary(idata, var_names=["mu", "tau", "theta"], kind="stats").to_string())

# %% [markdown]
# A k above 0.7, an `ess` of a few per cent, or an evidence that moves by more than its error when
# the guide is trained for longer: any of these would have looked wrong.
