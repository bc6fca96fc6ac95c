# %% [markdown]
# # The term premium of bonds: what is a flat yield curve due to?
# Long bonds yield more than short ones if short rates are expected to rise, or if investors want to
# be paid for the risk of their prices: the term premium. It grows with supply, volatility and risk
# aversion, and falls with wealth. The short rate and wealth are latent paths behind the yields.
# %%
import os

import arviz
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
SMOKE, MONTH = "SMOKE" in os.environ, 1.0 / 12.0
TAU = torch.tensor([0.25, 1.0, 2.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0])  # maturities in years
WIDTH = torch.tensor([0.5, 1.0, 2.0, 2.0, 2.5, 4.0, 5.0, 7.5, 10.0])  # years each stands for


# %% [markdown]
# ## The model
# The short rate returns to its mean, log wealth drifts; each is a Markov path as one site.
# %%
class Markov(dist.TorchDistribution):
    """x[0] from `first`; x[t + 1] from a normal about `slope * x[t] + drift`."""

    support = dist.constraints.real_vector
    arg_constraints = {}

    def __init__(self, first, slope, drift, scale, length):
        self.first, self.slope, self.drift, self.scale = first, slope, drift, scale
        super().__init__(event_shape=(length,), validate_args=False)

    def sample(self, sample_shape=()):
        path = [self.first.sample()]
        for noise in torch.randn(self.event_shape[0] - 1):
            path.append(self.slope * path[-1] + self.drift + self.scale * noise)
        return torch.stack(path)

    def log_prob(self, x):
        steps = dist.Normal(self.slope * x[:-1] + self.drift, self.scale).log_prob(x[1:])
        return self.first.log_prob(x[0]) + steps.sum()


# Medians, and standard deviations of logarithms.
PRIORS = {"kappa": (0.25, 0.5), "s_r": (0.01, 0.5), "gamma": (5.0, 1.0), "s_w": (0.1, 0.5)}
PRIORS |= {"s_e": (0.001, 0.5)}


def curve(r, w, supply, kappa, rbar, s_r, gamma):
    """Yields of all maturities, of shape (..., 9); all else has a last dimension of one."""
    duration = (1.0 - (-kappa * TAU).exp()) / kappa
    b = duration / TAU
    risk = gamma * (supply * duration * WIDTH).sum(-1, keepdim=True) * (-w).exp()
    convexity = 1.0 - 2.0 * b + (1.0 - (-2.0 * kappa * TAU).exp()) / (2.0 * kappa * TAU)
    mean = b * r + (1.0 - b) * (rbar + s_r**2 * risk / kappa)
    return mean - s_r**2 / (2.0 * kappa**2) * convexity


def model(yields, supply):
    months = len(supply)
    p = {n: pyro.sample(n, dist.LogNormal(np.log(m), s)) for n, (m, s) in PRIORS.items()}
    rbar = pyro.sample("rbar", dist.Normal(0.03, 0.015))
    omega = pyro.sample("omega", dist.Normal(0.03, 0.03))
    keep = (-p["kappa"] * MONTH).exp()
    spread = p["s_r"] / (2.0 * p["kappa"]).sqrt()
    first, step = dist.Normal(rbar, spread), spread * (1.0 - keep**2).sqrt()
    r = pyro.sample("r", Markov(first, keep, rbar * (1.0 - keep), step, months))
    drift, step = omega * MONTH, p["s_w"] * MONTH**0.5  # from log wealth zero in the first month
    w = pyro.sample("w", Markov(dist.Normal(drift, step), 1.0, drift, step, months - 1))
    w = torch.cat([torch.zeros(1), w])
    mean = curve(r[:, None], w[:, None], supply, p["kappa"], rbar, p["s_r"], p["gamma"])
    pyro.sample("y", dist.Normal(mean, p["s_e"]).to_event(2), obs=yields)


# %% [markdown]
# ## Data: simulated months, or your own
# `YIELDS` and `SUPPLY` may name text files of numbers with a row for each month and nine columns:
# yields per year, and debt outstanding for each year of maturity, in units of initial wealth.
# %%
own, months, rng = "YIELDS" in os.environ, 24 if SMOKE else 240, np.random.default_rng(7)
level, keep = np.zeros((2, months)), np.exp(-0.25 * MONTH)
for t in range(1, months):
    level[:, t] = 0.98 * level[:, t - 1] + 0.07 * rng.standard_normal(2)
