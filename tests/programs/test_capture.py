"""Captured, batched and compiled programs do what the functions they came from do."""

from __future__ import annotations

import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_hamflow import MCMC, NUTS
from pyro_hamflow.marginal.marginalize import marginalize
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import JointTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import (
    batch,
    capture,
    first_result,
    in_blocks,
    largest_tensor,
    loop,
)
from pyro_hamflow.programs.graph_recorder import _BINDINGS
from pyro_hamflow.programs.vectorize import Vectorized
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from pyro_hamflow.surrogates.targets import JudgedDensity, SurrogateDensity
from tests.helpers.kinds import long_but


def counts(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.Normal(mean, spread))
        pyro.sample("y", dist.Poisson(x.exp()), obs=y)


def _operations(graph):
    """The names of a graph's operations, such as ``"add"``."""
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return [target.__name__.split(".")[0] for target in calls]


def test_arguments_stay_apart_when_the_examples_are_one_tensor():
    example = torch.ones(3)
    graph = capture(lambda a, b: a - 2 * b, example, example)
    torch.testing.assert_close(graph(torch.ones(3), torch.zeros(3)), torch.ones(3))


def test_constants_are_computed_once():
    data = torch.randn(50)
    graph = capture(lambda a: a + data.exp().sum().log(), torch.tensor(0.0))
    assert _operations(graph) == ["add"]


def test_in_place_operations_become_pure():
    def function(a):
        total = torch.zeros(3)
        total[1] += a.sum()
        return total

    a = torch.randn(4, 3)
    graph = batch(capture(function, a[0]), a)
    torch.testing.assert_close(graph(a), torch.stack([function(row) for row in a]))


