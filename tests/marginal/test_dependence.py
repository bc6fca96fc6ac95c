"""Dependence on local sites is told by a model's operations, and estimates come right."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from pyro_hamflow import MCMC, PseudoMarginalNUTS, marginalize, to_inference_data
from pyro_hamflow.marginal import dependence as analysis
from tests.helpers.estimates import assert_unbiased, estimates

SUBJECT = torch.tensor([3, 0, 0, 2, 1, 1, 1, 4, 4, 0])  # ragged, and in no order
TIME = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.3, -0.4, 1.1, 0.2, -1.0], dtype=torch.float64)
Y = torch.tensor([0.3, 1.2, -1.0, 0.4, 2.2, 0.9, 0.1, -0.6, 0.5, 1.4], dtype=torch.float64)
COUNT = 5
AT = {"mu": torch.tensor(0.4, dtype=torch.float64), "s": torch.tensor(0.8, dtype=torch.float64)}
OWN = torch.nn.functional.one_hot(SUBJECT, COUNT).double()


def parameters():
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    return mu, s


def local(mu, s, count=COUNT):
    with pyro.plate("subject", count):
        return pyro.sample("x", dist.Normal(mu, s))


def by_quadrature(log_likelihood):
    """The log marginal likelihoods, from the elements' log likelihoods at x ``(points, 1)``."""
    x = torch.linspace(-9.0, 9.0, 4001)[:, None]
    log_joint = dist.Normal(AT["mu"], AT["s"]).log_prob(x) + log_likelihood(x)
    return log_joint.logsumexp(0) + math.log(18.0 / 4000)


def of_rows(log_rows):
    """Sums rows, ``(points, rows)`` of x ``(points, 1)``, to their elements."""
    return by_quadrature(lambda x: log_rows(x) @ OWN)


# --- flat likelihoods, which hide what depends on what -------------------------------------------

FLAT = {
    "relu": lambda x: (x - 3).relu(),
    "clamp": lambda x: x.clamp(min=2.5),
    "step": lambda x: (x > 3).to(x.dtype),
    "where": lambda x: torch.where(x > 3, x, 3.0),
    "round": lambda x: x.round(),
}


@pytest.mark.parametrize("link", FLAT.values(), ids=FLAT)
def test_flat_likelihood_depends_on_its_site(link):
    def model(y):
        x = local(*parameters(), len(y))
        with pyro.plate("again", len(y)):
            pyro.sample("y", dist.Normal(link(x), 0.8), obs=y)

    exact = by_quadrature(lambda x: dist.Normal(link(x), 0.8).log_prob(Y[:5]))
    marginal = marginalize(model, ["x"], num_particles=64, proposal="prior")
    assert_unbiased(estimates(marginal, AT, Y[:5])["x"], exact, resolution=0.05)


def relu_model(y):
    mean = pyro.sample("m", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal((x - 3).relu(), 0.3), obs=y)


def relu_mean(y):
    """The posterior mean by quadrature over x and m."""
    x, m = torch.linspace(-12.0, 14.0, 4001)[:, None, None], torch.linspace(-8.0, 10.0, 401)
    log_y = dist.Normal((x - 3).relu(), 0.3).log_prob(y[:, None])
    log_p = (dist.Normal(m, 1.0).log_prob(x) + log_y).logsumexp(0).sum(0)
    weight = (log_p + dist.Normal(0.0, 5.0).log_prob(m)).softmax(0)
    return float(weight @ m)


def test_posterior_behind_a_flat_likelihood():
    y = torch.tensor([0.1, 1.3, 0.0, 0.8, -0.1, 0.4, 1.9, 0.2])
    kernel = PseudoMarginalNUTS(marginalize(relu_model, ["x"], num_particles=32, proposal="prior"))
    mcmc = MCMC(kernel, num_samples=400, warmup_steps=150, num_chains=4, disable_progbar=True)
    mcmc.run(y)
    m = mcmc.get_samples(group_by_chain=True)["m"].mean(1)
    error = float(m.std()) / 2
    assert error < 0.05
    assert abs(float(m.mean()) - relu_mean(y)) < 4 * max(error, 0.015)


# --- data in long format --------------------------------------------------------------------------


def intercepts(y, read=lambda x: x[SUBJECT], rows=dist.Normal):
    mu, s = parameters()
    x = local(mu, s)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(read(x) + 0.3 * TIME, 0.9), obs=y)


