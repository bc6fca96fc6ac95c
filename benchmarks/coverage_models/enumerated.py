"""Discrete latent variables, summed out by Pyro's enumeration."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

from benchmarks.coverage_models.data import Collection, binary, counts, labels, normal, values

ENUMERATIONS = Collection()


@ENUMERATIONS.case(y=values(0.0, 1.0, 10.0, 11.0, 12.0, 1.5, 9.0))
@config_enumerate
def gaussian_mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[label], scale), obs=y)


@ENUMERATIONS.case(y=normal(60, 2))
def gaussian_mixture_of_vectors(y):
    """Each component a vector of means and a Cholesky factor."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
        root = pyro.sample("root", dist.LKJCholesky(2, 1.0))
    with pyro.plate("data", len(y)):
        label = pyro.sample("label", dist.Categorical(weights))
        factor = scale[label].unsqueeze(-1) * root[label]
        pyro.sample("y", dist.MultivariateNormal(loc[label], scale_tril=factor), obs=y)


@ENUMERATIONS.case(y=normal(40))
def low_dim_gauss_mix(y):
    """Ordered means, the labels summed out by a mixture distribution."""
    steps = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
    mu = pyro.sample("mu", dist.TransformedDistribution(steps, dist.transforms.OrderedTransform()))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


@ENUMERATIONS.case(y=normal(50))
def dirichlet_process(y):
    """Sticks broken off eight times."""
    concentration = pyro.sample("concentration", dist.Gamma(2.0, 1.0))
    with pyro.plate("sticks", 7):
        beta = pyro.sample("beta", dist.Beta(1.0, concentration))
    rest = torch.nn.functional.pad((1 - beta).cumprod(-1), (1, 0), value=1.0)
    weights = torch.nn.functional.pad(beta, (0, 1), value=1.0) * rest
    with pyro.plate("components", 8):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(mu[label], 0.5), obs=y)


@ENUMERATIONS.case(words=labels(12, 6, of=8))
def lda(words):
    """Topics of six words of twelve documents."""
    with pyro.plate("topic_plate", 3):
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(8) / 8))
    with pyro.plate("documents", 6):
        topics = pyro.sample("topics", dist.Dirichlet(torch.ones(3) / 3))
        with pyro.plate("words", 12):
            topic = pyro.sample("topic", dist.Categorical(topics))
            pyro.sample("word", dist.Categorical(topic_words[topic]), obs=words)


@ENUMERATIONS.case(notes=binary(8, 5))
def music_hmm(notes):
    """The first model of Pyro's music example, on one sequence."""
    rows = 0.9 * torch.eye(4) + 0.1
    moves = pyro.sample("moves", dist.Dirichlet(rows).to_event(1))
    tones = pyro.sample("tones", dist.Beta(0.1, 0.9).expand([4, 5]).to_event(2))
    plate = pyro.plate("tone", 5, dim=-1)
    x = 0
    for t in pyro.markov(range(len(notes))):
        x = pyro.sample(f"x_{t}", dist.Categorical(moves[x]))
        with plate:
            share = tones[x.squeeze(-1)]
            pyro.sample(f"y_{t}", dist.Bernoulli(share), obs=notes[t])


