"""Whitened models: the density is the model's own, and the noise is white where all is Gaussian."""

from __future__ import annotations

import functools
import math
import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

import pyro_hamflow as phf
from pyro_hamflow import whiten
from pyro_hamflow.model.potential import Potential

Y = torch.tensor([0.4, -1.2, 0.9, 2.1, 0.3, -0.2, 1.4], dtype=torch.float64)
COUNTS = torch.tensor([2.0, 0.0, 1.0, 4.0, 3.0, 1.0, 0.0], dtype=torch.float64)


def scales():
    one = torch.ones((), dtype=torch.float64)
    step = pyro.sample("step", dist.LogNormal(-0.5 * one, 0.5))
    error = pyro.sample("error", dist.LogNormal(-0.3 * one, 0.5))
    return step, error


class Walk(dist.TorchDistribution):
    """A random walk from N(0, 1), as one site of all times."""

    support = dist.constraints.real_vector
    arg_constraints = {}

    def __init__(self, step, length):
        self.step = step
        super().__init__(event_shape=(length,), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return self

    def sample(self, sample_shape=()):
        steps = torch.randn(self.event_shape, dtype=self.step.dtype)
        return torch.cat([steps[:1], self.step * steps[1:]]).cumsum(-1)

    def log_prob(self, x):
        first = dist.Normal(torch.zeros_like(self.step), 1.0).log_prob(x[0])
        return first + dist.Normal(x[:-1], self.step).log_prob(x[1:]).sum()


def level(y):  # one site of all times
    step, error = scales()
    x = pyro.sample("x", Walk(step, 7))
    pyro.sample("y", dist.Normal(x, error).to_event(1), obs=y)


def level_loop(y):  # a site for each time
    step, error = scales()
    x = pyro.sample("x_0", dist.Normal(torch.zeros_like(step), 1.0))
    pyro.sample("y_0", dist.Normal(x, error), obs=y[0])
    for t in pyro.markov(range(1, 7)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, step))
        pyro.sample(f"y_{t}", dist.Normal(x, error), obs=y[t])


def level_dense(y):  # the same as one multivariate normal
    step, error = scales()
    time = torch.arange(7, dtype=y.dtype)
    covariance = 1.0 + step**2 * torch.minimum(time, time[:, None])
    x = pyro.sample("x", dist.MultivariateNormal(torch.zeros_like(y), covariance))
    pyro.sample("y", dist.Normal(x, error).to_event(1), obs=y)


def counts(y):
    step, _ = scales()
    x = pyro.sample("x", Walk(step, 7))
    with pyro.plate("time", 7):
        pyro.sample("y", dist.Poisson(x.exp()), obs=y)


def two_states(y):  # level and slope, as two sites whose order has many bands
    step, error = scales()
    slope = pyro.sample("slope", Walk(0.3 * step, 7))
    with pyro.plate("time", 7):
        level = pyro.sample("level", dist.Normal(slope, step))
        pyro.sample("y", dist.StudentT(4.0, level, error), obs=y)


def panel(y):  # three short series of two states, as a loop in a plate
    step, error = scales()
    with pyro.plate("series", 3):
        x = torch.zeros((), dtype=y.dtype)
        for t in range(4):
            x = pyro.sample(f"x_{t}", dist.Normal(0.8 * x, step))
            pyro.sample(f"y_{t}", dist.Normal(x, error), obs=y[t : t + 3])


def positive(y):  # a path on the positive line, whose transitions are no normals
    step, error = scales()
    rate = torch.ones((), dtype=y.dtype)
    for t in range(4):
        rate = pyro.sample(f"rate_{t}", dist.Gamma(2.0 / step, 2.0 / (step * rate)))
        pyro.sample(f"y_{t}", dist.Normal(rate, error), obs=y[t])


