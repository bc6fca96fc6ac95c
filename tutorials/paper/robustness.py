# %% [markdown]
# # Robustness to steps, time and width: figures 3, 9 and 10 of the paper, as a table
# Fixed-kinetic Neural Hamiltonian Flows (Souveton et al., 2023, https://hal.science/hal-03976501),
# section 5.1 and appendix A. Final losses of the nine-mode mixture from a soft-uniform base; the
# paper has L = 50 for all, and trains for 150,000 steps instead of 2,000. The neural kinetic energy
# is a network alone, as there, begun with larger last layers: `nine_modes.py` tells why.

# %%
import os
import time
from functools import partial
from itertools import product

import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

pyro.set_rng_seed(0)
smoke = os.environ.get("SMOKE") == "1"
steps, widths = (5, [4]) if smoke else (2000, [8, 32, 128])
grid = torch.tensor([-2.5, 0.0, 2.5])
modes = dist.Normal(torch.cartesian_prod(grid, grid), 0.5).to_event(1)
target = dist.MixtureSameFamily(dist.Categorical(torch.ones(9)), modes)
samples = target.sample((5000,))

# %%
times = [0.1, 1.0, 10.0]
cells = list(product(["fixed", "neural"], widths, [1, 2, 10]))
cells += [("fixed", width, 50) for width in widths[:2]]
began = time.perf_counter()
lines = [
    "| kinetic energy | H | parameters | L |" + "".join(f" T = {t:g} |" for t in times),
    "|:--|--:|--:|--:|" + "--:|" * len(times),
]
for name, width, count in sorted(cells):
    losses = []
    for duration in times:
        torch.manual_seed(1)
        neural = partial(phf.NeuralKinetic, hidden=(width, width), inverse_mass=None)
        flow = phf.NeuralHamiltonianFlow(
            2,
            base=phf.SoftUniform(2, 3.0),
            kinetic=phf.LearnedGaussianKinetic if name == "fixed" else neural,
            hidden=(width, width),
            num_steps=count,
            time=duration,
        )
        if name == "neural":
            with torch.no_grad():
                flow.potential_network.last.mul_(10.0)
                flow.kinetic.network.last.mul_(10.0)
        fit = phf.fit_flow(flow, samples, num_steps=steps, batch_size=256, learning_rate=5e-3)
        losses.append(fit.losses[-50:].nanmean())
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    shown = "".join(f" {loss:.3f} |" for loss in losses)
    lines.append(f"| {name} | {width} | {parameters} | {count} |{shown}")
minutes = (time.perf_counter() - began) / 60
lines += [
    "",
    f"Mean bound of the last 50 of {steps} steps of Adam, 256 samples each; the entropy of the "
    "target is 3.60. Losses in the thousands are of fits that came apart. "
    f"{minutes:.1f} minutes on {torch.get_num_threads()} core(s).",
]
print("\n".join(lines))
with open("robustness.md", "w") as file:
    file.write("# Robustness of Neural Hamiltonian Flows\n\n" + "\n".join(lines) + "\n")
