"""Modes of many elements are found in a few steps, as closely as rounding allows."""

from __future__ import annotations

import pytest
import torch

from pyro_hamflow.marginal.newton import maximise


class Counted:
    """A log density that counts how often it is asked for."""

    def __init__(self, log_joint):
        self.log_joint, self.calls = log_joint, 0

    def __call__(self, v):
        self.calls += 1
        return self.log_joint(v)


def test_what_rounding_hides_is_no_reason_for_more_steps():
    """Of a sum as large as this, no gain below 1e-12 shows; each count's mode is near its log."""
    counts = torch.arange(3.0, 43.0, dtype=torch.float64)

    def log_joint(v):
        return 1e4 + (counts[:, None] * v - v.exp()).sum(-1)

    density = Counted(log_joint)
    found = maximise(density, counts.log()[:, None] + 0.3)
    assert density.calls <= 7
    torch.testing.assert_close(found.place[:, 0], counts.log(), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("count", [1e2, 1e4, 1e6])
def test_a_step_that_fails_is_made_as_short_as_the_curvature_asks(count):
    """Newton's first step leads to the exponential of the count."""
    density = Counted(lambda v: (count * v - v.exp()).sum(-1))
    found = maximise(density, torch.tensor([[-2.0], [0.0], [2.0]], dtype=torch.float64))
    assert density.calls <= 25
    torch.testing.assert_close(found.place.exp(), torch.full((3, 1), count, dtype=torch.float64))


def test_elements_without_a_density_do_not_hold_up_the_others():
    density = Counted(lambda v: (torch.tensor([1.0, torch.nan]) * (v - v.exp())[:, 0]).double())
    found = maximise(density, torch.full((2, 1), 0.5, dtype=torch.float64))
    assert density.calls <= 12
    assert abs(float(found.place[0])) < 1e-12
