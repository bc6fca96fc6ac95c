"""Data with gaps: under a mask they give what any numbers in their place would give."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_hamflow import HMC, MCMC, NUTS, marginalize, to_inference_data
from pyro_hamflow.model import runs
from pyro_hamflow.model.missing import without_gaps
from pyro_hamflow.model.potential import Potential

NAN = torch.nan
SEEN = torch.tensor([True, False, True, True, False, True])


def _gradients(model, *args):
    """Potential and gradient at three points, by programs; the model must be captured."""
    potential = Potential(model, args)
    position, noise = potential.vectors(3)
    result = potential.gradients(0.5 * position, noise)
    assert potential.programs.fallback_reason is None
    return result[:2]


def _same(model, with_gaps, filled):
    for one, other in zip(_gradients(model, *with_gaps), _gradients(model, *filled), strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _data(*numbers):
    """Six values, two of them missing."""
    first, second, third, fourth = numbers
    gaps = [first, NAN, second, third, NAN, fourth]
    return torch.tensor(gaps, dtype=torch.float64)


REAL, COUNTS, SHARES = (
    _data(0.3, -1.2, 0.4, 2.0),
    _data(1.0, 0.0, 4.0, 2.0),
    _data(0.1, 0.5, 0.7, 0.2),
)
FAMILIES = {
    "Normal": (dist.Normal, REAL),
    "StudentT": (lambda a, s: dist.StudentT(3.0 + s, a, s), REAL),
    "Gumbel": (lambda a, s: dist.Gumbel(a - 2000.0, s), REAL - 2000.0),
    "LogNormal": (dist.LogNormal, REAL.exp()),
    "Gamma": (lambda a, s: dist.Gamma(a.exp(), s), REAL.exp()),
    "Weibull": (lambda a, s: dist.Weibull(s, a.exp()), REAL.exp()),
    "Beta": (lambda a, s: dist.Beta(a.exp(), s), SHARES),
    "Uniform": (lambda a, s: dist.Uniform(torch.arange(6.0), torch.arange(6.0) + 1), REAL),
    "Poisson": (lambda a, s: dist.Poisson(a.exp()), COUNTS),
    "Bernoulli": (lambda a, s: dist.Bernoulli(logits=a * s), _data(0.0, 1.0, 1.0, 0.0)),
    "Binomial": (lambda a, s: dist.Binomial(torch.tensor([4.0, 1, 4, 5, 2, 6]), logits=a), COUNTS),
    "NegativeBinomial": (lambda a, s: dist.NegativeBinomial(s, logits=a), COUNTS),
    "mixture": (
        lambda a, s: dist.MixtureSameFamily(
            dist.Categorical(torch.stack([s, s.square()])), dist.Normal(torch.stack([a, -a]), 1.0)
        ),
        REAL,
    ),
}


@pytest.mark.parametrize("how", ["handler", "distribution"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_gaps_are_as_good_as_numbers(family, how):
    make, y = FAMILIES[family]
    if family == "Uniform":
        y = torch.arange(6.0) + SHARES

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 6):
            fn = make(a, s)
            if how == "handler":
                with poutine.mask(mask=SEEN):
                    pyro.sample("y", fn, obs=y)
            else:
                pyro.sample("y", fn.expand([6]).mask(SEEN), obs=y)

    # Under the mask the numbers do not matter, as long as densities are finite there.
    _same(
        model,
        (y,),
        (torch.where(SEEN, y, y[3] if family != "Uniform" else 0.5 + torch.arange(6.0)),),
    )


def test_infinite_values_under_a_mask():
    def model(y):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 6), poutine.mask(mask=SEEN):
            pyro.sample("y", dist.Normal(a, a), obs=y)

    _same(model, (REAL.nan_to_num(torch.inf),), (REAL.nan_to_num(),))


def test_missing_entries_of_vectors():
    y = torch.stack([REAL, REAL.flip(0), COUNTS], -1)
    seen = ~y.isnan()

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(a, 1.0).expand([6, 3]).mask(seen).to_event(1), obs=y)

    _same(model, (y,), (y.nan_to_num(),))


def test_missing_rows_of_vectors_and_simplices():
    rows = torch.stack([REAL, COUNTS], -1)
    shares = torch.stack([SHARES, 1 - SHARES], -1)

    def model(y, shares):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
        root = pyro.sample("root", dist.LKJCholesky(2, 1.0))
        with pyro.plate("data", 6), poutine.mask(mask=SEEN):
            pyro.sample("y", dist.MultivariateNormal(a, scale_tril=root), obs=y)
            pyro.sample("shares", dist.Dirichlet(a), obs=shares)

    half = torch.where(shares.isnan(), 0.5, shares)
    _same(model, (rows, shares), (rows.nan_to_num(), half))


def test_missing_values_with_labels_summed_out():
    def model(y):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", 6):
            label = pyro.sample("label", dist.Categorical(weights))
            with poutine.mask(mask=SEEN):
                pyro.sample("y", dist.Normal(loc[label], 1.0), obs=y)

    _same(model, (REAL,), (REAL.nan_to_num(),))


LINKS = {
    "product": lambda x, b, s: dist.Normal(x @ b, s),
    "exponential": lambda x, b, s: dist.Normal((x @ b).exp(), s),
    "power": lambda x, b, s: dist.Normal(((x.abs() ** s) * b).sum(-1), 1.0),
    "kernel": lambda x, b, s: dist.Normal((-(x[:, :1] - b).square() / s).exp().sum(-1), 1.0),
    "network": lambda x, b, s: dist.Normal(torch.tanh(x * b).sum(-1), s),
}


@pytest.mark.parametrize("link", LINKS)
def test_gaps_in_covariates_of_masked_rows(link):
    x = torch.stack([REAL, COUNTS.roll(3), COUNTS], -1)  # rows 1 and 4 alone have gaps

    def model(x):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 6), poutine.mask(mask=SEEN):
            pyro.sample("y", LINKS[link](x, b, s), obs=torch.arange(6.0))

    assert bool(x.isnan().any(-1).eq(~SEEN).all())
    _same(model, (x,), (x.nan_to_num(0.7),))


def test_gaps_in_covariates_of_a_factor():
    def model(x):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.factor("density", torch.where(SEEN, -(b * x - 1.0).square(), 0.0).sum())

    _same(model, (REAL,), (REAL.nan_to_num(),))


@pytest.mark.parametrize("proposal", ["prior", "laplace"])
def test_missing_values_of_a_marginal_model(proposal):
    y = torch.stack([REAL, REAL.flip(0)])

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("subject", 2, dim=-2):
            x = pyro.sample("x", dist.Normal(mean, 0.7))
            with (
                pyro.plate("visit", 6, dim=-1),
                poutine.mask(mask=~torch.stack([REAL, REAL.flip(0)]).isnan()),
            ):
                pyro.sample("y", dist.StudentT(4.0, x, 1.0), obs=y)

    results = []
    for data in (y, y.nan_to_num()):
        torch.manual_seed(0)
        marginal = marginalize(model, ["x"], num_particles=4, proposal=proposal)
        potential = Potential(marginal, (data,), separate_noise=True)
        results.append(potential.gradients(*potential.vectors(2)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def _level(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=~y.isnan()):
        returned = pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    pyro.deterministic("number_missing", returned.isnan().sum())


@pytest.fixture(scope="module")
def run():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(1)
    mcmc = MCMC(HMC(_level), num_samples=500, warmup_steps=200, num_chains=4)
    mcmc.run(REAL)
    yield mcmc
    torch.set_default_dtype(torch.float32)


def test_posterior_of_what_is_seen(run):
    """The posterior of a mean is normal, and knows four values."""
    precision = 4.0 + 0.01
    mean, sd = REAL.nansum() / precision, precision**-0.5
    draws = run.get_samples()["mean"]
    assert abs(draws.mean() - mean) < 4 * sd / 600**0.5
    assert abs(draws.std() - sd) < 4 * sd / 800**0.5


def test_results_keep_the_gaps(run):
    idata = to_inference_data(run)
    observed = torch.as_tensor(idata["observed_data"]["y"].values)
    torch.testing.assert_close(observed, REAL, equal_nan=True)
    pointwise = torch.as_tensor(idata["log_likelihood"]["y"].values)
    assert bool((pointwise[..., ~SEEN] == 0.0).all()) and bool((pointwise[..., SEEN] < 0.0).all())
    # The model itself sees what it was given.
    assert bool((idata["posterior"]["number_missing"].values == 2).all())


def test_gaps_that_count_are_refused():
    def scalars(mask):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(a, 1.0), obs=REAL)

    with pytest.raises(ValueError, match=r"'y' contain NaN \(2 of 6 .*poutine.mask\(mask=~data"):
        Potential(scalars, (torch.arange(6) < 4,))

    def entries():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0).expand([6]).to_event(1), obs=REAL)

    with pytest.raises(ValueError, match=r"`.mask\(~data.isnan\(\)\)` .* before its `.to_event`"):
        Potential(entries)

    def joint():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.MultivariateNormal(a.expand(6), torch.eye(6)), obs=REAL)

    with pytest.raises(ValueError, match=r"marginal distribution .* latent sites under `.mask\(F"):
        Potential(joint)


def test_gaps_in_covariates_that_count_are_refused():
    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(b * REAL, 1.0), obs=torch.zeros(6))

    with pytest.raises(ValueError, match="observed site 'y' has log density nan"):
        MCMC(NUTS(model), num_samples=2, warmup_steps=2).run()


@pytest.mark.filterwarnings("ignore:The model could not be captured")
def test_gaps_in_covariates_of_a_model_that_cannot_be_captured():
    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.factor("branch", b if b > 0.1 else -b)
        with pyro.plate("data", 6), poutine.mask(mask=SEEN):
            pyro.sample("y", dist.Normal(b * REAL, 1.0), obs=torch.zeros(6))

    with pytest.raises(ValueError, match="under the mask of 'y' it is computed from NaN: expected"):
        MCMC(NUTS(model), num_samples=2, warmup_steps=2).run()


def test_entries_of_a_joint_distribution_as_latent_sites():
    """Of a vector of two, one is seen: the other one's posterior is its conditional."""
    y, rho = torch.tensor([1.5, NAN]), 0.8
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]])

    def model():
        rest = pyro.sample("rest", dist.Normal(0.0, 1.0).mask(False))
        whole = torch.where(y.isnan(), rest, y)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=whole)

    potential = Potential(model)
    position = torch.linspace(-2.0, 3.0, 7)[:, None]
    value, slope, _ = potential.gradients(position, position[:, :0])
    expected = (position - rho * 1.5) / (1 - rho**2)
    torch.testing.assert_close(slope, expected)


def test_without_filling_gradients_are_no_numbers(monkeypatch):
    monkeypatch.setattr(runs, "without_gaps", lambda site: site["value"])
    potential = Potential(_level, (REAL,))
    assert potential.value_of_one(torch.zeros(1), torch.zeros(0)).isfinite()
    position = torch.zeros(1, requires_grad=True)
    potential.value_of_one(position, torch.zeros(0)).backward()
    assert position.grad.isnan().all()


def test_values_that_are_complete_stay_as_they_are():
    trace = poutine.trace(_level).get_trace(REAL.nan_to_num())
    assert without_gaps(trace.nodes["y"]) is trace.nodes["y"]["value"]