def process(y):
    step, error = scales()
    place = torch.arange(7, dtype=y.dtype)
    kernel = (-0.5 * ((place - place[:, None]) / (1.0 + step)) ** 2).exp()
    kernel = error**2 * kernel + 1e-6 * torch.eye(7, dtype=y.dtype)
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros_like(y), kernel))
    pyro.sample("y", dist.Bernoulli(logits=f).to_event(1), obs=(y > 0).to(y))


def random_levels(y):  # a vector, not a path; and a site after it
    step, _ = scales()
    with pyro.plate("group", 7):
        x = pyro.sample("x", dist.Normal(step, step))
    error = pyro.sample("late", dist.LogNormal(torch.zeros_like(step), 1.0))
    pyro.sample("y", dist.Normal(x.cumsum(-1), error).to_event(1), obs=y)


def steps_of_levels(y):  # what sums up to a path, twice
    step, error = scales()
    with pyro.plate("time", 7):
        slope = pyro.sample("slope", dist.Normal(torch.zeros_like(step), 0.5))
        noise = pyro.sample("noise", dist.Normal(torch.zeros_like(step), 1.0))
        x = (step * noise + slope.cumsum(-1)).cumsum(-1)
        pyro.sample("y", dist.StudentT(4.0, x, error), obs=y)


def panel_of_steps(y):  # series side by side, summed along time
    step, error = scales()
    z = pyro.sample("z", dist.Normal(torch.zeros(2, 9, dtype=y.dtype), 1.0).to_event(2))
    x = step * z.cumsum(-1)
    pyro.sample("y", dist.Poisson(x.exp() + error).to_event(2), obs=torch.ones_like(x))


MODELS = {
    "level": (level, ["x"], Y),
    "level_loop": (level_loop, ["x"], Y),
    "level_dense": (level_dense, ["x"], Y),
    "counts": (counts, ["x"], COUNTS),
    "two_states": (two_states, ["slope", "level"], Y),
    "panel": (panel, [f"x_{t}" for t in range(4)], Y),
    "positive": (positive, [f"rate_{t}" for t in range(4)], Y.abs()),
    "process": (process, ["f"], Y),
    "random_levels": (random_levels, ["x"], Y),
    "steps_of_levels": (steps_of_levels, ["slope", "noise"], Y),
    "panel_of_steps": (panel_of_steps, ["z"], Y),
}
WIDTHS = {"level": 2, "level_loop": 2, "level_dense": None, "counts": 2, "two_states": 3}
WIDTHS |= {"panel": 2, "positive": 2, "process": None, "random_levels": 2}
WIDTHS |= {"steps_of_levels": 6, "panel_of_steps": 3}


@functools.cache
def whitened_model(name):
    """A whitened model and its data; fitted once for all tests."""
    model, sites, y = MODELS[name]
    return whiten(model, sites), y


def log_joint(model, values, *args):
    with poutine.block(), torch.no_grad():
        return poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum()


@pytest.mark.parametrize("name", MODELS)
def test_density_is_the_models_times_the_change_of_volume(name):
    model, _, _ = MODELS[name]
    whitened, y = whitened_model(name)
    fit = whitened.fit(y)
    sites = fit.prior.layout.names
    assert fit.prior.layout.width == WIDTHS[name]
    torch.manual_seed(1)
    for _ in range(3):
        trace = poutine.trace(poutine.block(model, hide=["y"])).get_trace(y)
        others = [n for n in trace.stochastic_nodes if n not in sites and "plate" not in n]
        others = {n: trace.nodes[n]["value"] for n in others if not trace.nodes[n]["is_observed"]}
        z = torch.randn_like(fit.u)

        def path(z, others=others):
            values = others | {f"{fit.prior.layout.names[0]}_white": z}
            nodes = poutine.trace(poutine.condition(whitened, values)).get_trace(y).nodes
            parts = [nodes[site.name]["value"] for site in fit.prior.layout.sites]
            return torch.cat([part.reshape(-1) for part in parts])

        volume = torch.autograd.functional.jacobian(path, z).slogdet()[1]
        sizes = [site.stop - site.start for site in fit.prior.layout.sites]
        parts = zip(fit.prior.layout.sites, path(z).split(sizes), strict=True)
        known = {site.name: part.reshape(site.shape) for site, part in parts}
        expected = log_joint(model, others | known, y) + volume
        found = log_joint(whitened, others | {f"{fit.prior.layout.names[0]}_white": z}, y)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def kalman(y, step, error):
    """The log likelihood of a random walk from N(0, 1) with normal errors."""
    mean, variance, total = 0.0, 1.0, 0.0
    for datum in y.tolist():
        spread = variance + error**2
        total -= 0.5 * (math.log(2.0 * math.pi * spread) + (datum - mean) ** 2 / spread)
        gain = variance / spread
        mean, variance = mean + gain * (datum - mean), variance * (1.0 - gain) + step**2
    return total


