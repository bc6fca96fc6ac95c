"""Gradients in machine code: of the models of the zoo, kept on disk, or declined by name."""

from __future__ import annotations

import os
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import OrderedTransform

from benchmarks.coverage_models import ZOO
from pyro_hamflow.mcmc.transitions.trajectories import HMCTrajectories, NUTSTrajectories
from pyro_hamflow.model.gradients import gradient_functions
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs import banded
from pyro_hamflow.programs.capture import capture
from pyro_hamflow.programs.engines import choice, model_library
from pyro_hamflow.programs.engines.buffers import NotSupported
from pyro_hamflow.programs.engines.choice import choose_engine
from pyro_hamflow.programs.engines.narrow import repeated_late
from pyro_hamflow.programs.engines.native import NativeProgram
from pyro_hamflow.programs.machine_code import compiler
from pyro_hamflow.programs.machine_code.store import Store
from tests.helpers.native import native_program


def assert_gradient_right(potential):
    """At some points, the gradient in machine code is that of the graph."""
    program, graph = native_program(potential), potential.programs.base("gradient")
    torch.manual_seed(1)
    position = 0.5 * torch.randn(4, potential.dimension).to(potential.example)
    noise = torch.zeros(4, 0)
    value, gradient = program.gradient(position, noise)
    for i in range(4):
        expected = graph(position[i], noise[i])
        scale = 1.0 + expected[1].abs().max()
        assert torch.allclose(value[i], expected[0], rtol=1e-9, equal_nan=True)
        assert torch.allclose(gradient[i] / scale, expected[1] / scale, atol=1e-9, equal_nan=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The model could not be captured")
@pytest.mark.parametrize("name", ZOO)
def test_gradient_of_the_zoo_is_right(name):
    model, data = ZOO[name].make()
    potential = Potential(model, (), data)
    if potential.programs.base("gradient") is not None:
        assert_gradient_right(potential)


def oscillator(y):
    """Steps of a differential equation, each of which uses the last position and speed twice."""
    speed = pyro.sample("speed", dist.Normal(0.0, 1.5))
    place = torch.full_like(speed, -1.0)
    for _ in range(20):
        speed = speed + 0.05 * (place - place**3)
        place = place + 0.1 * speed
        speed = speed + 0.05 * (place - place**3)
    pyro.sample("y", dist.Normal(place, 0.1), obs=y)


def test_recurrences_are_lowered_in_bounded_time():
    assert_gradient_right(Potential(oscillator, (torch.tensor(0.6),)))


def grouped(y, group):
    """Gradients that add up in many places of one vector."""
    effect = pyro.sample("effect", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


def test_sums_over_groups_are_right():
    """Turns of a loop that write to the same place are not made at once."""
    y = torch.randn(70)
    group = torch.arange(70) % 3
    assert_gradient_right(Potential(grouped, (y, group)))


def ordered(y, x):
    """A gradient that is added up in groups and then read by a loop of another shape."""
    base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [OrderedTransform()]))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)


def test_sums_are_complete_where_they_are_read():
    assert_gradient_right(Potential(ordered, (torch.arange(60) % 4, torch.randn(60))))


