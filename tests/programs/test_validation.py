"""Models are run without the checks that read values, however their distributions were made."""

from __future__ import annotations

import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch.distributions import Distribution

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.validation import no_validation

X = torch.linspace(-1.0, 1.0, 6)

CHECKED = {
    "transformed": dist.TransformedDistribution(
        dist.Normal(0.0, 1.0, validate_args=True),
        [dist.transforms.ExpTransform()],
        validate_args=True,
    ),
    "expanded": dist.HalfCauchy(1.0, validate_args=True).expand([2]).to_event(1),
    "masked": dist.Normal(torch.zeros(2), 1.0, validate_args=True)
    .mask(torch.tensor([True, False]))
    .to_event(1),
    "mixed": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2), validate_args=True),
        dist.Normal(torch.tensor([-1.0, 1.0]), 1.0, validate_args=True),
        validate_args=True,
    ),
    "cholesky": dist.LKJCholesky(3, 1.0, validate_args=True),
    "simplex": dist.Dirichlet(torch.ones(3), validate_args=True),
    "logistic": dist.LogisticNormal(torch.zeros(2), torch.ones(2), validate_args=True),
}
COUNTS = dist.Poisson(torch.tensor(3.0), validate_args=True)


def priors_in_a_dictionary():
    values = {name: pyro.sample(name, prior) for name, prior in CHECKED.items()}
    with pyro.plate("point", 6):
        mean = values["mixed"] + values["expanded"].sum() + values["masked"].sum()
        pyro.sample("y", dist.StudentT(4.0, mean, 1.0, validate_args=True), obs=X)
    pyro.factor("counts", COUNTS.log_prob(torch.tensor(2.0)) * values["transformed"])


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.linear.bias = PyroSample(dist.Cauchy(0.0, 1.0).expand([1]).to_event(1))
        self.scale = PyroSample(dist.Exponential(torch.ones(2), validate_args=True).to_event(1))

    def forward(self):
        mean, scale = self.linear(X[:, None]).squeeze(-1), self.scale.sum()
        with pyro.plate("point", 6):
            pyro.sample("y", dist.Normal(mean, scale), obs=X)


@pytest.mark.parametrize("model", [priors_in_a_dictionary, Regression()])
def test_distributions_made_before_the_run_are_captured(model):
    potential = Potential(model)
    position, noise = potential.vectors(3)
    computed = potential.gradients(position, noise)
    assert potential.programs.fallback_reason is None
    for row, value in zip(position, computed[0], strict=True):
        free, values = potential.unravel(row), potential.constrain(row)
        expected = (
            -pyro.poutine.trace(pyro.condition(model, data=values)).get_trace().log_prob_sum()
        )
        for site in potential.sites:
            jacobian = site.transform.log_abs_det_jacobian(free[site.name], values[site.name])
            expected -= jacobian.sum()
        torch.testing.assert_close(value, expected)


def test_distributions_keep_their_own_checks():
    before = [prior._validate_args for prior in CHECKED.values()]
    potential = Potential(priors_in_a_dictionary)
    potential.gradients(*potential.vectors(2))
    assert [prior._validate_args for prior in CHECKED.values()] == before
    with pytest.raises(ValueError, match="within the support"):
        COUNTS.log_prob(torch.tensor(-1.0))


@pytest.mark.parametrize("found", [True, False])
def test_all_is_left_as_found(found):
    was = Distribution.__dict__["_validate_args"]
    Distribution._validate_args = found
    try:
        with pytest.raises(KeyError), no_validation(), no_validation():
            made = dist.Normal(0.0, -1.0, validate_args=True)
            raise KeyError
        assert Distribution.__dict__["_validate_args"] is found
        assert made._validate_args  # as it was asked for
        with no_validation():
            pyro.enable_validation(True)  # as a model may
        assert Distribution.__dict__["_validate_args"] is found
    finally:
        Distribution._validate_args = was


def test_blocks_of_several_threads_may_overlap():
    was = Distribution.__dict__["_validate_args"]
    entered, leave = threading.Event(), threading.Event()

    def other():
        with no_validation():
            entered.set()
            leave.wait(10.0)

    thread = threading.Thread(target=other)
    with no_validation():
        thread.start()
        assert entered.wait(10.0)
    assert COUNTS.log_prob(torch.tensor(-1.0)) == -torch.inf  # the other thread goes on unchecked
    leave.set()
    thread.join()
    assert Distribution.__dict__["_validate_args"] is was
    assert COUNTS._validate_args
