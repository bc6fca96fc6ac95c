"""Laws that integrators and samplers obey, as checks that can fail."""

from __future__ import annotations

import math

import arviz
import numpy as np
import torch
from torch import Tensor

LIMIT = 4.5  # standard errors; the suite tests some ten thousand statistics at fixed seeds
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def assert_reversible(move, flip, start, tolerance=1e-10):
    """Checks that a move, the flip, the move and the flip again lead back to the start.

    Arguments:
        move: From a tuple of tensors to another.
        flip: Turns the momenta round.
        start: The tuple to start from.
        tolerance: The largest distance from the start, in any coordinate.
    """
    there = move(start)
    moved = max((new - old).abs().max().item() for new, old in zip(there, start, strict=True))
    assert moved > 1e3 * tolerance, "the move stays where it is"
    back = flip(move(flip(there)))
    error = max((new - old).abs().max().item() for new, old in zip(back, start, strict=True))
    assert error <= tolerance, f"returned {error:.2e} from the start"


def assert_volume_preserving(move, start, tolerance=1e-10):
    """Checks that the Jacobian of a move has determinant one, by autograd.

    Arguments:
        move: From a tuple of tensors, each with one chain, to another.
        start: Where to take the Jacobian.
        tolerance: The largest error of the determinant's logarithm.
    """
    sizes = [part.numel() for part in start]

    def flat(vector: Tensor) -> Tensor:
        parts = [
            piece.reshape(part.shape)
            for piece, part in zip(vector.split(sizes), start, strict=True)
        ]
        return torch.cat([part.reshape(-1) for part in move(tuple(parts))])

    point = torch.cat([part.reshape(-1) for part in start])
    jacobian = torch.autograd.functional.jacobian(flat, point)
    sign, log_det = torch.linalg.slogdet(jacobian)
    assert sign > 0, "the Jacobian turns space inside out"
    assert abs(log_det.item()) <= tolerance, f"log determinant {log_det.item():.2e}"


def assert_order(energy_error, step_sizes, order=2.0, tolerance=0.1):
    """Checks that the energy error shrinks with the step size at a given order.

    Arguments:
        energy_error: From a step size to the energy errors of some trajectories of fixed time.
        step_sizes: At which to measure it.
        order: The slope of the logarithm of the error in that of the step size.
        tolerance: By how much the slope may differ.
    """
    errors = [energy_error(size).abs().mean().log() for size in step_sizes]
    x = torch.tensor(step_sizes).double().log()
    y = torch.stack(errors).double()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert abs(slope.item() - order) <= tolerance, f"order {slope.item():.3f}, not {order}"


def assert_invariant(before, after, limit=LIMIT):
    """Checks that many chains, begun from exact draws of a target, still follow it after moves.

    Means, second and third moments, cross moments and coverage of quantiles are compared by
    z-tests on the difference of each chain's two values, of mean zero if the target is kept.

    Arguments:
        before: Named quantities at exact draws, each of shape ``(chains, *)``.
        after: The same after some moves of each chain.
        limit: The largest difference of any statistic, in standard errors.
    """
    assert before.keys() == after.keys()
    names, old, new = [], [], []
    for name in before:
        first, last = before[name].flatten(1).double(), after[name].flatten(1).double()
        assert first.shape == last.shape, name
        assert bool(last.isfinite().all()), f"{name} is not finite"
        names += [f"{name}[{i}]" for i in range(first.shape[1])]
        old.append(first)
        new.append(last)
    first, last = torch.cat(old, 1), torch.cat(new, 1)
    centre, scale = first.mean(0), first.std(0)
    labels, differences = [], []
    for power, label in ((1, "mean"), (2, "second moment"), (3, "third moment")):
        labels += [f"{label} of {name}" for name in names]
        new_power = _power(last, centre, scale, power)
        differences.append(new_power - _power(first, centre, scale, power))
    for level in _QUANTILES:
        labels += [f"{level:.0%} quantile of {name}" for name in names]
        edge = first.quantile(level, 0)
        differences.append((last < edge).double() - (first < edge).double())
    for i in range(len(names)):
        for j in range(i):
            labels.append(f"cross moment of {names[j]} and {names[i]}")
        y, x = _power(last, centre, scale, 1), _power(first, centre, scale, 1)
        differences.append(y[:, :i] * y[:, i : i + 1] - x[:, :i] * x[:, i : i + 1])
    difference = torch.cat(differences, 1)
    error = difference.std(0) / math.sqrt(len(first))
    score = torch.where(error > 0, difference.mean(0) / error, 0.0)
    worst = int(score.abs().argmax())
    assert abs(score[worst].item()) <= limit, (
        f"the {labels[worst]} moved by {score[worst].item():.1f} standard errors"
    )


def _power(values: Tensor, centre: Tensor, scale: Tensor, power: int) -> Tensor:
    return ((values - centre) / scale).pow(power)


def scores(values, truth, truth_error=0.0):
    """By how many standard errors the mean of ``(chains, draws, *)`` differs from a truth.

    Arguments:
        values: The draws, as an array.
        truth: What their mean should be.
        truth_error: The standard error of the truth, which is added to ArviZ's of the mean.
    """
    error = arviz.mcse(arviz.convert_to_dataset({"v": values}))["v"].to_numpy()
    error = np.hypot(error, np.asarray(truth_error))
    return (values.mean((0, 1)) - np.asarray(truth)) / error