def test_loop_does_what_batch_does():
    def function(a, b):
        return a * b, a.sum()

    a, b = torch.randn(4, 3), torch.randn(4, 3)
    for one, other in zip(batch(function, a, b)(a, b), loop(function)(a, b), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("transition", long_but([HMCTransition], [JointTransition, HMCTransition]))
def test_compiled_steps_equal_plain_ones(transition, compiled_at_once):
    y = torch.tensor([2.0, 0.0, 1.0])
    plain, compiled = (
        Potential(
            marginalize(counts, ["x"], num_particles=2),
            (y,),
            separate_noise=True,
            compile_graphs=flag,
        )
        for flag in (False, True)
    )
    position, noise = plain.vectors(3)
    mass, size = torch.tensor([0.5, 2.0]), torch.full((3, 1), 0.1)
    other = torch.randn_like(position)
    if transition is JointTransition:
        inputs = (position, other, noise, torch.randn_like(noise), mass, size, 0.5 * size)
    else:
        inputs = (position, other, torch.randn_like(position), noise, mass, size)
    steps = [transition(potential, 3)._advance(mass) for potential in (plain, compiled)]
    assert steps[0] is not steps[1]
    for one, two in zip(steps[0](*inputs), steps[1](*inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("upper", [True, False])
def test_a_shared_triangle_is_solved_once_for_the_batch(upper, left):
    torch.manual_seed(0)
    triangle = torch.randn(4, 4, dtype=torch.float64) + 4.0 * torch.eye(4)
    triangle = triangle.triu() if upper else triangle.tril()
    rights = torch.randn(6, 2, 4, 4, dtype=torch.float64)[..., : 4 if left else 3, :]

    def solve(right):
        solution = torch.linalg.solve_triangular(triangle, right, upper=upper, left=left)
        return (solution,)

    graph = batch(capture(solve, rights[0]), rights)
    assert torch.allclose(graph(rights)[0], solve(rights)[0], rtol=1e-14, atol=1e-14)
    solves = [node for node in graph.graph.nodes if "solve" in str(node.target)]
    assert [len(node.meta["kind"][0]) for node in solves] == [2]


def test_triangles_that_differ_are_solved_one_by_one():
    torch.manual_seed(0)
    triangles = torch.randn(6, 4, 4, dtype=torch.float64).tril() + 4.0 * torch.eye(4)
    rights = torch.randn(6, 4, 2, dtype=torch.float64)

    def solve(triangle, right):
        return (torch.linalg.solve_triangular(triangle, right, upper=False),)

    graph = batch(capture(solve, triangles[0], rights[0]), triangles, rights)
    assert torch.allclose(graph(triangles, rights)[0], solve(triangles, rights)[0])


def test_products_of_a_batch_have_a_row_for_each():
    """With the vectors first and no transposes between, they are faster to go on from."""
    torch.manual_seed(0)
    matrix, vectors = torch.randn(7, 3), torch.randn(5, 3)
    graph = batch(capture(lambda v: (matrix @ v, v.new_ones(7) @ matrix), vectors[0]), vectors)
    product, total = graph(vectors)
    torch.testing.assert_close(product, vectors @ matrix.mT)
    torch.testing.assert_close(total, matrix.sum(0).expand(5, 3))
    assert product.is_contiguous()


def test_tensors_of_zeros_and_ones_are_constants():
    def function(a):
        return (a + torch.zeros_like(a).sum() + torch.ones_like(a, dtype=torch.float64).sum(),)

    a = torch.arange(6.0).reshape(2, 3)
    graph = batch(capture(function, a[0]), a)
    torch.testing.assert_close(graph(a)[0], a + 3.0, check_dtype=False)
    assert not {"zeros_like", "ones_like"} & set(_operations(graph))


def test_gradients_whose_batching_needs_the_shape_of_the_result():
    def model():
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))

    potential = Potential(model)
    for chains in (1, 4):
        position, noise = potential.vectors(chains)
        position = position.double().requires_grad_()
        value = torch.stack(
            [potential.value_of_one(z, u) for z, u in zip(position, noise, strict=True)]
        )
        (slope,) = torch.autograd.grad(value.sum(), position)
        computed = potential.graph("gradient", chains)(position.detach(), noise)
        torch.testing.assert_close(computed, (value.detach(), slope))


def test_gradients_of_parts_are_joined_in_one_operation():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("c", dist.LogNormal(0.0, 1.0))

    names = _operations(Potential(model).graph("gradient", 4))
    assert names.count("cat") == 1
    assert "slice" not in names


def grouped():
    group, y = torch.tensor([0, 2, 1, 0]), torch.tensor([0.5, 1.0, -1.0, 2.0])
    with pyro.plate("groups", int(group.max()) + 1):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    if (y > 0.0).any():
        pyro.sample("y", dist.Normal(mean[group], 1.0).to_event(1), obs=y)


def masked():
    mask = torch.tensor([True, False, True])
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x[mask].exp(), 1.0).to_event(1), obs=torch.ones(2))


_compiled = torch.compile(lambda a: a.sin() * a.exp(), backend="eager")


