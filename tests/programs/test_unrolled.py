"""Graphs written number by number: they give what the graph gives, and are taken where they pay."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn import functional

from benchmarks.coverage_models import ZOO
from pyro_hamflow.marginal.path_looks import added
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs import banded
from pyro_hamflow.programs.capture import capture
from pyro_hamflow.programs.engines import (
    blocks,
    choice,
    model_library,
    sides,
    statements,
    unrolled_rules,
)
from pyro_hamflow.programs.engines.model_library import Unrolled
from pyro_hamflow.programs.engines.native import NativeProgram, _part
from pyro_hamflow.programs.machine_code.store import Store
from tests.helpers.kinds import long_but
from tests.helpers.native import side_by_side

PLACES = torch.tensor([[2, 0, -1], [1, 1, 0]])
GROUPS = torch.tensor([0, 2, 2, 1])


@pytest.fixture
def by_number(monkeypatch):
    """All graphs are written number by number, or none at all."""
    write = lambda part: Unrolled(part.graph, part.inputs, 30_000)  # noqa: E731
    monkeypatch.setattr(model_library, "_function", write)


def elementwise(x):
    y = x.square() + 0.5
    whole = (3.0 * x).round().long()
    return [
        *(x.exp(), x.expm1(), y.log(), y.log1p(), x.sin(), x.cos(), x.tanh(), x.atan(), x.erf()),
        *(x.sigmoid(), y.lgamma(), y.digamma(), y.sqrt(), y.rsqrt(), y.reciprocal(), x.abs()),
        *(x.asinh(), (y + 1.0).acosh(), (x / 2).atanh(), (x / 2).asin(), (x / 2).acos()),
        *(x.sign(), x.floor(), x.ceil(), x**3, x**2, y**0.5, y**-1, y**x, 2.0 - x, x / y),
        *(functional.softplus(x), functional.logsigmoid(x), torch.xlogy(x.relu(), y)),
        *(torch.maximum(x, y), torch.minimum(x, y), x.clamp(min=0.1), x.clamp(-0.2, 0.3)),
        *(torch.where(x > 0.0, x, 2.0 * y), x.masked_fill(x < 0.0, 7.0), torch.add(x, y, alpha=3)),
        *(whole, whole + 1, whole / 2, whole == 1, ~(x > 0) | (y > 1), (x > 0) & (y > 1)),
        *(torch.full_like(x, 2.0), torch.ones_like(x), x.new_zeros(2), x.float().double()),
    ]


def reductions(x):
    y = x[:12].reshape(3, 4)
    return [
        *(
            y.sum(),
            y.sum(0),
            y.sum((0, 1)),
            y.mean(1, keepdim=True),
            y.prod(1),
            y.amax(0),
            y.amin(),
        ),
        *(*y.max(1), *y.min(0), y.max(), y.logsumexp(0), y.softmax(1), y.log_softmax(0)),
        *(y.cumsum(1), y.logcumsumexp(0), y.cumprod(0), (y > 0).any(1), (y > -9).all(), y.var(1)),
        *(y @ y.mT, y[0] @ y.mT, y @ y[0], y[0] @ y[1], (y > 0).sum(), y.norm()),
    ]


def moves(x):
    y = x[:12].reshape(3, 4)
    return [
        *(y.mT, y[1], y[:, 2], y[::2], y.flip(0), y.roll(1, 1), y.expand(2, 3, 4), y.repeat(2, 1)),
        *(torch.stack([y, 2 * y], 1), torch.cat([y, y[:1]]), y.diagonal(), y[0].diag_embed()),
        *(y.tril(), y.triu(1), functional.pad(y, (1, 2), value=3.0), *y.split([1, 3], 1)),
        *(y[PLACES], y[PLACES, PLACES + 1], y[:, PLACES], y.gather(0, PLACES.abs())),
        *(y.index_add(1, GROUPS, 2 * y), y.scatter_add(1, PLACES.abs(), y[:2, :3]), *y.unbind()),
        *(y.index_put((GROUPS[:2], GROUPS[:2]), x[:2]), y.scatter(1, PLACES.abs(), 5.0)),
    ]


def matrices(x):
    a = x[:9].reshape(3, 3)
    a = a @ a.mT + torch.eye(3)
    factor = torch.linalg.cholesky(a)
    solved = torch.linalg.solve_triangular(factor, x[:3, None], upper=False)
    backwards = torch.linalg.cholesky(a.flip(0, 1)).flip(0, 1)  # as of the inverse of a covariance
    last = torch.linalg.solve_triangular(backwards.mT, x[:3, None], upper=False)
    inverses = a.inverse(), (a @ a).flip(0, 1).inverse()
    solutions = solved, last, torch.cholesky_solve(x[:3, None], factor)
    return [factor, *solutions, a.sort(1)[0], *inverses]


GAPS = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.0, -1.0] * 2)


def with_gaps(x):
    y = x[:12] + GAPS
    return [
        *(y.exp(), y.log(), y.relu(), y.clamp(max=0.5), y.sigmoid(), y.sign(), 0.0 * y, y + 0.0),
        *(torch.where(y > 0, y, 0.0), torch.maximum(y, x[0]), y.amax(), *y.reshape(3, 4).max(1)),
        *(y[3:6].logsumexp(0), torch.xlogy(y, y), y.isnan(), y.isinf(), -y, y / 0.0, y == y),
    ]


@pytest.mark.parametrize(
    ("operations", "as_loops"),
    long_but(
        lambda case: case[1] == (case[0] is not elementwise),
        itertools.product([elementwise, reductions, moves, matrices, with_gaps], [False, True]),
    ),
)
def test_operations_give_what_torch_gives(operations, as_loops, by_number, monkeypatch, tmp_path):
    """Number by number, and as loops over what lies in memory."""
    if as_loops:
        monkeypatch.setattr(blocks, "_LEAST", 2)
        monkeypatch.setattr(unrolled_rules, "_LARGE", 1)
    x = torch.linspace(-1.6, 1.4, 12)
    shapes = [part.shape for part in operations(x)]

    def row(position, noise):
        found = operations(position)
        row = torch.cat([part.double().reshape(-1) for part in found])
        return position.sum(), row

    assert_same_results(row, x, shapes, tmp_path)


def of_several_chains(x):
    """What is worked out of numbers of several chains: no whole numbers, nothing in memory."""
    y = x.square() + 0.5
    data = torch.linspace(-1.0, 1.0, 12, dtype=x.dtype)
    same = torch.arange(12) % 2 == 0
    rows = x.reshape(3, 4)
    return [
        *(x.exp(), x.expm1(), y.log(), y.log1p(), x.sin(), x.cos(), x.tanh(), x.atan(), x.erf()),
        *(x.sigmoid(), y.lgamma(), y.digamma(), y.sqrt(), y.rsqrt(), y.reciprocal(), x.abs()),
        *(x.asinh(), (y + 1.0).acosh(), (x / 2).atanh(), (x / 2).asin(), (x / 2).acos()),
        *(x.sinh(), x.cosh(), (x / 2).tan(), x.erfc(), (3.0 * x).round(), x.floor(), x.ceil()),
        *(x.sign(), x.trunc(), x**3, x**2, y**0.5, y**-1, y**x, 2.0**x, y**data, 2.0 - x, x / y),
        *(functional.softplus(x), functional.logsigmoid(x), torch.xlogy(x.relu(), y)),
        *(torch.xlogy(data.relu(), y), x / data.exp(), data / y, x * data, data - x, x - data),
        *(torch.maximum(x, y), torch.maximum(x, data), torch.minimum(data, x), x.clamp(-0.2, 0.3)),
        *(torch.where(x > 0.0, x, 2.0 * y), torch.where(same, x, y), torch.where(same, x, 1.0)),
        *(torch.where(x > data, 1.0, 0.0), torch.where(x > 0.0, data, 0.0), (x > 0.0) | (y > 1.0)),
        *(x == data, ~(x >= 0.0), (x > 0.0) & same, x.isnan(), (1.0 / x.relu()).isinf()),
        *(x.masked_fill(x < 0.0, 7.0), x.masked_fill(same, 7.0), torch.where(x > 0.0, same, False)),
        *(((x > 0) * (x < 1)) * x, ((x > 0) + (x < 1)).to(x.dtype), ((x > 0) + same) * x),
        *(torch.maximum(x > 0, x < 1), torch.maximum(x > 0, same), torch.minimum(x > 0, x > 1)),
        *((x > 0).amax(), (rows > 0).amin(0), (x > 0) == same, (x > 0) != same, (x > 0) < (x > 1)),
        *(
            (x > 1) < (x > 0),
            (x > 1) <= same,
            same > (x > 0),
            (x > 0) == (x > 1),
            (x > 0) * 2.0 - y,
        ),
        *((x > 0.0).to(x.dtype), torch.zeros_like(x), torch.ones_like(x)),
        *(rows.sum(0), rows.mean(1), rows.prod(1), rows.amax(0), rows.logsumexp(0), rows.var(1)),
        *(rows.softmax(1), rows.cumsum(1), (rows > 0.0).any(1), rows.norm()),
        *(rows @ rows.mT, rows[0] @ rows.mT, rows @ data[:4], rows[0] @ rows[1], rows.flip(0)),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_several_chains_get_what_each_gets(dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(model_library, "_SIDE_LINES", 10**5)
    monkeypatch.setattr(model_library, "_SIDE_MOST", 10**5)
    monkeypatch.setattr(sides, "_MOST_ONE_BY_ONE", 10**5)
    side_by_side(monkeypatch)
    torch.set_default_dtype(dtype)
    x = torch.linspace(-1.6, 1.4, 12, dtype=dtype)

    def row(position, noise):
        found = of_several_chains(position)
        return position.sum(), torch.cat([part.to(dtype).reshape(-1) for part in found])

    assert_same_results(row, x, [part.shape for part in of_several_chains(x)], tmp_path)


def assert_same_results(row, x, shapes, tmp_path):
    """At some places, each result in a row of them is that of torch."""
    graph = _as_wide(capture(row, x, x[:0]), x, row)
    program = NativeProgram(graph, [graph.start, x[:0]], None, Store(tmp_path))
    places = graph.start + torch.tensor([0.0, 0.1, -0.3, 0.0, 0.2])[:, None].to(x.dtype)
    for place, found in zip(places, program.gradient(places, x.new_zeros(5, 0))[1], strict=True):
        assert_results(found, row(place[: len(x)], x[:0])[1], shapes)


def assert_results(found, expected, shapes):
    begin = 0
    for number, shape in enumerate(shapes):
        parts = [part[begin : begin + shape.numel()] for part in (found, expected)]
        torch.testing.assert_close(*parts, equal_nan=True, msg=partial("{1}: {0}".format, number))
        begin += shape.numel()


def _as_wide(graph, x, row):
    """The same function of as many numbers as it has results, of which it takes the first."""
    count = len(row(x, x[:0])[1])
    start = torch.cat([x, torch.zeros(count)])[: max(count, len(x))]
    wide = capture(lambda p, noise: row(p[: len(x)], noise), start, x[:0])
    wide.start = start
    return wide


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The model could not be captured")
@pytest.mark.parametrize("name", ZOO)
def test_gradient_of_the_zoo_is_right(name, by_number, tmp_path):
    model, data = ZOO[name].make()
    potential = Potential(model, (), data)
    graph = potential.programs.base("gradient")
    if graph is None:
        pytest.skip("not captured")
    try:
        program = NativeProgram(graph, [p[0] for p in potential.vectors(1)], None, Store(tmp_path))
    except model_library.NotSupported as error:
        pytest.skip(str(error).splitlines()[0])
    torch.manual_seed(1)
    position = 0.5 * torch.randn(4, potential.dimension).to(potential.example)
    value, gradient = program.gradient(position, torch.zeros(4, 0))
    for i in range(4):
        expected = graph(position[i], torch.zeros(0))
        scale = 1.0 + expected[1].abs().max()
        assert torch.allclose(value[i], expected[0], rtol=1e-9, equal_nan=True)
        assert torch.allclose(gradient[i] / scale, expected[1] / scale, atol=1e-9, equal_nan=True)


def predators(y):
    """Steps of a differential equation: thousands of operations on one number or two."""
    rates = pyro.sample("rates", dist.LogNormal(torch.full((4,), -1.0), 0.3).to_event(1))
    state, states = torch.tensor([1.0, 0.5]), []
    slope = lambda z: torch.stack(  # noqa: E731
        [(rates[0] - rates[1] * z[1]) * z[0], (rates[3] * z[0] - rates[2]) * z[1]]
    )
    for _ in range(30):
        half = state + 0.1 * slope(state)
        state = state + 0.2 * slope(half)
        states.append(state)
    pyro.sample("y", dist.Normal(torch.stack(states), 0.1).to_event(2), obs=y)


@pytest.fixture
def potential():
    return Potential(predators, (torch.ones(30, 2),))


def made(potential, path):
    graph = potential.programs.base("gradient")
    return NativeProgram(graph, [part[0] for part in potential.vectors(1)], None, Store(path))


@pytest.mark.parametrize("lines", long_but([7], [statements._IN_A_FUNCTION, 7]))
def test_a_recurrence_is_written_number_by_number(lines, potential, monkeypatch, tmp_path):
    """In functions of any length: what one makes, later ones read."""
    monkeypatch.setattr(statements, "_IN_A_FUNCTION", lines)
    monkeypatch.setattr(model_library, "source_of", None)  # Inductor is not asked
    program, graph = made(potential, tmp_path), potential.programs.base("gradient")
    position = 0.3 * torch.randn(3, 4) - 1.0
    value, gradient = program.gradient(position, torch.zeros(3, 0))
    for i in range(3):
        expected = graph(position[i], torch.zeros(0))
        torch.testing.assert_close(value[i], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient[i], expected[1], rtol=1e-12, atol=1e-12)


@pytest.fixture
def idle_inductor(monkeypatch):
    """Inductor's graphs are named, and not made, which takes it half a minute."""
    monkeypatch.setattr(model_library, "source_of", lambda *_: None)
    monkeypatch.setattr(model_library, "Function", lambda *_: "Inductor")


