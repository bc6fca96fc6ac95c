"""Pictures of flows: drawn, and refused by name where they cannot be."""

from __future__ import annotations

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    HMC,
    HNNHMC,
    MCMC,
    AnnealedSampler,
    AutoNeuralHamiltonianFlow,
    NeuralHamiltonianFlow,
    PotentialNetwork,
    marginalize,
    plot_estimator,
    plot_modes,
    plot_momenta,
    plot_path,
    plot_potential,
    plot_surrogate,
    plot_weights,
)

matplotlib.use("Agg")


def model():
    pyro.sample("x", dist.Normal(torch.ones(3), 2.0).to_event(1))


@pytest.fixture(params=["flow", "guide"])
def flow(request):
    if request.param == "flow":
        return NeuralHamiltonianFlow(3, hidden=(8,))
    guide = AutoNeuralHamiltonianFlow(model, hidden=(8,))
    guide.prepare()
    return guide


def test_everything_is_drawn(flow):
    import matplotlib.pyplot as plt

    axes = plot_potential(flow, lambda x: -x.square().sum(-1), dimensions=(0, 2))
    assert [axis.get_title() for axis in axes] == ["learned potential", "minus log target"]
    assert len(plot_potential(flow, axes=plt.figure().subplots())) == 1
    assert len(plot_momenta(flow, torch.randn(50, 3), num_samples=50)) == 2
    axes = plot_path(flow, num_samples=50, num_shown=3)
    assert [axis.get_title() for axis in axes][::2] == ["time 0", "time 1"]
    plt.close("all")


def test_potential_of_a_guide_lies_where_its_positions_do():
    guide = AutoNeuralHamiltonianFlow(model, hidden=(8,))
    guide.prepare()
    torch.testing.assert_close(guide.standardise(guide.to_position(torch.eye(3))), torch.eye(3))


def test_bad_arguments_are_refused(flow):
    with pytest.raises(ValueError, match=r"`dimensions` is \(0, 3\): expected two of the 3"):
        plot_momenta(flow, dimensions=(0, 3))
    with pytest.raises(ValueError, match="`num_shown` is 1"):
        plot_path(flow, num_shown=1)
    with pytest.raises(ValueError, match="`axes` has 3 axes: expected 2"):
        plot_momenta(flow, axes=[None] * 3)


def bars(axis):
    """The heights of bars, by the label of their kind."""
    return {group.get_label(): [bar.get_height() for bar in group] for group in axis.containers}


def signs(samples):
    return (samples["x"][..., 0] > 0.0).long()


def test_modes_are_counted_chain_by_chain():
    mcmc = MCMC(HMC(model), 40, 20, num_chains=3, seed=0)
    mcmc.run()
    axis = plot_modes(mcmc, signs)
    share = signs(mcmc.get_samples(group_by_chain=True)).double().mean(1)
    assert bars(axis)["mode 1"] == pytest.approx(share.tolist())
    assert bars(axis)["mode 0"] == pytest.approx((1.0 - share).tolist())
    with pytest.raises(ValueError, match=r"`mode_of` returns shape \(3,\): expected \(3, 40\)"):
        plot_modes(mcmc, lambda samples: signs(samples)[:, 0])
    with pytest.raises(ValueError, match="kernel is a HMC without a surrogate"):
        plot_surrogate(mcmc)


def test_surrogate_is_shown_against_the_model():
    kernel = HNNHMC(model, training_steps=5, fallback=False)
    mcmc = MCMC(kernel, 20, 100, num_chains=4, seed=0)
    mcmc.run()
    shown = torch.tensor(plot_surrogate(mcmc).collections[0].get_offsets())
    position, true = mcmc.draws.position.flatten(0, 1), -mcmc.draws.stats["lp"].flatten()
    torch.testing.assert_close(shown[:, 0], true)
    assert isinstance(mcmc.kernel.surrogate, PotentialNetwork)
    learned = mcmc.kernel.surrogate(position.to(next(mcmc.kernel.surrogate.parameters())))
    steps = shown[:, 1].diff()
    torch.testing.assert_close(steps.double(), learned.detach().double().diff(), atol=1e-4, rtol=0)


def test_weights_are_shown_by_temperature():
    def two():
        x = pyro.sample("x", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal(x.abs(), 0.3), obs=torch.tensor(2.0))

    sampler = AnnealedSampler(two, num_particles=64, seed=0)
    sampler.run()
    left, right = plot_weights(sampler)
    passages = sampler.population.passages
    size, rate = left.get_lines()
    assert list(size.get_xdata()) == [passage.inverse_temperature for passage in passages]
    assert list(size.get_ydata()) == [passage.ess for passage in passages]
    assert list(rate.get_ydata()) == [passage.acceptance_rate for passage in passages]
    assert sum(bar.get_height() for bar in right.patches) == 64


def test_estimates_grow_quieter_with_particles():
    def local(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            x = pyro.sample("x", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    counts = (64, 1024)
    marginals = [marginalize(local, ["x"], num_particles=n, proposal="prior") for n in counts]
    axis = plot_estimator(marginals, {"mean": torch.tensor(0.0)}, torch.tensor([1.0, -1.0]))
    whole = axis.get_lines()[0]
    assert tuple(whole.get_xdata()) == counts
    few, many = whole.get_ydata()
    assert few / many == pytest.approx(4.0, rel=0.4)  # the root of 16
