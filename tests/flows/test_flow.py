"""Neural Hamiltonian Flows: exact motion, exact densities of phases, and fits to samples."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    LearnedGaussianKinetic,
    NeuralHamiltonianFlow,
    NeuralKinetic,
    RelativisticKinetic,
    SoftUniform,
    fit_flow,
)
from pyro_hamflow.dynamics.integrators import leapfrog, leapfrog_step
from pyro_hamflow.flows.bases import standard_normal
from pyro_hamflow.networks.fields import PerceptronField
from pyro_hamflow.networks.perceptron import ScalarNetwork
from tests.helpers.laws import assert_volume_preserving

DIMENSION = 3
FLOWS = {
    "classical": {},
    "classical, stiff": {"stiffness": 1.0, "num_steps": 3},
    "relativistic": {"kinetic": RelativisticKinetic},
    "neural": {"kinetic": partial(NeuralKinetic, hidden=(16,), inverse_mass=None)},
    "symmetric": {
        "symmetric": True,
        "kinetic": partial(NeuralKinetic, hidden=(16,), symmetric=True),
    },
    "one step, deep": {"num_steps": 1, "time": 0.5, "hidden": (8, 8, 8)},
    "both encoders": {"encode_start": True, "hidden": (8,)},
    "soft uniform": {"base": lambda: SoftUniform(DIMENSION, 2.0)},
}


def rough(flow):
    """A flow with large random parameters, so that its motion is far from trivial."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return flow


@pytest.fixture(params=FLOWS)
def flow(request):
    settings = {"hidden": (16, 16), "base": lambda: None} | FLOWS[request.param]
    settings["base"] = settings["base"]()  # made here, where float64 is the default
    return rough(NeuralHamiltonianFlow(DIMENSION, **settings))


# --- motion -------------------------------------------------------------------------------------


def test_motion_back_undoes_motion(flow):
    start = torch.randn(50, DIMENSION), torch.randn(50, DIMENSION)
    there = flow.push(*start)
    assert (there[0] - start[0]).abs().max() > 0.1
    for back, first in zip(flow.pull(*there), start, strict=True):
        assert (back - first).abs().max() < 1e-10


def test_motion_preserves_volume(flow):
    start = torch.randn(1, DIMENSION), torch.randn(1, DIMENSION)
    assert_volume_preserving(lambda phase: flow.push(*phase), start, tolerance=1e-8)


def test_volume_law_fails_where_the_gradient_sees_the_momentum(monkeypatch):
    flow = rough(NeuralHamiltonianFlow(DIMENSION, hidden=(16, 16)))
    seen = []
    field = flow.kinetic.velocity_field()

    def watching(r):
        seen[:] = [r]
        return field(r)

    plain = flow.gradient_field()
    monkeypatch.setattr(flow.kinetic, "velocity_field", lambda: watching)
    monkeypatch.setattr(
        flow, "gradient_field", lambda: lambda q: plain(q) + (0.1 * seen[0] if seen else 0.0)
    )
    start = torch.randn(1, DIMENSION), torch.randn(1, DIMENSION)
    with pytest.raises(AssertionError, match="log determinant"):
        assert_volume_preserving(lambda phase: flow.push(*phase), start, tolerance=1e-8)


def test_energy_is_nearly_kept():
    def change(num_steps):
        torch.manual_seed(3)
        flow = rough(NeuralHamiltonianFlow(DIMENSION, hidden=(16, 16), num_steps=num_steps))
        q, p = torch.randn(100, DIMENSION), torch.randn(100, DIMENSION)
        before = flow.potential(q) + flow.kinetic.energy(p)
        q, p = flow.push(q, p)
        return (flow.potential(q) + flow.kinetic.energy(p) - before).abs().mean()

    assert change(40) < 0.1 * change(10)  # of second order: one sixteenth


def test_path_leads_where_push_does(flow):
    q, p = torch.randn(5, DIMENSION), torch.randn(5, DIMENSION)
    positions, momenta = flow.path(q, p)
    assert positions.shape == (flow.num_steps + 1, 5, DIMENSION)
    end = flow.push(q, p)
    torch.testing.assert_close((positions[-1], momenta[-1]), end)
    torch.testing.assert_close((positions[0], momenta[0]), (q, p))


def test_leapfrog_joins_the_samplers_steps():
    network = ScalarNetwork(DIMENSION, (8,))
    z, r = torch.randn(4, DIMENSION), torch.randn(4, DIMENSION)
    mass = torch.tensor([0.5, 1.0, 2.0])
    with torch.no_grad():
        end = leapfrog(network.field(), lambda r: mass * r, z, r, 0.3, 4)

        def gradient(z, noise):
            return network(z), network.field()(z)

        slope = network.field()(z)
        for _ in range(4):
            z, r, _, slope = leapfrog_step(gradient, z, r, slope, z, mass, torch.tensor(0.3))
    torch.testing.assert_close(end, (z, r))


