"""Functions in other words have torch's values and gradients, in fewer operations."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch.nn import functional

from pyro_hamflow.programs.capture import capture

LOGITS = torch.tensor([-800.0, -40.0, -1.3, 0.0, 2.0, 40.0, 800.0], dtype=torch.float64)
Y = torch.tensor([[0.0], [1.0], [0.3]], dtype=torch.float64)


def log_densities(logits):
    """Those of Bernoulli variables, for each logit at once, and the gradient of their sum."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        one = lambda at: dist.Bernoulli(logits=at, validate_args=False).log_prob(Y)  # noqa: E731
        found = torch.func.vmap(one)(logits)
        (slope,) = torch.autograd.grad(found.sum(), logits)
    return found.detach(), slope


def test_bernoulli_variables_take_one_operation_for_their_logarithm():
    graph = capture(log_densities, LOGITS)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("softplus" in name for name in called) == 2  # with that of the gradient
    assert not any("exp" in name.split(".")[1:2] or " exp " in name for name in called)
    found, slope = graph(LOGITS)
    exact = dist.Bernoulli(logits=LOGITS[:, None, None]).log_prob(Y[None, :2])
    assert torch.allclose(found[:, :2], exact, rtol=1e-15, atol=1e-14)
    assert torch.allclose(slope, Y.sum() - 3.0 * torch.sigmoid(LOGITS), atol=1e-14)


@pytest.mark.parametrize("logit", [math.inf, -math.inf])
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_infinite_logits_give_what_torch_gives(logit, y):
    logits, target = torch.tensor([logit]), torch.tensor([y])
    wanted = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")

    def loss(at):
        return functional.binary_cross_entropy_with_logits(at, target, reduction="none")

    assert torch.equal(capture(loss, logits)(logits).nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize(
    "settings", [{}, {"reduction": "sum"}, {"reduction": "none", "pos_weight": torch.tensor(3.0)}]
)
def test_other_forms_are_left_alone(settings):
    target = torch.tensor([0.0, 1.0, 0.3], dtype=torch.float64)
    weigh = lambda at: functional.binary_cross_entropy_with_logits(at, target, **settings)  # noqa: E731
    at = LOGITS[2:5]
    assert torch.allclose(capture(weigh, at)(at), weigh(at))
