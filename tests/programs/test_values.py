"""What leaves torch is never baked into a graph: it is refused, or recorded in another way."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import capture

SEEN = torch.tensor([True, False])


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(0.5 * x.numpy())

    @staticmethod
    def backward(ctx, slope):
        return 0.5 * slope


REFUSED = {
    "numpy": lambda x: torch.from_numpy(x.numpy() * 2.0),
    "of data": lambda x: torch.from_numpy(x.data.numpy()),
    "asarray": lambda x: torch.as_tensor(np.asarray(x)),
    "numpy function": lambda x: torch.as_tensor(np.exp(x)),
    "scipy": lambda x: torch.as_tensor(scipy.special.expit(x.detach())),
    "custom function": lambda x: Halved.apply(x),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "dlpack": lambda x: torch.from_dlpack(x) * 2.0,
    "numpy dlpack": lambda x: torch.from_numpy(np.from_dlpack(x)),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy": lambda x: copy.deepcopy(x),
    "storage": lambda x: torch.tensor(list(x.untyped_storage())),
    "item": lambda x: x * x[0].item(),
    "float": lambda x: x * float(x[0]),
    "math": lambda x: x * math.exp(x[0]),
    "int": lambda x: torch.ones(2) * int(x[0]),
    "range": lambda x: sum((x for _ in range(int(x[0]))), x),
    "if": lambda x: x if x[0] > 0.0 else -x,
    "while": lambda x: _halve(x),
    "assert": lambda x: x * _checked(x),
    "python max": lambda x: max(x),
    "python sum": lambda x: x * sum(x.tolist()),
    "equal": lambda x: x if torch.equal(x, x + 1.0) else -x,
    "allclose": lambda x: x if torch.allclose(x, x + 1.0) else -x,
    "written to": lambda x: x if torch.zeros(2).copy_(x)[0] > 0.0 else -x,
    "no gradient": lambda x: x if _without_gradient(x) > 0.0 else -x,
}

SHAPES = {
    "mask": lambda x: x[x > 0.0],
    "mask of a constant": lambda x: torch.ones(2)[x > 0.0],
    "masked select": lambda x: x.masked_select(x > 0.0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0.0)[0],
    "unique": lambda x: x.unique(),
    "counts": lambda x: torch.bincount(x.abs().long()),
    "repeated": lambda x: torch.ones(2).repeat_interleave(x.abs().long()),
    "written": lambda x: torch.zeros(2).index_put((x > 0.0,), x.sum()[None])[x > 1.0],
}

RECORDED = {
    "list": lambda x: torch.tensor([x[0], 1.0, x[1]]),
    "nested list": lambda x: torch.as_tensor([[x[0]], [x[1]]]),
    "full": lambda x: torch.full((3,), x[0]) + torch.full_like(x, fill_value=x[1])[0],
    "new": lambda x: x.new_full((2,), x[0]) + x.new_tensor([x[1], 3]),
    "copied": lambda x: torch.tensor(x),
    "data": lambda x: x.data * 2.0,
    "without gradient": lambda x: _without_gradient(x) * x,
    "mask": lambda x: x[SEEN] + x.masked_select(SEEN),
    "largest": lambda x: x[x.argmax()],
    "control by constants": lambda x: x if SEEN.any() and float(SEEN.sum()) == 1.0 else -x,
    "written, then constants": lambda x: torch.zeros(2).copy_(x) if bool(SEEN[0]) else x,
}


def _halve(x):
    while x.sum() > 1.0:
        x = 0.5 * x
    return x


def _checked(x):
    assert (x > -100.0).all()
    return x


def _without_gradient(x):
    with torch.no_grad():
        return x.sum()


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_leave_torch_are_refused(name):
    with pytest.raises(RuntimeError, match="asks for the value of a tensor that depends"):
        capture(REFUSED[name], torch.tensor([1.5, 2.5]))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_depend_on_values_are_refused_by_the_operation(name):
    with pytest.raises(RuntimeError, match=r"aten.*makes a tensor whose shape depends"):
        capture(SHAPES[name], torch.tensor([1.5, -2.5]))


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("name", RECORDED)
def test_what_can_be_recorded_is(name):
    graph = capture(RECORDED[name], torch.tensor([1.5, 2.5]))
    for x in (torch.tensor([0.3, -0.7]), torch.tensor([-2.0, 5.0])):
        torch.testing.assert_close(graph(x), RECORDED[name](x))


def caught():
    """It goes on where a matrix has no Cholesky factor, which no point may show."""
    r = pyro.sample("r", dist.Normal(0.0, 1e-3))
    matrix = torch.eye(2) + 0.01 * r * (1.0 - torch.eye(2))
    try:
        factor = torch.linalg.cholesky(matrix)
    except RuntimeError:
        factor = torch.linalg.cholesky(matrix + 100.0 * torch.eye(2))
    pyro.factor("likelihood", -factor.sum())


def by_numpy():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("flat here", -torch.as_tensor(np.maximum(x.detach().numpy() - 50.0, 0.0)))


def selected():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("positive", -x[x > 0.0].square().sum())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (caught, "goes on in another way where linalg.cholesky fails"),
        (by_numpy, "Tensor.numpy asks for the value"),
        (selected, "aten.index.Tensor makes a tensor whose shape depends"),
    ],
)
def test_models_that_cannot_be_captured_run_in_python_with_the_reason(model, reason):
    """The points of the check would have told nothing, in the first two."""
    potential = Potential(model)
    position, noise = potential.vectors(3)
    position = position.clone()
    position[0] *= 2000.0
    with pytest.warns(RuntimeWarning, match=reason):
        value, _, _ = potential.gradients(position, noise)
    for row, one in zip(position, value, strict=True):
        torch.testing.assert_close(one, potential.value_of_one(row, noise[0]).detach())
    assert potential.programs.failures.count == 0