@pytest.mark.parametrize("name", ["level", "level_loop", "level_dense"])
def test_noise_is_white_whatever_the_parameters_where_all_is_gaussian(name):
    """And what is left is the likelihood by Kalman's filter."""
    whitened, y = whitened_model(name)
    noise_name = f"{whitened.fit(y).prior.layout.names[0]}_white"
    torch.manual_seed(2)
    for step, error in [(0.6, 0.7), (0.1, 0.5), (2.0, 3.0), (0.3, 0.05), (0.5, 1e-3)]:
        values = {"step": torch.tensor(step).double(), "error": torch.tensor(error).double()}
        z = 2.0 * torch.randn(7, dtype=torch.float64)
        found = log_joint(whitened, values | {noise_name: z}, y)
        prior = dist.LogNormal(-0.5, 0.5).log_prob(values["step"])
        prior += dist.LogNormal(-0.3, 0.5).log_prob(values["error"])
        noise = dist.Normal(0.0, 1.0).log_prob(z).sum()
        assert float(found - noise - prior) == pytest.approx(kalman(y, step, error), abs=1e-7)


def ragged(y):  # two series, of which one ends before the other
    step, error = scales()
    lengths, x, size = torch.tensor([7, 4]), torch.zeros(2, dtype=y.dtype), torch.ones_like(step)
    with pyro.plate("series", 2):
        for t in pyro.markov(range(7)):
            with poutine.mask(mask=t < lengths):
                x = pyro.sample(f"x_{t}", dist.Normal(x, size))
                pyro.sample(f"y_{t}", dist.Normal(x, error), obs=y[t])
            size = step


def test_paths_may_end_under_a_mask():
    """States beyond the end keep their own prior, so that their noise is white, too."""
    whitened, y = whiten(ragged, ["x"]), torch.stack([Y, Y.flip(0)], -1)
    values = {"step": torch.tensor(0.6).double(), "error": torch.tensor(0.7).double()}
    size = len(whitened.fit(y).u)
    z = torch.linspace(-2.0, 2.0, size, dtype=torch.float64)
    found = log_joint(whitened, values | {"x_0_white": z}, y)
    prior = dist.LogNormal(-0.5, 0.5).log_prob(values["step"])
    prior += dist.LogNormal(-0.3, 0.5).log_prob(values["error"])
    noise = dist.Normal(0.0, 1.0).log_prob(z).sum()
    expected = kalman(Y, 0.6, 0.7) + kalman(Y.flip(0)[:4], 0.6, 0.7)
    assert float(found - noise - prior) == pytest.approx(expected, abs=1e-7)


def unseen(y):  # a path that nothing follows from, as before there are data
    step, _ = scales()
    x = torch.zeros_like(step)
    for t in pyro.markov(range(3)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, step))