def visits(y, group, flag):
    """What is read at places of data, six numbers apart, and by a truth value for each row."""
    effect = pyro.sample("effect", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    level = torch.where(flag[:, None], effect[group], effect.sum() * y.sum(-1))
    pyro.factor("visits", -torch.nn.functional.softplus(level[..., None] * y).sum())


def test_what_is_read_one_by_one_is_read_before(monkeypatch, tmp_path):
    sources = []
    honest = compiler.compiled

    def compiled(source, *flags):
        sources.append(source)
        return honest(source, *flags)

    monkeypatch.setattr(compiler, "compiled", compiled)
    monkeypatch.setenv("PYRO_HAMFLOW_CACHE", str(tmp_path))  # where nothing is kept yet
    group = torch.arange(40) % 3
    assert_gradient_right(Potential(visits, (torch.randn(40, 6), group, group[:2] == 0)))
    assert re.search(r"auto tmp\d+ = picked\d\[x\d\];", sources[0])
    assert re.search(r"auto tmp\d+ = picked\d\[x\d\] != 0;", sources[0])


def matrices(x):
    """Products, factors and solutions of every kind that there is code for."""
    a = (x.outer(x) + 3.0 * torch.eye(len(x))) @ torch.ones(len(x), 2)
    root = torch.linalg.cholesky(torch.eye(len(x)) * 3.0 + x.outer(x))
    right = torch.linalg.solve_triangular(root.mT, a, upper=True)
    left = torch.linalg.solve_triangular(root, a.mT, upper=False, left=False)
    sums = torch.cumsum(x.sort(descending=True).values, 0) * torch.cumprod(x.exp(), 0)
    batch = torch.stack([root, root.mT]) @ root
    return (right * left.mT).sum() + (sums @ x) + batch.square().sum() + torch.lgamma(x.exp()).sum()


def products(x):
    """Of matrices in every order of rows and columns, whole blocks of them and rests."""
    a, b = x.outer(x.cos()) + x, x.exp().outer(x) + x[:, None]
    wide = torch.cat([a, b, a.exp()], 1)
    first, second = a @ b + a.mT @ b, (a @ b.mT).sin() + a.mT @ b.mT
    return (first @ wide).square().sum() + (wide.mT @ second @ wide.tanh()).sum()


def bands(x):
    """Factors of banded matrices, their solutions and what they draw, and their gradients."""
    matrix = torch.stack([4.0 + x.square(), x.tanh(), 0.3 * x], -1).expand(2, -1, -1)
    root = banded.cholesky(matrix)
    draws = banded.draw(root, x.expand(2, -1), x.cos().expand(2, 3, -1))
    forward = banded.solve(root[0], x)
    none = banded.nearest_root(matrix - 4.0 * (x > 0.0)[:, None])  # that of another matrix
    both = banded.log_det(root).sum() + banded.log_det(none).sum()
    return both + draws.square().sum() + (forward * x).sum()


def systems(x):
    """Solutions, inverses and determinants of matrices of any kind, one and several at once."""
    a = x.outer(x) + torch.diag(x.cos() + 2.0)[torch.arange(len(x)).roll(1)]
    several = torch.stack([a, 2.0 * a.mT])
    solved = torch.linalg.solve(several, x.outer(x)).sum() + torch.linalg.solve(a, x) @ x
    solved = (
        solved + torch.linalg.solve(a, several, left=False).sum() + torch.inverse(several).sum()
    )
    sizes = torch.linalg.slogdet(several)[1].sum() + torch.det(several[:, :4, :4]).sum()
    sizes = sizes + torch.det(several[0]) + torch.linalg.slogdet(several.mT)[1].sum()
    root = torch.linalg.cholesky(torch.eye(len(x)) * 3.0 + x.outer(x))
    several = torch.stack([root, 2.0 * root])
    known = torch.cholesky_solve(x[:, None], several).sum() + torch.cholesky_inverse(several).sum()
    return solved + sizes + known + torch.cholesky_solve(x[:, None], root.mT, upper=True).sum()


def orders(x):
    """What follows the order of numbers; and their variance."""
    rows = torch.outer(x + 0.1, x.cos())  # no two of them alike
    parts = [
        *(torch.cummax(rows, 0).values, torch.cummin(rows, 1).values, rows.logcumsumexp(0)),
        *(rows.median(), rows.median(0).values, rows.median(1, keepdim=True).values),
        *(rows.kthvalue(3, 0).values, rows.topk(2, 0).values, rows.topk(4, largest=False).values),
        *(
            torch.nn.functional.layer_norm(rows, (11,), x),
            x.logcumsumexp(0),
            rows.var(),
            rows.std(1),
            *torch.var_mean(rows, 0, correction=0),
        ),
    ]
    return sum((part * (1.0 + part)).sum() for part in parts)


def distances(x):
    """Between points, some of them the same, by every norm; and numbers' places among others."""
    points, others = x[:10].reshape(2, 5, 1).expand(2, 5, 2) * x[:2], x[1:9].reshape(4, 2)
    parts = [torch.cdist(points, others, p) * x[3] for p in (1.0, 2.0, 2.5, torch.inf)]
    parts += [(1.0 + torch.cdist(points[0], points[0])).log()]
    edges = x.sort().values
    wide = torch.searchsorted(torch.stack([edges, edges + 0.1]), x[None].repeat(2, 1), right=True)
    narrow = torch.bucketize(x.cos(), edges) + torch.searchsorted(edges, x[2] * 1.1, side="right")
    return sum(part.sum() for part in parts) + (wide.sum(0) * x + narrow * x.exp()).sum()


def convolutions(x):
    """Sums over neighbours in every form, and exponentials of matrices small and large."""
    series, kernels = torch.stack([x, x.cos(), x.sin(), x.exp()])[None], x[:8].reshape(4, 1, 2)
    conv = torch.nn.functional.conv1d
    several = conv(series.expand(2, -1, -1).sin(), x.exp().outer(x[:8]).reshape(11, 4, 2), x)
    parts = [conv(series, kernels, groups=4, padding=1, dilation=3), several]
    parts += [
        conv(series, kernels.reshape(2, 2, 2), groups=2),
        conv(x[None, None], x[None, None, :4]),
    ]
    rates = torch.stack([x[:9].reshape(3, 3), 30.0 * x[2:].reshape(3, 3) - 20.0 * torch.eye(3)])
    return sum(part.square().sum() for part in parts) + torch.linalg.matrix_exp(rates).sum()


def special(x):
    """Functions whose code is in torch's headers."""
    return (torch.digamma(x.exp()) + torch.special.i0e(x) + torch.erfinv(x.tanh())).sum()


@pytest.mark.parametrize(
    "function",
    [
        matrices,
        bands,
        systems,
        orders,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (distances, convolutions)),
        pytest.param(special, marks=pytest.mark.slow),
    ],
)
def test_operations_of_libraries_are_right(function):
    both = gradient_functions(lambda x, noise: function(x))["gradient"]
    x, none = torch.sin(3.0 * torch.arange(11.0)), torch.zeros(0)
    program = NativeProgram(capture(both, x, none), (x, none))
    value, gradient = program.gradient(x[None], none[None])
    expected = both(x, none)
    assert torch.allclose(value[0], expected[0], rtol=1e-12)
    assert torch.allclose(gradient[0], expected[1], rtol=1e-10)