def intercepts_marginal():
    return of_rows(lambda x: dist.Normal(x + 0.3 * TIME, 0.9).log_prob(Y))


READERS = {
    "index": lambda x: x[..., SUBJECT],
    "index select": lambda x: x.index_select(-1, SUBJECT),
    "gather": lambda x: x.gather(-1, SUBJECT),
    "design matrix": lambda x: OWN @ x,
    "sparse design matrix": lambda x: torch.sparse.mm(OWN.to_sparse(), x[:, None])[:, 0],
    "einsum": lambda x: torch.einsum("ij,j->i", OWN, x),
    "written row by row": lambda x: torch.stack([x[int(i)] for i in SUBJECT]),
    "scattered": lambda x: torch.zeros(len(Y)).scatter(0, torch.arange(len(Y)), x[SUBJECT]),
    "masks": lambda x: sum(torch.where(SUBJECT == i, x[i], 0.0) for i in range(COUNT)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of sparse products
@pytest.mark.parametrize("proposal", ["prior", "laplace"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_rows_are_summed_to_their_elements(read, proposal):
    marginal = marginalize(intercepts, ["x"], num_particles=8, proposal=proposal)
    if proposal == "laplace":
        marginal.fit(Y, read, pilot={"mu": torch.tensor(0.0), "s": torch.tensor(1.2)})
    found = estimates(marginal, AT, Y, read)["x"]
    assert_unbiased(found, intercepts_marginal(), resolution=0.05)
    if proposal == "laplace":
        assert found.std(0).max() < 0.1  # the rows of a subject shape its proposal


def slopes(y):
    mu, s = parameters()
    with pyro.plate("subject", COUNT):
        x = pyro.sample("x", dist.Normal(mu, s).expand([2]).to_event(1))
    z = torch.stack([torch.ones_like(TIME), TIME], -1)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((x[SUBJECT] * z).sum(-1), 0.9), obs=y)


def gaussian_rows(mean, covariance):
    """Log densities of each subject's rows, whose joint law is Gaussian."""
    parts = []
    for i in range(COUNT):
        rows = (SUBJECT == i).nonzero()[:, 0]
        law = dist.MultivariateNormal(mean[rows], covariance[rows[:, None], rows])
        parts.append(law.log_prob(Y[rows]))
    return torch.stack(parts)


def slopes_marginal():
    z = torch.stack([torch.ones_like(TIME), TIME], -1)
    return gaussian_rows(AT["mu"] * z.sum(-1), AT["s"] ** 2 * z @ z.mT + 0.81 * torch.eye(10))


def two_terms(y):
    """A wide term of each subject, and rows; one row that no subject enters."""
    mu, s = parameters()
    with pyro.plate("subject", COUNT):
        x = pyro.sample("x", dist.Normal(mu, s))
        pyro.sample("first", dist.Normal(x, 1.0), obs=y[:COUNT])
    with pyro.plate("row", len(y)), poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(x[SUBJECT], 0.9).mask(TIME > -0.5), obs=y)


def two_terms_marginal():
    def log_likelihood(x):
        rows = torch.where(TIME > -0.5, dist.Normal(x, 0.9).log_prob(Y), 0.0)
        return dist.Normal(x, 1.0).log_prob(Y[:COUNT]) + 0.5 * rows @ OWN

    return by_quadrature(log_likelihood)


def grid_of_rows(y):
    """Rows in two plates of their own, beside the subjects'."""
    mu, s = parameters()
    with pyro.plate("subject", COUNT, dim=-1):
        x = pyro.sample("x", dist.Normal(mu, s))
    with pyro.plate("day", 2, dim=-2), pyro.plate("hour", 5, dim=-1):
        pyro.sample("y", dist.Normal(x[SUBJECT.reshape(2, 5)], 0.9), obs=y.reshape(2, 5))


def subjects_deep(y):
    """The subjects' plate lies left of the rows'."""
    mu, s = parameters()
    with pyro.plate("subject", COUNT, dim=-2):
        x = pyro.sample("x", dist.Normal(mu, s))
    with pyro.plate("row", len(y), dim=-1):
        pyro.sample("y", dist.Normal(x[SUBJECT, 0], 0.9), obs=y)


def plain_marginal():
    return of_rows(lambda x: dist.Normal(x, 0.9).log_prob(Y))


def as_factor(y):
    x = local(*parameters())
    pyro.factor("fit", dist.Normal(x[SUBJECT], 0.9).log_prob(y))


def two_sites(y):
    mu, s = parameters()
    with pyro.plate("subject", COUNT):
        x = pyro.sample("x", dist.Normal(mu, s))
        w = pyro.sample("w", dist.Normal(0.5 * x, 0.7))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x[SUBJECT] + w[SUBJECT] * TIME, 0.9), obs=y)


