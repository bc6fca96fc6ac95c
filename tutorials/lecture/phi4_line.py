# %% [markdown]
# # A field on a line: two phases, their free energies, and a constrained mean
#
# A chain of 100 coupled double wells lies almost wholly at +1 or at -1: the density at mean zero is
# 4e-7, so that no local move ever crosses. The prior below is a Gaussian that knows the coupling. A
# population that cools from it finds both phases, and the flow built on its draws and gradients
# jumps between them. So do coupling layers that bend the longest waves of the same Gaussian, and
# leave the others as they are. From a base that knows no coupling, layers have to learn the field's
# smoothness besides: jumps are refused, and trained by the reverse divergence the flow is left with
# one phase.

# %%
from __future__ import annotations

import math
import os
from functools import partial

import arviz
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import zuko

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
SMOKE = "SMOKE" in os.environ

# %% [markdown]
# ## The field: density exp(-beta U), ends held at zero, tilted by b, its mean pulled to .7

# %%
SITES, SPACING, BETA, PLACE, STIFFNESS = 100, 0.1, 20.0, 0.7, 1e4
LENGTH = SPACING * SITES
NEXT = torch.ones(SITES - 1).diag(1)
LINKS = 2 * torch.eye(SITES) - NEXT - NEXT.mT
COUPLING = BETA * (LENGTH * LINKS + torch.eye(SITES) / LENGTH)
INFORMED = dist.MultivariateNormal(torch.zeros(SITES), precision_matrix=COUPLING)
UNINFORMED = dist.Normal(torch.zeros(SITES), 1.0).to_event(1)


def energy(field, tilt, pull):
    ends = torch.nn.functional.pad(field, (1, 1))
    bending = 0.5 * LENGTH * (ends[..., 1:] - ends[..., :-1]).square().sum(-1)
    wells = ((1.0 - field.square()).square() / 4.0 + tilt * field).sum(-1) / LENGTH
    return bending + wells + pull * STIFFNESS * (field.mean(-1) - PLACE).square() / (4.0 * SITES)


def scalar_field(tilt=0.0, pull=0.0):
    field = pyro.sample("field", INFORMED)
    pyro.factor("boltzmann", -BETA * energy(field, tilt, pull) - INFORMED.log_prob(field))


# %% [markdown]
# ## The default flow, and coupling layers from a base that knows the coupling and one that does not
# All train beside walkers in both phases, which the population has found. A flow whose jumps would
# hardly be accepted is left out, and the run says so: it stands at zero here.

# %%
DRAWS = 30 if SMOKE else 300
BENT, WIDE = 12, 4.0  # waves that are bent; phases are many widths of the base away from its centre
jumps, means = {}, {}
couplings = partial(zuko.flows.RealNVP, transforms=4, hidden_features=(32,))


class BentWaves(torch.nn.Module):
    """The informed base, whose longest waves are bent by a flow of zuko: a guide that learns."""

    def __init__(self):
        super().__init__()
        precision, waves = torch.linalg.eigh(COUPLING)  # the longest first
        self.register_buffer("waves", waves * precision.rsqrt())
        self.register_buffer("back", (waves * precision.sqrt()).mT.contiguous())
        self.flow = couplings(BENT)
        self.rest = dist.Normal(torch.zeros(SITES - BENT), 1.0).to_event(1)
        self.log_volume = BENT * math.log(WIDE) - 0.5 * float(precision.log().sum())

    def prepare(self, *args, **kwargs):
        pass

    def draw(self, num_samples):
        bent, log_density = self.flow().rsample_and_log_prob((num_samples,))
        rest = self.rest.sample((num_samples,))
        position = torch.cat([WIDE * bent, rest], -1) @ self.waves.mT
        return position, log_density + self.rest.log_prob(rest) - self.log_volume

    def log_ratio(self, position):
        bent, rest = (position @ self.back.mT).split([BENT, SITES - BENT], -1)
        log_density = self.flow().log_prob(bent / WIDE) + self.rest.log_prob(rest)
        return log_density - self.log_volume


def run(name, flow):
    kernel = phf.FlowNUTS(scalar_field, flow=flow, num_particles=400 if SMOKE else 2000)
    mcmc = phf.MCMC(kernel, DRAWS, num_chains=16, seed=1)
    mcmc.run()
    means[name] = mcmc.get_samples(group_by_chain=True)["field"].mean(-1)
    statistics = phf.to_inference_data(mcmc).sample_stats
    rate = 0.0 if kernel.flow is None else float(statistics.global_accepted.mean())
    jumps[name] = rate
    up = (means[name] > 0).double()
    print(f"{name}: jumps accepted {rate:.3f}, P(+) {float(up.mean()):.4f}, {kernel.settings}")
    return kernel.flow


