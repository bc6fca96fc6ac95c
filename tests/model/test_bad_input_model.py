"""Wrong use of models, sites and estimates: each fault has its own message and names its site."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_hamflow import marginalize
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start
from tests.helpers.zoo import Shaped

Y = torch.tensor([0.3, -1.0, 2.2, 0.5], dtype=torch.float64)


def model(y, prior=None, scale=1.0):
    """A local site in a plate, with any prior."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.Normal(mu, 1.0) if prior is None else prior)
        x = x.reshape(x.shape[: x.dim() - len(getattr(prior, "event_shape", ()))] + (-1,))[..., 0]
        pyro.sample("y", dist.Normal(x, scale), obs=y)


def run(marginal, *args, **kwargs):
    return poutine.trace(marginal).get_trace(*args, **kwargs)


# --- arguments of marginalize -------------------------------------------------------------------

ARGUMENTS = {
    "no sites": (dict(sites=[]), ValueError, r"`sites` is \[\]: expected a list of names"),
    "one string": (dict(sites="x"), ValueError, "`sites` is 'x': expected a list of names"),
    "zero particles": (dict(num_particles=0), ValueError, "`num_particles` is 0: expected 1"),
    "negative": (dict(num_particles=-3), ValueError, "`num_particles` is -3: expected 1 or more"),
    "fraction": (dict(num_particles=2.5), TypeError, "`num_particles` is 2.5: expected an integer"),
    "truth": (dict(num_particles=True), TypeError, "`num_particles` is True: expected an integer"),
    "proposal": (dict(proposal="guess"), ValueError, "`proposal` is 'guess': expected 'auto', "),
    "no proposal": (dict(proposal=None), ValueError, "`proposal` is None: expected 'auto', "),
    "points": (dict(points="sobol"), ValueError, "`points` is 'sobol': expected one of 'iid', "),
    "follow": (dict(follow="sites"), ValueError, "`follow` is 'sites': expected one of 'auto', "),
    "follow and proposal": (
        dict(follow="linear", proposal="prior"),
        ValueError,
        "`follow` is 'linear' and `proposal` 'prior': expected `proposal` 'auto' or 'laplace'",
    ),
}


@pytest.mark.parametrize("options, error, match", ARGUMENTS.values(), ids=ARGUMENTS)
def test_argument_of_marginalize_is_refused(options, error, match):
    options = {"sites": ["x"], "num_particles": 4} | options
    with pytest.raises(error, match=match):
        marginalize(model, **options)


# --- sites --------------------------------------------------------------------------------------


def meets_global(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, scale), obs=y)


def crossed(y):
    first, second = pyro.plate("a", 4, dim=-1), pyro.plate("b", 2, dim=-2)
    with first:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with second:
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with first, second:
        pyro.sample("y", dist.Normal(u + v, 1.0), obs=y.expand(2, 4))


def no_plate(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([4]))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def sequential(y):
    for i in pyro.plate("subject", 4):
        x = pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(x, 1.0), obs=y[i])


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("subject", 4, subsample_size=2) as index:
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])