@pytest.mark.parametrize("training", [False, True])
def test_each_step_takes_one_gradient(monkeypatch, training):
    flow = NeuralHamiltonianFlow(DIMENSION, num_steps=7, hidden=(8,))
    calls, plain = [], PerceptronField.evaluate
    monkeypatch.setattr(PerceptronField, "evaluate", lambda *a: calls.append(a) or plain(*a))
    with torch.set_grad_enabled(training):
        flow.push(torch.zeros(1, DIMENSION), torch.zeros(1, DIMENSION))
    assert len(calls) == 8


def test_derivatives_of_the_motion_are_those_of_its_steps(flow):
    start = [torch.randn(5, DIMENSION, requires_grad=True) for _ in range(2)]
    inputs = [*start, *flow.potential_network.parameters(), *flow.kinetic.parameters()]
    inputs += [] if flow.stiffness is None else [flow.stiffness]
    weights = torch.randn(2, 5, DIMENSION)

    def potential_gradient(q):
        return torch.autograd.grad(flow.potential(q).sum(), q, create_graph=True)[0]

    def velocity(p):
        return torch.autograd.grad(flow.kinetic.energy(p).sum(), p, create_graph=True)[0]

    def derivatives(end):
        loss = sum((part * weight).sum() for part, weight in zip(end, weights, strict=True))
        return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)

    size = flow.time / flow.num_steps
    plain = leapfrog(potential_gradient, velocity, *start, size, flow.num_steps)
    moved = flow.push(*start)
    torch.testing.assert_close(moved, plain)
    torch.testing.assert_close(derivatives(moved), derivatives(plain))


def test_motion_can_be_differentiated_twice_over_and_tells_of_changed_weights(flow):
    q, p = torch.randn(5, DIMENSION), torch.randn(5, DIMENSION)
    loss = flow.push(q, p)[0].square().sum()
    inputs = list(flow.potential_network.parameters())
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs, retain_graph=True), first)
    with torch.no_grad():
        inputs[-1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs)