torch.manual_seed(0)
run("informed", BentWaves())
uninformed = phf.AutoFlow(scalar_field, couplings, start=UNINFORMED)
run("uninformed", uninformed)
flow = run("default", None)

# %% [markdown]
# ## The uninformed flow by the reverse divergence alone
# It says itself that it has lost a phase.

# %%
phf.fit_guide(scalar_field, uninformed, num_steps=20 if SMOKE else 1000, seed=0)
with torch.no_grad():
    left = float((uninformed.draw(1000)[0].mean(-1) > 0).double().mean())
print(f"trained by the reverse divergence, the uninformed flow has P(+) {left:.3f}")

# %% [markdown]
# ## Free energies: draws of the one frozen flow, weighted for each tilt and for the pulled mean
# The truth by the transfer operator on a grid.

# %%
TRUTH = {  # tilt: log Z(b) - log Z(0), P(+), mean
    0.001: (0.012172, 0.422686, -0.121230),
    0.005: (0.278968, 0.173823, -0.511990),
    0.01: (0.916024, 0.042394, -0.720350),
    0.015: (1.670128, 0.009231, -0.775481),
    0.02: (2.454381, 0.001958, -0.790211),
    0.025: (3.247774, 0.000413, -0.795969),
}
LOG_Z, PULLED_LOG_RATIO, PULLED_MEAN = -196.91222, -2.200838, 0.717264


def weigh(tilt, pull=0.0):
    many = 2000 if SMOKE else 40_000
    return phf.importance_sample(scalar_field, flow, tilt, pull, num_samples=many, seed=0)


flat = weigh(0.0)
print(f"log Z {flat.log_evidence:.4f} +- {flat.log_evidence_error:.4f}, truth {LOG_Z}")
differences = {}
for tilt, (difference, share, mean) in TRUTH.items():
    tilted = weigh(tilt)
    average = tilted.samples["field"].mean(-1)
    differences[tilt] = tilted.log_evidence - flat.log_evidence
    print(
        f"b {tilt:5.3f}: log Z(b) - log Z(0) {differences[tilt]:.4f} ({difference:.4f}), "
        f"P(+) {float(tilted.mean((average > 0).double())):.4f} ({share:.4f}), "
        f"mean {float(tilted.mean(average)):.4f} ({mean:.4f})"
    )
pulled = weigh(0.0, 1.0)
pulled_log_ratio = pulled.log_evidence - flat.log_evidence
pulled_mean = float(pulled.mean(pulled.samples["field"].mean(-1)))
print(f"pulled: log ratio {pulled_log_ratio:.4f} ({PULLED_LOG_RATIO}), mean {pulled_mean:.4f}")

# %% [markdown]
# ## The picture, and the check

# %%
figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
panels[0].plot(flat.resample(60)["field"].mT, color="tab:blue", lw=0.3)
panels[0].set(xlabel="site", ylabel="field", title="draws")
panels[1].bar(list(jumps), list(jumps.values()))
panels[1].set(title="jumps accepted", ylim=(0, 1))
panels[2].plot(list(TRUTH), [truth[0] for truth in TRUTH.values()], "k-", label="transfer operator")
panels[2].plot(*zip(*differences.items(), strict=True), "o", label="weights of the flow")
panels[2].set(xlabel="tilt b", ylabel="log Z(b) - log Z(0)")
panels[2].legend()
figure.savefig("phi4_line.png", dpi=120)

up = (means["default"] > 0).double()
assert jumps["default"] > 0.5 > jumps["uninformed"]
if not SMOKE:
    assert jumps["informed"] > 0.5 > 0.01 > min(left, 1 - left)
assert abs(float(up.mean()) - 0.5) < max(0.01, 4 * float(arviz.mcse(up.numpy())))
assert abs(flat.log_evidence - LOG_Z) < (0.2 if SMOKE else 0.03)
allowed = 0.2 if SMOKE else 0.02
assert all(abs(differences[tilt] - truth[0]) < allowed for tilt, truth in TRUTH.items())
assert abs(pulled_log_ratio - PULLED_LOG_RATIO) < (1.0 if SMOKE else allowed)
assert abs(pulled_mean - PULLED_MEAN) < 0.1 * allowed
