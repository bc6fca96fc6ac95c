# %% [markdown]
# # Nine modes from one: figures 4 to 7 of the paper
# Fixed-kinetic Neural Hamiltonian Flows (Souveton et al., 2023, https://hal.science/hal-03976501),
# section 5.2: a mixture of nine normals, fitted from three bases with both kinetic energies. Width
# 128, 10 leapfrog steps and time 1 as there; fewer training steps (the paper makes 150,000).

# %%
import os
from functools import partial

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

pyro.set_rng_seed(0)
smoke = os.environ.get("SMOKE") == "1"
steps, width = (5, 8) if smoke else (1500, 128)
grid = torch.tensor([-2.5, 0.0, 2.5])
means = torch.cartesian_prod(grid, grid)
target = dist.MixtureSameFamily(
    dist.Categorical(torch.ones(9)), dist.Normal(means, 0.5).to_event(1)
)
samples, test = target.sample((5000,)), target.sample((2000,))
print(f"entropy of the target: {-target.log_prob(target.sample((200_000,))).mean():.3f}")

bases = {
    "soft uniform": phf.SoftUniform(2, 3.0),
    "peaked normal": dist.Normal(torch.zeros(2), 1.0).to_event(1),
    "wide normal": dist.Normal(torch.zeros(2), 2.5).to_event(1),
}
kinetics = {
    "neural": partial(phf.NeuralKinetic, hidden=(width, width), inverse_mass=None),
    "fixed": phf.LearnedGaussianKinetic,
}


def enlarged(flow):
    with torch.no_grad():
        flow.potential_network.last.mul_(10.0)
        flow.kinetic.network.last.mul_(10.0)
    return flow


# %% [markdown]
# ## The six fits
# The neural kinetic energy is a network alone, as in the paper; both energies begin with ten times
# the usual weights in their last layers, without which such a flow stays with a wide base for
# thousands of steps: see the end.
#
# Minus the log likelihood of fresh samples, by importance sampling of 64 momenta each; the entropy
# is the best there is. Shares are of the least and the most visited mode, of 0.111 each.

# %%
sampled, potentials, momenta = (
    plt.subplots(2, 3, figsize=(13, 8), constrained_layout=True) for _ in range(3)
)
for row, (kinetic_name, kinetic) in enumerate(kinetics.items()):
    for column, (base_name, base) in enumerate(bases.items()):
        torch.manual_seed(1)
        flow = phf.NeuralHamiltonianFlow(2, base=base, kinetic=kinetic, hidden=(width, width))
        flow = enlarged(flow) if kinetic_name == "neural" else flow
        fit = phf.fit_flow(flow, samples, num_steps=steps, batch_size=256, learning_rate=2e-3)
        with torch.no_grad():
            drawn = flow().sample((5000,))
            loss = -flow.estimate_log_density(test, 64).value.mean()
        shares = torch.bincount(torch.cdist(drawn, means).argmin(1), minlength=9) / len(drawn)
        count = sum(parameter.numel() for parameter in flow.parameters())
        label = f"{kinetic_name} kinetic energy, {base_name}"
        print(
            f"{label:38} {count:6} parameters, bound {fit.best_loss:.3f}, loss {loss:.3f}, "
            f"shares {shares.min():.3f} to {shares.max():.3f}, {fit.seconds:.0f} s"
        )
        sampled[1][row, column].hist2d(*drawn.mT.numpy(), bins=100, range=[[-5, 5], [-5, 5]])
        phf.plot_potential(flow, axes=potentials[1][row, column])
        with torch.no_grad():
            encoded = flow.end_momenta.draw(samples)[0]
        momenta[1][row, column].hist2d(*encoded.mT.numpy(), bins=100)
        for axes in (sampled[1], potentials[1], momenta[1]):
            axes[row, column].set(title=label, aspect="equal")
for name, (figure, _) in {
    "samples": sampled,
    "potentials": potentials,
    "momenta": momenta,
}.items():
    figure.savefig(f"nine_modes_{name}.png", dpi=60)

# %% [markdown]
# All six find the nine modes, in three minutes together on one core. With the fixed kinetic energy
# and a base that covers the target, the potential has the target's nine wells; with a peaked base,
# it has ridges that push outwards, and the momenta at the end hold the modes. With the neural
# kinetic energy the modes of the target lie on hills: a velocity may turn against its momentum, and
# nothing tells which way round the two energies are. That is the paper's case for the fixed one.
#
# ## What the neural kinetic energy lacks at the start
# A quadratic part, with which it learns as the fixed one does and which is there by default; or ten
# times the weights in the last layers of both energies. No better than the base, with width 64 from
# the wide normal: in 500 steps, encoded first momenta, a learning rate of 0.01, three times the
# last weights of both energies, ten times those of the kinetic one; in 1,500 steps, a learning rate
# of 0.005 by itself, or with three times the time, or with three times all of the kinetic energy's
# weights. Ten times the time went half the way.

# %%
base = bases["wide normal"]
print(f"{'the base itself':38} loss {-base.log_prob(test).mean():.3f}")
for label, inverse_mass, change in (
    ("network alone", None, lambda flow: flow),
    ("network alone, last layers enlarged", None, enlarged),
    ("network and quadratic part", 1.0, lambda flow: flow),
):
    torch.manual_seed(1)
    hidden = (width // 2, width // 2)
    kinetic = partial(phf.NeuralKinetic, hidden=hidden, inverse_mass=inverse_mass)
    flow = phf.NeuralHamiltonianFlow(2, base=base, kinetic=kinetic, hidden=hidden)
    flow = change(flow)
    phf.fit_flow(flow, samples, num_steps=steps, batch_size=256, learning_rate=5e-3)
    with torch.no_grad():
        loss = -flow.estimate_log_density(test, 64).value.mean()
    print(f"{label:38} loss {loss:.3f}")
