"""Sites of every support, and of none, have the posterior that the model says."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import biject_to, constraints

from pyro_hamflow import HMC, MCMC, AutoNeuralHamiltonianFlow
from pyro_hamflow.model import runs
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.supports import Direction, LogCholesky, StickBreaking
from tests.helpers.laws import LIMIT, scores

CHAINS = 24


def run(model, num_samples=100, num_chains=CHAINS):
    """Draws of many chains, in the sites' supports, chains first; the model must be captured."""
    pyro.set_rng_seed(3)
    mcmc = MCMC(HMC(model), num_samples=num_samples, warmup_steps=150, num_chains=num_chains)
    mcmc.run()
    assert mcmc.kernel.potential.programs.fallback_reason is None
    return mcmc.get_samples(group_by_chain=True)


def check(statistics):
    """Compares the means of some statistics of draws with their truths."""
    values = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64) for v, _ in statistics.values()], -1
    )
    truths = torch.tensor([float(truth) for _, truth in statistics.values()])
    off = dict(zip(statistics, scores(values.numpy(), truths.numpy()), strict=True))
    assert all(abs(score) < LIMIT for score in off.values()), off


def turns(*angles):
    """A grid over whole turns of several angles."""
    grid = torch.linspace(-math.pi, math.pi, 401)[:-1]
    return torch.stack(torch.meshgrid(*[grid] * len(angles or (0,)), indexing="ij"), -1)


def test_circular_sites():
    """Angles are wrapped, whether the model repeats itself with every turn or not."""

    def model():
        near = pyro.sample("near", dist.VonMises(3.0, 2.0))  # on both sides of the cut
        pyro.sample("y", dist.VonMises(near, 1.0), obs=torch.tensor(-3.0))
        wide = pyro.sample("wide", dist.VonMises(0.0, 0.1))
        pyro.sample("z", dist.Normal(wide, 1.5), obs=torch.tensor(2.0))  # not periodic
        pyro.sample("pair", dist.SineBivariateVonMises(0.1, 0.2, 2.0, 3.0, 1.0))

    draws = run(model)
    for name in ("near", "wide", "pair"):
        assert bool((draws[name].abs() <= math.pi).all())
    # The product of two such densities is another one, whose mean direction is a sum of vectors.
    x = 2.0 * math.cos(3.0) + math.cos(-3.0)
    y = 2.0 * math.sin(3.0) + math.sin(-3.0)
    size, at = torch.tensor(math.hypot(x, y)), math.atan2(y, x)
    grid = turns()[..., 0]
    density = (
        dist.VonMises(0.0, 0.1).log_prob(grid) + dist.Normal(grid, 1.5).log_prob(torch.tensor(2.0))
    ).exp()
    plane = turns(0, 0)
    pair = dist.SineBivariateVonMises(0.1, 0.2, 2.0, 3.0, 1.0).log_prob(plane).exp()
    difference = (plane[..., 0] - plane[..., 1]).cos()
    check(
        {
            "cos near": (
                (draws["near"] - at).cos(),
                torch.special.i1(size) / torch.special.i0(size),
            ),
            "sin near": ((draws["near"] - at).sin(), 0.0),
            "wide": (draws["wide"], (grid * density).sum() / density.sum()),
            "difference": (
                (draws["pair"][..., 0] - draws["pair"][..., 1]).cos(),
                (difference * pair).sum() / pair.sum(),
            ),
        }
    )


def test_guides_refuse_angles():
    def model():
        pyro.sample("angle", dist.VonMises(0.0, 1.0).expand([2]).to_event(1))

    with pytest.raises(ValueError, match="'angle' is an angle .* `torch.atan2` is the angle"):
        AutoNeuralHamiltonianFlow(model)()


def test_improper_sites():
    def model():
        with pyro.plate("part", 2):
            rate = pyro.sample("rate", dist.ImproperUniform(constraints.positive, (), ()))
            pyro.sample("of_rate", dist.Gamma(3.0, 1.0), obs=rate)
        level = pyro.sample("level", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(level, 2.0).expand([4]).to_event(1), obs=torch.arange(4.0))
        ordered = dist.ImproperUniform(dist.constraints.ordered_vector, (), (3,))
        values = pyro.sample("ordered", ordered)
        pyro.sample("of_ordered", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=values)

    draws = run(model)
    check(
        {
            "rate": (draws["rate"][..., 0], 3.0),
            "its square": (draws["rate"][..., 1].square(), 12.0),
            "level": (draws["level"], 1.5),
            "its variance": ((draws["level"] - 1.5).square(), 1.0),
            # Order statistics of three normal numbers.
            "largest": (draws["ordered"][..., 2], 1.5 / math.sqrt(math.pi)),
            "middle": (draws["ordered"][..., 1], 0.0),
        }
    )


