"""Functions for many rows at once, whatever they do to one."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow.marginal.marginalize import marginalize
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.vectorize import Vectorized

Y = torch.tensor([[0.5, 1.0, -0.3], [-1.0, 0.2, 0.8]])
COUNTS = torch.tensor([[3.0, 0.0, 7.0], [1.0, 4.0, 5.0]])
SEEN = torch.tensor([True, False])


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    def backward(ctx, slope):
        return 2.0 * slope


def written(row, scale):
    total = torch.zeros(4)
    total[1:] = row * scale
    total[0] = row.detach().sum() * scale
    with torch.no_grad():
        stopped = scale * row.sum()
    total[total > 1.0] = 1.0
    return total * stopped, {"doubled": total.square().sum()}


def own_gradient(row, scale):
    total = torch.zeros(3)
    total[:] = Doubled.apply(row * scale)
    return total, {"doubled": total.sum()}


def values_asked_for(row, scale):
    total = torch.zeros(3)
    total[:] = row * scale if row[0] > 0.0 else row
    return total, {"doubled": total.sum()}


@pytest.mark.parametrize("function", [written, own_gradient, values_asked_for])
def test_values_and_gradients_are_those_of_each_row(function):
    rows = torch.randn(5, 3, requires_grad=True)
    scale = torch.tensor(1.5, requires_grad=True)
    each = Vectorized("rows")
    if function is written:
        part, more = each(lambda row: function(row, scale), rows)
    else:
        with pytest.warns(RuntimeWarning, match="rows could not be computed at once.*one by one"):
            each(lambda row: function(row, scale), rows)
        part, more = each(lambda row: function(row, scale), rows)  # without a second warning
    singles = [function(row, scale) for row in rows]
    expected = torch.stack([part for part, _ in singles])
    others = torch.stack([more["doubled"] for _, more in singles])
    torch.testing.assert_close(part, expected)
    torch.testing.assert_close(more["doubled"], others)
    for one, two in ((part, expected), (more["doubled"], others)):
        slopes, right = (
            torch.autograd.grad(x.sum(), (rows, scale), retain_graph=True) for x in (one, two)
        )
        for slope, known in zip(slopes, right, strict=True):
            torch.testing.assert_close(slope, known)


def test_faults_of_the_function_are_its_own():
    def faulty(row):
        return row @ torch.ones(7)

    with pytest.raises(RuntimeError, match="7"):
        Vectorized("rows")(faulty, torch.ones(2, 3))
    each = pickle.loads(pickle.dumps(copy.deepcopy(Vectorized("rows"))))
    torch.testing.assert_close(each(torch.exp, torch.ones(2, 3)), torch.ones(2, 3).exp())


def columns(by_hand):
    decay = pyro.sample("decay", dist.Uniform(-1.0, 1.0))
    with pyro.plate("subject", 2):
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if by_hand:
            first, second = x[:, 0], decay * x[:, 0] + x[:, 1]
            path = torch.stack([first, second, decay * second + x[:, 2]], -1)
            path = torch.where(SEEN[:, None], path, path.exp())
        else:
            path = torch.zeros(2, 3)
            path[:, 0] = x[:, 0]
            for t in (1, 2):
                path[:, t] = decay * path[:, t - 1].clone() + x[:, t]
            path[~SEEN] = path[~SEEN].exp()
        pyro.sample("y", dist.Normal(path, 1.0).to_event(1), obs=Y)


def shares(by_hand):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("subject", 2):
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if by_hand:
            constant = (COUNTS.sum(-1) + 1.0).lgamma() - (COUNTS + 1.0).lgamma().sum(-1)
            density = (COUNTS * (mean + x).log_softmax(-1)).sum(-1) + constant
            pyro.sample("y", dist.Delta(Y, log_density=density, event_dim=1), obs=Y)
        else:
            # Its density writes zeros by a mask.
            counts = torch.zeros(3, dtype=torch.long)
            pyro.sample("y", dist.Multinomial(10, logits=mean + x), obs=COUNTS + counts)


def ordinal(by_hand):
    cuts = pyro.sample("cut", dist.Normal(0.0, 1.0)) + torch.tensor([-1.0, 0.5, 1.0])
    with pyro.plate("subject", 2):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        y = torch.tensor([0, 2])
        if by_hand:
            below = torch.sigmoid(cuts - x[..., None])
            probs = torch.cat([below, torch.ones(2, 1)], -1) - torch.cat(
                [torch.zeros(2, 1), below], -1
            )
            pyro.sample("y", dist.Categorical(probs), obs=y)
        else:
            pyro.sample("y", dist.OrderedLogistic(x, cuts), obs=y)


@pytest.mark.parametrize("proposal", ["prior", "laplace"])
@pytest.mark.parametrize("model", [columns, shares, ordinal])
def test_models_that_write_in_place_are_marginalised(model, proposal):
    """Estimate and gradients are those of the same model without such writes."""
    potentials = []
    for by_hand in (False, True):
        marginal = marginalize(model, ["x"], num_particles=2, proposal=proposal)
        nesting = {"mean": torch.zeros(3), "cut": torch.zeros(()), "decay": torch.tensor(0.3)}
        marginal.fit(by_hand, pilot=nesting)
        potentials.append(Potential(marginal, (by_hand,), separate_noise=True))
    position, noise = potentials[0].vectors(3)
    for part, other in zip(*(p.gradients(position, noise) for p in potentials), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-6, atol=1e-6)
    assert potentials[0].programs.fallback_reason is None and not potentials[0].programs._looped
