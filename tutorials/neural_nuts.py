# %% [markdown]
# # Lynx and hare: a sampler that learns the energy it follows
# Pelts that the Hudson Bay Company counted, 1900-1920. Each gradient of a model that solves
# differential equations goes through every step of the solver. `HNNNUTS` looks at true gradients
# only until a network has learned them, follows the network, and asks the model once for each draw:
# for sixteen draws at a time, which takes hardly longer than for one.

# %%
import os

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_hamflow as phf

torch.set_default_dtype(torch.float64)
smoke = os.environ.get("SMOKE") == "1"  # small and fast, and nothing is learned
years, substeps, draws, warmup = (5, 1, 20, 60) if smoke else (21, 4, 500, 250)
hare = [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1]
hare += [40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
lynx = [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4]
lynx += [8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
y = torch.tensor([hare, lynx]).mT[:years]

# %% [markdown]
# ## The model
# Lotka and Volterra: hares grow and are eaten, lynxes starve and eat. In logarithms, populations
# cannot fall below zero. The solver is the classical Runge-Kutta method with four steps a year.


# %%
def populations(growth, meeting, start):
    rate = lambda x: growth + meeting * x.flip(-1).exp()  # noqa: E731
    x, step, path = start.log(), 1.0 / substeps, [start.log()]
    for _ in range(years - 1):
        for _ in range(substeps):
            k1 = rate(x)
            k2 = rate(x + 0.5 * step * k1)
            k3 = rate(x + 0.5 * step * k2)
            k4 = rate(x + step * k3)
            x = x + step / 6.0 * (k1 + 2.0 * (k2 + k3) + k4)
        path.append(x)
    return torch.stack(path)


def model(y):
    one, sign = torch.ones(2), torch.tensor([1.0, -1.0])
    growth = pyro.sample("growth", dist.LogNormal(0.0 * one, 0.5).to_event(1))
    meeting = pyro.sample("meeting", dist.LogNormal((0.05 * one).log(), 0.5).to_event(1))
    start = pyro.sample("start", dist.LogNormal((10.0 * one).log(), 1.0).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(-one, 1.0).to_event(1))
    path = populations(sign * growth, -sign * meeting, start)
    pyro.sample("y", dist.LogNormal(path, spread).to_event(2), obs=y)


# %% [markdown]
# ## Sampling
# Chains begin near published estimates: cycles of another period fit a little, too, and from far
# off some chains stay with those. `fallback=False` makes a seed repeat the run; by default the
# kernel also measures whether the network pays, and follows true gradients where it does not.

# %%
near = {"growth": [0.55, 0.8], "meeting": [0.028, 0.024], "start": [33, 6], "spread": [0.25] * 2}
torch.manual_seed(0)
begin = {n: torch.tensor(v).log() + 0.1 * torch.randn(4, 2) for n, v in near.items()}
kernel = phf.HNNNUTS(model, fallback=False, training_steps=100 if smoke else 1000)
mcmc = phf.MCMC(kernel, draws, warmup, num_chains=4, initial_params=begin, seed=1)
mcmc.run(y)
print(*mcmc.messages, sep="\n")

# %% [markdown]
# ## What the network learned, and what was saved
# Loss and error are of points held out; the energy's error is in nats, as log densities are: below
# one, most proposals are accepted.

# %%
for training in kernel.report.trainings:
    print(
        f"{training.points} points, {len(training.losses)} steps in {training.seconds:.1f} s: loss "
        f"{training.best_loss:.3f}, energy error {training.energy_error:.2f}"
    )
stats = mcmc.draws.stats
spent = kernel.report.n_gradients + int(stats["n_gradients"].sum())
asked = int(stats["n_densities"].sum())
steps = int(stats["n_steps"].sum())
print(f"{spent} true gradients and {asked} densities in all, where the draws made {steps} steps")
kernel.surrogate.save("neural_nuts.pt")  # HNNNUTS(model, surrogate=PotentialNetwork.load(...))

position = mcmc.draws.position[:, -1 - draws // 2 :]
true = -stats["lp"][:, -1 - draws // 2 :]
learned = kernel.surrogate(position).detach()

# %% [markdown]
# ## How you would notice a bad network
# Not by biased draws: there are none. Proposals would be refused (`surrogate_accepted`), and chains
# would stay where the network's energy is too high for long: `surrogate_error` has tails there.
# This one knows where the draws are, and nothing else: it was not trained.

# %%
bad = phf.PotentialNetwork(8)
bad.whiten_by(mcmc.draws.position.flatten(0, 1))
poor = phf.HNNNUTS(model, surrogate=bad, fallback=False, true_share=0.1)
again = phf.MCMC(poor, draws // 2, warmup // 4, num_chains=4, initial_params=begin, seed=1)
again.run(y)
for name, run in (("good", mcmc), ("bad", again)):
    found = run.draws.stats
    error = found["surrogate_error"].nan_to_num().abs().quantile(0.9)
    ess = arviz.ess(arviz.convert_to_dataset({"v": run.draws.position.numpy()}))["v"].min()
    print(
        f"{name}: accepted {found['surrogate_accepted'].double().mean():.2f}, nine errors in ten "
        f"below {error:.2f} nats, smallest ESS {float(ess):.0f} of {found['lp'].numel()} draws"
    )

# %%
figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
axes[0].scatter(true, learned - learned.mean() + true.mean(), s=4, alpha=0.3)
axes[0].axline((float(true.mean()),) * 2, slope=1.0, color="black", lw=0.7)
axes[0].set(title="Energy of draws", xlabel="the model's", ylabel="the network's, shifted")
for run, color in ((again, "C3"), (mcmc, "C0")):
    axes[1].plot(run.draws.position[0, :, 0], color=color, lw=0.7)
axes[1].set(title="One chain: good network (blue), bad (red)", xlabel="draw", ylabel="log growth")
samples = mcmc.get_samples()
sign = torch.tensor([1.0, -1.0])
for i in range(0, 4 * draws, max(1, draws // 10)):
    growth, meeting = samples["growth"][i], samples["meeting"][i]
    path = populations(sign * growth, -sign * meeting, samples["start"][i]).exp()
    for animal in range(2):
        axes[2].plot(1900 + torch.arange(years), path[:, animal], color=f"C{animal}", alpha=0.15)
for animal, name in enumerate(["hare", "lynx"]):
    axes[2].scatter(1900 + torch.arange(years), y[:, animal], color=f"C{animal}", label=name)
axes[2].set(title="Thousands of pelts", xlabel="year")
axes[2].legend()
figure.savefig("neural_nuts.png", dpi=100)
idata = phf.to_inference_data(mcmc)
print(arviz.summary(idata, var_names=["growth", "meeting", "start", "spread"]).to_string())

# %% [markdown]
# R-hat above 1.01, few proposals accepted, chains that stand still, or errors of many nats at some
# draws: any of these would have looked wrong.
