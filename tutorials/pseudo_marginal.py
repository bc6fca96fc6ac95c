# %% [markdown]
# # Effects from a mixture: what particles, proposals and the two NUTS do
# The model of Alenlöv, Doucet and Lindsten (2021): 500 subjects answer yes or no six times.

# %%
import os

import arviz
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
smoke = os.environ.get("SMOKE") == "1"  # small and fast, and nothing is learned
subjects, counts, draws, warmup = (30, [4], 16, 8) if smoke else (500, [4, 16, 64], 500, 200)

# %% [markdown]
# ## The model, and data simulated from it
# Of the subjects, 80% come from a narrow component around 0, the others from one around 3. The
# proposal `paper` is that of the article, N(0, 9), which knows neither parameters nor answers.


# %%
def mixture(mu, log_precision, logit_weight):
    weights = dist.Categorical(logits=torch.stack([logit_weight, torch.zeros_like(logit_weight)]))
    return dist.MixtureSameFamily(weights, dist.Normal(mu, (-0.5 * log_precision).exp()))


def model(z, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([8]).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    log_precision = pyro.sample("log_precision", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    logit_weight = pyro.sample("logit_weight", dist.Normal(0.0, 3.0))
    with pyro.plate("subject", z.shape[0], dim=-2):
        x = pyro.sample("x", mixture(mu, log_precision, logit_weight))
        with pyro.plate("visit", z.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=x + z @ beta), obs=y)


def paper(parameters, z, y):
    with pyro.plate("subject", z.shape[0], dim=-2):
        pyro.sample("x", dist.Normal(0.0, 3.0))


rng = np.random.default_rng(20)
beta, z = rng.standard_normal(8), rng.standard_normal((subjects, 6, 8))
low, narrow = rng.random(subjects) < 0.8, rng.normal(0.0, 10**-0.5, subjects)
effects = np.where(low, narrow, rng.normal(3.0, 3**-0.5, subjects))[:, None]
y = rng.random((subjects, 6)) < 1 / (1 + np.exp(-(effects + z @ beta)))
z, y = torch.tensor(z), torch.tensor(y).double()
truth = [torch.tensor([0.0, 3.0]), torch.tensor([10.0, 3.0]).log(), torch.tensor(0.8).logit()]
names = ["mu", "log_precision", "logit_weight"]
at_truth = {"beta": torch.tensor(beta)} | dict(zip(names, truth, strict=True))

# %% [markdown]
# ## Why integrate the effects out
# Plain NUTS refuses a mixture, which has no map from the real line. Given one by a subclass, 1,200
# draws in 513 dimensions, at 95 gradients each, were worth 6 for the log precisions: a component's
# width can change little while its subjects stay in place. Without effects, 13 dimensions are left.

# %% [markdown]
# ## How noisy is the estimate?
# The standard deviation (sd) of the log-likelihood estimate at the truth, which should be near one
# or less, by number of particles; at 16, short runs too. Joint moves, of parameters and noise
# together, need an estimate that is smooth as a whole. Conditional ones hold the noise, then renew
# it: the refresh rate is the share of subjects whose new noise is accepted.

# %%
for label, proposal in {"N(0, 9)": paper, "prior": "prior", "laplace": "laplace"}.items():
    line = f"{label:8}"
    for count in counts:  # chains start at the pilot, too
        estimate = phf.marginalize(model, ["x"], num_particles=count, proposal=proposal)
        estimate.fit(z, y, pilot=at_truth)
        quality = phf.estimator_quality(estimate, at_truth, z, y)
        line += f"  sd at {count}: {quality.standard_deviation:5.2f}"
        for method in ["joint", "conditional"] if count == 16 else []:
            kernel = phf.PseudoMarginalHMC(estimate, method=method, step_size=0.03, max_num_steps=8)
            short = phf.MCMC(kernel, num_samples=15, warmup_steps=0, num_chains=2, seed=0)
            short.run(z, y)
            rate = "acceptance_rate" if method == "joint" else "refresh_rate"
            line += f" ({method} {rate} {short.draws.stats[rate].mean():.2f})"
    print(line)

# %% [markdown]
# ## The two NUTS, and a bad run
# Conditional trajectories end where the parameters turn back, joint ones after half a turn of the
# noise at the latest: too early for the log precisions here. They pay where the estimate's variance
# is above 20 or so. By default (`method="auto"`) the kernel measures the variance and chooses.
# The bad run has the paper's proposal and four particles. It accepts what it was tuned to accept,
# but holds on to noise that overestimates subjects: its chains do not meet.

# %%
laplace = phf.marginalize(model, ["x"], num_particles=4)
wide = phf.marginalize(model, ["x"], num_particles=4, proposal=paper)
good = {"max_tree_depth": 3} if smoke else {"target_accept_prob": 0.9, "jit_compile": True}
runs = {}
for label, marginal, method, length, settings in [
    ("joint", laplace, "joint", draws // 2, good),
    ("bad", wide, "conditional", draws // 4, {}),
    ("conditional", laplace, "conditional", draws, good),
]:
    kernel = phf.PseudoMarginalNUTS(marginal, method=method, **settings)
    runs[label] = mcmc = phf.MCMC(kernel, length, min(length, warmup), num_chains=4, seed=1)
    mcmc.run(z, y)
    stats = mcmc.draws.stats
    parts = [part for part in mcmc.diagnostics().values() if "n_eff" in part]
    shown = ["tree_depth", "n_gradients", "acceptance_rate", "refresh_rate"]
    found = {name: stats[name].double().mean() for name in shown if name in stats}
    found["R-hat"] = max(part["r_hat"].max() for part in parts)
    found["smallest ESS"] = min(part["n_eff"].min() for part in parts)
    found["ESS for 1,000 gradients"] = 1000 * found["smallest ESS"] / stats["n_gradients"].sum()
    found["BFMI"] = arviz.bfmi(stats["energy"].numpy()).min()
    found["log-likelihood"] = stats["log_likelihood_estimate"].mean()
    shown = [f"{name} {float(value):.2f}" for name, value in found.items()]
    print(label, *mcmc.messages, ", ".join(shown), sep="\n  ")

# %% [markdown]
# ## What was learned
# The prior does not order the components: chains keep the labels of the pilot that they start near.
# The share below, 0 or 1, says whether the first one, whose weight `logit_weight` is, is the low
# one. `loo` leaves out subjects: it judges all answers of a new one, not one more of an old one.

# %%
share = float((mcmc.get_samples()["mu"].diff() > 0.0).double().mean())
coords = {"component": ["low", "high"] if share > 0.5 else ["high", "low"]}
idata = phf.to_inference_data(mcmc, coords=coords, dims={n: ["component"] for n in names[:2]})
print(f"Share of draws in which the first component is the low one: {share}\n{arviz.loo(idata)}")

figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
axes[0].scatter(effects, idata.posterior["x"].mean(("chain", "draw")), s=8, alpha=0.5)
axes[0].set(title="Effects", xlabel="simulated", ylabel="posterior mean")
grid = torch.linspace(-3.0, 6.0, 300)[:, None]
for i in range(0, draws, max(1, draws // 30)):
    drawn = [torch.tensor(idata.posterior[name].values[i % 4, i]) for name in names]
    axes[1].plot(grid, mixture(*drawn).log_prob(grid).exp(), color="C0", alpha=0.2)
axes[1].plot(grid, mixture(*truth).log_prob(grid).exp(), color="black")
axes[1].set(title="Density of effects: truth (black), draws", xlabel="effect", ylim=(0.0, 2.0))
for chains, color in [(runs["bad"], "C3"), (mcmc, "C0")]:
    axes[2].plot(chains.draws.stats["log_likelihood_estimate"].mT, color=color, lw=0.7)
axes[2].set(title="Log-likelihood estimates: good (blue), bad (red)", xlabel="draw")
figure.savefig("pseudo_marginal.png", dpi=100)
print(arviz.summary(idata, var_names=["beta", *names]).to_string())

# %% [markdown]
# R-hat above 1.01, few effective draws, BFMI below 0.3, a low refresh rate, or chains apart in
# their log-likelihood estimates: as in the bad run, any of these would have looked wrong.