# --- energies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(5,), (6, 4), (3, 4, 5)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_in_closed_form_and_its_derivative(hidden, symmetric):
    network = ScalarNetwork(DIMENSION, hidden, outputs=2, symmetric=symmetric)
    x = torch.randn(4, DIMENSION, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    closed = network.field()(x)
    torch.testing.assert_close(closed, slope)
    value = network(x)
    both = network.value_and_gradient(x)
    torch.testing.assert_close(both, (value, slope))
    torch.testing.assert_close(network.eval().value_and_gradient(x), both)
    weights, more = torch.randn_like(x), torch.randn_like(value)
    inputs = [x, *network.parameters()]
    for parts in ((more, weights), (more, 0.0 * weights)):
        found, expected = (
            torch.autograd.grad(
                sum((a * b).sum() for a, b in zip(pair, parts, strict=True)),
                inputs,
                retain_graph=True,
            )
            for pair in (both, (value, slope))
        )
        torch.testing.assert_close(found, expected)
    (alone,) = torch.autograd.grad((both[0] * more).sum(), inputs[:1], retain_graph=True)
    torch.testing.assert_close(alone, more[:, None] * slope)
    expected = torch.autograd.grad(
        (slope * weights).sum(), inputs, allow_unused=True, materialize_grads=True
    )
    found = torch.autograd.grad(
        (closed * weights).sum(), inputs, allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "kinetic",
    [
        LearnedGaussianKinetic,
        RelativisticKinetic,
        partial(NeuralKinetic, hidden=(6,)),
        partial(NeuralKinetic, hidden=(6,), inverse_mass=None),
    ],
)
def test_velocity_is_the_gradient_of_the_energy(kinetic):
    energy = rough(kinetic(DIMENSION))
    r = torch.randn(5, DIMENSION, requires_grad=True)
    (slope,) = torch.autograd.grad(energy.energy(r).sum(), r)
    torch.testing.assert_close(energy.velocity_field()(r), slope)


def test_relativistic_velocity_is_bounded_and_classical_at_rest():
    kinetic = RelativisticKinetic(2)
    far = torch.tensor([[1e6, 0.0]])
    torch.testing.assert_close(kinetic.velocity_field()(far).norm(), torch.tensor(3.0))
    slow = torch.tensor([[1e-4, 2e-4]])
    torch.testing.assert_close(kinetic.velocity_field()(slow), slow, rtol=1e-6, atol=0.0)


def test_symmetric_flow_is_symmetric():
    flow = rough(NeuralHamiltonianFlow(DIMENSION, symmetric=True, encode_start=True, hidden=(8,)))
    q, p = torch.randn(6, DIMENSION), torch.randn(6, DIMENSION)
    torch.testing.assert_close(flow.log_phase(q, p), flow.log_phase(-q, -p))
    torch.testing.assert_close(
        flow.end_momenta.log_density(q, p), flow.end_momenta.log_density(-q, -p)
    )


# --- densities ----------------------------------------------------------------------------------


def test_density_of_drawn_phases_is_that_of_given_ones(flow):
    q, p, log_density = flow.draw_phase((200,))
    torch.testing.assert_close(flow.log_phase(q, p), log_density, rtol=1e-8, atol=1e-8)


def linear_flow():
    """A flow without network, so that its phases are Gaussian."""
    flow = NeuralHamiltonianFlow(2, stiffness=2.0, hidden=(4,), time=0.7, num_steps=3)
    with torch.no_grad():
        flow.potential_network.last.zero_()
        flow.kinetic.below += 0.5
        flow.end_momenta.mean[-1].bias += 0.3  # a poor r(p|q): the estimate must not mind
    return flow


def linear_truth(flow):
    basis = torch.eye(4)
    with torch.no_grad():
        ends = torch.cat(flow.push(basis[:, :2], basis[:, 2:]), -1)
    covariance = (ends.mT @ ends)[:2, :2]
    return dist.MultivariateNormal(torch.zeros(2), covariance)


def test_estimated_density_is_the_true_one():
    flow = linear_flow()
    truth = linear_truth(flow)
    q = truth.sample((500,))
    with torch.no_grad():
        estimate = flow.estimate_log_density(q, 400)
        bound = flow.log_ratio(q)
    ratio = (estimate.value - truth.log_prob(q)).exp() - 1.0  # of mean zero
    score = ratio.mean() / (ratio.std() / math.sqrt(len(q)))
    assert abs(score) < 4
    standard = ratio / estimate.error
    assert 0.85 < standard.std() < 1.15  # the errors told are the errors made
    assert bound.mean() < truth.log_prob(q).mean() - 0.02


def test_estimated_density_fails_with_the_wrong_momenta(monkeypatch):
    flow = linear_flow()
    truth = linear_truth(flow)
    plain = flow.end_momenta.draw
    monkeypatch.setattr(  # claims momenta half as likely as they are
        flow.end_momenta, "draw", lambda q: (plain(q)[0], plain(q)[1] - 0.7)
    )
    q = truth.sample((500,))
    with torch.no_grad():
        ratio = (flow.estimate_log_density(q, 400).value - truth.log_prob(q)).exp() - 1.0
    assert abs(ratio.mean() / (ratio.std() / math.sqrt(len(q)))) > 10


def test_density_integrates_to_one():
    flow = rough(NeuralHamiltonianFlow(1, hidden=(8,), num_steps=4))
    x = torch.linspace(-20, 20, 1001)
    with torch.no_grad():
        value, error = flow.estimate_log_density(x[:, None], 1000)
    mass = value.exp()
    total = mass.sum() * (x[1] - x[0])
    deviation = (mass * error).square().sum().sqrt() * (x[1] - x[0])
    assert abs(total - 1.0) < 4 * deviation
    assert deviation < 0.05


@pytest.mark.parametrize("half_width", [0.5, 3.0])
def test_soft_uniform_is_normalised_and_drawn_from(half_width):
    base = SoftUniform(1, half_width)
    x = torch.linspace(-40, 40, 20_001)[:, None]
    mass = base.log_prob(x).exp() * (x[1] - x[0])
    torch.testing.assert_close(mass.sum(), torch.tensor(1.0), rtol=1e-6, atol=0.0)
    draws = base.sample((20_000,))[:, 0].sort().values
    grid = x[:, 0].contiguous()
    place = torch.searchsorted(grid, draws).clamp(max=len(grid) - 1)
    distance = (mass.cumsum(0)[place] - (torch.arange(20_000) + 0.5) / 20_000).abs().max()
    assert distance < 2.0 / math.sqrt(20_000)  # Kolmogorov and Smirnov's, far out in its tail


def test_soft_uniform_is_proportional_to_the_papers():
    x = torch.randn(10, 2)
    paper = (torch.sigmoid(x + 3) * torch.sigmoid(3 - x)).log().sum(-1)
    difference = SoftUniform(2).log_prob(x) - paper
    torch.testing.assert_close(difference, difference[:1].expand(10))


# --- as a distribution --------------------------------------------------------------------------


def test_distribution_has_the_shapes_of_a_distribution():
    flow = NeuralHamiltonianFlow(2, hidden=(8,))
    d = flow(num_momenta=3)
    assert d.event_shape == (2,) and d.batch_shape == ()
    assert d.sample((5, 4)).shape == (5, 4, 2)
    assert d.expand([7]).sample((5,)).shape == (5, 7, 2)
    assert d.expand([7]).log_prob(torch.zeros(2)).shape == (7,)
    assert d.log_prob(torch.zeros(5, 4, 2)).shape == (5, 4)


def test_flow_is_a_density_inside_a_model():
    flow = NeuralHamiltonianFlow(2, hidden=(16, 16))
    data = 0.3 * torch.randn(200, 2) + torch.tensor([1.0, -1.0])

    def model(data=None):
        pyro.module("flow", flow)
        with pyro.plate("data", 200):
            pyro.sample("x", flow(num_momenta=4), obs=data)

    svi = pyro.infer.SVI(
        model, lambda data: None, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO()
    )
    losses = [svi.step(data) / len(data) for _ in range(150)]
    wide = -standard_normal(2).log_prob(data).mean()
    assert sum(losses[-20:]) / 20 < wide - 0.5
    predicted = pyro.infer.Predictive(model, {}, num_samples=10)()
    assert predicted["x"].shape == (10, 200, 2)
    assert (predicted["x"].mean((0, 1)) - data.mean(0)).abs().max() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_follows_its_base_in_type(dtype):
    base = standard_normal(2, torch.zeros((), dtype=dtype))
    flow = NeuralHamiltonianFlow(2, base=base, hidden=(8,), stiffness=1.0)
    assert all(p.dtype == dtype for p in flow.parameters())
    assert flow().sample((3,)).dtype == dtype
    moved = flow.to(torch.float32)
    q, p, log_density = moved.draw_phase((3,))
    assert q.dtype == p.dtype == log_density.dtype == torch.float32


# --- fits ---------------------------------------------------------------------------------------


def two_modes():
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    parts = dist.Normal(means, 0.5).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts)