def test_an_improper_posterior_is_refused():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), (3,)))
        pyro.sample("y", dist.Normal(x[:2], 1.0).to_event(1), obs=torch.zeros(2))

    with pytest.raises(
        ValueError, match="'x' is improper: its prior is flat, and .* on 1 of its 3"
    ):
        Potential(model)


def test_bounded_improper_sites_need_no_data():
    def model():
        pyro.sample("x", dist.ImproperUniform(constraints.interval(1.0, 3.0), (2,), ()).to_event(1))

    check({"x": (run(model, 50)["x"][..., 1], 2.0)})


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # in prior draws, by torch
def test_directions_and_matrices():
    def model():
        pyro.sample("circle", dist.ProjectedNormal(torch.tensor([1.5, 0.0])))
        pyro.sample("sphere", dist.VonMises3D(torch.tensor([0.0, 2.0, 0.0])))
        with pyro.plate("matrices", 2):
            pyro.sample("wishart", dist.Wishart(torch.tensor(5.0), torch.eye(2)))
        pyro.sample("corr", dist.LKJ(3, 2.0))
        pyro.sample("root", dist.LKJCholesky(3, 2.0))

    chains = 100  # of few, means of a skewed cosine are no sample of a normal
    draws = run(model, num_chains=chains)
    angle = turns()
    around = torch.cat([angle.cos(), angle.sin()], -1)
    density = dist.ProjectedNormal(torch.tensor([1.5, 0.0])).log_prob(around).exp()
    assert abs(density.mean() * 2 * math.pi - 1.0) < 1e-6
    torch.testing.assert_close(draws["sphere"].norm(dim=-1), torch.ones(chains, 100))
    log_det = 2 * math.log(2.0) + torch.special.digamma(torch.tensor([2.5, 2.0])).sum()
    check(
        {
            "circle": (draws["circle"][..., 0], (around[:, 0] * density).sum() / density.sum()),
            "sphere": (draws["sphere"][..., 1], 1 / math.tanh(2.0) - 0.5),
            "wishart": (draws["wishart"][..., 0, 0, 0], 5.0),
            "its square": (draws["wishart"][..., 1, 1, 1].square(), 35.0),
            "its determinant": (draws["wishart"][..., 0, :, :].logdet(), log_det),
            # A correlation's distance from the ends has a symmetric beta distribution.
            "corr": (draws["corr"][..., 0, 2].square(), 1 / 6),
            "root": (draws["root"][..., 1, 0].square(), 1 / 6),
        }
    )


def test_volume_of_matrices():
    """By the determinant of the map's Jacobian on the entries that are free."""
    transform, x = LogCholesky(), torch.linspace(-0.7, 1.1, 6)
    row, column = torch.tril_indices(3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda z: transform(z)[row, column], x)
    matrix = transform(x)
    torch.testing.assert_close(
        transform.log_abs_det_jacobian(x, matrix), torch.linalg.slogdet(jacobian)[1]
    )
    torch.testing.assert_close(transform.inv(matrix), x)


@pytest.mark.parametrize("size", [2, 5, 300])
def test_coordinates_of_the_simplex_are_those_of_torch(size):
    transform, other = StickBreaking(), biject_to(constraints.simplex)
    x = torch.randn(3, size - 1)
    share = transform(x)
    torch.testing.assert_close(share, other(x))
    torch.testing.assert_close(transform.inv(share), x)
    torch.testing.assert_close(
        transform.log_abs_det_jacobian(x, share), other.log_abs_det_jacobian(x, other(x))
    )


@pytest.mark.parametrize("end", [-60.0, 60.0])
def test_small_shares_keep_their_density_in_single_precision(end):
    """Far out the density falls by the concentrations that go to zero there.

    Torch's map is flat below e to the power of -87, so that nothing holds a sampler there, and
    keeps what is left of the stick above e to the power of -17.
    """
    fn = dist.Dirichlet(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float32))

    def log_density(transform, x):
        share = transform(x)
        return fn.log_prob(share) + transform.log_abs_det_jacobian(x, share)

    x = torch.tensor([[end, 0.5], [1.2 * end, 0.5]], dtype=torch.float32)
    near, far = log_density(StickBreaking(), x)
    rate = 0.1 if end < 0.0 else 0.2 + 0.3
    assert abs((near - far) / (0.2 * abs(end)) - rate) < 1e-4
    lost = log_density(biject_to(constraints.simplex), 2.0 * x)
    assert abs((lost[0] - lost[1]) / (0.4 * abs(end)) - rate) > 0.09


