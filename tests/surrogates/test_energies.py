"""Learned energies: their gradients, their flows, how they are trained, saved and held to data."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_hamflow.dynamics.integrators import leapfrog_step
from pyro_hamflow.surrogates.fit import fit_energy
from pyro_hamflow.surrogates.losses import (
    GradientMatching,
    Points,
    TrajectoryMatching,
    TrajectorySegments,
)
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from tests.helpers.laws import assert_order, assert_reversible, assert_volume_preserving

SIZES = {
    "plain": {},
    "latent": {"outputs": 3},
    "deep": {"hidden": (8, 8, 8)},
    "context": {"context_dimension": 2},
}


def network_of(dimension=3, *, dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    network = PotentialNetwork(dimension, **({"hidden": (16, 16)} | sizes)).to(dtype)
    scale = torch.tensor([1.0, 5.0, 0.2], dtype=dtype)[:dimension]
    context = torch.randn(50, network.context_dimension, dtype=dtype)
    network.whiten_by(torch.randn(50, dimension, dtype=dtype) * scale + 1.0, context)
    with torch.no_grad():
        network.network.last.mul_(10.0)
        network.linear.add_(0.3)
    return network


def context_of(network, count):
    return torch.randn(count, network.context_dimension, dtype=network.centre.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_gradient_is_that_of_the_energy(name, dtype):
    network = network_of(dtype=dtype, **SIZES[name])
    z = torch.randn(7, 3, dtype=dtype, requires_grad=True)
    context = context_of(network, 7)
    value, slope = network.value_and_gradient(z, context)
    (true,) = torch.autograd.grad(value.sum(), z)
    assert value.shape == (7,) and slope.dtype == value.dtype == dtype
    assert torch.allclose(slope, true, rtol=1e-4 if dtype == torch.float32 else 1e-10)
    one = network.value_and_gradient(z[2], context[2])
    assert torch.allclose(one[1], slope[2]) and one[0].shape == ()


def test_outputs_are_summed():
    network = network_of(outputs=3)
    z = torch.randn(4, 3)
    whole = network(z)
    with torch.no_grad():
        network.network.last.copy_(network.network.last.sum(0).expand(3, -1) / 3)
    assert torch.allclose(network(z), whole)


def test_given_context_is_built_in():
    network = network_of(context_dimension=2)
    context, z = torch.randn(2), torch.randn(5, 3)
    plain = network.given(context)
    assert plain.context_dimension == 0
    held = network.value_and_gradient(z, context.expand(5, 2))
    for a, b in zip(plain.value_and_gradient(z), held, strict=True):
        assert torch.allclose(a, b)


def test_quadratic_part_decides_far_out():
    network = network_of()
    far = 1e4 * torch.randn(6, 3)
    x = network.whitened(far)
    assert torch.allclose(network(far), 0.5 * x.square().sum(-1), rtol=1e-2)


def test_flow_of_a_random_network_is_reversible_and_keeps_volume():
    network = network_of()
    mass, size = torch.ones(3), torch.tensor(0.3)

    def move(pair):
        z, r = pair
        slope = network.value_and_gradient(z)[1]
        for _ in range(5):
            z, r, _, slope = leapfrog_step(
                lambda z, noise: network.value_and_gradient(z), z, r, slope, z[:, :0], mass, size
            )
        return z, r

    flip = lambda pair: (pair[0], -pair[1])  # noqa: E731
    start = (torch.randn(4, 3), torch.randn(4, 3))
    assert_reversible(move, flip, start)
    assert_volume_preserving(move, tuple(part[:1] for part in start))


# --- training -----------------------------------------------------------------------------------


def bent(z):
    """A skewed energy and its gradient."""
    z = z.detach().requires_grad_()
    bend = torch.nn.functional.softplus(2.0 * z[:, 0] - z[:, 1])
    value = 0.5 * z.square().sum(-1) + 2.0 * bend + 0.3 * z[:, 2].cos()
    (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


def bent_points(count=1500):
    torch.manual_seed(1)
    z = torch.randn(count, 3)
    return Points(z, *bent(z), z[:, :0])


def trained(loss=None, steps=800, points=None, **sizes):
    points = bent_points() if points is None else points
    torch.manual_seed(2)
    network = PotentialNetwork(3, **({"hidden": (32, 32)} | sizes))
    if isinstance(points, Points):
        network.whiten_by(points.position)
    return network, fit_energy(network, points, loss=loss, num_steps=steps, learning_rate=1e-2)


def leapfrogs(count=400, steps=5):
    torch.manual_seed(3)
    z, r, mass = torch.randn(count, 3), torch.randn(count, 3), torch.tensor([1.0, 0.5, 1.5])
    size = 0.2 + 0.2 * torch.rand(count)
    slope, path = bent(z)[1], [z]
    for _ in range(steps):
        z, r, _, slope = leapfrog_step(
            lambda z, noise: bent(z), z, r, slope, z, mass, size[:, None]
        )
        path.append(z)
    return TrajectorySegments(torch.stack(path, 1), size, torch.diag(mass).expand(count, 3, 3))


@pytest.mark.parametrize("outputs", [1, 3])
def test_energy_is_learned(outputs):
    network, training = trained(outputs=outputs)
    torch.manual_seed(9)
    z = torch.randn(500, 3)
    value, slope = bent(z)
    with torch.no_grad():
        learned, learned_slope = network.value_and_gradient(z)
    assert (learned - value).std() < 0.1 * value.std()
    assert (learned_slope - slope).square().mean() < 0.02 * slope.square().mean()
    assert training.best_loss == min(training.checks) < 0.1 * training.checks[0]
    assert training.energy_error == pytest.approx(float((learned - value).std()), abs=0.1)
    assert 0 < training.best_step <= len(training.losses) <= training.budget == 800
    assert training.points == 1500 and training.seconds > 0


def test_far_from_zero_no_digits_are_lost():
    """Positions and energies are taken from their centres before precision is spared."""
    points = bent_points()
    where, scale, level = torch.tensor([1e6, 0.0, -1e6]), 1e-2, 1e9
    moved = points._replace(
        position=where + scale * points.position,
        value=level + points.value,
        gradient=points.gradient / scale,
    )
    (_, plain), (network, training) = trained(), trained(points=moved)
    assert training.best_loss < 1.5 * plain.best_loss
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}


def test_points_too_large_for_single_precision_are_left_out():
    points = bent_points()
    points.gradient[::10] *= 1e30
    network, training = trained(points=points)
    assert training.points == 1350
    assert training.best_loss < 0.1 * training.checks[0]


def test_points_held_out_teach_nothing():
    points = bent_points()
    out = torch.arange(len(points.position)) % 5 == 2
    wrong = torch.where(out[:, None], 30.0 * points.gradient + 5.0, points.gradient)
    torch.manual_seed(2)
    network = PotentialNetwork(3, hidden=(32, 32))
    training = fit_energy(
        network, points._replace(gradient=wrong), held_out=out, num_steps=800, patience=800
    )
    z = torch.randn(500, 3)
    value, slope = bent(z)
    assert training.best_loss > 10.0
    assert (network.value_and_gradient(z)[1] - slope).square().mean() < 0.2


@pytest.mark.slow
def test_trajectories_teach_the_gradient():
    network, training = trained(TrajectoryMatching(5), points=leapfrogs())
    z = torch.randn(300, 3)
    slope, learned = bent(z)[1], network.value_and_gradient(z)[1]
    assert (learned - slope).square().mean() < 0.1 * slope.square().mean()
    assert math.isnan(training.energy_error)


def test_true_trajectories_have_no_loss():
    """The loss compares with leapfrog steps, of any mass and step size."""
    trajectories = leapfrogs()

    class True_(PotentialNetwork):
        def value_and_gradient(self, position, context=None):
            return bent(position)

    assert TrajectoryMatching(5)(True_(3), trajectories) < 1e-20
    longer = trajectories._replace(step_size=1.1 * trajectories.step_size)
    assert TrajectoryMatching(5)(True_(3), longer) > 1e-3


def test_training_stops_early_and_keeps_the_best():
    """On energies that are noise there is nothing to learn after a while."""
    points = bent_points(300)
    noise = points._replace(gradient=torch.randn(300, 3), value=torch.randn(300))
    network, training = trained(points=noise, steps=5000)
    assert training.stopped_early and len(training.losses) < 3000
    assert training.best_loss < training.checks[-1]
    with torch.no_grad():
        block = torch.arange(300) // 16
        out = noise.pick(block % 10 == 9)
        assert float(GradientMatching()(network, out)) == pytest.approx(training.best_loss)


def test_flow_of_a_trained_network_conserves_energy():
    """The true energy, at the order of the steps, and at large ones as well as the true flow."""
    network, _ = trained(steps=1500)
    torch.manual_seed(4)
    z, r = torch.randn(200, 3), torch.randn(200, 3)

    def errors(gradient, size, time=1.5):
        x, p, slope = z, r, gradient(z)[1]
        for _ in range(round(time / size)):
            x, p, _, slope = leapfrog_step(
                lambda z, noise: gradient(z), x, p, slope, x, torch.ones(3), torch.tensor(size)
            )
        kinetic = 0.5 * (p.square() - r.square()).sum(-1)
        own = gradient(x)[0] - gradient(z)[0] + kinetic
        return own.detach(), (bent(x)[0] - bent(z)[0] + kinetic).detach()

    assert_order(lambda size: errors(network.value_and_gradient, size)[0], [0.15, 0.1, 0.075, 0.05])
    learned = errors(network.value_and_gradient, 0.5)[1].abs().mean()
    true = errors(bent, 0.5)[1].abs().mean()
    assert learned < 1.5 * true + 0.05


# --- files and bad input ------------------------------------------------------------------------


def test_files_of_before_are_read(tmp_path):
    """The quadratic and the linear part had other names in them."""
    network = PotentialNetwork(2)
    with torch.no_grad():
        network.quadratic += 0.3 * torch.randn(network.quadratic.shape)
        network.linear += torch.randn(network.linear.shape)
    weights = network.state_dict()
    weights["shape"], weights["slope"] = weights.pop("quadratic"), weights.pop("linear")
    torch.save({"sizes": network.sizes, "weights": weights}, tmp_path / "network.pt")
    again = PotentialNetwork.load(tmp_path / "network.pt")
    z = torch.randn(5, network.dimension)
    assert torch.equal(again(z), network(z))


def test_missing_context_is_refused():
    with pytest.raises(ValueError, match="`context` is None: expected one of 3 numbers"):
        PotentialNetwork(2, context_dimension=3)(torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saved_is_loaded(dtype, tmp_path):
    network = network_of(dtype=dtype, outputs=2)
    network.save(tmp_path / "network.pt")
    again = PotentialNetwork.load(tmp_path / "network.pt")
    z = torch.randn(5, 3, dtype=dtype)
    assert torch.equal(again(z), network(z))
    assert again.sizes == network.sizes and again.reach == network.reach


def test_other_files_are_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no potential network.*it has ..a..: expected"):
        PotentialNetwork.load(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"dimension": 0}, "`dimension` is 0: expected 1 or more"),
        ({"outputs": -1}, "`outputs` is -1: expected 1 or more"),
        ({"hidden": []}, "`hidden` is empty"),
    ],
)
def test_bad_sizes_are_refused(sizes, match):
    with pytest.raises(ValueError, match=match):
        PotentialNetwork(**({"dimension": 2} | sizes))


def test_bad_training_is_refused():
    points = bent_points(40)
    with pytest.raises(ValueError, match="there are 20 points: expected 32 or more"):
        fit_energy(PotentialNetwork(3), points.pick(torch.arange(20)))
    broken = points._replace(value=points.value.log() * math.nan)
    with pytest.raises(ValueError, match="are not finite"):
        fit_energy(PotentialNetwork(3), broken)
    with pytest.raises(ValueError, match="`energy_weight` is -1: expected 0 <="):
        GradientMatching(-1)
    with pytest.raises(ValueError, match="`num_steps` is 1: expected 2 or more"):
        TrajectoryMatching(1)
