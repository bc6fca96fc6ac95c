"""Results of models whose discrete sites are summed out, beside sums written out by hand."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf

Normal, Bernoulli = dist.Normal, dist.Bernoulli
Y = torch.tensor([-1.2, 0.3, 2.5, 0.9], dtype=torch.float64)
YY = torch.stack([Y, Y.flip(0), 0.5 * Y], -1)
SHARES = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
MOVES = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)


def mixture():
    """A discrete site for each datum: an entry for each."""
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
    mean = pyro.sample("mean", Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("datum", 4):
        z = pyro.sample("z", dist.Categorical(weight))
        pyro.sample("y", Normal(mean[z], 1.0), obs=Y)


def mixture_truth(p):
    parts = p["weight"].log()[..., None, :] + Normal(p["mean"][..., None, :], 1.0).log_prob(
        Y[:, None]
    )
    return {"y": parts.logsumexp(-1)}


def nested():
    """One for each group and one for each datum in it: an entry for each group."""
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("group", 4, dim=-2):
        z = pyro.sample("z", Bernoulli(torch.tensor(0.3)))
        with pyro.plate("visit", 3, dim=-1):
            k = pyro.sample("k", dist.Categorical(SHARES))
            pyro.sample("y", Normal(mean + z + 2.0 * k, 1.0), obs=YY)
    pyro.sample("other", Normal(mean, 1.0), obs=torch.tensor(0.3))


def nested_truth(p):
    mean = p["mean"][..., None, None, None, None]
    z, k = torch.tensor([0.0, 1.0])[:, None], torch.arange(3.0)
    inner = Normal(mean + z + 2.0 * k, 1.0).log_prob(YY[:, :, None, None]) + SHARES.log()
    parts = inner.logsumexp(-1).sum(-2) + torch.tensor([0.7, 0.3]).log()
    other = Normal(p["mean"], 1.0).log_prob(torch.tensor(0.3))
    return {"y": parts.logsumexp(-1), "other": other}


def shared():
    """One for all data: one entry for all."""
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    z = pyro.sample("z", Bernoulli(torch.tensor(0.4)))
    with pyro.plate("datum", 4):
        pyro.sample("y", Normal(mean + z, 1.0), obs=Y)


def shared_truth(p):
    parts = [Normal(p["mean"][..., None] + z, 1.0).log_prob(Y).sum(-1) for z in (0, 1)]
    return {"y": torch.stack(parts, -1).add(torch.tensor([0.6, 0.4]).log()).logsumexp(-1)}


def chains():
    """Hidden Markov chains: an entry for each chain."""
    mean = pyro.sample("mean", Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("sequence", 4):
        z = torch.tensor(0)
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Categorical(MOVES[z]))
            pyro.sample(f"y_{t}", Normal(mean[z], 1.0), obs=YY[:, t])


def chains_truth(p):
    emitted = Normal(p["mean"][..., None, None, :], 1.0).log_prob(YY[:, :, None])
    forward = MOVES[0].log() + emitted[..., 0, :]
    for t in (1, 2):
        forward = (forward[..., :, None] + MOVES.log()).logsumexp(-2) + emitted[..., t, :]
    return {"y": forward.logsumexp(-1)}


def before():
    """One before a continuous site too: the data are given what that tells of it."""
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("datum", 4):
        z = pyro.sample("z", Bernoulli(torch.tensor(0.4)))
        x = pyro.sample("x", Normal(mean + 3.0 * z, 1.0))
        pyro.sample("y", Normal(x + z, 1.0), obs=Y)


def before_truth(p):
    mean, weight = p["mean"][..., None], torch.tensor([0.6, 0.4]).log()
    prior = torch.stack([Normal(mean + 3.0 * z, 1.0).log_prob(p["x"]) for z in (0, 1)], -1) + weight
    data = torch.stack([Normal(p["x"] + z, 1.0).log_prob(Y) for z in (0, 1)], -1)
    return {"y": (prior + data).logsumexp(-1) - prior.logsumexp(-1)}


SEEN = torch.tensor([True, False, True, True])


def masked():
    """Some are masked, with their data: those count nothing."""
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("datum", 4), pyro.poutine.mask(mask=SEEN):
        z = pyro.sample("z", Bernoulli(torch.tensor(0.4)))
        pyro.sample("y", Normal(mean + z, 1.0), obs=Y)


def masked_truth(p):
    parts = torch.stack([Normal(p["mean"][..., None] + z, 1.0).log_prob(Y) for z in (0, 1)], -1)
    return {"y": (parts + torch.tensor([0.6, 0.4]).log()).logsumexp(-1) * SEEN}


def single():
    """A plate of one element."""
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("datum", 1):
        z = pyro.sample("z", Bernoulli(torch.tensor(0.4)))
        pyro.sample("y", Normal(mean + z, 1.0), obs=Y[:1])


def single_truth(p):
    parts = torch.stack([Normal(p["mean"][..., None] + z, 1.0).log_prob(Y[:1]) for z in (0, 1)], -1)
    return {"y": (parts + torch.tensor([0.6, 0.4]).log()).logsumexp(-1)}


CASES = {
    "mixture": (mixture, mixture_truth, {"y": ("datum",)}),
    "nested": (nested, nested_truth, {"y": ("group",), "other": ()}),
    "shared": (shared, shared_truth, {"y": ()}),
    "chains": (chains, chains_truth, {"y": ("sequence",)}),
    "before": (before, before_truth, {"y": ("datum",)}),
    "masked": (masked, masked_truth, {"y": ("datum",)}),
    "single": (single, single_truth, {"y": ("datum",)}),
}


def run(model):
    mcmc = phf.MCMC(phf.HMC(model), 5, 3, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run()
    return mcmc


@pytest.mark.parametrize("name", CASES)
def test_log_likelihoods_with_discrete_sites_summed_out(name):
    model, truth, dims = CASES[name]
    idata = phf.to_inference_data(run(model))
    values = {n: torch.tensor(v.to_numpy()) for n, v in idata.posterior.items()}
    found = idata.log_likelihood
    assert {n: v.dims[2:] for n, v in found.items()} == dims
    for site, expected in truth(values).items():
        np.testing.assert_allclose(found[site], expected, rtol=1e-10, atol=1e-12)


def with_deterministic():
    mean = pyro.sample("mean", Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("gap", mean[1] - mean[0])
    with pyro.plate("datum", 4):
        z = pyro.sample("z", Bernoulli(torch.tensor(0.4)))
        pyro.deterministic("level", mean[z.long()])
        pyro.sample("y", Normal(mean[z.long()], 1.0), obs=Y)


def test_deterministic_sites_that_can_be_given_are_and_others_named():
    mcmc = run(with_deterministic)
    with pytest.warns(RuntimeWarning, match=r"The posterior lacks \['level'\]"):
        idata = phf.to_inference_data(mcmc)
    assert set(idata.posterior) == {"mean", "gap"}
    mean = idata.posterior["mean"]
    np.testing.assert_allclose(idata.posterior["gap"], mean[..., 1] - mean[..., 0])
    assert "level" in idata.attrs["notes"]


def both():
    """A discrete and a local site in one plate: the first summed, the second integrated out."""
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    pyro.deterministic("double", 2.0 * mean)
    with pyro.plate("datum", 4):
        z = pyro.sample("z", Bernoulli(torch.tensor(0.4)))
        x = pyro.sample("x", Normal(mean + 3.0 * z, 1.0))
        pyro.deterministic("shifted", x + 1.0)
        pyro.sample("y", Normal(x, 1.0), obs=Y)


def test_discrete_sites_within_marginal_models():
    marginal = phf.marginalize(both, ["x"], num_particles=4)
    mcmc = phf.MCMC(phf.PseudoMarginalHMC(marginal), 10, 10, num_chains=2, seed=0)
    mcmc.run()
    with pytest.warns(RuntimeWarning, match=r"The posterior lacks \['x', 'shifted'\]"):
        idata = phf.to_inference_data(mcmc)
    mean = torch.tensor(idata.posterior["mean"].to_numpy())[..., None]
    np.testing.assert_allclose(idata.posterior["double"], 2.0 * mean[..., 0])
    parts = torch.stack([Normal(mean + 3.0 * z, 2.0**0.5).log_prob(Y) for z in (0, 1)], -1)
    truth = (parts + torch.tensor([0.6, 0.4]).log()).logsumexp(-1)
    assert np.abs(idata.log_likelihood["y"] - truth.numpy()).max() < 0.2