@pytest.mark.usefixtures("idle_inductor")
def test_what_has_no_rule_is_left_to_inductor(potential, monkeypatch):
    graph = potential.programs.base("gradient")
    part = _part(graph, [p[0] for p in potential.vectors(1)])
    assert isinstance(model_library._function(part), Unrolled)
    monkeypatch.setattr(model_library, "_MOST", 10**6)
    monkeypatch.delitem(unrolled_rules.RULES, "mul")
    assert model_library._function(part) == "Inductor"


def test_arguments_of_an_unknown_form_are_left_to_inductor(potential, monkeypatch):
    """A rule that does not know them is no reason for a run to fail."""
    part = _part(potential.programs.base("gradient"), [p[0] for p in potential.vectors(1)])
    monkeypatch.setitem(unrolled_rules.RULES, "mul", lambda writer, func, a: a)
    with pytest.raises(model_library.NotSupported):
        Unrolled(part.graph, part.inputs, 10**6)


@pytest.mark.usefixtures("idle_inductor")
def test_a_few_operations_and_many_numbers_are_left_to_inductor(potential, monkeypatch):
    part = _part(potential.programs.base("gradient"), [p[0] for p in potential.vectors(1)])
    monkeypatch.setattr(model_library, "_MOST", 10**6)
    monkeypatch.setattr(model_library, "_EACH", 0)
    assert model_library._function(part) == "Inductor"
    monkeypatch.setattr(model_library, "_EACH", 20)
    monkeypatch.setattr(model_library, "_MANY", 10**6)
    assert model_library._function(part) == "Inductor"


