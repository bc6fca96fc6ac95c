"""A model's potential: captured, batched, compiled and compared with Pyro's own."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start
from pyro_hamflow.programs import program_cache as programs
from tests.helpers.zoo import ZOO, eight_schools, learned_parameter

CHAINS = 3


@pytest.fixture(params=ZOO, scope="module")
def case(request):
    """A model's name, its potential and a position for each of three chains."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    potential = Potential(ZOO[request.param])
    torch.manual_seed(5)
    yield request.param, potential, 0.7 * torch.randn(CHAINS, potential.dimension)
    torch.set_default_dtype(torch.float32)


def _eager(potential, position):
    """Potential and gradient of one chain, by running the model under autograd."""
    position = position.clone().requires_grad_()
    value = potential.value_of_one(position, torch.zeros(0))
    return value.detach(), torch.autograd.grad(value, position)[0]


def _close(first, second, tolerance):
    scale = max(1.0, second.abs().max().item())
    return (first - second).abs().max().item() <= tolerance * scale


def test_capture_agrees_with_model(case):
    _, potential, position = case
    graph = potential.programs.base("gradients")
    assert potential.programs.fallback_reason is None
    for row in position:
        value, slope, _ = graph(row, torch.zeros(0))
        plain_value, plain_slope = _eager(potential, row)
        assert torch.isfinite(plain_value)
        assert _close(value, plain_value, 1e-12)
        assert _close(slope, plain_slope, 1e-12)


def test_batch_agrees_with_loop_over_chains(case):
    _, potential, position = case
    values, slopes, _ = potential.gradients(position, torch.zeros(CHAINS, 0))
    for value, slope, row in zip(values, slopes, position, strict=True):
        plain_value, plain_slope = _eager(potential, row)
        assert _close(value, plain_value, 1e-12)
        assert _close(slope, plain_slope, 1e-12)


def test_every_program_gives_the_same_potential():
    potential = Potential(eight_schools)
    position, nothing = torch.randn(CHAINS, potential.dimension), torch.zeros(CHAINS, 0)
    values, slopes, noise_slopes = potential.gradients(position, nothing)
    assert noise_slopes.shape == (CHAINS, 0)
    assert _close(potential.value(position, nothing), values, 1e-13)
    again, slopes_again = potential.programs.program("gradient", CHAINS)(position, nothing)
    assert _close(again, values, 1e-13)
    assert _close(slopes_again, slopes, 1e-13)


def test_potential_agrees_with_pyro(case):
    name, potential, position = case
    _, potential_fn, transforms, _ = initialize_model(ZOO[name])
    for row in position[:2]:
        values = potential.unravel(row)
        assert values.keys() == transforms.keys()
        captured, _, _ = potential.programs.base("gradients")(row, torch.zeros(0))
        assert _close(captured, potential_fn(values).detach(), 1e-10)


def test_gradient_agrees_with_finite_differences(case):
    _, potential, position = case
    step, eye = 1e-5, torch.eye(potential.dimension)
    for row in position[:1]:
        _, slope = _eager(potential, row)
        with torch.no_grad():
            up = [potential.value_of_one(row + step * e, torch.zeros(0)) for e in eye]
            down = [potential.value_of_one(row - step * e, torch.zeros(0)) for e in eye]
        difference = (torch.stack(up) - torch.stack(down)) / (2 * step)
        assert _close(slope, difference, 1e-6)


def test_vectors_and_values_round_trip(case):
    _, potential, position = case
    assert torch.equal(potential.ravel(potential.unravel(position), CHAINS), position)
    values = potential.constrain(position)
    for name, site in potential.plain_trace.nodes.items():
        if name in values:
            assert values[name].shape == (CHAINS, *site["value"].shape)
            support = potential.sites[[s.name for s in potential.sites].index(name)]
            assert bool(support.transform.codomain.check(values[name]).all())
    for i, row in enumerate(position):
        single = potential.constrain(row)
        assert all(torch.allclose(single[name], values[name][i]) for name in values)
        assert _close(potential.flatten(single), row, 1e-9)


