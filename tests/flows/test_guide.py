"""The guide: under every bound of Pyro, beside other guides, saved and loaded, and corrected."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from contextlib import nullcontext
from functools import cache

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value

from pyro_hamflow import (
    MCMC,
    AutoNeuralHamiltonianFlow,
    FlowMH,
    ForwardKL,
    ReverseKL,
    fit_guide,
    importance_sample,
    marginalize,
    noise,
)
from pyro_hamflow.flows.losses import Objective
from pyro_hamflow.flows.start import PriorDistribution
from pyro_hamflow.model.potential import Potential
from tests.helpers.guided import (
    ELBOS,
    JIT,
    Y,
    conjugate,
    evidence,
    mixed,
    posterior,
    subsampled,
)
from tests.helpers.kinds import long_but
from tests.helpers.targets import effects
from tests.helpers.zoo import eight_schools

SMALL = {"hidden": (8, 8), "num_steps": 3}


@cache
def _begun():
    guide = AutoNeuralHamiltonianFlow(mixed, **SMALL)
    guide.prepare(Y)
    return guide


def begun():
    """A guide that has found where it starts, which takes longer than to train it a little."""
    return copy.deepcopy(_begun())


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize(
    ("model", "name"),
    long_but(
        lambda case: case[0] is conjugate or case[1] in ("graph", "enumeration"),
        itertools.product([conjugate, mixed], ELBOS),
    ),
)
def test_trains_under_every_bound(name, model):
    guide = begun() if model is mixed else AutoNeuralHamiltonianFlow(model, **SMALL)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), ELBOS[name]())
    before = None
    for _ in range(3):
        loss = svi.step(Y)
        assert math.isfinite(loss) or name == "tail-adaptive"  # whose loss is infinity by design
        before = before or copy.deepcopy(guide.state_dict())
    changed = [n for n, v in guide.state_dict().items() if not torch.equal(v, before[n])]
    assert any("potential_network" in n for n in changed)
    assert any("start_momenta" in n for n in changed)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", JIT)
@pytest.mark.parametrize("called", [False, True])
def test_trains_under_compiled_bounds(name, called):
    guide = AutoNeuralHamiltonianFlow(conjugate, **SMALL)
    if called:
        guide(Y)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 1e-2}), JIT[name]())
    losses = [svi.step(Y) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == 3  # random numbers are drawn anew


def test_trains_as_a_module_with_torch_optimisers():
    with pyro.settings.context(module_local_params=True):
        guide = AutoNeuralHamiltonianFlow(conjugate, **SMALL)
        guide.prepare(Y)
        loss_of = Trace_ELBO()(conjugate, guide)
        optimizer = torch.optim.Adam(loss_of.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(Y).backward()
            assert all(p.grad is not None for p in guide.parameters())
            optimizer.step()
        assert not list(pyro.get_param_store().keys())


def test_bound_of_training_is_the_bound_of_pyro():
    guide = AutoNeuralHamiltonianFlow(mixed, reverse_encoder=True, **SMALL)
    guide.prepare(Y)
    objective = Objective(guide, Potential(mixed, (Y,), separate_noise=True), 1)
    results = []
    for bound in (lambda: Trace_ELBO().differentiable_loss(mixed, guide, Y), objective.reverse):
        torch.manual_seed(3)
        guide.zero_grad()
        value = bound()
        value.backward()
        results.append((value.detach(), [p.grad.clone() for p in guide.parameters()]))
    torch.testing.assert_close(*results)


def test_bound_is_below_the_evidence_and_weights_are_around_it():
    guide = AutoNeuralHamiltonianFlow(conjugate, **SMALL)
    fit_guide(conjugate, guide, Y, num_steps=200, seed=0)
    with torch.no_grad():
        objective = Objective(guide, Potential(conjugate, (Y,), separate_noise=True), 5000)
        bound = -float(objective.reverse())
    assert evidence(Y) - 0.2 < bound < evidence(Y)
    found = importance_sample(conjugate, guide, Y, num_samples=20_000, seed=1)
    assert abs(found.log_evidence - evidence(Y)) < 3 * found.log_evidence_error
    assert found.log_evidence_error < 0.02
    assert found.pareto_k < 0.7


@pytest.mark.slow
def test_reverse_encoder_tightens_the_bound():
    bounds = []
    for reverse_encoder in (False, True):
        guide = AutoNeuralHamiltonianFlow(mixed, reverse_encoder=reverse_encoder, **SMALL)
        fit = fit_guide(mixed, guide, Y, num_steps=300, num_particles=32, seed=0)
        bounds.append(-fit.best_loss)
    assert bounds[1] > bounds[0] + 0.02


# --- with the rest of Pyro ----------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_predicts(parallel):
    def model(y=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide = AutoNeuralHamiltonianFlow(model, **SMALL)
    guide(Y)
    drawn = Predictive(model, guide=guide, num_samples=7, parallel=parallel)()
    assert drawn["y"].shape == (7, 5) and drawn["mean"].numel() == 7


def test_first_call_may_come_from_a_prediction():
    guide = AutoNeuralHamiltonianFlow(conjugate, **SMALL)
    assert Predictive(conjugate, guide=guide, num_samples=3)(Y)["mean"].numel() == 3


def test_handlers_see_the_guides_sites():
    guide = AutoNeuralHamiltonianFlow(mixed, **SMALL)
    trace = poutine.trace(guide).get_trace(Y)
    names = [name for name in trace.stochastic_nodes if not name.startswith("_")]
    assert names == ["data", "scale", "share", "x"]
    assert trace.nodes["x"]["fn"].batch_shape == (5,)
    again = poutine.trace(poutine.replay(guide, trace)).get_trace(Y)
    torch.testing.assert_close(again.log_prob_sum(), trace.log_prob_sum())
    model_trace = poutine.trace(poutine.replay(mixed, trace)).get_trace(Y)
    assert torch.isfinite(model_trace.log_prob_sum())


def test_weights_of_traces_are_those_of_importance_sampling():
    guide = AutoNeuralHamiltonianFlow(mixed, reverse_encoder=True, **SMALL)
    guide.prepare(Y)
    torch.manual_seed(5)
    trace = poutine.trace(guide).get_trace(Y)
    model_trace = poutine.trace(poutine.replay(mixed, trace)).get_trace(Y)
    by_trace = model_trace.log_prob_sum() - trace.log_prob_sum()
    torch.manual_seed(5)
    position, log_ratio = guide.draw(1)
    value = Potential(mixed, (Y,)).value(position, position.new_zeros(1, 0))
    torch.testing.assert_close((-value - log_ratio)[0], by_trace)


def test_subsampled_data_train_it():
    torch.manual_seed(0)
    y = 1.5 + torch.randn(40)
    guide = AutoNeuralHamiltonianFlow(subsampled, **SMALL)
    svi = SVI(subsampled, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO(num_particles=4))
    for _ in range(100):
        svi.step(y)
    median = guide.median()["mean"]
    assert abs(median - y.sum() / (len(y) + 0.25)) < 0.3


def test_local_sites_of_subsampled_plates_are_refused():
    def model(y):
        with pyro.plate("person", len(y), subsample_size=2) as index:
            x = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])

    guide = AutoNeuralHamiltonianFlow(model, **SMALL)
    with pytest.raises(ValueError, match=r"'effect' lies in plate 'person'.*2 of 5 elements"):
        guide(Y)


def test_local_sites_of_subsampled_plates_may_be_left_to_another_guide():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("person", len(y), subsample_size=5) as index:
            x = pyro.sample("effect", dist.Normal(mean, 0.8))
            pyro.sample("y", dist.Normal(x, 0.6), obs=y[index])

    torch.manual_seed(0)
    y = 1.5 + torch.randn(20)
    guide = AutoGuideList(model)
    guide.append(AutoNeuralHamiltonianFlow(poutine.block(model, hide=["effect"]), **SMALL))
    guide.append(AutoNormal(poutine.block(model, expose=["effect"])))
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), Trace_ELBO())
    for _ in range(300):
        svi.step(y)
    assert abs(guide[0].median()["mean"] - y.sum() / (len(y) + 0.25)) < 0.4


def test_guides_of_one_process_are_apart():
    def shifted(y):
        conjugate(y - 5.0)

    first = AutoNeuralHamiltonianFlow(conjugate, **SMALL)
    second = AutoNeuralHamiltonianFlow(shifted, hidden=(4,), num_steps=2)
    third = copy.deepcopy(first)
    for guide, model in ((first, conjugate), (second, shifted), (third, conjugate)):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        svi.step(Y)
    tensors = [p for g in (first, second, third) for p in g.parameters()]
    assert len({id(p) for p in tensors}) == len(tensors)
    assert len(list(pyro.get_param_store().keys())) == len(tensors)
    assert float(first.median()["mean"] - second.median()["mean"]) > 3.0


# --- saved and copied ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "called"),
    long_but(
        [("prior", False)],
        itertools.product(["laplace", "prior"], [False, True]),
    ),
)
def test_saved_guide_is_loaded(start, called, tmp_path):
    guide = AutoNeuralHamiltonianFlow(mixed, start=start, **SMALL)
    guide.prepare(Y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    fresh = AutoNeuralHamiltonianFlow(mixed, start=start, **SMALL)
    if called:
        fresh(Y)
    fresh.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    fresh.prepare(Y)
    results = []
    for one in (guide, fresh):
        torch.manual_seed(0)
        results.append(one.draw(6))
    torch.testing.assert_close(*results)


def test_pickle_and_copy_leave_the_guide_whole():
    guide = AutoNeuralHamiltonianFlow(conjugate, **SMALL)
    guide(Y)
    copied = copy.deepcopy(guide)
    loaded = pickle.loads(pickle.dumps(guide))
    assert guide.model is not None and copied.model is not None
    for one in (guide, copied, loaded):
        assert one(Y)["mean"].shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["laplace", "prior"])
def test_type_is_the_models(dtype, start):
    y = Y.to(dtype)

    def model(y):
        mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), y.new_tensor(2.0)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, y.new_ones(())), obs=y)

    guide = AutoNeuralHamiltonianFlow(model, start=start, **SMALL)
    assert guide(y)["mean"].dtype == dtype
    assert all(p.dtype == dtype for p in guide.parameters())
    fit = fit_guide(model, guide, y, num_steps=100, num_particles=32, seed=0)
    assert fit.num_skipped == 0
    found = importance_sample(model, guide, y, num_samples=2000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 4 * found.log_evidence_error + 1e-4


# --- starts -------------------------------------------------------------------------------------


def test_prior_start_is_the_prior():
    prior = PriorDistribution(mixed, (Y,), {})
    draws = prior.sample((4000,))
    assert draws.shape == (4000, 8)
    scale, first = draws[:, 0].exp(), draws[:, 3]
    assert abs(scale.mean() - 2.0) < 4 * scale.std() / math.sqrt(4000)
    assert (first[1:] != first[:-1]).all()
    trace = poutine.trace(poutine.block(mixed, hide=["y"])).get_trace(Y)
    values = {n: trace.nodes[n]["value"] for n in ("scale", "share", "x")}
    position = prior.potential.flatten(values)
    by_hand = trace.log_prob_sum()
    for site in prior.potential.sites:
        free = site.transform.inv(values[site.name])
        by_hand = by_hand + site.transform.log_abs_det_jacobian(free, values[site.name]).sum()
    torch.testing.assert_close(prior.log_prob(position[None])[0], by_hand)


def test_guide_starts_at_the_prior_and_reaches_the_posterior():
    guide = AutoNeuralHamiltonianFlow(conjugate, start="prior", **SMALL)
    fit_guide(conjugate, guide, Y, num_steps=300, num_particles=32, seed=0)
    found = importance_sample(conjugate, guide, Y, num_samples=5000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 3 * found.log_evidence_error < 0.1


def test_guide_starts_from_a_given_distribution():
    base = dist.MultivariateNormal(torch.zeros(1), 9.0 * torch.eye(1))
    guide = AutoNeuralHamiltonianFlow(conjugate, start=base, **SMALL)
    fit_guide(conjugate, guide, Y, num_steps=300, num_particles=32, seed=0)
    found = importance_sample(conjugate, guide, Y, num_samples=5000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 3 * found.log_evidence_error < 0.1


# --- noise, and what is summed out --------------------------------------------------------------


def by_hand(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    x = mean + 0.8 * noise("u", (16, len(y)))
    terms = dist.Normal(x, 0.6).log_prob(y)
    pyro.factor("estimate", (terms.logsumexp(0) - math.log(16)).sum())


@pytest.mark.parametrize("kind", ["marginalised", "by hand"])
def test_noise_stays_standard_and_the_evidence_right(kind):
    """0.8^2 + 0.6^2 = 1: the marginal model is the conjugate one."""
    model = by_hand if kind == "by hand" else marginalize(effects, ["x"], num_particles=4)
    guide = AutoNeuralHamiltonianFlow(model, **SMALL)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step(Y))
    name = "u" if kind == "by hand" else "x_noise"
    assert poutine.trace(guide).get_trace(Y).nodes[name]["infer"]["noise"]
    assert guide.dimension == 1
    fit_guide(model, guide, Y, num_steps=200, num_particles=32, seed=0)
    found = importance_sample(model, guide, Y, num_samples=10_000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 3 * found.log_evidence_error < 0.15
    if kind == "marginalised":  # given the data, x is (0.36 mean + 0.64 y) with its own spread
        precision, total = 0.25 + len(Y), Y.sum()
        expected = 0.36 * total / precision + 0.64 * Y
        error = found.samples["x"].std(0) / math.sqrt(found.ess)
        assert ((found.mean(found.samples["x"]) - expected).abs() < 4 * error).all()


def test_discrete_sites_are_left_to_enumeration():
    @config_enumerate
    def model(y):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(share))
            pyro.sample("y", dist.Normal(3.0 * z, 1.0), obs=y)

    guide = AutoNeuralHamiltonianFlow(model, **SMALL)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceEnum_ELBO(max_plate_nesting=1))
    assert math.isfinite(svi.step(Y))
    fit_guide(model, guide, Y, num_steps=100, num_particles=32, seed=0)
    found = importance_sample(model, guide, Y, num_samples=4000, seed=0)
    grid = (torch.arange(4000) + 0.5) / 4000
    parts = dist.Normal(torch.tensor([0.0, 3.0]), 1.0).log_prob(Y[:, None]).exp()
    likelihood = ((1 - grid) * parts[:, :1] + grid * parts[:, 1:]).prod(0)
    truth = (likelihood * dist.Beta(2.0, 2.0).log_prob(grid).exp()).mean().log()
    assert abs(found.log_evidence - truth) < 3 * found.log_evidence_error < 0.1


# --- training -----------------------------------------------------------------------------------


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 4.0))
    both = torch.stack([dist.Normal(c, 0.5).log_prob(x) for c in (-3.0, 3.0)])
    pyro.factor("bumps", both.logsumexp(0))


def share_right(guide):
    return float((guide.draw(4000)[0] > 0).double().mean())


@pytest.mark.slow
def test_losses_differ_in_the_modes_they_find():
    draws = {"x": torch.where(torch.rand(2000) < 0.5, 3.0, -3.0) + 0.5 * torch.randn(2000)}
    settings = {
        "hidden": (16, 16),
        "init_loc_fn": init_to_value(values={"x": torch.tensor(2.5)}),
    }
    shares = {}
    for name, loss in {
        "reverse": ReverseKL(),
        "forward": ForwardKL(draws),
        "both": ForwardKL(draws, reverse=0.2),
    }.items():
        torch.manual_seed(1)
        guide = AutoNeuralHamiltonianFlow(two_modes, **settings)
        told = pytest.warns(UserWarning, match="lost modes with about 50 % .* x = -[23]")
        with told if name == "reverse" else nullcontext():
            fit_guide(two_modes, guide, loss=loss, num_steps=600, learning_rate=1e-2, seed=0)
        shares[name] = share_right(guide)
    assert shares["reverse"] > 0.95
    assert abs(shares["forward"] - 0.5) < 0.1
    assert 0.25 < shares["both"] < 0.75  # pulled back to the mode it started in, but not all


def test_annealing_finds_a_mode_that_plain_training_misses():
    base = dist.Normal(torch.zeros(1), 4.0).to_event(1)
    guide = AutoNeuralHamiltonianFlow(two_modes, start=base, hidden=(16, 16))
    fit = fit_guide(two_modes, guide, loss=ReverseKL(hottest=20.0), num_steps=400, seed=0)
    assert fit.best_step > 200  # losses of hot targets are not compared
    assert abs(share_right(guide) - 0.5) < 0.1


@pytest.mark.parametrize("at", ["preparation", "training"])
def test_interrupted_training_leaves_a_guide_that_trains(at, monkeypatch):
    """Also where it had no parameters yet; of a training, the best state is kept."""
    guide = AutoNeuralHamiltonianFlow(conjugate, hidden=(4,))
    loss, calls, states = ReverseKL(), [], []

    class Interrupted:
        settled = loss.settled

        def __call__(self, objective, progress):
            calls.append(progress)
            if len(calls) % 10 == 1:
                states.append(copy.deepcopy(guide.state_dict()))
            if len(calls) == 65:
                raise KeyboardInterrupt
            return loss(objective, progress)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if at == "preparation":
            patch.setattr(guide, "make_flow", interrupt)
        fit_guide(conjugate, guide, Y, loss=Interrupted(), num_steps=400, seed=0)
    if at == "training":
        kept = guide.state_dict()
        assert len(calls) == 65
        assert any(all(torch.equal(part, kept[n]) for n, part in s.items()) for s in states)
    assert fit_guide(conjugate, guide, Y, num_steps=20, seed=0).num_skipped == 0
    assert len(list(guide.parameters())) > 0


def test_steps_without_numbers_change_nothing():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("broken", torch.where(x.abs() < 1.0, 0.0, math.nan) * x)

    guide = AutoNeuralHamiltonianFlow(model, **SMALL)
    fit = fit_guide(model, guide, num_steps=50, num_particles=4, seed=0)
    assert 0 < fit.num_skipped <= 50
    assert all(bool(p.isfinite().all()) for p in guide.parameters())


# --- guides of others ---------------------------------------------------------------------------


class Gaussian(torch.nn.Module):
    """A guide by hand, of one parameter."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(1))
        self.log_scale = torch.nn.Parameter(torch.zeros(1))

    def prepare(self, *args):
        pass

    def draw(self, count):
        position = self.loc + self.log_scale.exp() * torch.randn(count, 1)
        return position, self.log_ratio(position)

    def log_ratio(self, position):
        return dist.Normal(self.loc, self.log_scale.exp()).log_prob(position).sum(-1)


