"""Pictures of flows: drawn, and refused by name where they cannot be."""

from __future__ import annotations

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    AutoNeuralHamiltonianFlow,
    NeuralHamiltonianFlow,
    plot_momenta,
    plot_path,
    plot_potential,
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