def test_sparse_shares_in_single_precision():
    def model():
        pyro.sample("share", dist.Dirichlet(torch.full((4,), 0.2, dtype=torch.float32)))

    draws = run(model, num_samples=200)["share"]
    logs = draws.double().log()
    digamma = torch.special.digamma(torch.tensor([0.2, 0.8]))
    log_mean = float(digamma[0] - digamma[1])
    check(
        {f"share {i}": (draws[..., i], 0.25) for i in range(4)}
        | {f"its logarithm {i}": (logs[..., i], log_mean) for i in range(4)}
    )


def test_density_of_directions_integrates_to_one():
    grid = torch.linspace(-6.0, 6.0, 200)  # without the origin
    plane = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    transform, fn = Direction(), dist.ProjectedNormal(torch.tensor([1.5, 0.0]))
    direction = transform(plane)
    log_density = fn.log_prob(direction) + transform.log_abs_det_jacobian(plane, direction)
    total = log_density.exp().sum() * (grid[1] - grid[0]) ** 2
    assert abs(total - 1.0) < 1e-3
    without_length = fn.log_prob(direction).exp().sum() * (grid[1] - grid[0]) ** 2
    assert abs(without_length - 1.0) > 1.0


SHIFTED = {
    "exponential": (dist.Exponential(1.0), [dist.transforms.AffineTransform(2.0, 1.0)]),
    "mirrored": (dist.HalfNormal(3.0), [dist.transforms.AffineTransform(0.0, -1.0)]),
    "interval": (dist.Uniform(0.0, 1.0), [dist.transforms.AffineTransform(-1.0, 2.0)]),
    "logarithm": (dist.Uniform(-1.0, 2.0), [dist.transforms.ExpTransform()]),
    "whole": (dist.Normal(0.5, 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]),
    "nothing": (dist.Normal(0.5, 1.0), []),
}


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("event", [0, 1])
def test_a_transformed_variable_lies_where_its_base_does(name, event):
    """Over the line the density of a likelihood and a prior integrates to what base draws give."""
    base, transforms = SHIFTED[name]
    fn = dist.TransformedDistribution(base, transforms).expand([1]).to_event(event)

    def model():
        x = pyro.sample("x", fn)
        pyro.factor("likelihood", -x.sum().square())

    potential = Potential(model)
    line = torch.linspace(-40.0, 40.0, 40_001).double()[:, None].to(potential.example)
    value = potential.value(line, potential.draw_noise(len(line))).double()
    total = float((-value).exp().sum() * (line[1] - line[0]))
    x = base.icdf((torch.arange(100_000) + 0.5) / 100_000)
    for transform in transforms:
        x = transform(x)
    assert abs(total / float((-x.square()).exp().mean()) - 1.0) < 2e-3


@pytest.mark.slow
def test_heavy_tails_and_intervals():
    def model():
        pyro.sample("half_cauchy", dist.HalfCauchy(1.0))
        pyro.sample("log_normal", dist.LogNormal(0.5, 1.5))
        pyro.sample("pareto", dist.Pareto(1.0, 1.5))
        low, high = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 5.0])
        pyro.sample("uniform", dist.Uniform(low, high).to_event(1))
        share = dist.Uniform(dist.Normal(0.0, 1.0).cdf(torch.tensor(0.5)), 1.0 - 1e-12)
        quantile = dist.transforms.CumulativeDistributionTransform(dist.Normal(0.0, 1.0)).inv
        pyro.sample("truncated", dist.TransformedDistribution(share, quantile))
        pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5])))

    draws = run(model)
    normal = dist.Normal(0.0, 1.0)
    half = torch.tensor(0.5)
    check(
        {
            "half_cauchy": (draws["half_cauchy"] < 1.0, 0.5),
            "its tail": (draws["half_cauchy"] > 10.0, 1 - 2 * math.atan(10.0) / math.pi),
            "log_normal": (draws["log_normal"].log(), 0.5),
            "pareto": (draws["pareto"] > 4.0, 4.0**-1.5),
            "uniform": (draws["uniform"][..., 1].square(), 31 / 3),
            "truncated": (draws["truncated"], normal.log_prob(half).exp() / (1 - normal.cdf(half))),
            "simplex": (draws["simplex"][..., 1], 2 / 3.5),
            "its square": (draws["simplex"][..., 2].square(), 0.5 * 1.5 / (3.5 * 4.5)),
        }
    )


def test_sites_of_one_value_or_of_none():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        doubled = pyro.sample("doubled", dist.Delta(2.0 * m))
        pyro.sample("y", dist.Normal(doubled, 1.0), obs=torch.tensor(1.0))
        pyro.sample("penalty", dist.Unit(-(m**2)))
        empty = pyro.sample("empty", dist.Normal(0.0, 1.0).expand([0]).to_event(1))
        pyro.sample("z", dist.Normal(empty.sum(), 1.0), obs=torch.tensor(0.0))

    draws = run(model)
    assert draws["empty"].shape == (CHAINS, 100, 0)
    # Precision 1 of the prior, 4 of the observation, 2 of the penalty.
    check({"mean": (draws["m"], 2 / 7), "square": (draws["m"].square(), 1 / 7 + 4 / 49)})


