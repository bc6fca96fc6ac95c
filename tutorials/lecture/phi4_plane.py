# %% [markdown]
# # A field on a torus: how far jumps of a flow reach
#
# Sites of a periodic L x L lattice are double wells, coupled to their neighbours. Below a critical
# coupling of about .68 the field is disordered; above it nearly all of it has one sign, which no
# local move changes. Jumps do, while the lattice is small: of single proposals one in twenty is
# accepted at L = 8 in the ordered phase, where the default makes up for it by 32 at once. Below the
# critical coupling local moves do, and no jumps are made. A symmetrised flow knows that both signs
# are equally likely, but not how a field of one sign fluctuates, which is what makes jumps fail.

# %%
from __future__ import annotations

import math
import os

import arviz
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
SMOKE = "SMOKE" in os.environ

# %% [markdown]
# ## The action: exp(-S) with S of links and wells

# %%
WELL = 0.5


def action(field, coupling):
    links = field * (field.roll(1, -1) + field.roll(1, -2))
    wells = field.square() + WELL * (field.square() - 1.0).square()
    return (wells - coupling * links).sum((-1, -2))


def lattice(size, coupling):
    prior = dist.Normal(torch.zeros(size, size), 1.0).to_event(2)
    field = pyro.sample("field", prior)
    pyro.factor("boltzmann", -action(field, coupling) - prior.log_prob(field))


# %% [markdown]
# ## Sizes and couplings, with nothing to tune; then once more with the flow made symmetric

# %%
SIZES = (3,) if SMOKE else (4, 6, 8, 10, 12, 14)
COUPLINGS = (0.75, 0.5)
DRAWS = 30 if SMOKE else 200
found, accepted = {}, {}


def run(kernel, size, coupling, kind):
    mcmc = phf.MCMC(kernel, DRAWS, num_chains=16, seed=1)
    mcmc.run(size, coupling)
    mean = mcmc.get_samples(group_by_chain=True)["field"].mean((-1, -2))
    statistics = phf.to_inference_data(mcmc).sample_stats
    rate = float(statistics.global_accepted.mean()) if "global_accepted" in statistics else 0.0
    found[kind, size, coupling], accepted[kind, size, coupling] = mean, rate
    absolute = mean.abs().numpy()
    print(
        f"L {size}, coupling {coupling}, {kind}: E|m| {absolute.mean():.4f} +- "
        f"{arviz.mcse(absolute):.4f}, P(m > 0) {float((mean > 0).double().mean()):.3f}, "
        f"jumps accepted {rate:.3f}, of {kernel.settings['num_proposals']} proposals"
    )


for coupling in COUPLINGS:
    for size in SIZES:
        kernel = phf.FlowNUTS(lattice)
        run(kernel, size, coupling, "default")
        if kernel.flow is None:
            continue  # jumps would not pay
        mirrored = phf.SymmetrisedGuide(kernel.flow, [dist.transforms.AffineTransform(0.0, -1.0)])
        for kind, guide in (("one proposal", kernel.flow), ("one, symmetric", mirrored)):
            jumping = phf.FlowNUTS(lattice, guide, adapt_flow=False, num_proposals=1)
            run(jumping, size, coupling, kind)

# %% [markdown]
# ## The picture, and the check against a cluster algorithm

# %%
TRUTH = {0.5: (0.1741, 0.0006), 0.75: (0.9467, 0.0009)}  # E|m| at L = 8, and its standard error
kinds = sorted({kind for kind, _, _ in accepted})
figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for panel, coupling in zip(panels, COUPLINGS, strict=True):
    for kind in kinds:
        sizes = [size for size in SIZES if (kind, size, coupling) in accepted]
        panel.plot(sizes, [accepted[kind, size, coupling] for size in sizes], "o-", label=kind)
    panel.set(title=f"coupling {coupling}", xlabel="L", ylabel="jumps accepted", ylim=(0, 1))
    panel.legend()
figure.savefig("phi4_plane.png", dpi=120)

for coupling, (truth, error) in TRUTH.items():
    if not SMOKE:
        absolute = found["default", 8, coupling].abs().numpy()
        assert abs(absolute.mean() - truth) < 3 * math.hypot(error, float(arviz.mcse(absolute)))
if not SMOKE:
    assert accepted["default", 8, 0.75] > 0.2 > accepted["one proposal", 8, 0.75]
