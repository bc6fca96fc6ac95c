"""Weights of populations, and resampling."""

from __future__ import annotations

import torch

from pyro_hamflow.smc.resampling import (
    conditional_size,
    effective_size,
    normalised,
    resample_systematically,
)


def test_particles_are_picked_as_often_as_their_weights_say():
    log_weights = torch.tensor([[0.1, 0.0, 0.25, 0.65]]).log().expand(20_000, 4)
    index = resample_systematically(log_weights)
    counts = torch.stack([(index == i).sum(1) for i in range(4)], 1).double()
    expected = 4.0 * log_weights[0].exp()
    assert bool(((counts - expected).abs() < 1.0).all())
    error = counts.std(0) / 20_000**0.5
    assert bool(((counts.mean(0) - expected).abs() <= 4.0 * error).all())


def test_rows_are_resampled_apart_and_dead_ones_stay():
    dead = torch.full((4,), -torch.inf)
    last = torch.tensor([-torch.inf, -torch.inf, -torch.inf, 0.0])
    index = resample_systematically(torch.stack([last, dead, torch.zeros(4)]))
    assert index.tolist() == [[3, 3, 3, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_sizes_count_dead_particles_as_nothing():
    log_weights = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [-torch.inf] * 4])
    torch.testing.assert_close(effective_size(log_weights), torch.tensor([2.0, 0.0]))
    assert normalised(log_weights).tolist() == [[0.5, 0.5, 0.0, 0.0], [0.25] * 4]


def test_a_step_is_worth_what_it_makes_of_those_that_live():
    before = torch.zeros(1, 4)
    assert conditional_size(before, torch.tensor([[1.0, 1.0, 1.0, -torch.inf]])) == 1.0
    ratio = torch.tensor([[1.0, 3.0, 1.0, 3.0]])
    assert abs(conditional_size(before, ratio.log()) - 4.0 / 5.0) < 1e-12
    weighted = torch.tensor([[3.0, 1.0, 3.0, 1.0]]).log()
    assert abs(conditional_size(weighted, ratio.log()) - 1.5**2 / 3.0) < 1e-12
