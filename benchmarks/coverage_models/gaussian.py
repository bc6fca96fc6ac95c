"""Gaussian processes and covariance matrices."""

from __future__ import annotations

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro.nn import PyroSample

from benchmarks.coverage_models.data import Collection, binary, counts, grid, normal

GAUSSIANS = Collection()


@GAUSSIANS.case(y=normal(200, 3))
def lkj_covariance(y):
    """Scales and a correlation matrix, as in Pyro's example."""
    theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(3)).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(3, 1.0))
    factor = torch.mm(torch.diag(theta.sqrt()), root)
    with pyro.plate("data", len(y)):
        family = dist.MultivariateNormal(torch.zeros(3), scale_tril=factor)
        pyro.sample("y", family, obs=y)


@GAUSSIANS.case(y=normal(40, 3))
def covariance_matrix(y):
    """The covariance itself is given, not its root."""
    corr = pyro.sample("corr", dist.LKJ(3, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0).expand([3]).to_event(1))
    mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(3), 4.0 * torch.eye(3)))
    covariance = scale[:, None] * corr * scale + 1e-4 * torch.eye(3)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(mean, covariance), obs=y)


@GAUSSIANS.case(y=normal(40, 3))
def precision_matrix(y):
    diagonal = pyro.sample("diagonal", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
    coupling = pyro.sample("coupling", dist.Normal(0.0, 0.3))
    precision = torch.diag(diagonal) + coupling.tanh() * 0.1 * (1 - torch.eye(3)) + torch.eye(3)
    with pyro.plate("data", len(y)):
        family = dist.MultivariateNormal(torch.zeros(3), precision_matrix=precision)
        pyro.sample("y", family, obs=y)


@GAUSSIANS.case(y=normal(30, 5))
def factor_analysis(y):
    """Covariance of low rank and a diagonal."""
    loading = pyro.sample("loading", dist.Normal(0.0, 1.0).expand([5, 2]).to_event(2))
    diagonal = pyro.sample("diagonal", dist.LogNormal(0.0, 0.5).expand([5]).to_event(1))
    with pyro.plate("data", len(y)):
        family = dist.LowRankMultivariateNormal(torch.zeros(5), loading, diagonal)
        pyro.sample("y", family, obs=y)


@GAUSSIANS.case(y=normal(20, 4))
def principal_components(y):
    """The scores are sampled, not integrated out."""
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2, 4]).to_event(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(z @ weight, sigma).to_event(1), obs=y)


@GAUSSIANS.case(y=normal(30, 3))
def multivariate_t(y):
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    root = pyro.sample("root", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateStudentT(df, torch.zeros(3), root), obs=y)


@GAUSSIANS.case(x=grid(12), y=normal(12))
def gp_regression(x, y):
    """A kernel of squared distances, by hand."""
    variance = pyro.sample("variance", dist.LogNormal(0.0, 1.0))
    length = pyro.sample("length", dist.InverseGamma(3.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    gap = (x[:, None] - x) / length
    kernel = variance * (-0.5 * gap.square()).exp() + (noise.square() + 1e-4) * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


@GAUSSIANS.case(x=grid(12), y=counts(12))
def gp_poisson(x, y):
    """A latent function, non-centred, under counts."""
    rho = pyro.sample("rho", dist.Gamma(5.0, 10.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    gap = (x[:, None] - x) / rho
    kernel = alpha.square() * (-0.5 * gap.square()).exp()
    kernel = kernel + 1e-3 * torch.eye(len(x))
    f = torch.linalg.cholesky(kernel) @ z
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(f.exp()), obs=y)


def _kernel():
    kernel = gp.kernels.RBF(input_dim=1)
    kernel.variance = PyroSample(dist.LogNormal(0.0, 1.0))
    kernel.lengthscale = PyroSample(dist.LogNormal(-1.0, 1.0))
    return kernel


class GaussianProcess(torch.nn.Module):
    """Pyro's own process with priors on its kernel."""

    def __init__(self):
        super().__init__()
        x = torch.linspace(0.0, 1.0, 10)
        self.process = gp.models.GPRegression(x, (6.0 * x).sin(), _kernel(), jitter=1e-3)
        self.process.noise = PyroSample(dist.HalfNormal(1.0))

    def forward(self):
        self.process.model()


GAUSSIANS.case()(GaussianProcess)


class SparseGaussianProcess(torch.nn.Module):
    """Pyro's own process with inducing points, which stay where they are."""

    def __init__(self):
        super().__init__()
        x = torch.linspace(0.0, 1.0, 20)
        points = torch.linspace(0.0, 1.0, 5)
        self.process = gp.models.SparseGPRegression(
            x, (6.0 * x).sin(), _kernel(), points, jitter=1e-3
        )

    def forward(self):
        self.process.model()


GAUSSIANS.case()(SparseGaussianProcess)


class GaussianProcessLatentVariables(torch.nn.Module):
    """Pyro's own process whose inputs are latent."""

    def __init__(self):
        super().__init__()
        x = torch.linspace(-1.0, 1.0, 6)
        y = torch.stack([x.sin(), x.square()])
        process = gp.models.GPRegression(x[:, None], y, _kernel(), jitter=1e-2)
        self.process = gp.models.GPLVM(process)

    def forward(self):
        self.process.model()


GAUSSIANS.case()(GaussianProcessLatentVariables)


@GAUSSIANS.case(y=normal(8, 6), x=normal(8, 2))
def seemingly_unrelated(y, x):
    """Several answers with correlated errors, coefficients in a matrix."""
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2, 6]).to_event(2))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0).expand([6]).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(6, 2.0))
    with pyro.plate("data", len(y)):
        factor = scale.unsqueeze(-1) * root
        pyro.sample("y", dist.MultivariateNormal(x @ weight, scale_tril=factor), obs=y)


@GAUSSIANS.case(neighbours=normal(9), y=counts(9))
def spatial(neighbours, y):
    """A conditional autoregression on a ring of districts."""
    alpha = pyro.sample("alpha", dist.Uniform(0.0, 0.99))
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    ring = torch.roll(torch.eye(9), 1, 0) + torch.roll(torch.eye(9), -1, 0)
    precision = tau * (2.0 * torch.eye(9) - alpha * ring)
    effect = pyro.sample(
        "effect", dist.MultivariateNormal(torch.zeros(9), precision_matrix=precision)
    )
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("district", 9):
        pyro.sample("y", dist.Poisson((effect + beta * neighbours).exp()), obs=y)


@GAUSSIANS.case(y=binary(6, 4))
def correlated_effects(y):
    """Intercepts and slopes of subjects with a correlation, by a root."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(2, 2.0))
    with pyro.plate("subject", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        effect = z @ (scale[:, None] * root).mT
        with pyro.plate("visit", 4, dim=-1):
            logits = effect[..., 0] + effect[..., 1] * torch.linspace(-1.0, 1.0, 4)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)
