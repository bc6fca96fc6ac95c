# %% [markdown]
# # Periods of a real star: the velocities of K2-24
#
# Two planets pass before the star K2-24, every 20.9 and 42.4 days. Had they not been seen to, what
# would its velocities alone say? One planet's orbit is fitted to 32 of them (Petigura and others,
# 2016, the example of the package RadVel): a dozen periods remain, and the two true ones are among
# them. The error beyond the instrument's is a parameter, too.

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
# ## Days, velocities and their errors in metres per second

# %%
MEASURED = """
64.820 6.959 1.594, 64.825 5.018 1.601, 64.831 13.812 1.659, 66.828 1.151 1.653, 67.853 9.389 1.639,
73.888 -2.821 1.724, 74.852 -0.773 1.908, 76.864 -2.223 1.709, 77.866 0.146 1.839,
78.834 2.740 1.650, 80.931 7.571 1.863, 82.886 5.138 1.682, 83.824 0.369 1.901, 84.800 -1.481 1.690,
84.829 -2.737 1.680, 84.840 -5.683 1.719, 88.956 -3.910 1.714, 95.857 -5.635 1.644,
102.899 3.635 1.761, 103.771 3.539 1.650, 111.756 -3.754 1.460, 112.794 -0.112 1.783,
120.803 0.113 1.638, 121.823 -2.588 1.760, 122.742 3.020 1.657, 129.762 -13.034 1.983,
129.810 -10.997 1.876, 132.432 -12.065 1.703, 132.807 -14.867 1.913, 157.717 -1.309 1.930,
157.755 -5.320 1.944, 165.711 4.873 1.617
"""
ROWS = torch.tensor([[float(part) for part in row.split()] for row in MEASURED.split(",")])
DAYS, SPEEDS, ERRORS = ROWS.unbind(-1)
SHORTEST, LONGEST = math.log(5.0), math.log(100.0)


def wave(days, log_period, phase):
    return (2.0 * math.pi * days * (-log_period).exp() + phase).cos()


def one_planet(days, speeds, errors):
    log_period = pyro.sample("log_period", dist.Uniform(SHORTEST, LONGEST))
    phase = pyro.sample("phase", dist.Uniform(0.0, 2.0 * math.pi))
    amplitude = pyro.sample("amplitude", dist.Normal(5.0, 3.0))
    offset = pyro.sample("offset", dist.Normal(0.0, 5.0))
    jitter = pyro.sample("jitter", dist.HalfNormal(4.0))
    mean = offset + amplitude * wave(days, log_period, phase)
    with pyro.plate("time", len(days)):
        pyro.sample("speed", dist.Normal(mean, (errors**2 + jitter**2).sqrt()), obs=speeds)


# %% [markdown]
# ## The truth on a grid of periods, phases and jitters, given which all else is Gaussian

# %%
width = (LONGEST - SHORTEST) / 2000
periods = torch.arange(SHORTEST + 0.5 * width, LONGEST, width)
phases = (torch.arange(32) + 0.5) / 32 * 2.0 * math.pi
jitters = (torch.arange(28) + 0.5) / 2.0
waves = wave(DAYS, periods[:, None, None], phases[:, None])
design = torch.stack([waves, torch.ones_like(waves)], -1)
mean, precision = torch.tensor([5.0, 0.0]), torch.tensor([9.0, 25.0]).reciprocal().diag()
residual = SPEEDS - design @ mean
parts = []
for jitter in jitters:
    weight = 1.0 / (ERRORS**2 + jitter**2)
    root = torch.linalg.cholesky((design.mT * weight) @ design + precision)
    pull = (design.mT @ (weight * residual)[..., None]).squeeze(-1)
    half = torch.linalg.solve_triangular(root, pull[..., None], upper=False).squeeze(-1)
    of_data = 0.5 * (weight.log() - math.log(2.0 * math.pi) - weight * residual**2).sum(-1)
    of_planet = 0.5 * (half.square().sum(-1) + precision.logdet())
    log_volume = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    parts.append(of_data + of_planet - log_volume + dist.HalfNormal(4.0).log_prob(jitter))
likelihood = torch.stack(parts) + math.log(0.5)
log_z = float(likelihood.logsumexp((0, 1, 2))) - math.log(len(periods) * len(phases))
density = likelihood.logsumexp((0, 2)).softmax(0)
mean_jitter = float(jitters @ likelihood.logsumexp((1, 2)).softmax(0))
EDGES = torch.linspace(SHORTEST, LONGEST, 31)


def bins(log_period, weights):
    index = torch.bucketize(log_period, EDGES[1:-1])
    return torch.zeros(len(EDGES) - 1).index_add(0, index, weights)


truth = bins(periods, density)

# %% [markdown]
# ## The run, with nothing to tune, and the evidence of a planet
# `AnnealedSampler` tells the evidence of any model: here with a planet, and with none.

# %%
kernel = phf.FlowNUTS(one_planet)
mcmc = phf.MCMC(kernel, 100 if SMOKE else 1500, num_chains=16, seed=0)
mcmc.run(DAYS, SPEEDS, ERRORS)
draws = mcmc.get_samples()
log_period = draws["log_period"]
share = bins(log_period, torch.ones_like(log_period) / len(log_period))
distance = 0.5 * float((share - truth).abs().sum())
print(arviz.summary(phf.to_inference_data(mcmc)).to_string())
print(
    f"total variation of the periods' shares {distance:.4f}, jitter {mean_jitter:.3f} by the grid"
)

still = pyro.condition(one_planet, {"amplitude": torch.tensor(0.0)})
at_rest = float(dist.Normal(5.0, 3.0).log_prob(torch.tensor(0.0)))  # the condition's own density
found = {}
for name, model in (("a planet", one_planet), ("none", still)):
    sampler = phf.AnnealedSampler(model, num_particles=400 if SMOKE else 2000, seed=0)
    sampler.run(DAYS, SPEEDS, ERRORS)
    found[name] = sampler.log_evidence - (at_rest if name == "none" else 0.0)
    print(f"{name}: log evidence {found[name]:.3f} +- {sampler.log_evidence_error:.3f}")
print(
    f"by the grid {log_z:.3f}; the odds of a planet are {math.exp(log_z - found['none']):.3g} to 1"
)

# %% [markdown]
# ## The picture, and the check

# %%
figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
panel.hist(log_period.exp(), bins=periods[::8].exp(), density=True, label="FlowNUTS")
panel.plot(periods.exp(), density / width / periods.exp(), lw=0.7, color="k", label="grid")
for true in (20.885, 42.363):
    panel.axvline(true, ls=":", color="tab:red")
panel.set(xscale="log", xlabel="period in days; dotted, the planets seen", ylabel="density")
panel.legend()
figure.savefig("star_k2_24.png", dpi=120)

assert distance < (0.2 if SMOKE else 0.02)
assert abs(float(draws["jitter"].mean()) - mean_jitter) < (0.5 if SMOKE else 0.05)
assert abs(found["a planet"] - log_z) < (1.0 if SMOKE else 0.25)
