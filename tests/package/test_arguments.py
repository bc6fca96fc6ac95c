"""Every argument is checked for type, sign, finiteness, shape and definiteness before a run."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    HMC,
    HNNHMC,
    HNNNUTS,
    MALA,
    MCMC,
    NUTS,
    AutoNeuralHamiltonianFlow,
    NeuralHamiltonianFlow,
    PseudoMarginalHMC,
    PseudoMarginalNUTS,
    RandomWalk,
)
from pyro_hamflow.flows.bases import SoftUniform
from pyro_hamflow.flows.losses import ReverseKL
from pyro_hamflow.mcmc.transitions.noise_refresh import CorrelatedRefresh
from pyro_hamflow.surrogates.losses import GradientMatching, TrajectoryMatching
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

NAN, INF = math.nan, math.inf
KERNELS = (HMC, NUTS, PseudoMarginalHMC, PseudoMarginalNUTS, HNNHMC, HNNNUTS, MALA, RandomWalk)
LEARNING = (HNNHMC, HNNNUTS)


def model():
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def spoilt():
    network = PotentialNetwork(2, hidden=(4,))
    next(network.parameters()).data[0] = NAN
    return network


NUMBERS = [
    ("step_size", (-0.1, 0, NAN, INF), ("0.1", True, 1j)),
    ("target_accept_prob", (0, 1, -1, 2, NAN), ("0.8", True)),
]
MATRICES = [
    (torch.tensor([1.0, 0.0]), "has 0.0 in it: expected positive numbers"),
    (torch.tensor([1.0, -2.0]), "has -2.0 in it: expected positive numbers"),
    (torch.tensor([1.0, NAN]), "is not finite"),
    (torch.tensor([INF, 1.0]), "is not finite"),
    (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "is not symmetric"),
    (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "is not positive definite"),
    (torch.tensor([[0.0, 0.0], [0.0, 1.0]]), "has 0.0 on its diagonal"),
    (torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), "has -1.0 on its diagonal"),
    (torch.ones(2, 3), r"has shape \(2, 3\): expected"),
    (torch.tensor(1.0), r"has shape \(\): expected"),
]


def cases(numbers):
    """Each name with each value, and the error that it leads to."""
    return [
        (name, value, error)
        for name, wrong, other in numbers
        for error, values in ((ValueError, wrong), (TypeError, other))
        for value in values
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "value", "error"), cases(NUMBERS))
def test_numbers_of_all_kernels(kernel, name, value, error):
    with pytest.raises(error, match=f"`{name}` is .*: expected"):
        kernel(model, **{name: value})


@pytest.mark.parametrize("kernel", [HMC, NUTS, MALA, RandomWalk])
@pytest.mark.parametrize(("value", "message"), MATRICES)
def test_inverse_mass(kernel, value, message):
    with pytest.raises(ValueError, match=f"`inverse_mass_matrix` {message}"):
        kernel(model, inverse_mass_matrix=value)
    with pytest.raises(ValueError, match=rf"`inverse_mass_matrix\[.*\]` {message}"):
        kernel(model, inverse_mass_matrix={("x",): value})


@pytest.mark.parametrize("value", [1.0, "ones", [1.0, 1.0], torch.ones(2, dtype=torch.long)])
def test_inverse_mass_of_another_type(value):
    with pytest.raises(TypeError, match="`inverse_mass_matrix` is .*: expected a tensor"):
        NUTS(model, inverse_mass_matrix=value)


def test_inverse_mass_of_any_scales_is_taken():
    tiny = torch.tensor([[1e-24, 0.5], [0.5, 1e24]])
    NUTS(model, inverse_mass_matrix=tiny, full_mass=True)


HMC_NUMBERS = [
    ("trajectory_length", (0, -1.0, NAN, INF), ("1",)),
    ("jitter", (-0.1, 1, NAN), ("0", True)),
    ("max_num_steps", (0,), (10.0, INF)),
    ("min_stepsize", (0, -1, NAN, INF), (True,)),
    ("max_stepsize", (0, -1, NAN), ("1",)),
]
NUTS_NUMBERS = [("max_tree_depth", (0, -1, 60), (2.5, True, NAN, INF))]
LEARNING_NUMBERS = [
    ("num_transitions", (0,), (1.5, True)),
    ("num_proposals", (0, -1), (NAN,)),
    ("true_share", (-0.1, 1.1, NAN), ("0",)),
    ("trust_radius", (0, -1, NAN), ("1",)),
    ("training_points", (0,), (1.5,)),
    ("training_steps", (0,), (True,)),
    ("rounds", (-1,), (1.0,)),
    ("outputs", (0,), (1.5,)),
]


@pytest.mark.parametrize("kernel", [HMC, PseudoMarginalHMC, HNNHMC])
@pytest.mark.parametrize(("name", "value", "error"), cases(HMC_NUMBERS))
def test_numbers_of_hmc(kernel, name, value, error):
    with pytest.raises(error, match=f"`{name}` is .*: expected"):
        kernel(model, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"), cases([("num_steps", (0, -3), (2.5, True, NAN))])
)
def test_number_of_steps(name, value, error):
    with pytest.raises(error, match=f"`{name}` is .*: expected"):
        HMC(model, **{name: value})


@pytest.mark.parametrize("kernel", [NUTS, PseudoMarginalNUTS, HNNNUTS])
@pytest.mark.parametrize(("name", "value", "error"), cases(NUTS_NUMBERS))
def test_numbers_of_nuts(kernel, name, value, error):
    with pytest.raises(error, match=f"`{name}` is .*: expected"):
        kernel(model, **{name: value})


@pytest.mark.parametrize("kernel", LEARNING)
@pytest.mark.parametrize(("name", "value", "error"), cases(LEARNING_NUMBERS))
def test_numbers_of_learning_kernels(kernel, name, value, error):
    with pytest.raises(error, match=f"`{name}` is .*: expected"):
        kernel(model, **{name: value})


@pytest.mark.parametrize("kernel", LEARNING)
def test_surrogate_that_lost_its_numbers(kernel):
    with pytest.raises(ValueError, match="`surrogate` has '.*' that is not finite"):
        kernel(model, surrogate=spoilt())


@pytest.mark.parametrize("name", ["adapt_step_size", "adapt_mass_matrix", "jit_compile"])
@pytest.mark.parametrize("value", [None, "yes", 0.5])
def test_flags(name, value):
    with pytest.raises(TypeError, match=f"`{name}` is .*: expected True or False"):
        HMC(model, **{name: value})


MCMC_NUMBERS = [
    ("num_samples", (0, -1), (1.5, True, NAN, "5")),
    ("warmup_steps", (-1,), (1.5, True, INF)),
    ("num_chains", (0,), (2.0, None)),
    ("seed", (-1, 2**32), (1.5, True, "1")),
    ("save_warmup", (), (1, None)),
    ("disable_progbar", (), (1, None)),
    ("hook_fn", (), (1, "print")),
]


@pytest.mark.parametrize(("name", "value", "error"), cases(MCMC_NUMBERS))
def test_numbers_of_mcmc(name, value, error):
    with pytest.raises(error, match=f"`{name}` is .*: expected"):
        MCMC(NUTS(model), **({"num_samples": 5} | {name: value}))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_starting_values_that_are_not_finite(value, chain_method):
    start = {"x": torch.tensor([[0.0, 1.0], [0.0, value]])}
    settings = {"num_chains": 2, "initial_params": start, "chain_method": chain_method}
    mcmc = MCMC(NUTS(model), 5, 5, **settings)
    with pytest.raises(ValueError, match="`initial_params` of site 'x' is not finite"):
        mcmc.run()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda v: CorrelatedRefresh(v), "correlation"),
        (lambda v: GradientMatching(v), "energy_weight"),
        (lambda v: TrajectoryMatching(v), "num_steps"),
        (lambda v: ReverseKL(hottest=v), "hottest"),
        (lambda v: ReverseKL(annealed=v), "annealed"),
        (lambda v: SoftUniform(2, v), "half_width"),
        (lambda v: NeuralHamiltonianFlow(2, time=v), "time"),
        (lambda v: NeuralHamiltonianFlow(2, num_steps=v), "num_steps"),
        (lambda v: NeuralHamiltonianFlow(v), "dimension"),
        (lambda v: NeuralHamiltonianFlow(2)(v), "num_momenta"),
        (lambda v: AutoNeuralHamiltonianFlow(model, time=v), "time"),
        (lambda v: AutoNeuralHamiltonianFlow(model, num_steps=v), "num_steps"),
        (lambda v: PotentialNetwork(v), "dimension"),
        (lambda v: PotentialNetwork(2, context_dimension=v), "context_dimension"),
    ],
)
@pytest.mark.parametrize("value", [NAN, -1.0, INF, "1", True])
def test_numbers_of_parts(make, name, value):
    with pytest.raises((TypeError, ValueError), match=f"`{name}` is .*: expected"):
        make(value)


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
@pytest.mark.parametrize(("num_samples", "warmup_steps"), [(1, 0), (1, 1), (1, None), (2, 3)])
def test_shortest_runs_end(chain_method, num_samples, warmup_steps):
    settings = {"num_chains": 2, "chain_method": chain_method, "disable_progbar": True}
    mcmc = MCMC(HMC(model), np.int64(num_samples), warmup_steps, **settings)
    mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (2, num_samples, 2)
