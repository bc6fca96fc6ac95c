"""Users are told of models that take a latent value out of torch, not of those that branch."""

from __future__ import annotations

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, NUTS, RandomWalk
from pyro_hamflow.model.blind_gradients import warn_of_blind_gradient
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start

Y = torch.tensor(3.0)
MESSAGE = "The gradient of the log density is not its slope"


def warned(model, *, num_chains=4, dtype=torch.float64, seed=0):
    """Whether users are told, where chains start."""
    pyro.set_rng_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            potential = Potential(model)
            warn_of_blind_gradient(potential, *find_start(potential, num_chains))
    finally:
        torch.set_default_dtype(before)
    return any(MESSAGE in str(one.message) for one in caught)


def observe(mean, scale=1.0):
    pyro.sample("y", dist.Normal(mean, scale), obs=Y.to(torch.as_tensor(mean).dtype))


def unit(size=None):
    fn = dist.Normal(torch.zeros(() if size is None else size), 1.0)
    return pyro.sample("x", fn if size is None else fn.to_event(1))


def by_item():
    observe(unit().item())


def by_numpy():
    observe(torch.as_tensor(np.sinh(unit(3).detach().numpy())).sum(), 0.1)


def by_list():
    observe(torch.tensor(unit(2).tolist()).sum())


def half_read():
    """A part of the slope is seen."""
    x = unit(2)
    observe(x[0] + 5.0 * x[1].item())


BLIND = [by_item, by_numpy, by_list, half_read]


def branches():
    x = unit(2)
    observe(x.sum() if x[0] > 0.0 else 2.0 * x.sum(), 0.1)


def jumps():
    x = unit()
    observe(x + (3.0 if x > 0.1 else -3.0), 0.01)


def kinks():
    x = unit(2)
    observe(max(x[0], x[1]).abs(), 0.01)


def steps():
    """The density has steps: it is flat between them, as its gradient says."""
    observe(float(np.floor(2.0 * unit().item())), 0.3)


def curved():
    x = unit(2)
    observe((3.0 * x).exp().sum() if bool(x.isfinite().all()) else x.sum(), 0.01)


def many_data():
    x = unit()
    count = 100_000 if x.item() < 1e6 else 1
    pyro.sample("y", dist.Normal(x, 1.0).expand([count]).to_event(1), obs=Y.expand(count).to(x))


def narrow():
    x = unit(2)
    observe(x.sum() if x[0] < 1e6 else x[0], 1e-3)


def straight_through():
    """Users mean it so, and it is captured as it stands."""
    x = unit()
    observe(x + (x.round() - x).detach())


def flat():
    """At its mode slope and difference are zero, but for rounding."""
    x = pyro.sample("x", dist.Uniform(-1.0, 1.0))
    pyro.factor("nothing", 0.0 * x if x > -2.0 else x)


RIGHT = [branches, jumps, kinks, curved, many_data, narrow, straight_through, flat]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model", BLIND)
def test_values_that_are_read_are_told_of(model, dtype):
    assert warned(model, dtype=dtype)
    assert warned(model, dtype=dtype, num_chains=1, seed=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model", [*RIGHT, steps])
def test_no_false_alarms(model, dtype):
    for seed in range(6):
        assert not warned(model, dtype=dtype, num_chains=1 + seed % 3, seed=seed)


@pytest.mark.filterwarnings("ignore:The model could not be captured")
@pytest.mark.parametrize("kernel", [HMC, NUTS])
def test_users_are_told_before_sampling(kernel):
    with pytest.warns(RuntimeWarning, match=MESSAGE):
        kernel(by_item).begin(2, 10)


@pytest.mark.filterwarnings("ignore:The model could not be captured")
def test_a_random_walk_needs_no_gradient():
    RandomWalk(by_item).begin(2, 10)  # where any warning but the above is an error


def test_a_start_on_a_kink_is_no_fault():
    def model():
        x = pyro.sample("x", dist.Laplace(0.0, 0.1))
        observe(torch.relu(x) if x > -1e6 else x, 0.3)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        potential = Potential(model)
        middle = torch.zeros(2, 1).to(potential.example)
        warn_of_blind_gradient(potential, middle, middle[:, :0])
    assert len(caught) == 1  # that it is not captured
