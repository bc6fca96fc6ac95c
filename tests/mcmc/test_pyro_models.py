"""The models that Pyro's own samplers are tried on, each against its posterior."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.poutine as poutine
import pytest
import torch
from pyro.contrib.conjugate.infer import BetaBinomialPair, collapse_conjugate, posterior_replay
from pyro.infer import Predictive, config_enumerate
from pyro.infer.mcmc import StreamingMCMC
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_hamflow import HMC, MCMC, NUTS
from tests.helpers.laws import scores

Moments = dict[str, tuple[Any, Any]]


class Case(NamedTuple):
    """A model, its arguments, and the mean and standard deviation of each of its parameters."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    truth: Moments


def on_grid(log_density: Tensor, **values: Tensor) -> Moments:
    """Means and standard deviations under a density on a grid, of values of its shape."""
    weight = log_density.flatten().softmax(0)
    means = {name: (weight * value.flatten()).sum() for name, value in values.items()}
    return {
        name: (
            means[name],
            (weight * (value.flatten() - means[name]).square()).sum().sqrt(),
        )
        for name, value in values.items()
    }


def normal(precision: float, linear: float) -> tuple[float, float]:
    """Moments of a density proportional to exp(linear x - precision x^2 / 2)."""
    return linear / precision, precision**-0.5


def moments_of(distribution: Any) -> tuple[Tensor, Tensor]:
    return distribution.mean, distribution.variance.sqrt()


# --- the models ---------------------------------------------------------------------------------

_random = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X = _random(60, 2)
LABELS = (_random(60) < X[:, 0] - 2.0 * X[:, 1]).double()
TOSSES = (_random(40, 2) < torch.tensor([1.2, -1.2])).double()
REALS = 1.3 * _random(12) + 0.4
TWO_HUMPS = torch.cat([_random(12), REALS + 3.0])
SHARE = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)


def logistic():
    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=x @ beta).to_event(1), obs=y)

    grid = torch.cartesian_prod(torch.linspace(-2, 4, 200), torch.linspace(-5, 1, 200))
    density = dist.Normal(0.0, 1.0).log_prob(grid).sum(1)
    density = density + dist.Bernoulli(logits=grid @ X.T).log_prob(LABELS).sum(1)
    parts = on_grid(density, first=grid[:, 0], second=grid[:, 1])
    means, spreads = zip(parts["first"], parts["second"], strict=True)
    return Case(model, (X, LABELS), {"beta": (torch.stack(means), torch.stack(spreads))})


def beta_bernoulli():
    def model(y):
        p = pyro.sample("p", dist.Beta(torch.full((2,), 1.1), 1.1).to_event(1))
        with pyro.plate("data", len(y), dim=-2):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    ones, count = TOSSES.sum(0), len(TOSSES)
    return Case(model, (TOSSES,), {"p": moments_of(dist.Beta(1.1 + ones, 1.1 + count - ones))})


def dirichlet_categorical():
    data = torch.tensor([0, 1, 1, 1, 2, 1, 0, 2, 1, 1])

    def model(y):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)

    return Case(model, (data,), {"p": moments_of(dist.Dirichlet(torch.tensor([3.0, 7.0, 3.0])))})


def gamma_normal():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, rate.rsqrt()), obs=y)

    posterior = dist.Gamma(2.0 + len(REALS) / 2, 1.0 + 0.5 * REALS.square().sum())
    return Case(model, (REALS,), {"rate": moments_of(posterior)})


def bernoulli_latent():
    """Two layers of coins under each datum, and one that nothing depends on: all summed out."""

    def model(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Bernoulli(p))
            b = pyro.sample("b", dist.Bernoulli(0.65 * a + 0.1))
            pyro.sample("y", dist.Normal(2.0 * b, 1.0), obs=y)
        pyro.sample("nuisance", dist.Bernoulli(0.3))

    share = (0.65 * SHARE + 0.1)[:, None]
    up, down = (dist.Normal(m, 1.0).log_prob(TWO_HUMPS) for m in (2.0, 0.0))
    density = torch.logaddexp(share.log() + up, (1 - share).log() + down).sum(1)
    return Case(model, (TWO_HUMPS,), on_grid(density, p=SHARE))