supply = level[:1].T + np.outer(level[1], 0.5 * np.log(TAU.numpy() / 5.0))
supply = 0.05 * np.exp(supply + 0.04 * MONTH * np.arange(months)[:, None])
r, w = np.full((months, 1), 0.02), np.zeros((months, 1))
for t in range(1, months):
    shock = 0.012 * np.sqrt((1.0 - keep**2) / 0.5) * rng.standard_normal()
    r[t] = 0.03 + keep * (r[t - 1] - 0.03) + shock
    w[t] = w[t - 1] + 0.04 * MONTH + 0.1 * np.sqrt(MONTH) * rng.standard_normal()
r, w, supply = map(torch.from_numpy, (r, w, supply))
yields = curve(r, w, supply, torch.tensor(0.25), 0.03, 0.012, 5.0)
yields = yields + 0.001 * torch.from_numpy(rng.standard_normal(yields.shape))
if own:
    yields, supply = (torch.from_numpy(np.loadtxt(os.environ[n])) for n in ("YIELDS", "SUPPLY"))

# %% [markdown]
# ## The posterior
# Parameters and paths are sampled together; `whiten` takes the paths to white noise. It would have
# looked wrong with an `r_hat` above 1.01, or few draws of `gamma`, which trades with wealth.
# %%
draws, warmup = (10, 10) if SMOKE else (1000, 300)
mcmc = phf.MCMC(phf.NUTS(phf.whiten(model, ["r", "w"])), draws, warmup, num_chains=4, seed=0)
mcmc.run(yields, supply)
posterior = phf.to_inference_data(mcmc).posterior
posterior = posterior.assign(last_r=posterior["r"][..., -1], last_w=posterior["w"][..., -1])
# Long joint runs of another program, R-hat 1.00, on the simulated data; rounded to three digits.
REFERENCE = {"kappa": 0.2526, "s_r": 0.0113, "gamma": 5.95, "s_w": 0.1009, "s_e": 0.00101}
REFERENCE |= {"rbar": 0.0290, "omega": 0.0089, "last_r": 0.0491, "last_w": -0.0560}
print(summary := arviz.summary(posterior, var_names=list(REFERENCE), round_to=5))
for name, value in REFERENCE.items():
    error = abs(summary["mean"][name] - value) - 10.0 ** (np.floor(np.log10(abs(value))) - 2) / 2
    assert own or SMOKE or error < 4.0 * 2**0.5 * summary["mcse_mean"][name], name

# %% [markdown]
# ## What is the last curve flat, or steep, due to?
# The slope from three months to thirty years, against the slope with one cause at its normal value:
# short rates at their mean, and volatility, wealth and risk aversion at the middle of their priors.
# %%
sites = ["kappa", "rbar", "s_r", "gamma", "r", "w"]
last = {n: torch.from_numpy(posterior[n].values.reshape(4 * draws, -1))[:, -1:] for n in sites}
last |= {"supply": supply[-1]}
causes = {
    "short rates expected to fall": {"r": last["rbar"]},
    "low volatility of bonds": {"s_r": torch.tensor(PRIORS["s_r"][0])},
    "much wealth in the market": {"w": torch.zeros(1)},
    "low risk aversion": {"gamma": torch.tensor(PRIORS["gamma"][0])},
}
curves = torch.stack([curve(**(last | normal)) for normal in ({}, *causes.values())])
slopes = 1e4 * (curves[..., -1] - curves[..., 0])  # basis points, of each draw
effects = slopes[0] - slopes[1:]
print(f"slope of the last curve: {slopes[0].mean():.0f} ± {slopes[0].std():.0f} basis points")
for number, (cause, effect) in enumerate(zip(causes, effects, strict=True)):
    flattens, first = (effect < 0).double().mean(), (effects.argmin(0) == number).double().mean()
    by = f"{effect.mean():5.0f} ± {effect.std():3.0f} basis points"
    print(f"{cause:30s} {by}; P(flattens it) {flattens:.2f}, P(by the most) {first:.2f}")

# %%
plt.hist(effects.T.numpy(), bins=40, density=True, label=list(causes))
plt.xlabel("effect on the slope of the last curve, basis points")
plt.legend()
plt.savefig("term_premium.png", dpi=150, bbox_inches="tight")