@ENUMERATIONS.case(y=binary(3, 6))
def hmm_of_sequences(y):
    """Several sequences of unequal lengths, ends masked away."""
    lengths = torch.tensor([6, 4, 3])
    moves = pyro.sample("moves", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    share = pyro.sample("share", dist.Beta(1.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("sequences", len(y), dim=-1):
        x = 0
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=t < lengths):
                x = pyro.sample(f"x_{t}", dist.Categorical(moves[x]))
                pyro.sample(f"y_{t}", dist.Bernoulli(share[x]), obs=y[:, t])


@ENUMERATIONS.case(y=normal(20))
def discrete_hmm(y):
    """All steps in one distribution that runs forward in parallel."""
    start = pyro.sample("start", dist.Dirichlet(torch.ones(2)))
    moves = pyro.sample("moves", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    hmm = dist.DiscreteHMM(start.log(), moves.log(), dist.Normal(loc, 1.0), duration=len(y))
    pyro.sample("y", hmm, obs=y)


@ENUMERATIONS.case(step=normal(4, 7), kind=labels(4, of=2))
def mixed_hmm(step, kind):
    """States of seals: their groups have effects on how they move between states."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    logits = pyro.sample("logits", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
    effect = pyro.sample("effect", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("seals", len(step), dim=-1):
        x = torch.tensor(0)
        for t in pyro.markov(range(step.shape[1])):
            moves = logits[x] + effect[kind].unsqueeze(-1) * torch.tensor([0.0, 1.0])
            x = pyro.sample(f"x_{t}", dist.Categorical(logits=moves))
            pyro.sample(f"step_{t}", dist.Normal(loc[x], 1.0), obs=step[:, t])


@ENUMERATIONS.case(y=counts(40))
def change_point(y):
    """Coal-mining disasters: the year of the change is summed out."""
    early = pyro.sample("early", dist.Exponential(1.0))
    late = pyro.sample("late", dist.Exponential(1.0))
    change = pyro.sample("change", dist.Categorical(torch.ones(len(y))))
    rate = torch.where(torch.arange(len(y)) < change.unsqueeze(-1), early, late)
    pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


@ENUMERATIONS.case(y=binary(6, 2))
def toy_mixture(y):
    """Sums over a small tree of discrete causes."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0).expand([4]).to_event(1))
    with pyro.plate("data", len(y)):
        cause = pyro.sample("cause", dist.Bernoulli(share[0]))
        effect = pyro.sample("effect", dist.Bernoulli(share[1 + cause.long()]))
        family = dist.Bernoulli(0.2 + 0.6 * effect * share[3])
        pyro.sample("first", family, obs=y[:, 0])
        pyro.sample("second", dist.Bernoulli(0.3 + 0.4 * cause), obs=y[:, 1])


def _life(alive, seen, survival, capture, caught, t):
    """One period of a capture-recapture model; returns who lives and who was ever seen."""
    share = alive * survival
    alive = pyro.sample(f"alive_{t}", dist.Bernoulli(share))
    pyro.sample(f"caught_{t}", dist.Bernoulli(capture * alive), obs=caught)
    return alive, seen | caught.bool()


@ENUMERATIONS.case(caught=binary(15, 5))
def capture_recapture(caught):
    """Animals first seen at different times, those not yet seen masked away."""
    survival = pyro.sample("survival", dist.Uniform(0.0, 1.0))
    capture = pyro.sample("capture", dist.Uniform(0.0, 1.0))
    with pyro.plate("animals", len(caught), dim=-1):
        alive, seen = torch.ones(len(caught)), torch.zeros(len(caught), dtype=torch.bool)
        for t in pyro.markov(range(caught.shape[1])):
            with poutine.mask(mask=seen):
                alive, seen = _life(alive, seen, survival, capture, caught[:, t], t)


@ENUMERATIONS.case(caught=binary(15, 5))
def capture_recapture_by_time(caught):
    """Survival differs between periods, as fixed draws in the loop."""
    capture = pyro.sample("capture", dist.Uniform(0.0, 1.0))
    animals = pyro.plate("animals", len(caught), dim=-1)
    alive, seen = torch.ones(len(caught)), torch.zeros(len(caught), dtype=torch.bool)
    for t in pyro.markov(range(caught.shape[1])):
        survival = pyro.sample(f"survival_{t}", dist.Uniform(0.0, 1.0))
        with animals, poutine.mask(mask=seen):
            alive, seen = _life(alive, seen, survival, capture, caught[:, t], t)


@ENUMERATIONS.case(caught=binary(15, 5))
def capture_recapture_random(caught):
    """Survival with a random effect of each period, on the logit scale."""
    mean = torch.logit(pyro.sample("mean", dist.Uniform(0.0, 1.0)))
    spread = pyro.sample("spread", dist.Uniform(0.0, 10.0))
    capture = pyro.sample("capture", dist.Uniform(0.0, 1.0))
    animals = pyro.plate("animals", len(caught), dim=-1)
    alive, seen = torch.ones(len(caught)), torch.zeros(len(caught), dtype=torch.bool)
    for t in pyro.markov(range(caught.shape[1])):
        logit = pyro.sample(f"logit_{t}", dist.Normal(mean, spread))
        with animals, poutine.mask(mask=seen):
            alive, seen = _life(alive, seen, torch.sigmoid(logit), capture, caught[:, t], t)


@ENUMERATIONS.case(y=normal(10, 3))
@config_enumerate
def indexed_cells(y):
    """A table of means looked up by an enumerated row and a plate's column."""
    with pyro.plate("column", 3, dim=-1), pyro.plate("row", 2, dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y), dim=-2):
        row = pyro.sample("row_of", dist.Categorical(torch.tensor([0.3, 0.7])))
        with pyro.plate("cell", 3, dim=-1):
            loc = Vindex(mean)[row, torch.arange(3)]
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@ENUMERATIONS.case(y=normal(30), x=normal(30))
def switching_regression(y, x):
    """Two regimes that follow each other, each a regression of its own."""
    stay = pyro.sample("stay", dist.Beta(10.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
    moves = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    loc = beta[:, 0] + beta[:, 1] * x[:, None]
    hmm = dist.DiscreteHMM(torch.zeros(2), moves.log(), dist.Normal(loc, 0.5))
    pyro.sample("y", hmm, obs=y)
