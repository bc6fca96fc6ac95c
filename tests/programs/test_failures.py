"""A model that fails at some positions has no density there, and nothing else happens."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, MCMC, NUTS
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs import graph_recorder as recording
from pyro_hamflow.programs.capture import batch, capture
from pyro_hamflow.programs.failures import first_that_works
from tests.helpers.kinds import long_but
from tests.helpers.laws import scores

Y = torch.tensor([[1.0, 0.5], [-0.5, 0.2], [0.3, 0.9]], dtype=torch.float64)


def correlated(scale=1.0):
    """The covariance has ones on its diagonal, so it is one for -1 < r < 1 alone."""
    r = pyro.sample("r", dist.Normal(0.0, scale))
    covariance = torch.eye(2)
    covariance[0, 1] = covariance[1, 0] = r
    law = dist.MultivariateNormal(torch.zeros(2), covariance_matrix=covariance)
    pyro.sample("y", law.expand([3]).to_event(1), obs=Y)


def correlated_in_python(scale=1.0):
    r = pyro.sample("r", dist.Normal(0.0, scale))
    if r.item() > 100.0:  # no graph follows this
        raise ValueError("never reached")
    covariance = torch.eye(2)
    covariance[0, 1] = covariance[1, 0] = r
    law = dist.MultivariateNormal(torch.zeros(2), covariance_matrix=covariance)
    pyro.sample("y", law.expand([3]).to_event(1), obs=Y)


def on_grid(scale=1.0):
    """The posterior of r by quadrature: points, and their probabilities."""
    r = torch.linspace(-1.0, 1.0, 20_001, dtype=torch.float64)[1:-1]
    quadratic = Y.square().sum() - 2.0 * r * (Y[:, 0] * Y[:, 1]).sum()
    log_density = -0.5 * (r / scale).square() - 1.5 * (1.0 - r**2).log()
    return r, (log_density - 0.5 * quadratic / (1.0 - r**2)).softmax(0)


def moments_on_grid(scale=1.0):
    r, probability = on_grid(scale)
    mean = (r * probability).sum()
    return float(mean), float((r.square() * probability).sum() - mean**2) ** 0.5


ROWS = torch.tensor([[0.2], [1.5], [-0.3], [torch.nan]], dtype=torch.float64)


def test_only_rows_that_fail_have_no_density():
    potential = Potential(correlated)
    value, slope, _ = potential.gradients(ROWS, torch.zeros(4, 0))
    assert potential.programs.fallback_reason is None
    assert potential.programs.fallible == {"linalg.cholesky"}
    assert value.isnan().tolist() == [False, True, False, True]
    for row in (0, 2):
        expected = potential.function("gradient")(ROWS[row], torch.zeros(0))
        torch.testing.assert_close((value[row], slope[row]), expected)
    evaluated = potential.value(ROWS, torch.zeros(4, 0))
    torch.testing.assert_close(evaluated, value, equal_nan=True)


@pytest.mark.filterwarnings("ignore:The model could not be captured", "ignore:Converting a tensor")
def test_in_python_as_well_and_failures_are_counted():
    potential = Potential(correlated_in_python)
    value, slope, _ = potential.gradients(ROWS[:3], torch.zeros(3, 0))
    assert value[1] == torch.inf and slope[1] == 0.0
    torch.testing.assert_close(
        value[[0, 2]], Potential(correlated).value(ROWS[[0, 2]], torch.zeros(2, 0))
    )
    failures = potential.programs.failures
    assert (failures.count, failures.calls) == (1, 3)
    assert failures.position.tolist() == [1.5] and "linalg.cholesky" in failures.reason
    said = potential.describe_failures(0)
    assert "failed at 1 of 3 positions" in said and "{'r': 1.5}" in said


OPERATIONS = {
    "cholesky": lambda k: torch.linalg.cholesky(k).sum(),
    "inverse": lambda k: torch.linalg.inv(k * (k[0, 0] > 0.0)).sum(),
    "solve": lambda k: torch.linalg.solve(k * (k[0, 0] > 0.0), k[0]).sum(),
    "lu": lambda k: torch.linalg.lu_factor(k * (k[0, 0] > 0.0))[0].sum(),
    "svd": lambda k: torch.linalg.svdvals(k.log()).sum(),
    "pinv": lambda k: torch.linalg.pinv(k.log()).sum(),
    "eigh": lambda k: torch.linalg.eigvalsh(k.log()).sum(),
    "least squares": lambda k: torch.linalg.lstsq(k.log(), k[:, :1]).solution.sum(),
    "cholesky inverse": lambda k: torch.cholesky_inverse(k * (k[0, 0] > 0.0)).sum(),
}
if hasattr(torch.ops.aten, "cholesky"):  # until torch 2.13
    OPERATIONS["old cholesky"] = lambda k: torch.cholesky(k).sum()


@pytest.mark.filterwarnings("ignore:torch.cholesky is deprecated")
@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_can_fail_is_nan_there_and_right_elsewhere(name):
    """At a negative diagonal the operations raise, or get NaN to work with."""

    def function(a):
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            k = torch.tensor([[0.0, 0.5], [0.5, 1.5]]) + torch.diag(torch.stack([a, 0.0 * a]))
            value = OPERATIONS[name](k)
            return value.detach(), torch.autograd.grad(value, a)[0]

    rows = torch.tensor([1.0, -1.0, 2.0])
    graph = batch(capture(function, rows[1]), rows)  # recorded where it fails
    value, slope = graph(rows)
    assert not value[[0, 2]].isnan().any() and not slope[[0, 2]].isnan().any()
    assert not value[1].isfinite()
    for row in (0, 2):
        torch.testing.assert_close((value[row], slope[row]), function(rows[row]))


def test_a_graph_that_is_finite_where_the_model_fails_is_not_taken(monkeypatch):
    def one_where_failed(factorise):
        def run(matrix, **settings):
            factor, info = factorise(matrix, **settings)
            return torch.where(info != 0, torch.eye(2), factor), info

        return run

    monkeypatch.setattr(recording, "nan_where_failed", one_where_failed)
    potential = Potential(correlated, (5.0,))
    with pytest.warns(RuntimeWarning, match="the graph and the model disagree"):
        potential.gradients(*potential.vectors(2))


def test_draws_against_a_grid():
    """By default, from a prior most of whose draws have no density."""
    kernel = NUTS(correlated)
    mcmc = MCMC(kernel, num_samples=500, num_chains=4, seed=0)
    mcmc.run(3.0)
    r = mcmc.get_samples(group_by_chain=True)["r"]
    mean, spread = moments_on_grid(3.0)
    summary = mcmc.summary()
    error = 4.0 * spread / float(summary["ess_bulk"].iloc[0]) ** 0.5
    assert abs(float(r.mean()) - mean) < error
    assert abs(float(r.std()) - spread) < error
    assert kernel.potential.programs.fallback_reason is None
    assert any("linalg.cholesky fails have no density" in message for message in mcmc.messages)


@pytest.mark.filterwarnings("ignore:The model could not be captured", "ignore:Converting a tensor")
def test_moves_in_python_leave_the_posterior_as_it_is():
    num_chains = 250
    r, probability = on_grid()
    start = r[torch.multinomial(probability, num_chains, replacement=True)][:, None]
    potential = Potential(correlated_in_python)
    transition = HMCTransition(potential, num_chains)
    tuning = Tuning(0.7, GaussianKinetic(torch.ones(1, dtype=torch.float64)))
    state, info = transition.step(transition.state_at(start, start[:, :0]), tuning, 2)
    assert potential.programs.failures.count > 20 and info.diverging.sum() > 10
    assert 0.3 < info.accepted.double().mean() < 0.9
    mean, spread = moments_on_grid()
    scores = (state.position - mean) / spread
    assert abs(float(scores.mean())) < 4.0 / num_chains**0.5
    assert abs(float(scores.square().mean()) - 1.0) < 4.0 * 1.5 / num_chains**0.5


def grouped():
    """A covariance for each group: one that is none leaves the whole row without a density."""
    with pyro.plate("group", 2):
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        one = torch.ones_like(r)
        covariance = torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -2)
        law = dist.MultivariateNormal(torch.zeros(2), covariance_matrix=covariance)
        with pyro.plate("row", 3):
            pyro.sample("y", law, obs=Y[:, None].expand(3, 2, 2))


def by_precision():
    r = pyro.sample("r", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    precision = torch.stack(
        [torch.stack([r[0].exp(), r[1]]), torch.stack([r[1], 1.0 + 0.0 * r[0]])]
    )
    law = dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision)
    pyro.sample("y", law.expand([3]).to_event(1), obs=Y)


def by_eigenvalues():
    r = pyro.sample("r", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    matrix = torch.stack([torch.stack([r[0].exp(), r[1]]), torch.stack([r[1], 1.0 + 0.0 * r[0]])])
    values, vectors = torch.linalg.eigh(matrix)
    pyro.factor("f", -1.5 * values.log().sum() - 0.5 * ((Y @ vectors).square() / values).sum())


@pytest.mark.parametrize("model", [grouped, by_precision, by_eigenvalues])
def test_rows_without_a_density_in_models_of_several_kinds(model):
    potential = Potential(model)
    rows = torch.tensor([[0.2, 0.1], [0.1, 2.0], [-0.3, 0.4], [0.0, -3.0]], dtype=torch.float64)
    value, slope, _ = potential.gradients(rows, torch.zeros(4, 0))
    assert potential.programs.fallback_reason is None
    assert value.isfinite().tolist() == [True, False, True, False]
    for row in (0, 2):
        expected = potential.function("gradient")(rows[row], torch.zeros(0))
        torch.testing.assert_close((value[row], slope[row]), expected)


def refusing(error, low=-0.5):
    """A model that raises where r lies below a bound, as it does at draws from its prior."""

    def model():
        r = pyro.sample("r", dist.Normal(-2.0, 3.0))
        if r < low:
            raise error("too low")
        pyro.sample("y", dist.Normal(r, 1.0), obs=torch.tensor(0.2, dtype=torch.float64))

    return model


@pytest.mark.filterwarnings("ignore:The model could not be captured", "ignore:Converting a tensor")
@pytest.mark.parametrize("error", long_but([ValueError], [ValueError, AssertionError]))
def test_a_check_of_the_models_own_cuts_its_posterior(error):
    """A normal posterior with mean -0.02 and variance 0.9, cut off at -0.5."""
    kernel = NUTS(refusing(error), max_tree_depth=2)
    mcmc = MCMC(kernel, 200, 100, num_chains=4, seed=0, disable_progbar=True)
    mcmc.run()
    r = mcmc.get_samples(group_by_chain=True)["r"].double()
    grid = torch.linspace(-0.5, 8.0, 20_001, dtype=torch.float64)
    probability = (-0.5 * (grid + 0.02).square() / 0.9).softmax(0)
    mean = float((grid * probability).sum())
    variance = float(((grid - mean).square() * probability).sum())
    assert abs(scores(r.numpy(), mean)).max() < 4.0
    assert abs(scores((r.numpy() - mean) ** 2, variance)).max() < 4.0
    assert r.min() >= -0.5
    failures = kernel.potential.programs.failures
    assert failures.count > 0
    assert any(f"failed at {failures.count} of" in message for message in mcmc.messages)
    assert any("too low" in message for message in mcmc.messages)


def test_a_check_that_never_passes_is_raised_as_it_is():
    with pytest.raises(ValueError, match="too low"):
        Potential(refusing(ValueError, low=1e9))


@pytest.mark.parametrize("traced", [False, True])
def test_a_function_is_looked_at_where_chains_start(traced):
    """Away from a matrix that is positive definite hardly any random one is."""

    def energy(values):
        return torch.linalg.cholesky(values["k"]).diagonal().square().sum()

    start = {"k": 50.0 * torch.eye(3)}
    function = torch.jit.trace(energy, (start,)) if traced else energy
    kernel = HMC(potential_fn=function, adapt_step_size=False, num_steps=3, step_size=1e-20)
    kernel.initial_params = start
    kernel.setup(0)
    indefinite = {"k": torch.ones(3, 3)}
    moved = kernel.sample(indefinite)  # from where there is no density
    assert torch.equal(moved["k"], indefinite["k"])
    torch.testing.assert_close(kernel.sample(start)["k"], start["k"])


def test_faults_of_the_model_itself_are_raised_as_they_are():
    def faulty():
        pyro.sample("r", dist.Normal(0.0, 1.0))
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        Potential(faulty)

    def always():
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        torch.linalg.cholesky(-torch.eye(2) * r**2)

    with pytest.raises(torch.linalg.LinAlgError, match="could not be completed"):
        Potential(always)

    def interrupted():
        raise KeyboardInterrupt

    potential = Potential(correlated)
    with pytest.raises(KeyboardInterrupt):
        potential.programs.failures.tolerate(interrupted, tuple)()
    with pytest.raises(TypeError):
        first_that_works(lambda point: 1 / 0 if point else [] + point, [1, 0, 2])
