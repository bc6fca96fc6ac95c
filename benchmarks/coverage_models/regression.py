"""Regressions: one linear predictor, many families of answers."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

from benchmarks.coverage_models.data import (
    Collection,
    binary,
    counts,
    labels,
    members,
    normal,
    positive,
    uniform,
)

REGRESSIONS = Collection()


@REGRESSIONS.case(is_africa=binary(170), ruggedness=positive(170), log_gdp=normal(170, loc=8.0))
def terrain(is_africa, ruggedness, log_gdp):
    """Ruggedness and gross domestic product, with an interaction."""
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b_africa = pyro.sample("b_africa", dist.Normal(0.0, 1.0))
    b_rugged = pyro.sample("b_rugged", dist.Normal(0.0, 1.0))
    b_both = pyro.sample("b_both", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    mean = a + b_africa * is_africa + b_rugged * ruggedness + b_both * is_africa * ruggedness
    with pyro.plate("data", len(log_gdp)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)


@REGRESSIONS.case(x=normal(120, 8), y=binary(120))
def logistic(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y)


@REGRESSIONS.case(mom_hs=binary(150), mom_iq=normal(150, loc=100.0, scale=15.0), score=normal(150))
def kidiq(mom_hs, mom_iq, score):
    """Children's test scores; flat priors as wide normals, centred covariates."""
    beta = pyro.sample("beta", dist.Normal(0.0, 100.0).expand([4]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    iq = mom_iq - mom_iq.mean()
    x = torch.stack([torch.ones_like(iq), mom_hs, iq, mom_hs * iq], -1)
    with pyro.plate("child", len(score)):
        pyro.sample("score", dist.Normal(x @ beta, sigma), obs=score)


@REGRESSIONS.case(height=normal(100, loc=66.0, scale=4.0), male=binary(100), earn=positive(100))
def earnings(height, male, earn):
    beta = pyro.sample("beta", dist.StudentT(3.0, 0.0, 2.5).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.Exponential(1.0))
    z = (height - height.mean()) / height.std()
    mean = beta[0] + beta[1] * z + beta[2] * male
    pyro.sample("log_earn", dist.Normal(mean, sigma).to_event(1), obs=earn.log())


@REGRESSIONS.case(x=positive(46, 5), group=binary(46), weight=positive(46))
def mesquite(x, group, weight):
    """Yield of bushes on the logarithms of their sizes."""
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([7]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    mean = beta[0] + x.log() @ beta[1:6] + beta[6] * group
    with pyro.plate("bush", len(weight)):
        pyro.sample("weight", dist.LogNormal(mean, sigma), obs=weight)


@REGRESSIONS.case(age=labels(90, of=4), income=labels(90, of=5), vote=binary(90))
def nes(age, income, vote):
    """Votes on a factor of four levels and a score."""
    by_age = pyro.sample("by_age", dist.Normal(0.0, 2.5).expand([4]).to_event(1))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    logits = by_age[age] + slope * income
    with pyro.plate("voter", len(vote)):
        pyro.sample("vote", dist.Bernoulli(logits=logits), obs=vote)


@REGRESSIONS.case(distance=positive(80), arsenic=positive(80), switched=binary(80))
def wells(distance, arsenic, switched):
    """Probit regression, by the normal distribution function."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    eta = beta[0] + beta[1] * distance + beta[2] * arsenic
    share = dist.Normal(0.0, 1.0).cdf(eta).clamp(1e-6, 1.0 - 1e-6)
    with pyro.plate("household", len(switched)):
        pyro.sample("switched", dist.Bernoulli(share), obs=switched)


@REGRESSIONS.case(x=normal(60, 2), y=normal(60))
def student_t(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(df, x @ beta, scale), obs=y)


@REGRESSIONS.case(x=normal(60, 2), y=labels(60, of=5))
def ordinal(x, y):
    """Answers on a scale, with ordered cut points."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    steps = dist.Normal(0.0, 1.0).expand([4]).to_event(1)
    cuts = pyro.sample(
        "cuts", dist.TransformedDistribution(steps, dist.transforms.OrderedTransform())
    )
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.OrderedLogistic(x @ beta, cuts), obs=y)


@REGRESSIONS.case(x=normal(80, 2), y=counts(80, rate=1.0))
def zero_inflated(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson((x @ beta).exp(), gate=gate), obs=y)


@REGRESSIONS.case(x=normal(80, 3), exposure=positive(80), y=counts(80))
def negative_binomial(x, exposure, y):
    """Counts by mean and dispersion, with an offset."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    size = pyro.sample("size", dist.Exponential(0.5))
    eta = x @ beta + exposure.log()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.NegativeBinomial(size, logits=eta - size.log()), obs=y)


@REGRESSIONS.case(x=normal(40, 2), y=labels(40, of=10))
def beta_binomial(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    precision = pyro.sample("precision", dist.Pareto(1.0, 1.5))
    share = torch.sigmoid(x @ beta)
    with pyro.plate("data", len(y)):
        family = dist.BetaBinomial(share * precision, (1 - share) * precision, total_count=10)
        pyro.sample("y", family, obs=y.to(x))


@REGRESSIONS.case(y=counts(30, 4))
def dirichlet_multinomial(y):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(4)))
    precision = pyro.sample("precision", dist.LogNormal(1.0, 1.0))
    with pyro.plate("data", len(y)):
        family = dist.DirichletMultinomial(share * precision, y.sum(-1), is_sparse=False)
        pyro.sample("y", family, obs=y)


@REGRESSIONS.case(x=normal(50), angle=uniform(50, low=-3.0, high=3.0))
def von_mises(x, angle):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    start = pyro.sample("start", dist.Uniform(-math.pi, math.pi))
    concentration = pyro.sample("concentration", dist.HalfNormal(3.0))
    with pyro.plate("data", len(x)):
        mean = start + 2.0 * torch.atan(slope * x)
        pyro.sample("angle", dist.VonMises(mean, concentration), obs=angle)


@REGRESSIONS.case(x=normal(70, 2), time=positive(70), died=binary(70))
def weibull_survival(x, time, died):
    """Survival with censoring: densities of deaths, probabilities of outliving."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
    scale = (x @ beta / shape).exp()
    with pyro.plate("patient", len(time)):
        with poutine.mask(mask=died.bool()):
            pyro.sample("death", dist.Weibull(scale, shape), obs=time)
        pyro.factor("survival", -((time / scale) ** shape) * (1 - died))


@REGRESSIONS.case(x=normal(50, 12), y=normal(50))
def horseshoe(x, y):
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("covariate", x.shape[1]):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    beta = pyro.deterministic("beta", z * local * tau)
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


@REGRESSIONS.case(x=normal(30, 5), y=normal(30))
def sparse_interactions(x, y):
    """Pairwise interactions by a polynomial kernel, coefficients integrated out."""
    number, width = x.shape
    sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
    phi = sigma * (1.0 / number**0.5) / width
    eta_1 = pyro.sample("eta_1", dist.HalfCauchy(1.0)) * phi
    squared = pyro.sample("squared", dist.InverseGamma(2.0, 2.0))
    psi = pyro.sample("psi", dist.InverseGamma(2.0, 2.0))
    local = pyro.sample("local", dist.HalfCauchy(1.0).expand([width]).to_event(1))
    eta_2 = eta_1.square() * psi.sqrt() / squared
    kappa = (squared.sqrt() * local / (squared + (eta_1 * local).square()).sqrt()) * x
    dot = kappa @ kappa.T
    kernel = 0.5 * eta_2.square() * (1 + dot).square() + eta_1.square() * dot
    kernel = kernel - 0.5 * eta_2.square() * (kappa.square() @ kappa.square().T)
    covariance = kernel + (sigma.square() + 1e-4) * torch.eye(number)
    root = torch.linalg.cholesky(covariance)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(number), scale_tril=root), obs=y)