@pytest.mark.parametrize("loss", ["reverse", "forward"])
def test_guide_by_hand_is_trained_and_corrected(loss):
    exact, guide = posterior(Y), Gaussian()
    losses = {"reverse": ReverseKL(), "forward": ForwardKL({"mean": exact.sample((20_000,))})}
    settings = {"num_steps": 600, "num_particles": 1000, "learning_rate": 2e-2, "seed": 0}
    fit = fit_guide(conjugate, guide, Y, loss=losses[loss], **settings)
    assert abs(guide.loc - exact.mean) < 0.03
    assert abs(guide.log_scale - exact.stddev.log()) < 0.03
    bound = -evidence(Y) if loss == "reverse" else float(exact.entropy())
    assert abs(fit.best_loss - bound) < 0.03
    found = importance_sample(conjugate, guide, Y, num_samples=2000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 0.01
    mcmc = MCMC(FlowMH(conjugate, guide), 500, 0, disable_progbar=True)
    mcmc.run(Y)
    assert abs(mcmc.get_samples()["mean"].mean() - exact.mean) < 4 * exact.stddev / math.sqrt(500)


def test_guides_that_lack_something_are_refused():
    class Silent(Gaussian):
        log_ratio = None

    class Column(Gaussian):
        def draw(self, count):
            position, log_density = super().draw(count)
            return position, log_density[:, None]

    class Telling(Gaussian):
        def draw(self, count):
            position = torch.zeros(count, 1)
            return position, position[:, 0]

        def log_ratio(self, position):
            return super().log_ratio(position)[:, None]

    with pytest.raises(TypeError, match="a Silent: expected a TrainableGuide, .* `log_ratio` it"):
        fit_guide(conjugate, Silent(), Y)
    with pytest.raises(TypeError, match="a DensityGuide, whose methods `log_ratio` it lacks"):
        FlowMH(conjugate, Silent())
    for use in (fit_guide, importance_sample):
        with pytest.raises(
            ValueError, match=r"log densities of shape \(\d+, 1\): expected \(\d+,\)"
        ):
            use(conjugate, Column(), Y)
    with pytest.raises(ValueError, match=r"tells log densities of shape \(64, 1\)"):
        fit_guide(conjugate, Telling(), Y, loss=ForwardKL({"mean": Y}))
    with pytest.raises(ValueError, match=r"tells log densities of shape \(1, 1\)"):
        MCMC(FlowMH(conjugate, Telling()), 5, 0, disable_progbar=True).run(Y)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "middle"}, "`start` is 'middle': expected one of"),
        ({"num_steps": 0}, "`num_steps` is 0"),
        ({"time": 0.0}, "`time` is 0.0"),
        ({"hidden": ()}, "`hidden` is"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoNeuralHamiltonianFlow(conjugate, **settings)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="`model` is 3"):
        AutoNeuralHamiltonianFlow(3)
    wrong = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"`start` has event shape \(2,\): expected \(1,\)"):
        AutoNeuralHamiltonianFlow(conjugate, start=wrong)(Y)
    guide = AutoNeuralHamiltonianFlow(conjugate, **SMALL)
    with pytest.raises(TypeError, match="a Linear: expected .* `prepare`, `draw`, `log_ratio` it"):
        fit_guide(conjugate, torch.nn.Linear(1, 1), Y)
    for name in ("num_steps", "num_particles", "learning_rate", "patience"):
        with pytest.raises(ValueError, match=f"`{name}` is 0: expected (a positive|1 or more)"):
            fit_guide(conjugate, guide, Y, **{name: 0})
    with pytest.raises(ValueError, match="plate 'data' is subsampled"):
        fit_guide(subsampled, AutoNeuralHamiltonianFlow(subsampled), Y)
    with pytest.raises(ValueError, match="`draws` lacks values of site 'mean'"):
        fit_guide(conjugate, guide, Y, loss=ForwardKL({"other": Y}))
    with pytest.raises(ValueError, match="`draws` of site 'mean' have shape"):
        fit_guide(conjugate, guide, Y, loss=ForwardKL({"mean": torch.zeros(5, 2)}))
    with pytest.raises(ValueError, match="`hottest` is 0.5"):
        ReverseKL(hottest=0.5)
    with pytest.raises(ValueError, match="`annealed` is 1.0"):
        ReverseKL(annealed=1.0)
    with pytest.raises(NotImplementedError, match="no map of positions alone"):
        guide.get_transform()


def test_a_hierarchy_without_a_mode_begins_where_its_mass_is():
    """Its density grows without end as the scale falls: descents went to a scale of 1e-15."""
    guide = AutoNeuralHamiltonianFlow(eight_schools)
    guide.prepare()
    (start,) = guide.quantiles([0.5])["tau"].tolist()
    assert 0.3 < start < 30.0
    fit_guide(eight_schools, guide, num_steps=300, seed=0, disable_progbar=True)
    found = importance_sample(eight_schools, guide, seed=0)
    assert abs(found.log_evidence + 31.7) < 1.0
