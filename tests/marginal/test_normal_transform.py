"""Distributions as transforms of normal noise, and the points that the noise is placed at."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as torch_dist
from scipy import stats
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_hamflow.marginal.normal_transform import normal_transform
from pyro_hamflow.marginal.points import lattice, noise_count, place_points

P_VALUE = 6e-5  # of a deviation of four standard errors


def _logistic(p):
    uniform = dist.Uniform(torch.zeros_like(p[0]), 1.0)
    transforms = [torch_dist.SigmoidTransform().inv, torch_dist.AffineTransform(p[0], p[1])]
    return dist.TransformedDistribution(uniform, transforms)


def _mixture(parts):
    return lambda p: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.stack([p[0], torch.zeros_like(p[0])], -1)), parts(p)
    )


# Each: a distribution as a function of its parameters, and their values.
WITH_CDF = {
    "normal": (lambda p: dist.Normal(p[0], p[1]), [0.3, 1.2]),
    "log-normal": (lambda p: dist.LogNormal(p[0], p[1]), [0.3, 0.7]),
    "gamma": (lambda p: dist.Gamma(p[0], p[1]), [2.3, 1.7]),
    "gamma, spiked": (lambda p: dist.Gamma(p[0], p[1]), [0.3, 0.8]),
    "gamma, large": (lambda p: dist.Gamma(p[0], p[1]), [250.0, 3.0]),
    "inverse gamma": (lambda p: dist.InverseGamma(p[0], p[1]), [2.3, 1.7]),
    "chi squared": (lambda p: dist.Chi2(p[0]), [3.4]),
    "half-normal": (lambda p: dist.HalfNormal(p[0]), [1.3]),
    "half-cauchy": (lambda p: dist.HalfCauchy(p[0]), [1.3]),
    "cauchy": (lambda p: dist.Cauchy(p[0], p[1]), [0.3, 1.3]),
    "laplace": (lambda p: dist.Laplace(p[0], p[1]), [0.3, 1.3]),
    "exponential": (lambda p: dist.Exponential(p[0]), [1.3]),
    "uniform": (lambda p: dist.Uniform(p[0], p[1]), [-0.7, 1.3]),
    "gumbel": (lambda p: dist.Gumbel(p[0], p[1]), [-0.7, 1.3]),
    "weibull": (lambda p: dist.Weibull(p[0], p[1]), [0.7, 1.3]),
    "pareto": (lambda p: dist.Pareto(p[0], p[1]), [0.7, 2.3]),
    "kumaraswamy": (lambda p: torch_dist.Kumaraswamy(p[0], p[1]), [1.7, 2.3]),
    "logistic": (_logistic, [0.3, 1.3]),
    "mixture of normals": (
        _mixture(lambda p: dist.Normal(p[1:3], p[3:5])),
        [0.4, -1.5, 2.0, 0.3, 1.1],
    ),
    "mixture of gammas": (
        # torch has no derivative of the gamma distribution function in its shape
        _mixture(lambda p: dist.Gamma(torch.tensor([1.5, 9.0]), p[1:3])),
        [0.4, 1.3, 1.1],
    ),
}
ROOT = torch.tensor([[0.8, 0.0, 0.0], [0.5, 1.1, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
LINEAR = {
    "multivariate normal": (
        lambda p: dist.MultivariateNormal(p[:3], scale_tril=ROOT * p[3]),
        [0.1, 0.2, -0.4, 1.3],
    ),
    "by covariance": (
        lambda p: dist.MultivariateNormal(p[:3], (ROOT @ ROOT.mT) * p[3]),
        [0.1, 0.2, -0.4, 1.3],
    ),
    "low-rank normal": (
        lambda p: dist.LowRankMultivariateNormal(p[:3], ROOT[:, :2] * p[3], p[4:]),
        [0.1, 0.2, -0.4, 1.3, 0.5, 0.7, 0.2],
    ),
    "vector of normals": (lambda p: dist.Normal(p[:3], p[3:]).to_event(1), [0.1] * 3 + [1.3] * 3),
}
COMPOSED = {
    "student t": (lambda p: dist.StudentT(p[0], p[1], p[2]), [4.3, 0.3, 1.4]),
    "beta": (lambda p: dist.Beta(p[0], p[1]), [0.8, 2.4]),
    "dirichlet": (lambda p: dist.Dirichlet(p), [0.8, 2.4, 1.3]),
    "multivariate student t": (
        lambda p: dist.MultivariateStudentT(p[0], p[1:4], ROOT),
        [4.3, 0.1, 0.2, -0.4],
    ),
    "vector of gammas": (lambda p: dist.Gamma(p[:2], p[2:]).to_event(1), [0.8, 2.4, 1.3, 0.3]),
    "log of a vector": (
        lambda p: dist.TransformedDistribution(
            dist.Gamma(p[:2], p[2:]), [torch_dist.ExpTransform().inv]
        ).to_event(1),
        [0.8, 2.4, 1.3, 0.3],
    ),
}
ALL = WITH_CDF | LINEAR | COMPOSED


def families(registry):
    return pytest.mark.parametrize("build, values", registry.values(), ids=registry)


@families(WITH_CDF)
def test_cdf_at_draw_is_that_of_the_noise(build, values):
    """The draw is the quantile function at Phi(u), or at Phi(-u)."""
    fn = build(torch.tensor(values))
    shape, draw = normal_transform(fn)
    assert shape == ()
    u = torch.linspace(-5.0, 5.0, 201)
    x = draw(u)
    level = fn.cdf(x)
    expected = torch.special.ndtr(u if x[-1] > x[0] else -u)
    assert x.isfinite().all()
    assert (level - expected).abs().max() < 1e-8
    assert (x.diff() > 0).all() or (x.diff() < 0).all()


@families(LINEAR)
def test_linear_transform_has_the_mean_and_covariance(build, values):
    fn = build(torch.tensor(values))
    shape, draw = normal_transform(fn)
    root = torch.autograd.functional.jacobian(draw, torch.zeros(shape))
    covariance = getattr(fn, "covariance_matrix", None)
    covariance = fn.variance.diag() if covariance is None else covariance
    assert torch.allclose(draw(torch.zeros(shape)), fn.mean, rtol=1e-12)
    assert torch.allclose(root @ root.mT, covariance, rtol=1e-12)
    u = torch.randn(shape)
    assert torch.allclose(draw(u), fn.mean + root @ u, rtol=1e-12)


MARGINALS = {
    "student t": ([lambda p: stats.t(p[0], p[1], p[2])], COMPOSED["student t"]),
    "beta": ([lambda p: stats.beta(p[0], p[1])], COMPOSED["beta"]),
    "dirichlet": (
        [lambda p, i=i: stats.beta(p[i], sum(p) - p[i]) for i in range(3)],
        COMPOSED["dirichlet"],
    ),
    "multivariate student t": (
        [lambda p, i=i: stats.t(p[0], p[1 + i], ROOT[i].norm().item()) for i in range(3)],
        COMPOSED["multivariate student t"],
    ),
    "vector of gammas": (
        [lambda p, i=i: stats.gamma(p[i], scale=1 / p[2 + i]) for i in range(2)],
        COMPOSED["vector of gammas"],
    ),
}


@pytest.mark.parametrize("marginals, case", MARGINALS.values(), ids=MARGINALS)
def test_draws_follow_the_distribution(marginals, case):
    build, values = case
    shape, draw = normal_transform(build(torch.tensor(values)))
    x = draw(torch.randn(20000, *shape)).reshape(20000, -1)
    assert x.shape[1] == len(marginals)
    for column, marginal in zip(x.T, marginals, strict=True):
        assert stats.kstest(column.numpy(), marginal(values).cdf).pvalue > P_VALUE


def test_components_of_a_dirichlet_are_correlated_as_they_should():
    fn = dist.Dirichlet(torch.tensor([0.8, 2.4, 1.3]))
    shape, draw = normal_transform(fn)
    x = draw(torch.randn(40000, *shape))
    assert torch.allclose(x.sum(-1), torch.ones(40000), rtol=1e-12)
    product = (x[:, 0] - fn.mean[0]) * (x[:, 1] - fn.mean[1])
    expected = -0.8 * 2.4 / (4.5**2 * 5.5)
    assert abs(product.mean() - expected) < 4 * product.std() / 200


@pytest.mark.parametrize("dtype, small", [(torch.float64, 1e-3), (torch.float32, 2e-2)])
def test_shares_of_tiny_concentrations_are_all_or_nothing(dtype, small):
    """Their gamma variables are below all numbers; equal for that, they made equal shares."""
    few = torch.full((3,), small, dtype=dtype)
    for fn in (dist.Beta(few[0], few[0]), dist.Dirichlet(few)):
        shape, draw = normal_transform(fn)
        u = torch.randn(20000, *shape, dtype=dtype, requires_grad=True)
        x = draw(u)
        (slope,) = torch.autograd.grad(x.sum(), u)
        assert bool(slope.isfinite().all()) and bool((x > 0).all())
        between = ((x > 0.1) & (x < 0.9)).double().mean().item()
        first = x if x.dim() == 1 else x[:, 0]
        assert between < 3.0 * small * math.log(9.0)
        assert abs((first > 0.5).double().mean().item() - fn.mean.flatten()[0].item()) < 0.015


def test_rows_of_a_multivariate_t_share_their_scale():
    build, values = COMPOSED["multivariate student t"]
    fn = build(torch.tensor(values))
    shape, draw = normal_transform(fn)
    x = draw(torch.randn(20000, *shape))
    distance = torch.linalg.solve_triangular(ROOT, (x - fn.loc).mT, upper=False).square().sum(0)
    assert stats.kstest(distance.numpy() / 3, stats.f(3, 4.3).cdf).pvalue > P_VALUE


def _draw(build):
    return lambda p, u: normal_transform(build(p)).draw(u)


@families(ALL)
def test_derivatives_agree_with_finite_differences(build, values):
    p = torch.tensor(values)
    shape, _ = normal_transform(build(p))
    draw = _draw(build)
    for seed, spread in ((0, 1.0), (1, 2.0)):
        torch.manual_seed(seed)
        u = spread * torch.randn(shape)
        slopes = torch.autograd.functional.jacobian(draw, (p, u))
        for which, slope in enumerate(slopes):
            point = (p, u)[which]
            differences = []
            for unit in torch.eye(point.numel()):
                step = 2e-5 * unit.reshape(point.shape) * point.abs().clamp(min=0.1)
                ends = []
                for move in (step, -step):
                    moved = [p, u]
                    moved[which] = point + move
                    ends.append(draw(*moved))
                differences.append((ends[0] - ends[1]) / (2 * step.abs().max()))
            difference = torch.stack(differences, -1).reshape(slope.shape)
            scale = max(1.0, difference.abs().max().item())
            assert (slope - difference).abs().max() < 1e-5 * min(1.0, scale) * scale


@families(ALL)
@pyro.validation_enabled(False)
def test_batched_and_captured_draws_agree_with_single_ones(build, values):
    p = torch.tensor(values) * torch.tensor([[1.0], [1.02], [0.97]])
    shape, _ = normal_transform(build(p[0]))
    u, draw = torch.randn(3, *shape), _draw(build)

    def slopes(p, u):
        p, u = p.detach().requires_grad_(), u.detach().requires_grad_()
        x = draw(p, u)
        return x.detach(), *torch.autograd.grad(x.square().sum(), (p, u))

    single = [slopes(*pair) for pair in zip(p, u, strict=True)]
    graph = make_fx(slopes)(p[0], u[0])
    batched = torch.func.vmap(draw)(p, u)
    captured = torch.func.vmap(graph)(p, u)
    for i, expected in enumerate(single):
        assert torch.allclose(batched[i], expected[0], rtol=1e-11, atol=1e-13)
        for part, plain in zip(captured, expected, strict=True):
            assert torch.allclose(part[i], plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
def test_noise_of_a_batch_has_batch_then_noise_shape(batch):
    fn = dist.Gamma(torch.ones(*batch, 2), 1.0).to_event(1)
    shape, draw = normal_transform(fn)
    assert shape == (2,)
    assert draw(torch.randn(*batch, *shape)).shape == (*batch, 2)
    fn = dist.Beta(torch.full(batch, 3.0), torch.full(batch, 2.0))
    shape, draw = normal_transform(fn)
    assert draw(torch.randn(*batch, *shape)).shape == batch


def test_float32_noise_gives_float32_draws():
    for fn in (dist.Gamma(torch.tensor(2.0).float(), 1.0), dist.HalfCauchy(torch.ones(()).float())):
        u = torch.linspace(-6.0, 6.0, 31, dtype=torch.float32)
        x = normal_transform(fn).draw(u)
        assert x.dtype == torch.float32
        assert x.isfinite().all()


UNKNOWN = {
    "von Mises": lambda: dist.VonMises(torch.tensor(0.0), torch.tensor(1.0)),
    "LKJ": lambda: dist.LKJCholesky(3, torch.tensor(1.0)),
    "Poisson": lambda: dist.Poisson(torch.tensor(1.0)),
    "categorical": lambda: dist.Categorical(torch.ones(3)),
}


@pytest.mark.parametrize("build", UNKNOWN.values(), ids=UNKNOWN)
def test_distribution_without_transform_is_refused(build):
    fn = build()
    with pytest.raises(ValueError, match=f"{type(fn).__name__} is no known smooth transform"):
        normal_transform(fn)


# --- points -------------------------------------------------------------------------------------


def test_independent_points_are_the_noise():
    noise = torch.randn(5, 3, 2)
    assert place_points("iid", 5, noise) is noise
    assert noise_count("iid", 5) == 5
    assert noise_count("rqmc", 5) == 1
    assert noise_count("antithetic", 5) == 3


@pytest.mark.parametrize("num_points", [1, 2, 5, 8])
def test_pairs_mirror_each_other(num_points):
    noise = torch.randn(noise_count("antithetic", num_points), 3, 2)
    points = place_points("antithetic", num_points, noise)
    assert points.shape == (num_points, 3, 2)
    assert torch.equal(points[: len(noise)], noise)
    assert torch.equal(points[len(noise) :], -noise[: num_points - len(noise)])


@pytest.mark.parametrize("dimension", [1, 2, 5])
@pytest.mark.parametrize("num_points", [1, 2, 7, 32])
def test_each_lattice_point_is_standard_normal(num_points, dimension):
    points = place_points("rqmc", num_points, torch.randn(1, 5000, dimension))
    assert points.shape == (num_points, 5000, dimension)
    for point in points[:: max(1, num_points // 3)]:
        for column in point.T:
            assert stats.kstest(column.numpy(), "norm").pvalue > P_VALUE
        covariance = point.T @ point / 5000 - torch.eye(dimension)
        assert covariance.abs().max() < 4 * math.sqrt(2 / 5000)


@pytest.mark.parametrize("dimension", [1, 2, 5])
@pytest.mark.parametrize("num_points", [4, 7, 32, 100])
def test_lattice_points_differ_and_project_evenly(num_points, dimension):
    grid = lattice(num_points, dimension)
    assert grid.shape == (num_points, dimension)
    even = torch.arange(num_points) / num_points
    for column in grid.T:
        assert torch.allclose(column.sort().values, even, atol=1e-9)


@pytest.mark.parametrize("dimension, gain", [(1, 200.0), (2, 20.0), (4, 4.0)])
def test_lattice_reduces_the_variance(dimension, gain):
    def variance(points):
        noise = torch.randn(noise_count(points, 32), 2000, dimension)
        x = place_points(points, 32, noise)
        return (-0.5 * (x - 0.5).square().sum(-1)).exp().mean(0).var()

    assert variance("rqmc") * gain < variance("iid")


def test_lattice_is_differentiable_in_the_noise():
    noise = torch.randn(1, 3, 2, requires_grad=True)
    points = place_points("rqmc", 4, noise)
    (slope,) = torch.autograd.grad(points[2, 1, 0], noise)
    density = torch.exp(-0.5 * (noise[0, 1, 0] ** 2 - points[2, 1, 0] ** 2))
    assert torch.allclose(slope[0, 1, 0], density.detach(), rtol=1e-9)
    assert slope.count_nonzero() == 1