def test_fit_finds_two_modes_from_one():
    target = two_modes()
    flow = NeuralHamiltonianFlow(2, hidden=(32, 32), num_steps=5)
    fit = fit_flow(
        flow, target.sample((2000,)), num_steps=400, batch_size=128, learning_rate=1e-2, seed=0
    )
    assert fit.num_skipped == 0 and len(fit.losses) == 400
    with torch.no_grad():
        test = target.sample((1000,))
        estimate = flow.estimate_log_density(test, 64).value.mean()
        drawn = flow().sample((4000,))
    assert estimate > target.log_prob(test).mean() - 0.2
    assert abs((drawn[:, 0] > 0).double().mean() - 0.6) < 0.05
    assert ((drawn[:, 0].abs() - 2).abs() > 1.5).double().mean() < 0.1


def test_fit_repeats_itself_with_a_seed():
    samples = torch.randn(50, 2)
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        flow = NeuralHamiltonianFlow(2, hidden=(4,))
        losses.append(fit_flow(flow, samples, num_steps=10, batch_size=8, seed=1).losses)
    assert torch.equal(*losses)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "`num_steps` is 0: expected 1 or more"),
        ({"time": -1.0}, "`time` is -1.0: expected a positive"),
        ({"hidden": ()}, "`hidden` is .*: expected the width"),
        ({"base": dist.Normal(torch.zeros(2), 1)}, r"batch shape \(2,\) and event shape \(\)"),
        ({"base": standard_normal(3)}, r"expected \(\) and \(2,\)"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NeuralHamiltonianFlow(2, **settings)


def test_bad_types_are_refused():
    with pytest.raises(TypeError, match="`dimension` is 2.5: expected an integer"):
        NeuralHamiltonianFlow(2.5)


def test_bad_samples_are_refused():
    flow = NeuralHamiltonianFlow(2, hidden=(4,))
    with pytest.raises(ValueError, match=r"shape \(5, 3\): expected \(\*, 2\)"):
        fit_flow(flow, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="not all finite"):
        fit_flow(flow, torch.tensor([[0.0, math.nan]]))
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        fit_flow(flow, torch.zeros(5, 2), batch_size=0)
    with pytest.raises(ValueError, match="`half_width` is 0"):
        SoftUniform(2, 0.0)
    with pytest.raises(ValueError, match="`num_momenta` is 0"):
        flow(num_momenta=0)
    with pytest.raises(ValueError, match="`num_momenta` is 1: expected 2"):
        flow.estimate_log_density(torch.zeros(1, 2), 1)
