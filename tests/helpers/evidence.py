"""What is asked of populations: evidence and the weights of modes, within their errors."""

from __future__ import annotations


def assert_evidence(population, expected, largest):
    """Within three standard errors, which are smaller than ``largest``."""
    error = population.log_evidence_error
    assert error < largest
    assert abs(population.log_evidence - expected) < 3.0 * error


def share(population, belongs):
    """The weight of some particles, and its standard error from the parts."""
    weights = population.log_weights.softmax(0).reshape(len(population.parts_log_evidence), -1)
    parts = (weights * belongs.reshape(weights.shape)).sum(1)
    whole = weights.sum(1)
    total = parts.sum() / whole.sum()
    return float(total), float((parts - total * whole).square().sum().sqrt())