def test_orders_of_numbers_that_are_none_and_singular_matrices_are_those_of_torch():
    def both(x, noise):
        rows = torch.stack(
            [x, x[:3].repeat(2), x[3:].repeat(2)]
        )  # some, none, and some of them NaN
        parts = [
            *(rows.cummax(1).values, rows.cummin(1).values, rows.logcumsumexp(1)),
            *(rows.median(1).values, rows.kthvalue(2, 1).values, rows.topk(2, 1).values),
            *(rows.median(), rows[1].median(), torch.zeros(0).median()),
            *torch.linalg.slogdet(x[:2].outer(x[:2])),
            torch.det(torch.ones(3, 3) * x[0]),
        ]
        return torch.cat([part.reshape(-1) for part in parts]).nan_to_num(1e3, 2e3, 3e3)[0], (
            torch.cat([part.reshape(-1) for part in parts]).nan_to_num(1e3, 2e3, 3e3)
        )

    torch.set_default_dtype(torch.float32)
    x = torch.tensor([2.0, 1.0, -torch.inf, torch.inf, torch.nan, 1.0])
    program = NativeProgram(capture(both, x, x[:0]), (x, x[:0]))
    place = program.place(x[None], x[None, :0])
    expected = both(x, x[:0])[1]
    assert len(expected) > 40
    found = torch.zeros(1, len(expected))
    place = place._replace(gradient=found)
    program._call("evaluate", place)
    assert torch.allclose(found[0], expected, rtol=1e-5)


def test_numbers_that_are_none_and_differences_that_are_zero_are_those_of_torch():
    def both(x, noise):
        return x[2:].sort(descending=True).values[1:].sum(), x[:2] * x[:2] - x[1] * x[1]

    x, none = torch.tensor([0.1, 0.1, 2.0, torch.nan, 1.0]), torch.zeros(0)
    program = NativeProgram(capture(both, x, none), (x, none))
    value, difference = program.gradient(x[None], none[None])
    assert value.item() == 3.0
    assert (difference[0, :2] == 0.0).all()
    with pytest.raises(TypeError, match="float32"):
        program.place(x[None].float(), none[None])


def test_an_operation_without_code_is_named(tmp_path):
    def spectrum(x, noise):
        values = torch.linalg.eigvalsh(x.outer(x) + torch.eye(len(x)))
        return values.sum(), x

    x, none = torch.tensor([0.3, -0.2]), torch.zeros(0)
    graph = capture(spectrum, x, none)
    for _ in range(2):  # found out, and remembered
        with pytest.raises(NotSupported, match="eig"):
            NativeProgram(graph, (x, none), store=Store(tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".txt"]


def test_an_argument_of_an_unknown_form_is_declined(tmp_path):
    """As the type of complex numbers, of which there are none here."""
    both = gradient_functions(lambda x, noise: torch.fft.rfft(x).abs().square().sum())["gradient"]
    x, none = torch.tensor([0.3, -0.2, 0.1]), torch.zeros(0)
    with pytest.raises(NotSupported, match="complex"):
        NativeProgram(capture(both, x, none), (x, none), store=Store(tmp_path))


def test_a_density_of_another_type_than_the_parameters_is_right():
    """A double behind the last chain's float would be written over others' memory."""
    torch.set_default_dtype(torch.float32)
    potential = Potential(line, (torch.ones(3, dtype=torch.float64),))
    position = potential.vectors(4)[0]
    graph, program = potential.programs.base("gradient"), native_program(potential)
    value, gradient = program.gradient(position, position[:, :0])
    assert graph(position[0], position[0, :0])[0].dtype == torch.float64
    assert position.dtype == value.dtype == gradient.dtype == torch.float32
    assert choose_engine("native", graph, position, position[0, :0], None).name == "native"
    for i, row in enumerate(position):
        expected = graph(row, row[:0])
        assert torch.allclose(value[i], expected[0].float(), rtol=1e-5)
        assert torch.allclose(gradient[i], expected[1], rtol=1e-4)


def line(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope, 1.0).expand(y.shape).to_event(1), obs=y)


