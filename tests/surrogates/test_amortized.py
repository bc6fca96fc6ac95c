"""Surrogates of all data sets of a model: what they know, and that it costs no exactness."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer.autoguide.initialization import init_to_value

from pyro_hamflow import HNNNUTS, MCMC, AmortizedSurrogate, learn_surrogate, progress
from pyro_hamflow.model.potential import Potential
from tests.helpers.laws import scores

SIZE = 6
SMALL = {"num_sets": 64, "training_steps": 50, "disable_progbar": True}


def decay(y):
    """Counts that fall with time; two parameters."""
    rate = pyro.sample("rate", dist.LogNormal(-1.0, 0.5))
    level = pyro.sample("level", dist.Normal(2.0, 0.5))
    time = torch.arange(SIZE).to(level)
    pyro.sample("y", dist.Normal(level * torch.exp(-rate * time), 0.3).to_event(1), obs=y)


@pytest.fixture(scope="module")
def surrogate():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    return learn_surrogate(
        decay, torch.zeros(SIZE), num_sets=500, training_steps=2000, disable_progbar=True
    )


def simulated(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SIZE + 2, generator=generator)
    rate, level = (-1.0 + 0.5 * noise[0]).exp(), 2.0 + 0.5 * noise[1]
    return torch.stack([rate.log(), level]), level * (-rate * torch.arange(SIZE)).exp() + (
        0.3 * noise[2:]
    )


def draws_for(surrogate, y, *, draws=200, chains=8, warmup=60):
    kernel = HNNNUTS(decay, surrogate=surrogate, fallback=False, true_share=0.0)
    mcmc = MCMC(kernel, draws, warmup, num_chains=chains, seed=0, disable_progbar=True)
    mcmc.run(y)
    return mcmc


@pytest.mark.slow
def test_energy_given_data_is_the_models(surrogate):
    found = []
    for seed in range(5):
        true, y = simulated(seed)
        potential = Potential(decay, (y,))
        z = true + 0.1 * torch.randn(100, 2)
        error = surrogate.at(potential)(z) - potential.value(z, z[:, :0])
        found.append(float(error.detach().std()))
    assert np.median(found) < 0.3, found
    assert surrogate.training.best_loss < 0.2 * surrogate.training.checks[0]
    assert surrogate.n_gradients >= 512 * (3 + 3), "three along a trajectory, three about the guess"


@pytest.mark.parametrize("seed", [11, 12])
def test_draws_for_new_data_are_the_posteriors(surrogate, seed):
    """Beside quadrature, and without a gradient of the model."""
    _, y = simulated(seed)
    mcmc = draws_for(surrogate, y)
    stats = mcmc.draws.stats
    assert stats["n_gradients"].sum() == 0
    assert stats["acceptance_rate"].mean() > 0.6
    assert not mcmc.kernel.report.trainings
    potential = Potential(decay, (y,))
    axes = [torch.linspace(-4.0, 2.0, 400), torch.linspace(-0.5, 5.0, 300)]
    grid = torch.cartesian_prod(*axes)
    weight = torch.softmax(-potential.value(grid, grid[:, :0]), 0)
    truth = (weight[:, None] * torch.cat([grid, grid.square()], 1)).sum(0)
    position = mcmc.draws.position
    values = torch.cat([position, position.square()], -1).numpy()
    assert abs(scores(values, truth)).max() < 4.0


def test_other_data_are_refused(surrogate):
    kernel = HNNNUTS(decay_of_any_length, surrogate=surrogate)
    mcmc = MCMC(kernel, 5, 5, num_chains=2, disable_progbar=True)
    with pytest.raises(ValueError, match=r"summary of the data has shape \(4,\): expected \(6,\)"):
        mcmc.run(torch.zeros(4))


def decay_of_any_length(y):
    level = pyro.sample("level", dist.Normal(2.0, 0.5).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(level[0], 0.3).expand([len(y)]).to_event(1), obs=y)


def test_start_and_scale_are_the_surrogates(surrogate):
    """Chains that began elsewhere would stay where nothing was learned."""
    _, y = simulated(11)
    kernel = HNNNUTS(decay, surrogate=surrogate, fallback=False)
    state = kernel.begin(400, 0, (y,))
    network = kernel.surrogate
    whitened = network.whitened(state.position)
    assert (whitened.mean(0).abs() < 0.3).all()
    assert ((whitened.std(0) - 1.0).abs() < 0.3).all()
    assert torch.allclose(kernel.kinetic.inverse_mass, network.root @ network.root.mT)
    assert kernel.report.n_gradients == surrogate.n_probes == 3


def test_start_and_structure_that_were_asked_for(surrogate):
    start = init_to_value(values={"rate": torch.tensor(0.5), "level": torch.tensor(1.5)})
    settings = {"init_strategy": start, "full_mass": [("rate",)], "fallback": False}
    kernel = HNNNUTS(decay, surrogate=surrogate, **settings)
    state = kernel.begin(2, 0, (simulated(11)[1],))
    expected = torch.tensor([math.log(0.5), 1.5]).expand(2, 2)
    torch.testing.assert_close(state.position, expected)
    inverse_mass, root = kernel.kinetic.inverse_mass, kernel.surrogate.root
    torch.testing.assert_close(inverse_mass, torch.diag((root @ root.mT).diag()))


def test_saved_surrogate_is_the_same(surrogate, tmp_path):
    path = tmp_path / "surrogate.pt"
    surrogate.save(path)
    again = AmortizedSurrogate.load(path)
    potential, z = Potential(decay, (simulated(11)[1],)), torch.randn(5, 2)
    assert torch.equal(again.at(potential)(z), surrogate.at(potential)(z))
    assert again.n_gradients == surrogate.n_gradients
    assert torch.equal(again.training.losses, surrogate.training.losses)
    assert again.training.energy_error == surrogate.training.energy_error


def test_summary_is_given_again(tmp_path):
    def summary(data):
        return data["y"][:2]

    learned = learn_surrogate(decay, torch.zeros(SIZE), summary=summary, **SMALL)
    path = tmp_path / "surrogate.pt"
    learned.save(path)
    with pytest.raises(ValueError, match="trained with a summary of its own: expected it as"):
        AmortizedSurrogate.load(path)
    again = AmortizedSurrogate.load(path, summary=summary)
    potential, z = Potential(decay, (torch.ones(SIZE),)), torch.randn(5, 2)
    assert torch.equal(again.at(potential)(z), learned.at(potential)(z))
    learned.network.save(path)
    with pytest.raises(ValueError, match="holds no amortised surrogate, but: pyro_hamflow pot"):
        AmortizedSurrogate.load(path)


def test_strange_data_cost_no_crash(surrogate):
    """Data that no parameter of the prior would bring forth: refused proposals at worst."""
    y = torch.tensor([1e6, -1e6, 0.0, torch.inf, 3.0, 3.0])
    assert surrogate.at(Potential(decay, (y,)))(torch.zeros(1, 2)).isfinite().all()
    mcmc = MCMC(HNNNUTS(decay, surrogate=surrogate), 20, 60, num_chains=4, disable_progbar=True)
    mcmc.run(torch.full((SIZE,), 30.0))
    assert mcmc.draws.position.isfinite().all()


def test_single_precision_follows_a_double(surrogate):
    torch.set_default_dtype(torch.float32)
    network = surrogate.at(Potential(decay, (torch.ones(SIZE),)))
    assert network(torch.zeros(1, 2)).dtype == torch.float32
    assert surrogate.network.centre.dtype == torch.float64


def test_progress_is_shown(capfd, monkeypatch):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    learn_surrogate(decay, torch.zeros(SIZE), **(SMALL | {"disable_progbar": False}))
    shown = capfd.readouterr().err
    assert "Simulate" in shown and "Fit energy" in shown


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`num_sets` is 0: expected 1 or more"):
        learn_surrogate(decay, torch.zeros(SIZE), num_sets=0)
    with pytest.raises(ValueError, match="the model observes nothing"):
        learn_surrogate(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match=r"summary of the data has shape \(\): expected a vector"):
        learn_surrogate(decay, torch.zeros(SIZE), summary=lambda data: data["y"].sum(), **SMALL)


def test_seed_repeats_training():
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        learned = learn_surrogate(decay, torch.zeros(SIZE), **SMALL)
        found.append(learned.at(Potential(decay, (torch.ones(SIZE),)))(torch.ones(1, 2)))
    assert torch.equal(*found)
    assert isinstance(learned, AmortizedSurrogate)


@pytest.mark.slow
def test_prior_draws_rank_anywhere(surrogate):
    """Simulation-based calibration, for which an amortised surrogate is made."""
    ranks = []
    for seed in range(200):
        true, y = simulated(1000 + seed)
        mcmc = draws_for(surrogate, y, draws=20, chains=31, warmup=30)
        ranks.append((mcmc.draws.position[:, -1] < true).sum(0))
    for values in torch.stack(ranks, 1):
        found = torch.bincount(values // 4, minlength=8)
        assert scipy.stats.chisquare(found.numpy()).pvalue > 1e-3, found