def two_sites_marginal():
    z = torch.stack([torch.ones_like(TIME), TIME], -1)
    variance = AT["s"] ** 2
    joint = torch.stack(
        [
            torch.stack([variance, 0.5 * variance]),
            torch.stack([0.5 * variance, 0.25 * variance + 0.49]),
        ]
    )
    mean = AT["mu"] * (1 + 0.5 * TIME)
    return gaussian_rows(mean, z @ joint @ z.mT + 0.81 * torch.eye(10))


LONG = {
    "random slopes": (slopes, ["x"], slopes_marginal),
    "two terms": (two_terms, ["x"], two_terms_marginal),
    "two plates of rows": (grid_of_rows, ["x"], plain_marginal),
    "subjects left of rows": (subjects_deep, ["x"], plain_marginal),
    "factor": (as_factor, ["x"], plain_marginal),
    "two sites": (two_sites, ["x", "w"], two_sites_marginal),
}


@pytest.mark.parametrize("proposal", ["prior", "laplace"])
@pytest.mark.parametrize("model, sites, exact", LONG.values(), ids=LONG)
def test_unbiased_in_long_format(model, sites, exact, proposal):
    marginal = marginalize(model, sites, num_particles=16, proposal=proposal)
    if proposal == "laplace":
        marginal.fit(Y, pilot={"mu": torch.tensor(0.0), "s": torch.tensor(1.2)})
    assert_unbiased(estimates(marginal, AT, Y)["_".join(sites)], exact(), resolution=0.05)


def test_rows_of_no_element_count_once():
    """A row whose index says that no subject enters it."""

    def model(y):
        mu, s = parameters()
        x = local(mu, s)
        padded = torch.cat([x, mu[None]])
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(padded[index], 0.9), obs=y)

    index = torch.where(TIME > 0.9, COUNT, SUBJECT)
    marginal = marginalize(model, ["x"], num_particles=8)
    marginal.fit(Y, pilot=AT)
    trace = poutine.trace(poutine.condition(marginal, AT)).get_trace(Y)
    trace.compute_log_prob()
    alone = dist.Normal(AT["mu"], 0.9).log_prob(Y)[index == COUNT].sum()
    assert torch.allclose(trace.nodes["y"]["log_prob_sum"], alone)
    own = torch.where((index < COUNT)[:, None], OWN, 0.0)
    exact = by_quadrature(lambda x: dist.Normal(x, 0.9).log_prob(Y) @ own)
    assert_unbiased(estimates(marginal, AT, Y)["x"], exact, resolution=0.05)


def test_sabotaged_rows_are_noticed(monkeypatch):
    def shifted(tensor: Tensor) -> Tensor:
        return torch.where(tensor > 1, tensor - 1, tensor)

    found = analysis.trace_owners
    monkeypatch.setattr(
        analysis,
        "trace_owners",
        lambda *args: {
            name: owners._replace(of=shifted(owners.of)) if name == "y" else owners
            for name, owners in found(*args).items()
        },
    )
    marginal = marginalize(intercepts, ["x"], num_particles=8, proposal="prior")
    log_estimates = estimates(marginal, AT, Y)["x"]
    with pytest.raises(AssertionError):
        assert_unbiased(log_estimates, intercepts_marginal(), resolution=0.5)


# --- what is refused, by name ---------------------------------------------------------------------


def path(y):
    x = local(*parameters(), len(y))
    with pyro.plate("again", len(y)):
        pyro.sample("y", dist.Normal(x.cumsum(-1), 1.0), obs=y)


def coupled_prior(y):
    x = local(*parameters(), len(y))
    pyro.factor("smooth", -(x.diff() ** 2).sum())
    with pyro.plate("again", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def flat_neighbour(y):
    mu, s = parameters()
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.Normal(mu, s))
        pyro.sample("y", dist.Normal(x + (x.roll(1) - 50).relu(), 1.0), obs=y)