def test_paths_without_data_have_the_noise_of_their_prior():
    whitened = whiten(unseen, ["x"])
    assert len(whitened.fit(Y).u) == 3
    values = {"step": torch.tensor(0.6).double(), "error": torch.tensor(0.7).double()}
    z = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    prior = dist.LogNormal(-0.5, 0.5).log_prob(values["step"])
    prior += dist.LogNormal(-0.3, 0.5).log_prob(values["error"])
    found = log_joint(whitened, values | {"x_0_white": z}, Y)
    assert float(found - prior - dist.Normal(0.0, 1.0).log_prob(z).sum()) == pytest.approx(0.0)


def test_batched_gradients_are_those_of_the_model_in_python():
    for name in ("level_loop", "process", "panel", "positive"):
        whitened, y = whitened_model(name)
        potential = Potential(whitened, (y,))
        position, noise = potential.vectors(3)
        value, gradient, _ = potential.gradients(0.3 * position, noise)
        assert potential.programs.fallback_reason is None
        for i, row in enumerate(0.3 * position):
            row.requires_grad_()
            one = potential.value_of_one(row, noise[i])
            torch.testing.assert_close(value[i], one.detach())
            torch.testing.assert_close(gradient[i], torch.autograd.grad(one, row)[0])


def test_single_precision():
    double, _ = whitened_model("counts")
    y, one = COUNTS.float(), torch.ones((), dtype=torch.float32)
    z = torch.linspace(-1.0, 1.0, 7, dtype=torch.float32)
    values = {"step": 0.5 * one, "error": 0.7 * one, "x_white": z}

    def model(y):
        step = pyro.sample("step", dist.LogNormal(-0.5 * one, 0.5))
        pyro.sample("error", dist.LogNormal(-0.3 * one, 0.5))
        x = pyro.sample("x", Walk(step, 7))
        with pyro.plate("time", 7):
            pyro.sample("y", dist.Poisson(x.exp()), obs=y)

    single = whiten(model, ["x"])
    found = log_joint(single, values, y)
    assert single.fit(y).u.dtype == torch.float32
    exact = log_joint(double, {name: value.double() for name, value in values.items()}, COUNTS)
    assert float(found) == pytest.approx(float(exact), abs=2e-3)


def test_draws_from_the_prior_are_the_models():
    torch.manual_seed(3)
    draws = Predictive(whitened_model("panel")[0], num_samples=150)(Y)
    step, last = draws["step"], draws["x_3"].reshape(-1, 3)
    ratio = last / step / (1 + 0.64 + 0.64**2 + 0.64**3) ** 0.5  # standard normal
    assert abs(float(ratio.mean())) < 4.0 * 450**-0.5
    assert abs(float(ratio.square().mean()) - 1.0) < 4.0 * (2.0 / 450) ** 0.5


@pytest.mark.parametrize("name", ["process", "two_states"])
def test_noise_leads_back_to_the_path(name):
    whitened, y = whitened_model(name)
    fit = whitened.fit(y)
    parameters = {"step": torch.tensor(0.2).double(), "error": torch.tensor(0.7).double()}
    path, u = fit.map(parameters), fit.prior.draw(parameters)
    torch.testing.assert_close(path.forward(path.inverse(u)), u)


def test_posterior_is_that_of_a_grid():
    """Of one count, whose path is one number, and of the scale of its prior."""

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.7))
        x = pyro.sample("x", dist.Normal(torch.zeros(1), scale).to_event(1))
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    y = torch.tensor([6.0])
    mcmc = phf.MCMC(
        phf.NUTS(whiten(model, ["x"])), num_samples=100, warmup_steps=100, num_chains=20
    )
    mcmc.run(y)
    posterior = phf.to_inference_data(mcmc).posterior
    log_scale, x = torch.linspace(-4.0, 4.0, 400)[:, None], torch.linspace(-4.0, 5.0, 400)
    density = dist.Normal(0.0, 0.7).log_prob(log_scale) + dist.Poisson(x.exp()).log_prob(y)
    density = (density + dist.Normal(0.0, log_scale.exp()).log_prob(x)).exp()
    share = density / density.sum()
    for found, values in [(posterior["x"].values, x), (posterior["scale"].values, log_scale.exp())]:
        mean = (share * values).sum()
        sd = float(((share * values**2).sum() - mean**2).sqrt())
        assert abs(found.mean() - float(mean)) < 4.5 * sd / 600**0.5
        assert abs(found.std() / sd - 1.0) < 0.2


