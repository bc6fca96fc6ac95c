"""Guides made of flows of zuko: what Pyro's guides do, exact densities, starts, and refusals."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam

from pyro_hamflow import (
    HMC,
    MCMC,
    AutoFlow,
    FlowMH,
    ForwardKL,
    ReverseKL,
    fit_guide,
    importance_sample,
    marginalize,
)
from pyro_hamflow.flows.losses import Objective
from pyro_hamflow.flows.start import PriorDistribution
from pyro_hamflow.model.potential import Potential
from tests.helpers.guided import ELBOS, JIT, Y, conjugate, evidence, mixed, posterior, subsampled
from tests.helpers.kinds import long_but
from tests.helpers.targets import effects
from tests.helpers.zuko_flows import FLOWS, flows, zuko

NSF = FLOWS["NSF"]


def banana():
    """A normalised density of one bent mode."""
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    x = pyro.sample("x", prior)
    second = dist.Normal(0.4 * x[..., 0].square(), 0.8).log_prob(x[..., 1])
    pyro.factor("bent", dist.Normal(0.0, 1.0).log_prob(x[..., 0]) + second - prior.log_prob(x))


def bananas(y):
    with pyro.plate("data", len(y)):
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("second", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(first.square() - 1.0, 0.5), obs=y)


# --- densities ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"),
    long_but(
        [*((name, "laplace") for name in FLOWS), ("NSF", "prior"), ("RealNVP", "prior")],
        itertools.product(FLOWS, ["laplace", "prior"]),
    ),
)
def test_density_is_the_same_by_two_routes(name, start):
    model = mixed if start == "prior" else bananas
    guide = AutoFlow(model, FLOWS[name], start=start)
    guide.prepare(Y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.manual_seed(0)
    position, log_density = guide.draw(500)
    torch.testing.assert_close(guide.log_ratio(position), log_density, rtol=1e-10, atol=1e-10)
    torch.manual_seed(0)
    with torch.no_grad():
        again, by_the_way_back = guide.draw(500)
    torch.testing.assert_close(again, position, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(by_the_way_back, log_density.detach(), rtol=1e-10, atol=1e-10)


def test_density_adds_up_to_one():
    guide = AutoFlow(banana, NSF, degrees_of_freedom=5.0)
    guide.prepare()
    fit_guide(banana, guide, num_steps=50, seed=0)
    place = torch.linspace(-4.1, 4.1, 241)
    line, weight = 2.0 * place.sinh(), 2.0 * place.cosh() * (8.2 / 240)  # to 60 on either side
    with torch.no_grad():
        density = guide.log_ratio(torch.cartesian_prod(line, line)).exp().reshape(241, 241)
    total = weight @ density @ weight
    assert abs(total - 1.0) < 2e-3


@pytest.mark.parametrize("name", ["GF", "NAF"])
def test_an_inverse_that_is_wrong_is_told_of(name):
    guide = AutoFlow(banana, getattr(flows, name), degrees_of_freedom=1.0)
    guide.prepare()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="its inverse, .* is not right"):
        guide.draw(500)


# --- with the rest of Pyro ----------------------------------------------------------------------


# The guide of `test_guide.py` is trained under all of them.
BOUNDS = ["trace", "enumeration"]


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", long_but(BOUNDS, ELBOS | JIT))
def test_trains_under_every_bound(name):
    guide = AutoFlow(mixed, NSF)
    guide(Y)
    svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 1e-2}), (ELBOS | JIT)[name]())
    before = copy.deepcopy(guide.state_dict())
    for _ in range(2):
        loss = svi.step(Y)
        assert math.isfinite(loss) or name == "tail-adaptive"
    changed = [n for n, v in guide.state_dict().items() if not torch.equal(v, before[n])]
    assert {n for n, _ in guide.named_parameters()} <= set(changed)


def test_bound_of_training_is_the_bound_of_pyro():
    guide = AutoFlow(mixed, NSF)
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


@pytest.mark.parametrize("parallel", [False, True])
def test_predicts(parallel):
    def model(y=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide = AutoFlow(model, NSF)
    guide(Y)
    drawn = Predictive(model, guide=guide, num_samples=7, parallel=parallel)()
    assert drawn["y"].shape == (7, 5) and drawn["mean"].numel() == 7


def test_subsampled_data_train_it():
    torch.manual_seed(0)
    y = 1.5 + torch.randn(40)
    guide = AutoFlow(subsampled, NSF)
    svi = SVI(subsampled, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO(num_particles=4))
    for _ in range(60):
        svi.step(y)
    assert abs(guide.median()["mean"] - y.sum() / (len(y) + 0.25)) < 0.3


@pytest.mark.slow
def test_transport_by_pyro_takes_its_map():
    guide = AutoFlow(conjugate, NSF)
    fit_guide(conjugate, guide, Y, num_steps=50, seed=0)
    neutra = NeuTraReparam(guide)
    mcmc = MCMC(HMC(neutra.reparam(conjugate)), 400, 100, disable_progbar=True)
    mcmc.run(Y)
    (latent,) = mcmc.get_samples().values()
    mean, exact = neutra.transform_sample(latent)["mean"].detach(), posterior(Y)
    assert abs(mean.mean() - exact.mean) < 4 * exact.stddev / math.sqrt(150)
    assert abs(mean.std() / exact.stddev - 1.0) < 0.2
    drawn = guide.get_transform()(guide.get_base_dist().sample((4000,))).detach()
    quantiles = drawn[:, 0].quantile(torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(quantiles, guide.quantiles([0.1, 0.9])["mean"], atol=0.05, rtol=0.0)


# --- saved and copied ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "called"),
    long_but(
        [("laplace", True)],
        itertools.product(["laplace", "prior"], [False, True]),
    ),
)
def test_saved_guide_is_loaded(start, called, tmp_path):
    guide = AutoFlow(mixed, NSF, start=start)
    guide.prepare(Y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    fresh = AutoFlow(mixed, NSF, start=start)
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
    guide = AutoFlow(conjugate, flows.NSF)
    guide(Y)
    copied = copy.deepcopy(guide)
    loaded = pickle.loads(pickle.dumps(guide))
    for one in (guide, copied, loaded):
        assert one(Y)["mean"].shape == ()
    tensors = [p for one in (guide, copied) for p in one.parameters()]
    assert len({id(p) for p in tensors}) == len(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["laplace", "prior"])
def test_type_is_the_models(dtype, start):
    y = Y.to(dtype)

    def model(y):
        mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), y.new_tensor(2.0)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, y.new_ones(())), obs=y)

    guide = AutoFlow(model, NSF, start=start)
    assert guide(y)["mean"].dtype == dtype
    assert all(p.dtype == dtype for p in guide.parameters())
    fit = fit_guide(model, guide, y, num_steps=100, num_particles=32, seed=0)
    assert fit.num_skipped == 0
    found = importance_sample(model, guide, y, num_samples=2000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 4 * found.log_evidence_error + 1e-4


# --- fitted and corrected -----------------------------------------------------------------------


@pytest.mark.parametrize("name", long_but(["RealNVP", "MAF"], ["RealNVP", "NSF", "MAF"]))
def test_evidence_is_right(name):
    guide = AutoFlow(banana, FLOWS[name], degrees_of_freedom=10.0)
    fit_guide(banana, guide, num_steps=300, seed=0)
    found = importance_sample(banana, guide, num_samples=5000, seed=1)
    assert abs(found.log_evidence) < 3 * found.log_evidence_error < 0.1
    assert found.pareto_k < 0.7 and found.ess > 2500


def test_chains_of_its_draws_are_right():
    guide = AutoFlow(conjugate, NSF)
    fit_guide(conjugate, guide, Y, num_steps=100, seed=0)
    mcmc = MCMC(FlowMH(conjugate, guide), 1000, 0, disable_progbar=True)
    mcmc.run(Y)
    mean, exact = mcmc.get_samples()["mean"], posterior(Y)
    assert abs(mean.mean() - exact.mean) < 4 * exact.stddev / math.sqrt(300)


def test_a_flow_that_is_given_is_the_guides_own():
    flow = flows.RealNVP(2)
    guide = AutoFlow(banana, flow)
    fit_guide(banana, guide, num_steps=50, seed=0)
    assert {id(p) for p in flow.parameters()} == {id(p) for p in guide.parameters()}


@pytest.mark.parametrize("loss", long_but(["annealed"], ["reverse", "forward", "both", "annealed"]))
def test_losses_train_it(loss):
    draws = {"mean": posterior(Y).sample((2000,))}
    losses = {
        "reverse": ReverseKL(),
        "forward": ForwardKL(draws),
        "both": ForwardKL(draws, reverse=0.5),
        "annealed": ReverseKL(hottest=10.0),
    }
    guide = AutoFlow(conjugate, NSF, start=dist.Normal(torch.zeros(1), 4.0).to_event(1))
    fit = fit_guide(conjugate, guide, Y, loss=losses[loss], num_steps=300, seed=0)
    assert fit.best_step > 150 or loss != "annealed"
    found = importance_sample(conjugate, guide, Y, num_samples=2000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 3 * found.log_evidence_error < 0.1
    assert found.ess > 1000


def test_noise_is_left_at_its_prior():
    """0.8^2 + 0.6^2 = 1: the marginal model is the conjugate one."""
    model = marginalize(effects, ["x"], num_particles=4)
    guide = AutoFlow(model, NSF)
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).step(Y))
    assert poutine.trace(guide).get_trace(Y).nodes["x_noise"]["infer"]["noise"]
    assert guide.dimension == 1
    fit_guide(model, guide, Y, num_steps=200, num_particles=32, seed=0)
    found = importance_sample(model, guide, Y, num_samples=10_000, seed=0)
    assert abs(found.log_evidence - evidence(Y)) < 3 * found.log_evidence_error < 0.15


# --- starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["prior", "given"])
def test_flow_begins_where_it_is_told(start):
    """An identity of a flow: its density is that of where it starts."""

    class Identity(torch.nn.Module):
        def __init__(self, features):
            super().__init__()
            self.base = flows.NICE(features).base

        def transform(self, c):
            return zuko.transforms.IdentityTransform()

    given = dist.MultivariateNormal(torch.ones(8), 0.5 * torch.eye(8) + 0.5)
    guide = AutoFlow(mixed, Identity, start="prior" if start == "prior" else given)
    guide.prepare(Y)
    expected = PriorDistribution(mixed, (Y,), {}) if start == "prior" else given
    position = expected.sample((50,))
    torch.testing.assert_close(guide.log_ratio(position), expected.log_prob(position))


def test_heavy_tails_are_those_of_students_t():
    guide = AutoFlow(conjugate, partial(flows.NSF, transforms=1), degrees_of_freedom=3.0)
    guide.prepare(Y)
    # Beyond its splines a flow is linear.
    far = guide.to_position(torch.tensor([[1e3], [1e4]]))
    drop = float(-guide.log_ratio(far).diff().detach())
    assert abs(drop - 4.0 * math.log(10.0)) < 1e-3


# --- bad input ----------------------------------------------------------------------------------


def test_what_is_no_flow_is_refused():
    with pytest.raises(TypeError, match="`flow` is a str: expected a flow of zuko"):
        AutoFlow(conjugate, "NSF")
    with pytest.raises(TypeError, match="`flow` is a Linear: expected a flow of zuko"):
        AutoFlow(conjugate, torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="`flow` makes a int: expected a flow of zuko"):
        AutoFlow(conjugate, lambda features: features)(Y)
    with pytest.raises(TypeError, match="`flow` is a GMM: expected a flow of zuko"):
        AutoFlow(conjugate, flows.GMM)(Y)
    with pytest.raises(ValueError, match=r"`flow` NSF is of event shape \(3,\): expected \(1,\)"):
        AutoFlow(conjugate, flows.NSF(3))(Y)
    with pytest.raises(ValueError, match="`flow` MAF has no density without a context"):
        AutoFlow(mixed, flows.MAF(8, context=2))(Y)
    with pytest.raises(ValueError, match="`flow` NCSF starts from .*whole real line"):
        AutoFlow(conjugate, flows.NCSF)(Y)
    with pytest.raises(ValueError, match="`degrees_of_freedom` is 0"):
        AutoFlow(conjugate, NSF, degrees_of_freedom=0)
    with pytest.raises(ValueError, match="`degrees_of_freedom` is 5, and `start` 'prior'"):
        AutoFlow(conjugate, NSF, start="prior", degrees_of_freedom=5)
    with pytest.raises(ValueError, match="`start` is 'middle'"):
        AutoFlow(conjugate, NSF, start="middle")
    with pytest.raises(TypeError, match="`model` is 3"):
        AutoFlow(3, NSF)