def mixture(kind: str):
    """Two components, of one the mean unknown; assignments summed out in three ways."""

    def model(y):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        mean = pyro.sample("mean", dist.Normal(4.0, 1.0))
        means = torch.stack([mean.new_zeros(()), mean])
        weights = torch.stack([1 - share, share])
        with pyro.plate("data", len(y)):
            if kind == "same family":
                parts = dist.Normal(means, 1.0)
                pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=y)
                return
            which = pyro.sample("which", dist.Categorical(weights), infer=infer)
            pyro.sample("y", dist.Normal(means[which], 1.0), obs=y)

    infer = {"enumerate": "parallel"} if kind == "marked" else {}
    grid = torch.cartesian_prod(SHARE[::10], torch.linspace(1.0, 6.0, 200))
    share, mean = grid[:, :1], grid[:, 1:]
    near, far = (
        dist.Normal(0.0, 1.0).log_prob(TWO_HUMPS),
        dist.Normal(mean, 1.0).log_prob(TWO_HUMPS),
    )
    density = torch.logaddexp((1 - share).log() + near, share.log() + far).sum(1)
    density = density + dist.Beta(2.0, 2.0).log_prob(share[:, 0])
    density = density + dist.Normal(4.0, 1.0).log_prob(mean[:, 0])
    truth = on_grid(density, share=share[:, 0], mean=mean[:, 0])
    return Case(config_enumerate(model) if kind == "decorated" else model, (TWO_HUMPS,), truth)


def hidden_markov():
    data = torch.tensor([0.1, -0.5, 1.9, 2.5, 1.2, 0.3, -0.2, 2.2])

    def model(y):
        stay = pyro.sample("stay", dist.Beta(3.0, 1.0))
        rows = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
        x: Any = 0
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Categorical(rows[x]), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Normal(2.0 * x, 1.0), obs=y[t])

    stay = torch.stack([SHARE, 1 - SHARE], -1)
    rows = torch.stack([stay, stay.flip(-1)], -2)
    forward = torch.tensor([1.0, 0.0]).expand(len(SHARE), 2)
    for value in data:
        emission = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(value).exp()
        forward = (forward[:, None] @ rows)[:, 0] * emission
    density = forward.sum(-1).log() + dist.Beta(3.0, 1.0).log_prob(SHARE)
    return Case(model, (data,), on_grid(density, stay=SHARE))


GROUPS = torch.tensor(
    [[0.2, 1.1, -0.3, 0.8], [2.0, 1.5, 2.8, 2.2], [-1.0, 0.1, -0.4, -0.9]], dtype=torch.float64
)


def groups(kind: str):
    """Means of three groups about a common one: plates nested, in sequence, or reparametrised."""

    def nested(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("group", 3, dim=-2):
            own = pyro.sample("own", dist.Normal(mean, 0.5))
            with pyro.plate("visit", 4, dim=-1):
                pyro.sample("y", dist.Normal(own, 1.0), obs=y)

    def sequential(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        for i in pyro.plate("group", 3):
            own = pyro.sample(f"own_{i}", dist.Normal(mean, 0.5))
            for j in pyro.plate(f"visit_{i}", 4):
                pyro.sample(f"y_{i}_{j}", dist.Normal(own, 1.0), obs=y[i, j])

    averages, noise = GROUPS.mean(1), 0.5**2 + 1.0 / 4
    posterior = normal(1 / 4.0 + 3 / noise, float(averages.sum()) / noise)
    centred = poutine.reparam(nested, config={"own": LocScaleReparam(0.0)})
    model = {"nested": nested, "sequential": sequential, "reparametrised": centred}[kind]
    return Case(model, (GROUPS,), {"mean": posterior})


def handled(kind: str):
    """A normal mean under effect handlers that change what is given of it."""

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.scale(scale=scaling), poutine.mask(mask=kept):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    scaling = 2.5 if kind == "scale" else 1.0
    kept = torch.arange(len(REALS)) % 2 == 0 if kind == "mask" else torch.tensor(True)
    precision = scaling * float(kept.expand(len(REALS)).sum())
    posterior = normal(1.0 + precision, scaling * float((REALS * kept).sum()))
    model = poutine.condition(model, data={"scale": torch.tensor(1.0)})
    return Case(model, (REALS,), {"mean": posterior})


def with_parameter():
    """What `pyro.param` holds is a number here: it stays as it is."""

    def model(y):
        loc = pyro.param("loc", torch.tensor(2.0))
        mean = pyro.sample("mean", dist.Normal(loc, 0.5))
        doubled = pyro.deterministic("doubled", 2.0 * mean)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.5 * doubled, 1.0), obs=y)

    return Case(model, (REALS,), {"mean": normal(4.0 + len(REALS), 8.0 + float(REALS.sum()))})