def test_samplers_and_guides_take_whitened_models():
    whitened, y = whitened_model("counts")
    guide = AutoNormal(whitened)
    svi = SVI(whitened, guide, Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    pyro_mcmc = PyroMCMC(NUTS(whitened), num_samples=3, warmup_steps=2, disable_progbar=True)
    pyro_mcmc.run(y)
    assert pyro_mcmc.get_samples()["x_white"].shape == (3, 7)


def test_predictions_follow_the_path_of_the_draws():
    whitened, y = whitened_model("two_states")
    z = torch.randn(3, 14)
    samples = {"step": torch.full((3,), 0.4), "error": torch.full((3,), 0.5), "slope_white": z}
    first = Predictive(whitened, samples)(y)
    again = Predictive(whitened, samples)(None)
    assert first["level"].shape == (3, 7)
    torch.testing.assert_close(again["level"], first["level"])
    assert again["y"].shape == (3, 7)


def forecast(y=None, length=7):
    step, error = scales()
    x = torch.zeros_like(step)
    for t in pyro.markov(range(length)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, step))
        pyro.sample(f"y_{t}", dist.Normal(x, error), obs=None if y is None else y[t])


def test_predictions_of_a_loop_follow_its_draws_and_go_on_from_there():
    """A loop named by what its sites have in common is the one of the draws without data, too."""
    whitened = whiten(forecast, ["x"])
    samples = {"step": torch.full((80,), 0.4), "error": torch.full((80,), 0.01)}
    samples |= {"x_0_white": torch.zeros(80, 7)}
    first = Predictive(whitened, samples)(10.0 * Y)
    later = Predictive(whitened, samples)(None, 9)
    for t in range(7):
        torch.testing.assert_close(later[f"x_{t}"], first[f"x_{t}"])
        assert (later[f"y_{t}"] - first[f"x_{t}"]).abs().max() < 0.05
    steps = later["x_8"] - first["x_6"]
    assert abs(steps.mean()) < 4.0 * (0.32 / 80) ** 0.5
    assert abs(steps.var() / 0.32 - 1.0) < 4.0 * (2.0 / 80) ** 0.5


@pytest.mark.parametrize("model", [counts, forecast])
def test_a_fit_serves_equal_data(model):
    whitened = whiten(model, ["x"])
    assert whitened.fit(COUNTS) is whitened.fit(COUNTS.clone())


def test_other_data_have_other_sites():
    whitened = whiten(counts, ["x"])
    first = whitened.fit(COUNTS)
    assert whitened.fit(COUNTS) is first
    assert whitened.fit(COUNTS.clone()) is first
    assert whitened.fit(COUNTS + 1.0) is not first


def test_a_fitted_model_is_pickled():
    whitened, y = whitened_model("counts")
    values = {"step": torch.tensor(0.4), "error": torch.tensor(0.5), "x_white": torch.ones(7)}
    again = pickle.loads(pickle.dumps(whitened))
    before, after = (
        poutine.trace(poutine.condition(model, values)).get_trace(y) for model in (whitened, again)
    )
    torch.testing.assert_close(after.nodes["x"]["value"], before.nodes["x"]["value"])
    torch.testing.assert_close(after.log_prob_sum(), before.log_prob_sum())


def mean_after(y):
    x = pyro.sample("x_0", dist.Normal(torch.zeros(()), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 1.0))
    x = pyro.sample("x_1", dist.Normal(x, scale))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y[0])