def test_float32_model_gives_float32_potential():
    def model(y):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(a.exp(), 1.0).to_event(1), obs=y)

    torch.set_default_dtype(torch.float32)
    potential = Potential(model, (torch.tensor([0.5, 1.0]),))
    position = torch.tensor([[0.3, -0.2]])
    value, slope, _ = potential.gradients(position, torch.zeros(1, 0))
    assert value.dtype == slope.dtype == torch.float32
    with torch.enable_grad():
        plain_value, plain_slope = _eager(potential, position[0])
    assert torch.allclose(value[0], plain_value, rtol=1e-6)
    assert torch.allclose(slope[0], plain_slope, rtol=1e-5)
    assert potential.ravel({"a": position.double()}, 1).dtype == torch.float32
    assert find_start(potential, 2)[0].dtype == torch.float32


def test_arguments_reach_the_model():
    def model(y, *, scale):
        a = pyro.sample("a", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    potential = Potential(model, (torch.tensor(2.0),), {"scale": 3.0})
    value = potential.value(torch.tensor([[0.5]]), torch.zeros(1, 0))
    normal = torch.distributions.Normal
    expected = normal(0.0, 3.0).log_prob(torch.tensor(0.5))
    expected = expected + normal(0.5, 1.0).log_prob(torch.tensor(2.0))
    assert torch.allclose(value, -expected, rtol=1e-14)


def branching(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    scale = 2.0 if a > 0.0 else 0.5
    pyro.sample("y", dist.Normal(a, scale), obs=y)


def counting(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    level = sum(a**k for k in range(1, 2 + int(a.detach().abs() * 2)))
    pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def through_numpy(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    scale = torch.as_tensor(1.0 + a.detach().abs().numpy())
    pyro.sample("y", dist.Normal(a, scale), obs=y)


@pytest.mark.parametrize("model", [branching, counting, through_numpy])
def test_control_flow_falls_back_to_model(model):
    y = torch.tensor(0.7)
    potential = Potential(model, (y,))
    position = torch.tensor([[0.9], [-0.8], [1.7]])
    with pytest.warns(RuntimeWarning, match="could not be captured as a graph.*The reason: .+"):
        values, slopes, _ = potential.gradients(position, torch.zeros(3, 0))
    assert potential.programs.fallback_reason
    for value, slope, row in zip(values, slopes, position, strict=True):
        plain_value, plain_slope = _eager(potential, row)
        assert torch.equal(value, plain_value)
        assert torch.equal(slope, plain_slope)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        assert torch.equal(potential.value(position, torch.zeros(3, 0)), values)


def test_disagreement_of_graph_and_model_is_noticed():
    """Control flow that tracing cannot see: the captured branch is right on one side only."""

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        positive = bool(torch.tensor(a.detach().tolist() > 0.0))
        pyro.sample("y", dist.Normal(a, 2.0 if positive else 0.5), obs=y)

    potential = Potential(model, (torch.tensor(0.7),))
    position = torch.tensor([[0.9], [-0.8]])
    with pytest.warns(RuntimeWarning, match="could not be captured"):
        values, _, _ = potential.gradients(position, torch.zeros(2, 0))
    expected = torch.stack([_eager(potential, row)[0] for row in position])
    assert torch.equal(values, expected)


def tiny(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a.sin(), 1.0), obs=y)


def test_compiled_potential_agrees_with_captured(compiled_at_once):
    y = torch.tensor(0.7)
    plain, compiled = Potential(tiny, (y,)), Potential(tiny, (y,), compile_graphs=True)
    position = torch.tensor([[0.9], [-0.8], [1.7]])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Compilation failed")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        result = compiled.gradients(position, torch.zeros(3, 0))
    for part, expected in zip(result, plain.gradients(position, torch.zeros(3, 0)), strict=True):
        assert torch.allclose(part, expected, rtol=1e-10, atol=1e-10)


def test_failure_of_the_compiler_is_survived(monkeypatch, compiled_at_once):
    import torch._inductor

    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler here\nand a long stack")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    y, position = torch.tensor(0.7), torch.tensor([[0.9], [-0.8]])
    potential = Potential(tiny, (y,), compile_graphs=True)
    with pytest.warns(RuntimeWarning, match=r"^Compilation failed \(no C\+\+ .* here\); .*\.$"):
        value, _, _ = potential.gradients(position, torch.zeros(2, 0))
    assert torch.equal(value, Potential(tiny, (y,)).gradients(position, torch.zeros(2, 0))[0])


def test_change_of_a_parameter_is_noticed():
    potential = Potential(learned_parameter)
    assert potential.renew((), {})
    pyro.get_param_store()["scale"] = torch.tensor(1.4)
    assert not potential.renew((), {})
    assert Potential(learned_parameter).renew((), {})


def test_noise_is_separate_or_a_latent_site():
    def model():
        from pyro_hamflow import noise

        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        u = noise("u", (4, 2))
        pyro.factor("estimate", (a * u).sin().sum())

    joint, split = Potential(model), Potential(model, separate_noise=True)
    assert (joint.dimension, joint.noise_dimension) == (9, 0)
    assert (split.dimension, split.noise_dimension) == (1, 8)
    position, noise = torch.randn(2, 1), torch.randn(2, 8)
    value, slope, noise_slope = split.gradients(position, noise)
    all_value, all_slope, _ = joint.gradients(torch.cat([position, noise], -1), torch.zeros(2, 0))
    standard = 0.5 * noise.square().sum(-1) + 4 * torch.log(torch.tensor(2 * torch.pi))
    assert torch.allclose(value + standard, all_value, rtol=1e-12)
    assert torch.allclose(torch.cat([slope, noise_slope + noise], -1), all_slope, rtol=1e-12)


def test_draws_of_the_global_generator_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    potential = Potential(eight_schools)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(3)
    potential.programs.base("gradients")
    assert torch.equal(torch.rand(2), expected)


def test_start_is_finite_and_within_the_box():
    potential = Potential(eight_schools)
    centre = torch.full((potential.dimension,), 5.0)
    position, noise = find_start(potential, 4, centre, radius=0.5)
    assert noise.shape == (4, 0)
    assert bool(((position - centre).abs() <= 0.5).all())
    assert bool(potential.value(position, noise).isfinite().all())
    assert len(position.unique(dim=0)) == 4


def test_failure_to_batch_is_survived(monkeypatch):
    def fail(*args):
        raise RuntimeError("aten::odd has no batching rule\nand a long stack")

    # A model that nobody else has captured.
    potential = Potential(lambda y: tiny(y), (torch.tensor(0.7),))
    position = torch.tensor([[0.9], [-0.8]])
    monkeypatch.setattr(programs, "batch", fail)
    with pytest.warns(RuntimeWarning, match="not be batched.*: aten::odd has no batching rule$"):
        values, slopes, _ = potential.gradients(position, torch.zeros(2, 0))
    for value, slope, row in zip(values, slopes, position, strict=True):
        plain_value, plain_slope = _eager(potential, row)
        assert _close(value, plain_value, 1e-12)
        assert _close(slope, plain_slope, 1e-12)


def many_data(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x.sum(), x[0].exp()), obs=y)


def test_large_programs_run_in_blocks():
    potential = Potential(many_data, (torch.randn(20_000),))
    position, noise = potential.vectors(6)
    assert potential.programs.rows_at_once("gradient", 6) == 3
    assert potential.programs.rows_at_once("gradient", 4) == 2
    assert potential.programs.rows_at_once("gradient", 7) == 7
    value, slope = potential.programs.program("gradient", 6)(position, noise)
    torch.testing.assert_close((value, slope), potential.graph("gradient", 6)(position, noise))
    torch.testing.assert_close(potential.value(position, noise), value)
    small = Potential(many_data, (torch.randn(20),))
    assert small.programs.rows_at_once("gradient", 64) == 64


def test_density_is_the_beginning_of_the_gradient(monkeypatch):
    """Where the gradient's program is there, the density's is taken out of it."""
    potential = Potential(many_data, (torch.randn(20),))
    position, noise = potential.vectors(3)
    value, _ = potential.programs.program("gradient", 3)(position, noise)
    monkeypatch.setattr("pyro_hamflow.programs.program_cache.capture", None)
    monkeypatch.setattr("pyro_hamflow.programs.program_cache.batch", None)
    assert torch.equal(potential.value(position, noise), value)