class Linear(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1, bias=False)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def module():
    precision = X.T @ X + torch.eye(2)
    mean = torch.linalg.solve(precision, X.T @ LABELS)
    spread = precision.inverse().diagonal().sqrt()
    return Case(Linear(), (X, LABELS), {"linear.weight": (mean[None], spread[None])})


CASES: dict[str, Callable[[], Case]] = {
    "logistic": logistic,
    "beta-bernoulli": beta_bernoulli,
    "dirichlet-categorical": dirichlet_categorical,
    "gamma-normal": gamma_normal,
    "bernoulli-latent": bernoulli_latent,
    "hidden Markov": hidden_markov,
    "pyro.param": with_parameter,
    "module": module,
}
CASES |= {f"mixture, {k}": partial(mixture, k) for k in ("plain", "decorated", "same family")}
CASES |= {f"mixture, {k}": partial(mixture, k) for k in ("marked",)}
CASES |= {f"groups, {k}": partial(groups, k) for k in ("nested", "sequential", "reparametrised")}
CASES |= {f"handlers, {k}": partial(handled, k) for k in ("condition", "scale", "mask")}


def check(samples: dict[str, Tensor], truth: Moments) -> None:
    """First and second moments of draws ``(chains, draws, *)``, within four standard errors."""
    for name, (mean, spread) in truth.items():
        values = samples[name].double().numpy()
        mean, spread = (torch.as_tensor(part).numpy() for part in (mean, spread))
        assert abs(scores(values, mean)).max() < 4.0, name
        assert abs(scores((values - mean) ** 2, spread**2)).max() < 4.0, name


@pytest.mark.parametrize("name", CASES)
def test_posterior(name):
    case = CASES[name]()
    mcmc = MCMC(HMC(case.model), 60, 60, num_chains=25, seed=2, disable_progbar=True)
    mcmc.run(*case.args)
    check(mcmc.get_samples(group_by_chain=True), case.truth)


def test_check_of_posteriors_can_fail():
    """A datum left out, and a spread too small by a fifth, are seen."""
    case = gamma_normal()
    mcmc = MCMC(HMC(case.model), 60, 60, num_chains=25, seed=2, disable_progbar=True)
    mcmc.run(case.args[0][1:])
    with pytest.raises(AssertionError):
        check(mcmc.get_samples(group_by_chain=True), case.truth)
    mean, spread = case.truth["rate"]
    mcmc.run(*case.args)
    with pytest.raises(AssertionError):
        check(mcmc.get_samples(group_by_chain=True), {"rate": (mean, 0.8 * spread)})


# --- discrete sites -----------------------------------------------------------------------------


@pytest.mark.parametrize("infer", [{"enumerate": "sequential"}, {"num_samples": 3}])
def test_discrete_sites_are_summed_out_whatever_the_model_says(infer):
    """Their values in turn, or draws of them, would leave a density that is noisy."""

    def model(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        a = pyro.sample("a", dist.Bernoulli(p), infer=infer)
        x = pyro.sample("x", dist.Normal(a, 1.0), infer={"enumerate": "parallel", "num_samples": 2})
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y = torch.tensor(2.5)
    up, down = (dist.Normal(m, 2.0**0.5).log_prob(y) for m in (1.0, 0.0))
    truth = on_grid(torch.logaddexp(SHARE.log() + up, (1 - SHARE).log() + down), p=SHARE)
    mcmc = MCMC(HMC(model), 60, 60, num_chains=25, seed=2, disable_progbar=True)
    mcmc.run(y)
    check(mcmc.get_samples(group_by_chain=True), truth)


def test_branch_on_a_discrete_site_is_refused():
    def model():
        a = pyro.sample("a", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(1.0 if a else 0.0, 1.0))

    with pytest.raises(
        ValueError, match=r"all values of the discrete sites \['a'\] at once .*wher"
    ):
        MCMC(NUTS(model), 5, 5).run()


def components(*, plated):
    data = torch.tensor([0.0, 0.0, 3.0, 3.0, 3.0, 5.0, 5.0])
    with pyro.plate("component", 3) if plated else poutine.mask(mask=torch.tensor(True)):
        means = pyro.sample("means", dist.Normal(torch.arange(3.0), 1.0))
    with pyro.plate("data", 7):
        which = pyro.sample("which", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("y", dist.Normal(means[which], 1.0), obs=data)


@pytest.mark.parametrize(
    ("plated", "nesting", "message"),
    [
        (False, None, "site 'means'"),  # a dimension that no plate explains
        (False, 1, "site 'means'"),
        (True, 0, "`max_plate_nesting` is 0: expected 1 or more"),
    ],
)
def test_plates_and_enumeration_that_clash_are_refused(plated, nesting, message):
    kernel = NUTS(partial(components, plated=plated), max_plate_nesting=nesting)
    with pytest.raises(ValueError, match=message):
        MCMC(kernel, 5, 5).run()


def test_deeper_nesting_than_needed_changes_nothing():
    gradients = []
    for nesting in (None, 1, 4):
        kernel = NUTS(partial(components, plated=True), max_plate_nesting=nesting)
        kernel.begin(1, 0, initial_params={"means": torch.ones(1, 3)})
        gradients.append(kernel.potential.gradients(torch.ones(1, 3), torch.zeros(1, 0))[1])
    torch.testing.assert_close(gradients[1:], [gradients[0]] * 2)


def test_part_of_the_data_is_refused():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=3) as index:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])

    with pytest.raises(ValueError, match="plate 'data' is subsampled"):
        MCMC(NUTS(model), 5, 5).run(REALS)