def switching(y):
    state = pyro.sample("state", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})
    x = pyro.sample("x", dist.Normal(state, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y[0])


@pytest.mark.parametrize(
    ("model", "sites", "message"),
    [
        (counts, "x", "`sites` is 'x': expected a list"),
        (counts, [], "`sites` is .*: expected a list"),
        (counts, ["h"], "site 'h' is not in the model: expected a latent site"),
        (counts, ["y"], "site 'y' is observed or computed"),
        (mean_after, ["x_0", "x_1"], "depends on site 'scale', which is drawn after"),
        (switching, ["state"], "site 'state' is discrete"),
        (switching, ["x"], "discrete site 'state' comes before the end of the path"),
    ],
)
def test_what_is_no_path_is_refused(model, sites, message):
    with pytest.raises(ValueError, match=message):
        whiten(model, sites).fit(COUNTS)


def test_runs_of_many_at_once_are_refused():
    whitened, y = whitened_model("counts")
    with pytest.raises(ValueError, match="expected runs of a whitened model one by one"):
        with pyro.plate("many", 2, dim=-3):
            whitened(y)
    samples = {"step": torch.tensor(0.4), "error": torch.tensor(0.4), "x_white": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"the noise of the path \['x'\] has shape \(3,\)"):
        poutine.condition(whitened, samples)(y)


def long_loop(y, offsets):
    step, error = scales()
    x = torch.zeros_like(step)
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x + offsets[t], step))
        pyro.sample(f"y_{t}", dist.Normal(x, error), obs=y[t])


def test_long_loops_are_fitted_by_programs_of_few_operations():
    y = torch.sin(torch.arange(60.0).double())
    offsets = torch.zeros_like(y)
    whitened = whiten(lambda y: long_loop(y, offsets), ["x"])
    fit = whitened.fit(y)
    sizes = [len(program.graph.nodes) for program in fit.prior.densities._programs]
    assert max(sizes) < 100  # of sixty steps
    theta, u = fit.centre + 0.3, 2.0 * fit.u.detach() + 0.1
    values = fit.split.values(theta)
    told = fit.prior.log_density_to_fit(u, values), fit.split.log_rest(theta, u)
    gone = fit.prior._replace(densities=None)
    fit.split.prior = gone
    right = gone.log_density(u, values), fit.split.log_rest(theta, u)
    torch.testing.assert_close(told, right, rtol=1e-10, atol=1e-10)


def test_the_density_of_a_long_loop_follows_what_its_model_reads():
    """A fit keeps programs of the model as it was; the density is that of the model as it is."""
    y = torch.sin(torch.arange(60.0).double())
    offsets = torch.zeros_like(y)

    def model(y):
        long_loop(y, offsets)

    whitened = whiten(model, ["x"])
    fit = whitened.fit(y)
    offsets += 0.5
    values = fit.split.values(fit.centre) | {"x_0_white": torch.randn_like(fit.u)}
    trace = poutine.trace(poutine.condition(whitened, values)).get_trace(y)
    path = {f"x_{t}": trace.nodes[f"x_{t}"]["value"] for t in range(60)}
    parameters = {name: values[name] for name in ("step", "error")}
    expected = log_joint(model, parameters | path, y) + fit.map(parameters).log_volume()
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_highest_mode_of_the_parameters_is_taken_and_another_told(side):
    """Chains start about it alone: one factor makes the other root 55 times as dense."""

    def model(y):
        root = pyro.sample("root", dist.Normal(0.2 * side, 1.5))
        pyro.factor("pull", -side * root)
        x = 0.0
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(x, 0.1))
            pyro.sample(f"y_{t}", dist.Normal(root**2 + x, 0.1), obs=y[t])

    y = 4.0 + 0.1 * torch.sin(torch.arange(6.0))
    kernel = phf.NUTS(whiten(model, [f"x_{t}" for t in range(6)]))
    mcmc = phf.MCMC(kernel, 20, 20, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(y)
    assert (side * mcmc.get_samples()["root"] < -1.5).all()
    assert any("the posterior has another mode" in said for said in mcmc.messages)