@REGRESSIONS.case(x=normal(60, 2), y=labels(60, of=4))
def softmax(x, y):
    """Categories, the first as reference."""
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    logits = torch.cat([torch.zeros(len(x), 1), x @ weight], -1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


@REGRESSIONS.case(x=normal(60, 2), y=positive(60))
def gamma(x, y):
    beta = pyro.sample("beta", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
    shape = pyro.sample("shape", dist.InverseGamma(2.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Gamma(shape, shape / (x @ beta).exp()), obs=y)


@REGRESSIONS.case(year=normal(62, loc=1980.0, scale=18.0), y=normal(62, loc=9.0))
def kilpisjarvi(year, y):
    """A trend in temperatures, by years that are not centred."""
    alpha = pyro.sample("alpha", dist.Normal(9.0, 100.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 0.033))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("summer", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta * year, sigma), obs=y)


@REGRESSIONS.case(x=normal(50), y=normal(50), outlier_scale=uniform(1, low=5.0, high=6.0))
def robust_mixture(x, y, outlier_scale):
    """Outliers by a mixture of two normals around the line."""
    a, b = pyro.sample("line", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    share = pyro.sample("share", dist.Beta(1.0, 9.0))
    mean = (a + b * x)[:, None]
    scales = torch.cat([torch.ones(1), outlier_scale])
    with pyro.plate("data", len(y)):
        parts = dist.Normal(mean, scales)
        weights = dist.Categorical(torch.stack([1 - share, share]))
        pyro.sample("y", dist.MixtureSameFamily(weights, parts), obs=y)


@REGRESSIONS.case(county=members(120, 12), floor=binary(120), log_radon=normal(120))
def radon(county, floor, log_radon):
    """Intercepts and slopes that vary between counties."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    spread = pyro.sample("spread", dist.HalfCauchy(2.5).expand([2]).to_event(1))
    with pyro.plate("county", 12):
        effect = pyro.sample("effect", dist.Normal(mu, spread).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("house", len(floor)):
        mean = effect[county, 0] + effect[county, 1] * floor
        pyro.sample("log_radon", dist.Normal(mean, sigma), obs=log_radon)