# --- in Pyro's own runners ----------------------------------------------------------------------

IN_PYRO = ["gamma-normal", "module", "bernoulli-latent"]


@pytest.mark.parametrize("kernel", [HMC, NUTS])
@pytest.mark.parametrize("name", IN_PYRO)
def test_posterior_in_pyros_runner(name, kernel):
    case = CASES[name]()
    mcmc = pyro.infer.MCMC(kernel(case.model), 250, 100, disable_progbar=True)
    mcmc.run(*case.args)
    check(mcmc.get_samples(group_by_chain=True), case.truth)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_PYRO])
def test_every_posterior_in_pyros_runner(name):
    case = CASES[name]()
    mcmc = pyro.infer.MCMC(NUTS(case.model), 600, 200, disable_progbar=True)
    mcmc.run(*case.args)
    check(mcmc.get_samples(group_by_chain=True), case.truth)


def test_streaming():
    case = gamma_normal()
    mcmc = StreamingMCMC(NUTS(case.model), 150, 60, num_chains=2, disable_progbar=True)
    mcmc.run(*case.args)
    mean, spread = case.truth["rate"]
    for chain in range(2):
        found = mcmc.get_statistics()[chain, "rate"]
        assert found["count"] == 150
        assert abs(float(found["mean"] - mean)) < 0.5 * float(spread)


# --- what follows a run -------------------------------------------------------------------------


def test_predictive_of_draws():
    """Predictions of a linear model have the variance of noise and coefficients together."""
    case = module()
    mcmc = MCMC(HMC(case.model), 60, 60, num_chains=25, seed=2, disable_progbar=True)
    mcmc.run(*case.args)
    new = torch.tensor([[1.0, 0.5]])
    drawn = Predictive(case.model, mcmc.get_samples())(new)["y"].reshape(25, 60)
    precision = X.T @ X + torch.eye(2)
    mean = new @ torch.linalg.solve(precision, X.T @ LABELS)
    variance = 1.0 + new @ precision.inverse() @ new.T
    check({"y": drawn}, {"y": (mean.squeeze(), variance.sqrt().squeeze())})


def test_replay_of_conjugate_pairs():
    """The collapsed site, drawn after the run, has its exact posterior."""

    def model(y):
        pyro.sample("other", dist.Normal(0.0, 1.0))  # whose draws say how many to replay
        with pyro.plate("coin", 2):
            pair = BetaBinomialPair()
            p = pyro.sample("p", pair.latent(torch.ones(2), torch.ones(2)))
            with pyro.plate("data", len(y)):
                pyro.sample("y", pair.conditional(probs=p, total_count=count), obs=y)

    count = torch.tensor([30.0, 10.0])
    y = torch.tensor([[21.0, 4.0], [18.0, 2.0], [24.0, 3.0]])
    mcmc = MCMC(NUTS(collapse_conjugate(model)), 400, 5, seed=0, disable_progbar=True)
    mcmc.run(y)
    drawn = posterior_replay(model, mcmc.get_samples(), y, num_samples=400)["p"]
    posterior = dist.Beta(1 + y.sum(0), 1 + 3 * count - y.sum(0))
    check({"p": drawn[None]}, {"p": moments_of(posterior)})