def program_of(y, store):
    potential = Potential(line, (y,))
    return NativeProgram(
        potential.programs.base("gradient"), [v[0] for v in potential.vectors(1)], store=store
    )


def slope_at_zero(program):
    return program.gradient(torch.zeros(1, 1), torch.zeros(1, 0))[1].item()


def test_libraries_serve_other_data_and_are_checked(tmp_path, monkeypatch):
    store = Store(tmp_path)
    assert slope_at_zero(program_of(torch.tensor([1.0, 2.0]), store)) == -3.0
    built = []
    build = model_library._made
    monkeypatch.setattr(model_library, "_made", lambda *a: built.append(1) or build(*a))
    assert slope_at_zero(program_of(torch.tensor([5.0, 2.0]), store)) == -7.0
    assert not built, "other data of the same shapes"
    (path,) = tmp_path.iterdir()
    copy = tmp_path / "beside"  # what is loaded stays as it is
    copy.write_bytes(path.read_bytes()[:-1])
    os.replace(copy, path)
    assert slope_at_zero(program_of(torch.tensor([1.0, 1.0]), store)) == -2.0
    assert built, "a file that was cut short"


def test_chains_move_one_by_one_where_the_compiler_knows_no_vectors(tmp_path, monkeypatch):
    monkeypatch.setitem(model_library.HEADERS, "side_by_side", "#error")
    assert slope_at_zero(program_of(torch.tensor([1.0, 2.0]), Store(tmp_path))) == -3.0


def test_a_home_that_cannot_be_written_to_is_no_hindrance(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way of a folder")
    assert slope_at_zero(program_of(torch.tensor([1.0, 2.0]), Store(file))) == -3.0


def test_other_systems_are_left_to_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(model_library, "_PLATFORMS", [("Windows", "AMD64")])
    with pytest.raises(NotSupported, match="any operation, for it knows neither this system"):
        program_of(torch.tensor([1.0, 2.0]), Store(tmp_path))


def starts(potential, num_chains):
    """Where chains start, and the noise of one."""
    position, noise = potential.vectors(num_chains)
    return position, noise[0]


def test_machine_code_that_is_wrong_is_not_taken(monkeypatch):
    """By a thousandth of one gradient, at some places alone."""
    potential = Potential(line, (torch.zeros(2),))
    graph, right = potential.programs.base("gradient"), NativeProgram.gradient

    def wrong(self, position, noise):
        value, gradient = right(self, position, noise)
        return value, torch.where(position > 0.0, 1.001 * gradient, gradient)

    monkeypatch.setattr(NativeProgram, "gradient", wrong)
    found = choose_engine("auto", graph, *starts(potential, 4), 10**6)
    assert found.name == "torch" and found.declined and "do not agree" in found.reason


def nearly_singular(y):
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    x = torch.linspace(0.0, 1.0, len(y), dtype=y.dtype)
    kernel = (-0.5 * ((x[:, None] - x) / length).square()).exp()
    matrix = kernel + 1e-9 * torch.eye(len(y), dtype=y.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), matrix), obs=y)


def test_machine_code_is_right_as_far_as_the_graph_is():
    potential = Potential(nearly_singular, (torch.linspace(-1.0, 1.0, 60).double().sin(),))
    graph = potential.programs.base("gradient")
    assert choose_engine("native", graph, *starts(potential, 4), None).name == "native"