def test_one_hot_labels_are_summed_out():
    def mixture(family):
        def model():
            m = pyro.sample("m", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
            with pyro.plate("data", 4):
                label = pyro.sample("label", family(torch.tensor([0.5, 0.3, 0.2])))
                mean = (label * m).sum(-1) if family is dist.OneHotCategorical else m[label]
                pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.arange(4.0))

        potential = Potential(model)
        return potential.gradients(*potential.vectors(3))[:2]

    torch.testing.assert_close(mixture(dist.OneHotCategorical), mixture(dist.Categorical))


SEEN = torch.tensor([True, False, True, True])


def imputing():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    y = torch.tensor([1.0, torch.nan, 0.0, 2.0])
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(m, 1.0).expand([4]), obs=y, obs_mask=SEEN)


def test_missing_data_are_imputed():
    draws = run(imputing)
    unseen = draws["y_unobserved"]
    # Three values are seen; all others are as the model would go on.
    check(
        {
            "m": (draws["m"], 0.75),
            "its square": (draws["m"].square(), 0.75**2 + 0.25),
            "unseen": (unseen[..., 1], 0.75),
            "its variance": ((unseen[..., 1] - 0.75).square(), 1.25),
            "beside": (unseen[..., 0], 0.75),
        }
    )


def test_without_a_prior_masked_entries_are_flat(monkeypatch):
    potential = Potential(imputing)
    position = torch.randn(3, 5)
    slope = potential.gradients(position, position[:, :0])[1]
    assert bool((slope != 0.0).all())
    monkeypatch.setattr(runs, "find_unused", lambda nodes, log_density: {})
    slope = Potential(imputing).gradients(position, position[:, :0])[1]
    assert slope.eq(0.0).all(0).tolist() == [False, True, False, True, True]


def test_series_of_unequal_lengths():
    """Values beyond the end keep their prior; up to it, all is as in models of single series."""
    lengths = torch.tensor([3, 1])

    def together():
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        z = torch.zeros(2)
        with pyro.plate("series", 2):
            for t in range(3):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, s))
                    pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=torch.full((2,), 0.5))

    potential = Potential(together)
    position = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    value = potential.value(position, position[:, :0])
    values = potential.constrain(position)
    s, z = values["s"][:, None], torch.stack([values[f"z_{t}"] for t in range(3)], 1)
    before = torch.cat([torch.zeros(3, 1, 2), z[:, :-1]], 1)
    prior = dist.Normal(before, s[..., None]).log_prob(z).sum((1, 2))
    seen = torch.arange(3)[:, None] < lengths
    likelihood = (dist.Normal(z, 1.0).log_prob(torch.tensor(0.5)) * seen).sum((1, 2))
    log_s = s[:, 0].log()
    expected = dist.Normal(0.0, 0.5).log_prob(log_s) + prior + likelihood
    torch.testing.assert_close(value, -expected)


@pytest.mark.parametrize("how", ["handler", "distribution"])
def test_masked_values_that_matter_are_left_to_the_data(how):
    """A mask is then a flat prior, as it is in Pyro."""

    def model():
        fn = dist.Normal(5.0, 0.1).expand([3])
        if how == "handler":
            with poutine.mask(mask=False):
                x = pyro.sample("x", fn.to_event(1))
        else:
            x = pyro.sample("x", fn.mask(torch.tensor([False, True, False])).to_event(1))
        pyro.sample("y", dist.Normal(x[:2], 2.0).to_event(1), obs=torch.zeros(2))

    potential = Potential(model)
    x = torch.tensor([[1.0, 1.0, 1.0]])
    slope = potential.gradients(x, x[:, :0])[1][0]
    own = (1.0 - 5.0) / 0.01  # of the prior
    if how == "distribution":
        # The first entry meets the data alone, the second both, the last is used by nothing.
        torch.testing.assert_close(slope, torch.tensor([0.25, 0.25 + own, own]))
    else:  # one event, of which a part is used: the whole stays masked
        torch.testing.assert_close(slope, torch.tensor([0.25, 0.25, 0.0]))


INTEGERS = {
    "Poisson": dist.Poisson(3.0),
    "Geometric": dist.Geometric(0.5),
    "Multinomial": dist.Multinomial(3, torch.ones(3) / 3),
}


@pytest.mark.parametrize("family", INTEGERS)
def test_whole_numbers_without_bounds_are_refused(family):
    def model():
        x = pyro.sample("x", INTEGERS[family])
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=f"'x' is a {family}, discrete .* such as a `Categorical`"):
        Potential(model)