def series(x):
    """A recurrence over sixty steps, and vectors and matrices of its states."""
    state, states = x[0], []
    for t in range(60):
        state = 0.5 * state.tanh() + x[t]
        states.append(state)
    whole = torch.stack(states)
    table = (whole[:, None] - 0.1 * whole).exp() * (1.0 + whole.square())
    return (table.sum(1).log() + table.sum(0).log() - whole / 3.0).sum() + table.mean()


def assert_runs_as_its_graph(graph, x, folder):
    """Machine code gives the graph's value and slope elsewhere than where it was captured."""
    program = NativeProgram(graph, [x, x[:0]], None, Store(folder))
    value, slope = program.gradient(x[None] + 0.1, torch.zeros(1, 0))
    expected = graph(x + 0.1, x[:0])
    torch.testing.assert_close(value[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope[0], expected[1], rtol=1e-12, atol=1e-12)


def test_vectors_and_matrices_among_numbers_are_loops(monkeypatch, tmp_path):
    monkeypatch.setattr(model_library, "source_of", None)  # Inductor is not asked

    def gradient(x, noise):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = series(x)
            return value.detach(), *torch.autograd.grad(value, x)

    x = 0.3 * torch.randn(60, dtype=torch.float64)
    graph = capture(gradient, x, x[:0])
    count = sum(node.op == "call_function" for node in graph.graph.nodes)
    assert count > model_library._MANY
    part = _part(graph, [x, x[:0]])
    text = Unrolled(part.graph, part.inputs, 20 * count).text("program")
    assert text.count("\n") < 4000  # number by number there would be some ten thousand
    assert_runs_as_its_graph(graph, x, tmp_path)


def learners(x, steps):
    """What twenty people learn at each step, by rates of their own."""
    value, rate, total = torch.zeros(20).double(), x.sigmoid(), 0.0
    for t in range(steps):
        total = total + torch.nn.functional.softplus(value * x).sum()
        value = value + rate * (math.sin(t) - value)
    return total


def test_loops_of_all_steps_are_one_function(tmp_path, monkeypatch):
    """Machine code is made of each loop once, however many steps repeat it."""
    monkeypatch.setattr(model_library, "source_of", None)  # Inductor is not asked

    def graph_of(steps):
        def gradient(x, noise):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                value = learners(x, steps)
                return value.detach(), *torch.autograd.grad(value, x)

        return capture(gradient, x, x[:0])

    x = 0.3 * torch.randn(20, dtype=torch.float64)
    functions, calls = [], []
    for steps in (40, 60):
        graph = graph_of(steps)
        part = _part(graph, [x, x[:0]])
        text = Unrolled(part.graph, part.inputs, 10**6).text("program")
        functions.append(text.count("void loop"))
        calls.append(text.count("\nloop"))
    assert functions[1] <= functions[0] + 2
    assert calls[1] > calls[0] + 100
    assert_runs_as_its_graph(graph, x, tmp_path)


def test_numbers_that_lie_apart_are_copied_once(tmp_path, monkeypatch):
    """However many operations read them in one row; and types are told without any copy."""
    monkeypatch.setattr(model_library, "source_of", None)  # Inductor is not asked

    def gradient(x, noise):
        state, states = x[0], []
        for t in range(80):
            state = 0.5 * state.tanh() + x[t]
            states.append(state)
        whole = torch.stack(states)
        return (whole * x).sum(), whole.exp() + whole.sin() + whole.cos() + 2.0 * whole

    x = 0.3 * torch.randn(80, dtype=torch.float64)
    graph = capture(gradient, x, x[:0])
    unrolled = Unrolled(_part(graph, [x, x[:0]]).graph, [x, x[:0]], 10**6)
    lines = [line for step in unrolled._writer.steps for line in step.lines]
    assert sum("] = v" in line for line in lines) == 80
    assert_runs_as_its_graph(graph, x, tmp_path)


def test_columns_of_a_matrix_are_copied_whole(tmp_path, monkeypatch):
    """As those of the states of a recurrence, not number by number."""
    monkeypatch.setattr(model_library, "source_of", None)  # Inductor is not asked

    def columns(x, noise):
        state, states = x, []
        for _ in range(150):
            state = 0.5 * state.tanh() + x
            states.append(state)
        return torch.stack(states, -1).exp().sum(), x

    x = 0.3 * torch.randn(20, dtype=torch.float64)
    graph = capture(columns, x, x[:0])
    unrolled = Unrolled(_part(graph, [x, x[:0]]).graph, [x, x[:0]], 10**6)
    lines = [line for step in unrolled._writer.steps for line in step.lines]
    assert len(lines) < 1000  # and 3,000 more, one for each number
    program = NativeProgram(graph, [x, x[:0]], None, Store(tmp_path))
    expected = graph(x + 0.1, x[:0])[0]
    value = program.gradient(x[None] + 0.1, torch.zeros(1, 0))[0]
    torch.testing.assert_close(value[0], expected, rtol=1e-12, atol=1e-12)


def test_a_dense_matrix_by_its_bands_takes_few_lines(tmp_path, monkeypatch):
    """As a path has whose data follow from all of it, among the steps of its recursion."""
    monkeypatch.setattr(model_library, "source_of", None)
    n = 40
    held = banded.bands_of(torch.eye(n).double() * 9.0 + 1.0 / (1.0 + torch.arange(n)), n)
    prior = torch.tensor([2.0, -0.9]).double().repeat(n, 1)

    def density(x):
        level = torch.zeros_like(x[0])
        levels = [level := (0.9 * level + step).sin() for step in x]
        u = torch.stack(levels)
        whole = held * banded.outer((0.1 * u).exp(), (0.1 * u).exp(), n)
        whole = added(prior * x[0].exp(), whole)
        root = banded.cholesky(whole)
        return banded.draw(root, banded.multiply(whole, u) + u, x).square().sum()

    def gradient(x, noise):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = density(x)
            return value.detach(), *torch.autograd.grad(value, x)

    x = 0.3 * torch.randn(n, dtype=torch.float64)
    graph = capture(gradient, x, x[:0])
    part = _part(graph, [x, x[:0]])
    text = Unrolled(part.graph, part.inputs, 10**6).text("program")
    assert text.count("\n") < 6000  # copied one number at a time there were 23,000
    assert_runs_as_its_graph(graph, x, tmp_path)


def test_graphs_too_long_for_inductor_are_run_by_torch_which_says_so(potential, monkeypatch):
    graph = potential.programs.base("gradient")
    position, noise = potential.vectors(2)
    monkeypatch.setattr(model_library, "_EACH", 0)
    monkeypatch.setattr(model_library, "_SIDE_MOST", 0)
    monkeypatch.setattr(model_library, "_MOST", 500)
    monkeypatch.setattr(model_library, "source_of", None)
    monkeypatch.setattr(Store, "find", lambda *_: None)
    chosen = choice.choose_engine("auto", graph, position, noise[0], 10**6, steps=10)
    assert chosen.name == "torch"
    assert chosen.declined
    assert "too many operations" in chosen.reason
