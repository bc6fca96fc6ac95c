# %% [markdown]
# # A planet's period from twelve velocities: seventeen answers with their weights
#
# Twelve radial velocities of a star leave many periods of its planet possible, each a narrow mode.
# A population that cools from the prior finds them, and a flow built on it jumps between them.

# %%
import math
import os

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
SMOKE = "SMOKE" in os.environ

# %% [markdown]
# ## Velocities in metres per second; a star alone, a circular orbit, an eccentric one

# %%
DAYS = torch.tensor([14.55, 31.42, 67.77, 85.89, 92.04, 97.91, 109.32, 144.34, 156.89, 162.40])
DAYS = torch.cat([DAYS, torch.tensor([169.75, 175.72])])
SPEEDS = torch.tensor([-1.71, 6.12, -1.66, 8.27, -5.65, 0.26, 0.98, -4.00, 3.01, 3.77, 3.67, -0.98])
ERROR, SHORTEST, LONGEST = 2.5, math.log(3.0), math.log(300.0)


def observe(mean, speeds):
    with pyro.plate("time", len(speeds)):
        pyro.sample("speed", dist.Normal(mean, ERROR), obs=speeds)


def no_planet(days, speeds):
    offset = pyro.sample("offset", dist.Normal(0.0, 5.0))
    observe(offset.expand(len(days)), speeds)


def orbit():
    log_period = pyro.sample("log_period", dist.Uniform(SHORTEST, LONGEST))
    phase = pyro.sample("phase", dist.Uniform(0.0, 2.0 * math.pi))
    amplitude = pyro.sample("amplitude", dist.Normal(5.0, 3.0))
    offset = pyro.sample("offset", dist.Normal(0.0, 5.0))
    return log_period, phase, amplitude, offset


def speed(days, log_period, phase, amplitude, offset):
    return offset + amplitude * (2.0 * math.pi * days * (-log_period).exp() + phase).cos()


def circular(days, speeds):
    observe(speed(days, *orbit()), speeds)


def eccentric(days, speeds):
    log_period, phase, amplitude, offset = orbit()
    eccentricity = pyro.sample("eccentricity", dist.Beta(0.867, 3.03))
    periapsis = pyro.sample("periapsis", dist.Uniform(0.0, 2.0 * math.pi))
    mean_anomaly = 2.0 * math.pi * days * (-log_period).exp() + phase
    anomaly = mean_anomaly + 0.85 * eccentricity * mean_anomaly.sin().sign()
    for _ in range(6):  # Newton's method on Kepler's equation
        error = anomaly - eccentricity * anomaly.sin() - mean_anomaly
        anomaly = anomaly - error / (1.0 - eccentricity * anomaly.cos())
    stretch = ((1.0 + eccentricity) / (1.0 - eccentricity)).sqrt()
    true_anomaly = 2.0 * torch.atan2(stretch * (anomaly / 2).sin(), (anomaly / 2).cos())
    turned = (true_anomaly + periapsis).cos() + eccentricity * periapsis.cos()
    observe(offset + amplitude * turned, speeds)


# %% [markdown]
# ## The truth on a grid of periods and phases, given which all else is Gaussian

# %%
EDGES = torch.tensor([3.0, 3.3, 3.65, 4.5, 7.0, 9.0, 12.0, 15.0, 22.0, 33.0, 60.0, 300.0]).log()


def bins(log_period, weights):
    index = torch.bucketize(log_period.flatten(), EDGES[1:-1])
    return torch.zeros(len(EDGES) - 1).index_add(0, index, weights.flatten())


def log_evidence_given(design, mean, variance):
    covariance = (design * variance) @ design.mT + ERROR**2 * torch.eye(len(SPEEDS))
    return dist.MultivariateNormal(design @ mean, covariance).log_prob(SPEEDS)


width = (LONGEST - SHORTEST) / (4000 if SMOKE else 8000)
periods = torch.arange(SHORTEST + 0.5 * width, LONGEST, width)
phases = (torch.arange(64) + 0.5) / 64 * 2.0 * math.pi
wave = (2.0 * math.pi * DAYS * (-periods).exp()[:, None, None] + phases[:, None]).cos()
design = torch.stack([wave, torch.ones_like(wave)], -1)
likelihood = log_evidence_given(design, torch.tensor([5.0, 0.0]), torch.tensor([9.0, 25.0]))
log_z = float(likelihood.flatten().logsumexp(0) - math.log(likelihood.numel()))
density = likelihood.logsumexp(1).softmax(0)
truth = bins(periods, density)
alone = float(log_evidence_given(torch.ones(len(SPEEDS), 1), torch.zeros(1), torch.tensor([25.0])))
print(f"log Z {log_z:.5f}, without a planet {alone:.5f}, periods {truth.numpy().round(4)}")

# %% [markdown]
# ## The run, with nothing to tune

# %%
kernel = phf.FlowNUTS(circular)
mcmc = phf.MCMC(kernel, 100 if SMOKE else 1500, num_chains=16, seed=1)
mcmc.run(DAYS, SPEEDS)
log_period = mcmc.get_samples()["log_period"]
share = bins(log_period, torch.ones_like(log_period) / len(log_period))
distance = 0.5 * float((share - truth).abs().sum())
print(arviz.summary(phf.to_inference_data(mcmc)).to_string())
print(f"periods {share.numpy().round(4)}: total variation {distance:.4f}")

# %% [markdown]
# ## Is there a planet, and is its orbit round?
# The frozen flow's weights give the evidence; so does a population alone, of any model.

# %%
weighted = phf.importance_sample(circular, kernel.flow, DAYS, SPEEDS, num_samples=100_000, seed=0)
print(weighted.message, weighted)
found = {}
for model in (no_planet, circular, eccentric):
    sampler = phf.AnnealedSampler(model, num_particles=400 if SMOKE else 4000, seed=0)
    sampler.run(DAYS, SPEEDS)
    found[model.__name__] = sampler
    print(f"{model.__name__}: {sampler.log_evidence:.3f} +- {sampler.log_evidence_error:.3f}")

# %% [markdown]
# ## The picture, and the check
# A chain that stays in one mode would have looked wrong: an `r_hat` above 1.01 of `log_period`, or
# two evidences of the circular orbit that are many errors apart.

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
panels[0].hist(log_period, bins=periods[::10], density=True, label="FlowNUTS")
panels[0].plot(periods, density / width, lw=0.7, color="k", label="grid")
panels[0].set(xlim=(1.1, 4.2), xlabel="log of the period in days", ylabel="density")
panels[0].legend()
times = torch.linspace(0.0, 180.0, 800)
orbits = [value[:: len(value) // 8, None] for value in mcmc.get_samples().values()]
panels[1].plot(times, speed(times, *orbits).mT, lw=0.6, color="tab:blue")
panels[1].errorbar(DAYS, SPEEDS, ERROR, fmt="ko", ms=3)
panels[1].set(xlabel="days", ylabel="velocity in m/s", title="orbits drawn")
figure.savefig("exoplanet.png", dpi=120)

assert abs(found["no_planet"].log_evidence - alone) < 4 * found["no_planet"].log_evidence_error
assert abs(log_z + 35.948077) < 1e-4
assert abs(weighted.log_evidence - log_z) < (0.3 if SMOKE else 0.05)
assert distance < (0.15 if SMOKE else 0.02)