def subsample_given(y):
    """The plate's scale counts each of the two data twice."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("subject", 4, subsample=torch.tensor([0, 2])) as index:
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])


def local_count(y):
    with pyro.plate("subject", 4):
        n = pyro.sample("n", dist.Poisson(2.0))
        pyro.sample("y", dist.Normal(n, 1.0), obs=y)


def local_label(y):
    with pyro.plate("subject", 4):
        kind = pyro.sample("kind", dist.Bernoulli(0.3))
        x = pyro.sample("x", dist.Normal(kind, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def inner_label(y):
    with pyro.plate("subject", 4, dim=-2):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("visit", 3, dim=-1):
            kind = pyro.sample("kind", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(x + kind, 1.0), obs=y[:, None].expand(4, 3))


def dependent(y, shift=1):
    with pyro.plate("subject", 4):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + 0.1 * x.roll(shift, -1), 1.0), obs=y)


def dependent_prior(y):
    with pyro.plate("subject", 4):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(x.roll(2, -1), 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def observed_outside(y):
    with pyro.plate("subject", 4):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)
    pyro.sample("total", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(1.0))


def random_inside(y):
    with pyro.plate("subject", 4):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + 0.1 * torch.randn(4), 1.0), obs=y)


def mixed(y):
    prior = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3)), dist.Normal(torch.zeros(3), torch.ones(3))
    )
    with pyro.plate("subject", 4):
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


SITES = {
    "unknown": (model, ["z"], r"unknown site 'z': expected one of the latent sites \['mu', 'x'\]"),
    "a plate": (model, ["subject"], "unknown site 'subject': expected one of the latent sites"),
    "observed": (model, ["y"], "site 'y' is observed: expected one of the latent sites"),
    "depended upon": (model, ["mu"], "site 'mu' is not local: latent site 'x' depends on it"),
    "global": (
        meets_global,
        ["scale", "x"],
        "site 'scale' is global: it lies in no plate, while .* 'x'",
    ),
    "crossed plates": (crossed, ["u", "v"], "'u' and 'v' meet in one term but lie in different"),
    "no plate": (no_plate, ["x"], "the plate of local site 'x' cannot be told: .* 4 elements"),
    "sequential plate": (sequential, ["x_1"], "site 'x_1' lies in a sequential plate"),
    "subsampled plate": (subsampled, ["x"], r"plate 'subject' is subsampled \(2 of 4 elements\)"),
    "subsample given": (subsample_given, ["x"], r"plate 'subject' is subsampled \(2 of 4 elem"),
    "count": (local_count, ["n"], "local site 'n' is discrete: expected a continuous site"),
    "label": (local_label, ["kind"], "local site 'kind' is discrete and enumerable"),
    "label inside": (inner_label, ["x"], "discrete site 'kind' lies in plate 'visit', inside the"),
    "dependent elements": (dependent, ["x"], "plate 'subject' are not independent .* 'y' at one"),
    "dependent at a distance": (
        lambda y: dependent(y, 2),
        ["x"],
        "elements of plate 'subject' are not independent",
    ),
    "dependent priors": (dependent_prior, ["x", "w"], "not independent .*: 'w' at one element"),
    "observed outside": (observed_outside, ["x"], "'total' depends on local site 'x' but lies"),
    "random numbers": (random_inside, ["x"], "random numbers that are no sample sites: .* 'y'"),
    "few particles": (mixed, ["x"], r"`num_particles` is 2: expected at least 3, one for each"),
}


@pytest.mark.parametrize("model, sites, match", SITES.values(), ids=SITES)
def test_site_is_refused(model, sites, match):
    with pytest.raises(ValueError, match=match):
        run(marginalize(model, sites, num_particles=2), Y)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_dependence_of_any_two_elements_is_noticed(size):
    def model(y, source, target):
        with pyro.plate("subject", size):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            extra = torch.zeros(size)
            extra[target] = 1.0
            pyro.sample("y", dist.Normal(x + extra * x[..., source, None], 1.0), obs=y)

    for source in range(size):
        for target in range(size):
            if source != target:
                with pytest.raises(ValueError, match="not independent"):
                    run(
                        marginalize(model, ["x"], num_particles=1),
                        torch.zeros(size),
                        source,
                        target,
                    )


# --- proposals ----------------------------------------------------------------------------------


def _proposal(*names, **options):
    def proposal(parameters, y, prior=None):
        with pyro.plate("subject", len(y)):
            for name in names:
                pyro.sample(name, options.get(name, dist.Normal(0.0, 1.0)))

    return proposal


def outside_plate(parameters, y, prior=None):
    pyro.sample("x", dist.Normal(0.0, 1.0))


PRIORS = {
    "no transform": (dist.VonMises(0.0, 1.0), "prior", "prior of local site 'x' .*VonMises is no"),
    "no vector transform": (
        dist.LKJCholesky(2, 1.0),
        "prior",
        "prior of local site 'x' .*LKJCholesky is no known",
    ),
    "no transform for laplace": (
        dist.VonMises(0.0, 1.0),
        "laplace",
        "prior of local site 'x' is a VonMises: proposal 'laplace'",
    ),
    "mixture without transforms": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.VonMises(torch.ones(2), torch.ones(2))
        ),
        "laplace",
        "prior of local site 'x' is a VonMises: proposal 'laplace'",
    ),
    "misses a site": (None, _proposal(), "does not sample local site 'x'"),
    "another site": (None, _proposal("w"), "samples site 'w', which is not integrated out"),
    "no transform in function": (
        dist.VonMises(0.0, 1.0),
        _proposal("x", x=dist.VonMises(0.0, 2.0)),
        "site 'x': VonMises is",
    ),
    "other event shape": (
        None,
        _proposal("x", x=dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        r"site 'x' with batch shape \(4,\) and event shape \(2,\): expected \(4,\) and \(\)",
    ),
    "other batch shape": (
        None,
        outside_plate,
        r"samples site 'x' with batch shape \(\) and .*: expected \(4,\)",
    ),
    "part of the support": (
        None,
        _proposal("x", x=dist.HalfNormal(2.0)),
        r"proposal of local site 'x', HalfNormal, has support .*: expected one that holds every",
    ),
}


@pytest.mark.parametrize("prior, proposal, match", PRIORS.values(), ids=PRIORS)
def test_prior_or_proposal_is_refused(prior, proposal, match):
    marginal = marginalize(model, ["x"], num_particles=2, proposal=proposal)
    with pytest.raises(ValueError, match=match):
        run(marginal, Y, prior=prior)


def test_pilot_that_lacks_a_site_is_refused():
    marginal = marginalize(model, ["x"], num_particles=2, proposal="laplace")
    with pytest.raises(ValueError, match="`pilot` lacks a value for site 'mu'"):
        marginal.fit(Y, pilot={})


# --- potentials ---------------------------------------------------------------------------------


def with_nan(y):
    y = y.clone()
    y[2] = torch.nan
    return y


def count_parameter(y):
    n = pyro.sample("n", dist.Poisson(2.0))
    pyro.sample("y", dist.Normal(n, 1.0).expand([4]).to_event(1), obs=y)


def no_support(y):
    value = pyro.sample("a", Shaped(None, torch.zeros(()), lambda x: -(x**2)))
    pyro.sample("y", dist.Normal(value, 1.0).expand([4]).to_event(1), obs=y)


def no_map(y):
    definite = dist.constraints.positive_semidefinite
    value = pyro.sample("a", Shaped(definite, torch.eye(2), lambda x: x.sum((-1, -2))))
    pyro.sample("y", dist.Normal(value.sum(), 1.0).expand([4]).to_event(1), obs=y)


def moving_support(y):
    end = pyro.sample("end", dist.Gamma(2.0, 1.0))
    pyro.sample("a", dist.Uniform(-1.0, end))


def own_randomness(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a + torch.randn(4), 1.0).to_event(1), obs=y)


def own_data(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    y += 1.0
    with pyro.plate("subject", 4):
        x = pyro.sample("x", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def own_mask(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    pyro.sample("y", dist.Normal(a[a > 0], 1.0).to_event(1), obs=y)


def model_of_four(y):
    with pyro.plate("subject", 4):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


POTENTIALS = {
    "own mask": (own_mask, Y, "shape of a result follows the values of latent sites, in .*'index'"),
    "NaN": (model, with_nan(Y), r"data of observed site 'y' contain NaN \(1 of 4 values\)"),
    "NaN, marginal": (
        marginalize(model, ["x"], num_particles=2),
        with_nan(Y),
        r"data of observed site 'y' contain NaN \(1 of 4 values\)",
    ),
    "shape": (
        model_of_four,
        Y[:3],
        r"data of observed site 'y' have shape \(3,\): expected \(4,\)",
    ),
    "shape, marginal": (
        marginalize(model_of_four, ["x"], num_particles=2),
        Y[:3],
        r"data of observed site 'y' have shape \(3,\): expected \(4,\), that of its distribution",
    ),
    "subsampled": (subsampled, Y, r"plate 'subject' is subsampled \(2 of 4 elements\)"),
    "subsample given": (subsample_given, Y, r"plate 'subject' is subsampled \(2 of 4 elements\)"),
    "count": (count_parameter, Y, "latent site 'n' is a Poisson, discrete without finite support"),
    "no support": (no_support, Y, "distribution of site 'a', Shaped, has no support: expected"),
    "no map": (
        no_map,
        Y,
        "distribution of site 'a', Shaped, has support PositiveSemidefinite.* no map",
    ),
    "moving support": (moving_support, Y, "support of site 'a' depends on other latent sites"),
    "randomness": (own_randomness, Y, "random numbers that are no sample sites.*hamflow.noise"),
    "data in place": (own_data, Y.clone(), "changes its data in place, or draws random numbers"),
}


@pytest.mark.parametrize("model, y, match", POTENTIALS.values(), ids=POTENTIALS)
def test_model_is_refused(model, y, match):
    with pytest.raises(ValueError, match=match):
        Potential(model, (y,))


def test_masked_nan_is_no_fault():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4), poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    potential = Potential(model, (with_nan(Y),))
    assert potential.value_of_one(torch.zeros(1), torch.zeros(0)).isfinite()


INITIAL = {
    "missing": ({"mu": torch.zeros(3)}, "`initial_params` lacks a value for site 'x'"),
    "unknown": (
        {"mu": torch.zeros(3), "x": torch.zeros(3, 4), "w": torch.zeros(3)},
        r"`initial_params` names 'w': expected \['mu', 'x'\]",
    ),
    "no chains": (
        {"mu": torch.tensor(0.0), "x": torch.zeros(3, 4)},
        r"`initial_params` of site 'mu' has shape \(\): expected \(3,\), chains first",
    ),
    "other shape": (
        {"mu": torch.zeros(3), "x": torch.zeros(3, 5)},
        r"`initial_params` of site 'x' has shape \(3, 5\): expected \(3, 4\), chains first",
    ),
}


@pytest.mark.parametrize("values, match", INITIAL.values(), ids=INITIAL)
def test_initial_values_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        Potential(model, (Y,)).ravel(values, 3)


def impossible(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Poisson(a.exp()).expand([4]).to_event(1), obs=-y.abs())


def steep(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    root = (a - a.detach()).abs().sqrt()  # zero, with an infinite slope
    pyro.sample("y", dist.Normal(root, 1.0).expand([4]).to_event(1), obs=y)


def impossible_local(y):
    with pyro.plate("subject", 4):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Poisson(x.exp()), obs=-y.abs())


NO_START = {
    "observed site": (impossible, r"observed site 'y' has log density (-inf|nan)"),
    "gradient": (steep, "the gradient of the log density is not finite"),
    "estimate": (
        marginalize(impossible_local, ["x"], num_particles=2, proposal="prior"),
        "likelihood estimate 'x_log_likelihood' has log density (-inf|nan); 4 of 4 data of "
        r"observed site 'y' lie outside its support, IntegerGreaterThan\(lower_bound=0\)",
    ),
}


@pytest.mark.parametrize("model, match", NO_START.values(), ids=NO_START)
def test_want_of_a_start_names_the_site(model, match):
    potential = Potential(model, (Y,), separate_noise=True)
    with pytest.raises(ValueError, match="no finite starting point in 100 tries: " + match):
        find_start(potential, 2)