def compiled_part():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("part", _compiled(a))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own
@pytest.mark.parametrize("model", [grouped, masked, compiled_part])
def test_models_are_captured(model):
    """Control flow may follow the data, masks pick latents, and parts be compiled already."""
    potential = Potential(model)
    position, noise = potential.vectors(3)
    graph = potential.graph("gradient", 3)
    assert potential.programs.fallback_reason is None
    rows = [potential.function("gradient")(z, u) for z, u in zip(position, noise, strict=True)]
    for part, plain in zip(graph(position, noise), zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(part, torch.stack(plain))
    masks = [b for b in graph.buffers() if b.dtype == torch.bool]
    assert not masks


def test_values_that_depend_on_an_argument_cannot_be_asked_for():
    def of_a_result(a):
        return a if a.sum() > 0.0 else -a

    def of_a_constant_written_to(a):
        total = torch.zeros(2)
        total[0] = a.sum()
        return a if total[1] > -1.0 else -a

    for function in (of_a_result, of_a_constant_written_to):
        with pytest.raises(RuntimeError, match="asks for the value of a tensor that depends on"):
            capture(function, torch.ones(3))


def test_literals_that_are_written_to_are_new_in_each_run():
    def function(a):
        total = torch.tensor([1.0, 2.0])
        total[0] += a
        return total

    graph, a = capture(function, torch.tensor(1.0)), torch.tensor(3.0)
    for _ in range(2):
        torch.testing.assert_close(graph(a), torch.tensor([4.0, 2.0]))


def test_a_copy_of_the_data_takes_values_of_arguments():
    data = torch.tensor([0.2, 0.9, torch.nan, 0.4])
    missing = data.isnan()

    def by_mask(a):
        full = data.clone()
        full[missing] = a[:1]
        return full

    def through_a_view(a):
        full = data.expand(2, 4).clone()
        full.T[2] = a
        return full.sum(0)

    a = torch.randn(3, 2)
    for function in (by_mask, through_a_view):
        graph = batch(capture(function, a[0]), a)
        torch.testing.assert_close(graph(a), torch.stack([function(row) for row in a]))
    assert data.isnan().sum() == 1  # the data stay as they were


def test_repeated_operations_are_done_once_and_random_ones_each_time():
    def function(a):
        return a.exp() + a.exp() + a.clone().reshape(a.shape), torch.rand(2) - torch.rand(2)

    graph = capture(function, torch.ones(2))
    names = _operations(graph)
    assert (names.count("exp"), names.count("add"), names.count("rand")) == (1, 2, 2)
    assert not {"clone", "view", "reshape"} & set(names)
    first, second = graph(torch.ones(2)), graph(torch.ones(2))
    assert bool((first[1] != second[1]).all()) and bool((first[1] != 0.0).all())


class _Called(TorchDispatchMode):
    """The operation that was called last."""

    def __torch_dispatch__(self, target, types, args=(), kwargs=None):
        self.target = target
        return target(*args, **(kwargs or {}))


def test_functions_called_in_place_of_operations_do_the_same():
    x, mask = torch.rand(2, 2) + 0.1, torch.tensor([True, False])
    others = {"default": (), "Tensor": (x,), "Scalar": (2.0,), "dims": ([0, 1],), "int": (0, 1)}
    others |= {"Tensor_Scalar": (2.0,), "Tensor_Tensor": (x,), "dim_IntList": ([1],)}
    arguments = {
        "bitwise_and": (mask, mask),
        "bitwise_not": (mask,),
        "bmm": (x[None], x[None]),
        "cat": ([x, x], 1),
        "clamp": (x, 0.2, 0.5),
        "clamp_min": (x, 0.2),
        "cumprod": (x, 1),
        "cumsum": (x, 1),
        "flip": (x, [1]),
        "full_like": (x, 3.0),
        "gather": (x, 1, torch.tensor([[0, 1]])),
        "logical_and": (mask, mask),
        "logsumexp": (x, [1]),
        "masked_fill": (x, mask, -1.0),
        "mm": (x, x),
        "permute": (x, [1, 0]),
        "reshape": (x, [4]),
        "split_with_sizes": (x, [1, 1], 1),
        "stack": ([x, x], 1),
        "unsqueeze": (x, 1),
        "where": (mask, x, x),
    }
    dispatched = {"aten.mul.Scalar": "aten.mul.Tensor", "aten.reshape.default": "aten.view.default"}
    for target, function in _BINDINGS.items():
        _, name, overload = str(target).split(".")
        inputs = arguments.get(name) or (x, *others[overload])
        with _Called() as called:
            result = function(*inputs)
        assert str(called.target) == dispatched.get(str(target), str(target))
        torch.testing.assert_close(result, target(*inputs), rtol=0.0, atol=0.0)


def test_largest_tensor_on_the_way():
    graph = capture(lambda x: (x[:, None] * x).exp().sum(), torch.zeros(7))
    assert largest_tensor(graph) == 49
    batched = batch(lambda x: (x[:, None] * x).exp().sum(), torch.zeros(3, 7))
    assert largest_tensor(batched) == 147


def test_data_are_not_made_on_the_way():
    data = torch.ones(1000)
    assert largest_tensor(capture(lambda x: data @ (data * 2.0) * x, torch.zeros(7))) == 7


def test_blocks_one_after_the_other():
    sizes = []

    def function(x, y):
        sizes.append(len(x))
        return x + y, (x * y).sum(-1)

    x, y = torch.randn(2, 6, 3)
    torch.testing.assert_close(in_blocks(function, 2)(x, y), function(x, y))
    assert sizes == [2, 2, 2, 6]


def test_first_result_alone():
    def function(x, y):
        return (x * y).sum(), x.cos(), y.sin()

    x, y = torch.randn(2, 5)
    graph = capture(function, x, y)
    alone = first_result(graph)
    assert torch.equal(alone(x, y, torch.zeros(0))[0], graph(x, y)[0])
    assert len(alone(x, y, torch.zeros(0))) == 1
    assert len(alone.graph.nodes) < len(graph.graph.nodes)


@pytest.mark.parametrize(
    "numbers", [[0, 2, 2, 1], [-1, 0, -3, 2], [1]], ids=["plain", "from the right", "one"]
)
def test_rows_are_read_and_summed_without_indexing(numbers):
    """Reading by numbers and its gradient, batched, are a gather and a scattered sum."""
    index, weights = torch.tensor(numbers), torch.arange(1.0, len(numbers) + 1)

    def gradient(x):
        x = x.detach().requires_grad_()
        value = (x.exp()[:, index] * weights).square().sum()
        return value.detach(), torch.autograd.grad(value, x)[0]

    x = torch.randn(5, 2, 3)
    graph = batch(capture(gradient, x[0]), x)
    expected = [gradient(one) for one in x]
    for i, found in enumerate(graph(x)):
        torch.testing.assert_close(found, torch.stack([each[i] for each in expected]))
    names = {getattr(n.target, "__name__", "").split(".")[0] for n in graph.graph.nodes}
    assert {"gather", "scatter_add"} <= names
    assert not {"index", "index_put"} & names


def test_programs_around_a_surrogate_go_with_it():
    """And a second run of a kernel needs no others than the first."""

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    kernel = NUTS(model)
    run = MCMC(kernel, num_samples=5, warmup_steps=5, num_chains=2, disable_progbar=True)
    run.run()
    potential = kernel.potential
    owned = potential.programs._owned
    assert list(owned) == [potential]
    position = potential.vectors(2)[0]
    network = PotentialNetwork(2, hidden=[4])
    for _ in range(2):
        surrogate = SurrogateDensity(potential, network)
        judged = JudgedDensity(potential, network, None)
        for density in (surrogate, judged):
            advance = HMCTransition(density, 2)._advance(torch.ones(2))
            advance(position, position, position, position[:, :0], torch.ones(2), position[:, :1])
        assert len(owned) == 3
        del surrogate, judged, density, advance
        gc.collect()
        assert list(owned) == [potential]
    known = list(potential.programs._graphs)
    run.run()
    assert kernel.potential is potential
    assert set(potential.programs._graphs) - set(known) <= {("evaluate", 2)}


def test_a_function_that_records_a_factorisation_of_its_own_has_one_way():
    """The failure that the outer check asks for comes while the inner one is being checked."""

    def row(matrix):
        factor = torch.zeros(2, 2)
        factor[:] = torch.linalg.cholesky(matrix)  # which `torch.func.vmap` refuses
        return factor.diagonal().log().sum()

    rows = Vectorized("rows")

    def function(scale):
        return rows(row, scale * torch.eye(2).expand(3, 2, 2)).sum()

    graph = capture(function, torch.tensor(2.0))
    torch.testing.assert_close(graph(torch.tensor(3.0)), 3.0 * torch.tensor(3.0).log())
