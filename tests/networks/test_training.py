"""The loop that trains everything: what it keeps, skips, measures, and when it stops."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_hamflow.networks.training import train


def line():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    return module


def mean_loss(progress, mean):
    return mean


def test_best_state_is_kept_training_stops_early_and_skipped_steps_are_counted():
    module, calls = line(), []

    def loss(progress):
        calls.append(progress)
        value = module.weight.sum().square()
        if len(calls) == 7:
            return value * math.nan
        return value if len(calls) <= 40 else value + 100.0 * len(calls)

    training = train(
        module,
        loss,
        measure=mean_loss,
        num_steps=400,
        learning_rate=0.02,
        check_every=10,
        patience=40,
    )
    assert training.num_skipped == 1 and bool(training.losses[6].isnan())
    assert training.stopped_early and len(training.losses) == 90 and training.budget == 400
    assert training.best_step == 40 and training.best_loss < 0.5
    assert abs(module.weight.item() ** 2 - float(training.losses[39])) < 0.05


def test_gradient_that_is_no_number_changes_nothing():
    module = line()

    def loss(progress):
        return (module.weight.sum() - 1.0).abs().sqrt()  # of infinite gradient here

    training = train(
        module,
        loss,
        measure=mean_loss,
        num_steps=5,
        learning_rate=0.1,
        check_every=1,
        patience=math.inf,
    )
    assert training.num_skipped == 5 and module.weight.item() == 1.0
    assert training.best_step == 0 and training.best_loss == math.inf


@pytest.mark.parametrize("known_after", [0.0, 0.5])
def test_states_are_compared_by_the_measure_and_where_it_says(known_after):
    """Training moves away from what the measure wants: the first state compared is the best."""
    module, seen = line(), []

    def measure(progress, mean):
        seen.append(progress)
        return -module.weight.item() if progress >= known_after else None

    training = train(
        module,
        lambda progress: module.weight.sum(),
        measure=measure,
        num_steps=20,
        learning_rate=0.1,
        check_every=5,
        patience=math.inf,
    )
    assert seen == [0.0, 0.2, 0.45, 0.7, 0.95]
    assert [math.isnan(check) for check in training.checks] == [x < known_after for x in seen]
    assert training.best_step == (0 if known_after == 0.0 else 15)
    assert training.best_loss == pytest.approx(-module.weight.item(), rel=1e-6)
    assert not training.stopped_early and len(training.losses) == 20


def test_rate_falls_along_a_cosine():
    """Under a constant gradient each step of Adam is as long as the rate."""
    module, weights = line(), []

    def loss(progress):
        weights.append(module.weight.item())
        return module.weight.sum()

    train(
        module,
        loss,
        measure=lambda progress, mean: None,
        num_steps=8,
        learning_rate=0.1,
        check_every=1,
        patience=math.inf,
    )
    weights.append(module.weight.item())
    steps = [before - after for before, after in zip(weights, weights[1:], strict=False)]
    rates = [0.05 * (1.0 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert steps == pytest.approx(rates, rel=1e-5)