def coarse(y):
    """Parameters in double precision, and on the way to data numbers in single."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean.float(), 0.7), obs=y)


def test_machine_code_is_right_to_the_digits_that_a_model_keeps():
    potential = Potential(coarse, (torch.arange(60).float().sin(),))
    graph = potential.programs.base("gradient")
    assert choose_engine("native", graph, *starts(potential, 4), None).name == "native"


def test_machine_code_need_not_agree_where_rounding_decides(monkeypatch):
    """The gradient of a density that is known to no digit, and is not there."""

    def steep(y):
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
        pyro.factor("steep", -((0.3 + x).clamp(min=0.0) * 1e9).square())

    potential = Potential(steep, (torch.zeros(2).double(),))
    graph, right = potential.programs.base("gradient"), NativeProgram.gradient
    position = torch.full((4, 1), -1.0, dtype=torch.float64)

    def wrong(self, position, noise):
        value, gradient = right(self, position, noise)
        return value, torch.where(position > -0.3, 2.0, 1.0) * gradient

    monkeypatch.setattr(NativeProgram, "gradient", wrong)
    monkeypatch.setattr(choice, "_SHIFTS", (0.0, 1.0))
    noise = torch.zeros(0, dtype=torch.float64)
    assert choose_engine("native", graph, position, noise, None).name == "native"
    monkeypatch.setattr(choice, "_SHIFTS", (0.0, 0.7 + 1e-9))
    assert choose_engine("native", graph, position, noise, None).name == "torch"


def test_the_choice_is_by_the_length_of_the_run():
    potential = Potential(line, (torch.zeros(2),))
    graph = potential.programs.base("gradient")
    assert choose_engine("torch", graph, *starts(potential, 4), 10**6).name == "torch"
    short = choose_engine("auto", graph, *starts(potential, 4), 100)
    assert short.name == "torch" and "too short" in short.reason and not short.declined
    assert choose_engine("auto", graph, *starts(potential, 4), None).name == "torch"
    assert choose_engine("auto", graph, *starts(potential, 4), 10**6).name == "native"
    found = [choose_engine("auto", graph, *starts(potential, 4), 1000, steps=n) for n in (1, 8)]
    assert [one.name for one in found] == ["torch", "native"]
    missing = choose_engine("native", None, *starts(potential, 4), 100)
    assert missing.declined and "not captured" in missing.reason


def tails(y):
    """Parameters that are repeated for all data, and special functions of them."""
    degrees = pyro.sample("degrees", dist.Gamma(2.0, 0.1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(degrees, 0.0, scale), obs=y)
    repeated = degrees.expand(len(y))
    pyro.factor("ones", (torch.lgamma(repeated) * torch.ones_like(repeated) + repeated).sum())


def test_functions_of_what_is_repeated_are_worked_out_once():
    potential = Potential(tails, (torch.linspace(-2.0, 2.0, 60).double(),))
    graph = potential.programs.base("gradient")
    changed = repeated_late(graph)
    costly = ("lgamma", "digamma")
    shapes = {
        tuple(node.meta["kind"][0])
        for node in changed.graph.nodes
        if getattr(node.target, "__name__", "").split(".")[0] in costly
    }
    assert shapes == {()}
    position, noise = starts(potential, 4)
    for row in position:
        for one, other in zip(changed(row, noise), graph(row, noise), strict=True):
            assert torch.allclose(one, other, rtol=1e-12)
    assert_gradient_right(potential)


def recurrence(y):
    """Hundreds of operations on one number each."""
    keep = pyro.sample("keep", dist.Beta(2.0, 2.0))
    level, levels = torch.zeros_like(keep), []
    for _ in range(80):
        level = keep * level + (1.0 - keep) * torch.cos(level)
        levels.append(level)
    pyro.sample("y", dist.Normal(torch.stack(levels).mean(), 0.1), obs=y)


def test_recurrences_are_compiled_in_short_runs():
    """They take torch long, and are compiled in seconds."""
    potential = Potential(recurrence, (torch.tensor(0.5),))
    graph = potential.programs.base("gradient")
    assert choose_engine("auto", graph, *starts(potential, 4), 120, steps=6).name == "native"


def test_trajectories_of_many_parameters_are_expected_to_be_longer():
    few, many = (NUTSTrajectories(10).expected_steps(size) for size in (2, 100))
    assert few < many < 100
    assert NUTSTrajectories(3).expected_steps(100) == 7
    assert HMCTrajectories(None, 5, 0.0, 10).expected_steps(100) == 5


def test_many_chains_of_large_data_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(choice, "_OUT_OF_CACHE", 1)
    potential = Potential(line, (torch.zeros(2),))
    graph = potential.programs.base("gradient")
    found = choose_engine("auto", graph, *starts(potential, 64), 10**6)
    assert found.name == "torch" and "large data" in found.reason
    assert choose_engine("auto", graph, *starts(potential, 4), 10**6).name == "native"
