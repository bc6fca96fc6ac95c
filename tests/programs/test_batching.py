"""Whatever operations people write are recorded, differentiated and batched as they are."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow.model.gradients import value_and_gradients
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import batch, capture

TIMES = torch.linspace(0.0, 2.0, 6, dtype=torch.float64)
OBSERVED = torch.tensor([True, False, True, True, False, True, False, True])


def columns(a):
    z = torch.zeros(2, 5)
    z[:, 0] = a[:2]
    for t in range(1, 5):
        z[:, t] = a[2] * z[:, t - 1].clone() + a[3:5]
    z[:, -1] += a[0]
    return z.square()


def slices(a):
    z = torch.zeros(9)
    z[:-1] = a
    z[::2] *= 2.0
    z[-3:] += a[:3]
    z[1:-1].sub_(a[:7])
    z.view(3, 3)[:, 1:].mul_(a[0])
    return z.exp()


def masks(a):
    z = torch.zeros(8)
    z[OBSERVED] = a[OBSERVED].exp()
    z[~OBSERVED] += a[:3]
    z[torch.outer(OBSERVED, OBSERVED)[0]] -= 1.0
    picked = torch.masked_select(a, OBSERVED) * torch.zeros(8).masked_scatter(OBSERVED, a)[0]
    return z.square().sum() + picked.sum() + torch.where(OBSERVED, a, -a).exp().sum()


def masks_of_arguments(a):
    """What is written where an argument says so, as long as it is one value, has a known shape."""
    z = a.clone()
    z[a > 0.5] = 0.1
    z[(a < 0.0) & OBSERVED] = a[0] * a[1]
    rows = a.outer(a)
    rows[a > 0.0] = a
    rows[..., 2:][rows[..., 2:] < 0.0] = -1.0
    return z.exp().sum() + rows.square().sum()


def diagonals(a):
    z = a.outer(a)
    z.fill_diagonal_(2.0)
    z = z * a
    z.fill_diagonal_(0.5)
    z.diagonal().add_(a)
    z.t()[1] *= 3.0
    z.view(-1)[::9] += a[0]
    lower = torch.zeros(4, 4)
    i, j = torch.tril_indices(4, 4, -1)
    lower[i, j] = a[:6]
    return z.square().sum() + (lower @ lower.mT).sum() + z.as_strided((3, 2), (9, 1), 2).exp().sum()


def indexed(a):
    places, where = torch.tensor([0, 1, 1, 3, 0, 0, 2, 2]), torch.arange(4)
    z = torch.zeros(4).index_put((places,), a, accumulate=True).square()
    z = z.scatter_add(0, where.flip(0), a[:4]).index_add(0, places[:2], a[:2])
    z = z + torch.zeros(4).scatter_reduce(0, places, a, "amax").index_copy(0, where[1:3], a[:2])
    z = z + torch.ones(4).index_fill(0, where[:1], 2.0) * a[:4].take(where)
    largest = a[a.argmax()] + a[torch.tensor(2)]
    return z * largest + a.gather(0, where) + a[torch.unique(places)] + a[places.nonzero()[:4, 0]]


def ordered(a):
    steps = torch.searchsorted(a.exp().cumsum(0), torch.tensor([1.0, 2.0])).clamp(max=7)
    bins = torch.bucketize(a, torch.tensor([-1.0, 0.0, 1.0]))
    z = a.sort().values[2] + a.topk(3).values.sum() + a.median() + a.kthvalue(3).values
    z = z + torch.quantile(a, 0.3) + a.cummax(0).values.sum() + a.amin() + a[steps].sum()
    return z + a[bins].square().sum() + a[a.argsort()] * torch.arange(8)


def signals(a):
    z = torch.nn.functional.conv1d(a[None, None], torch.ones(1, 1, 3)).flatten()
    z = z[:5] + torch.fft.rfft(a).abs() + torch.fft.fft(a).real[:5] + a.unfold(0, 4, 1).sum(-1)
    z = z + torch.einsum("i,j,ij->i", a, a, a.outer(a))[:5] + a.cumprod(0)[:5]
    z = z + torch.nn.functional.embedding(torch.tensor([0, 3]), a[:, None]).sum()
    return (
        z + a.logcumsumexp(0)[:5] + a.diff()[:5] + a.roll(2)[:5] + torch.trapezoid(a, TIMES[0] + a)
    )


def special(a):
    b, s = torch.sigmoid(a), torch.special
    z = torch.igamma(torch.tensor(2.0), a.exp()) + a.exp().digamma() + torch.polygamma(2, a.exp())
    z = z + b.erfinv() + s.ndtri(b) + s.log_ndtr(a) + s.erfcx(a) + s.i0e(a) + s.i1(a)
    return z + s.xlogy(b, b) + s.entr(b) + s.multigammaln(a.exp() + 3.0, 2) + torch.atan2(a, b)


def matrices(a):
    k = torch.exp(-a[0].square() * (TIMES[:, None] - TIMES) ** 2) + 0.5 * torch.eye(6)
    b, lower = a[:6, None], torch.linalg.cholesky(k)
    factors, pivots = torch.linalg.lu_factor(k)
    z = torch.linalg.slogdet(k)[1] + k.logdet() + torch.linalg.det(k) + k.inverse().sum()
    z = z + torch.linalg.solve(k, b).sum() + torch.linalg.lu_solve(factors, pivots, b).sum()
    z = z + torch.linalg.eigvalsh(k).log().sum() + torch.linalg.svdvals(k).sum()
    z = z + torch.linalg.qr(k).R.abs().sum() + torch.matrix_exp(-k).sum() + torch.linalg.pinv(k)[0]
    z = z + torch.cholesky_solve(b, lower).sum() + torch.cholesky_inverse(lower).trace()
    z = z + torch.linalg.lstsq(k, b).solution.sum() + torch.linalg.matrix_power(k, -2).sum()
    return z + torch.kron(k[:2, :2], k[:3, :3])[0] + torch.linalg.lu(k)[2].diagonal()


def lists(a):
    """Numbers in a list are made into a tensor, past which no gradient goes, as in torch."""
    z = torch.tensor([[a[0], 1.0], [a[1], a[2]]]) @ a[:2]
    return z + torch.as_tensor([a[3], 2]) * a[4]


FUNCTIONS = [
    columns,
    slices,
    masks,
    masks_of_arguments,
    diagonals,
    indexed,
    ordered,
    signals,
    special,
    matrices,
    lists,
]


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # torch's own
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_operations_are_recorded_differentiated_and_batched(function):
    def value_and_slope(a):
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            return value_and_gradients(function(a).sum(), a)

    torch.manual_seed(0)
    rows = torch.randn(3, 8, dtype=torch.float64)
    graph = capture(value_and_slope, torch.randn(8, dtype=torch.float64))
    batched = batch(graph, rows)
    for row, *parts in zip(rows, *batched(rows), strict=True):
        for part, expected in zip(parts, value_and_slope(row), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-10)
    targets = [node.target for node in batched.graph.nodes if node.op == "call_function"]
    assert not set(targets) & {torch.ops.aten.as_strided.default, torch.ops.aten.nonzero.default}
    selects = [target for target in targets if target is torch.ops.aten.select.int]
    assert len(selects) < 40  # else the rows were run one by one


def test_an_operation_that_cannot_be_batched_is_run_row_by_row():
    """Only that one: the others run once for all rows."""

    def function(a):
        z = a.index_fill(0, torch.tensor([1]), a[0])
        return (z * a.sin(),)

    rows = torch.randn(3, 4)
    graph = capture(function, rows[0])
    batched = batch(graph, rows)
    expected = torch.stack([function(row)[0] for row in rows])
    torch.testing.assert_close(batched(rows)[0], expected)
    names = [str(node.target) for node in batched.graph.nodes]
    assert sum("index_fill" in name for name in names) == 3
    assert sum("sin" in name for name in names) == 1


def ordinal():
    cuts = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 2.0).to_event(1), dist.transforms.OrderedTransform()
    )
    cuts, slope = pyro.sample("cuts", cuts), pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("point", 6):
        y = torch.tensor([0, 1, 3, 2, 1, 0])
        pyro.sample("y", dist.OrderedLogistic(slope * TIMES, cuts), obs=y)


def multinomial():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Multinomial(10, p), obs=torch.tensor([3.0, 0.0, 7.0]))


def factors():
    loadings = pyro.sample("loadings", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
    spread = pyro.sample("spread", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("point", 2):
        law = dist.LowRankMultivariateNormal(torch.zeros(3), loadings, spread)
        pyro.sample("y", law, obs=torch.tensor([[0.5, 1.0, 0.2], [-1.0, 0.0, 0.3]]))


def process(times=TIMES):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    kernel = torch.exp(-0.5 * ((times[:, None] - times) / length) ** 2) * 1.0
    kernel.view(-1)[::7] += 0.1
    law = dist.MultivariateNormal(torch.zeros(6), covariance_matrix=kernel)
    pyro.sample("y", law, obs=times.sin())


@pytest.mark.parametrize("model", [ordinal, multinomial, factors, process])
def test_models_that_write_in_place_are_batched(model):
    potential = Potential(model)
    position, noise = potential.vectors(3)
    value, slope, _ = potential.gradients(position, noise)
    assert potential.programs.fallback_reason is None and not potential.programs._looped
    for row, one, slope_of_one in zip(position, value, slope, strict=True):
        expected, expected_slope = potential.function("gradient")(row, noise[0])
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(slope_of_one, expected_slope)


def test_what_is_computed_in_single_precision_is_judged_by_it():
    potential = Potential(process, (TIMES.float(),))
    assert potential.example.dtype == torch.float64
    potential.gradients(*potential.vectors(2))
    assert potential.programs.fallback_reason is None