def memberships(y):
    x = local(*parameters())
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(0.5 * (x[SUBJECT] + x[SUBJECT.flip(0)]), 1.0), obs=y)


def crossed(y):
    mu, s = parameters()
    x = local(mu, s)
    with pyro.plate("item", 2):
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x[SUBJECT] + v[SUBJECT % 2], 1.0), obs=y)


def chosen_by_a_mask_of_its_own(y):
    x = local(*parameters(), len(y))
    pyro.factor("tail", x[x > 3].sum())


def chosen_by_a_mask_of_its_own_in_a_plate(y):
    x = local(*parameters(), len(y))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x[x > 3], 1.0), obs=y)


def branch(y):
    mu, s = parameters()
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.Normal(mu, s))
        pyro.sample("y", dist.Normal(x if x[0] > 0 else x.flip(0), 1.0), obs=y)


def branch_on_a_parameter(y):
    mu, s = parameters()
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.Normal(mu, s))
        pyro.sample("y", dist.Normal(x if s > 0.1 else x.flip(0), 1.0), obs=y)


def read_by_numpy(y, read=lambda x: torch.tensor(x.numpy())):
    x = local(*parameters(), len(y))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(read(x), 1.0), obs=y)


def read_as_a_list(y):
    read_by_numpy(y, lambda x: torch.tensor(x.tolist()))


def label_of_rows(y):
    mu, s = parameters()
    x = local(mu, s)
    with pyro.plate("row", len(y)):
        kind = pyro.sample("kind", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(x[SUBJECT] + kind, 1.0), obs=y)


def mask_of_its_own(y):
    mu, s = parameters()
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.Normal(mu, s))
        with poutine.mask(mask=x.flip(0) > 0):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


REFUSED = {
    "path": (path, ["x"], "'y' depends on local site 'x' .* meet in operation 'cumsum'"),
    "coupled prior": (coupled_prior, ["x"], "'smooth' depends on local site 'x'.*operation 'sub'"),
    "flat neighbour": (flat_neighbour, ["x"], "not independent .* operation 'add'"),
    "two members in a row": (memberships, ["x"], "'y' depends .* single entries .* several"),
    "crossed": (crossed, ["x", "v"], "'x' and 'v' meet in one term .* among the parameters"),
    "own mask": (chosen_by_a_mask_of_its_own, ["x"], "site 'x' cannot be told: .* 'index'"),
    "own mask in a plate": (
        chosen_by_a_mask_of_its_own_in_a_plate,
        ["x"],
        "shape of a result follows the values of latent .* 'index': Shape mismatch",
    ),
    "branch": (branch, ["x"], "what depends on site 'x' cannot be told: control flow"),
    "branch on a parameter": (branch_on_a_parameter, ["x"], "depends on site 's' cannot be told"),
    "numpy": (read_by_numpy, ["x"], "site 'x' cannot be told: the model takes .* out of torch"),
    "list": (read_as_a_list, ["x"], "site 'x' cannot be told: the model takes .* out of torch"),
    "label of rows": (label_of_rows, ["x"], "discrete site 'kind' lies in plate 'row', inside"),
    "mask": (mask_of_its_own, ["x"], "elements of plate 'subject' are not independent"),
}


@pytest.mark.parametrize("model, sites, match", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_integrated_out_is_refused(model, sites, match):
    with pytest.raises(ValueError, match=match):
        marginalize(model, sites, num_particles=2).plan(Y)


def test_crossed_effects_with_one_among_the_parameters():
    marginal = marginalize(crossed, ["x"], num_particles=2)
    structure = marginal.plan(Y).structure
    assert structure.parameters == ("mu", "s", "v")
    assert structure.groups[0].rows["y"].tolist() == SUBJECT.tolist()


def test_results_of_long_data_are_by_element():
    mcmc = MCMC(
        PseudoMarginalNUTS(marginalize(intercepts, ["x"], num_particles=8)),
        num_samples=5,
        warmup_steps=5,
        num_chains=2,
        disable_progbar=True,
    )
    mcmc.run(Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = to_inference_data(mcmc)
    assert dict(data.posterior.x.sizes) == {"chain": 2, "draw": 5, "subject": COUNT}
    assert dict(data.log_likelihood.y.sizes) == {"chain": 2, "draw": 5, "subject": COUNT}
    assert dict(data.observed_data.y.sizes) == {"row": len(Y)}
