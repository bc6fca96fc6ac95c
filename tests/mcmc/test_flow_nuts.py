"""FlowNUTS finds modes, jumps between them, and gives their shares; and says what went wrong."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_hamflow import (
    HMC,
    MALA,
    MCMC,
    NUTS,
    AutoFlow,
    FlowNUTS,
    PseudoMarginalNUTS,
    RandomWalk,
    marginalize,
    noise,
    progress,
    to_inference_data,
)
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.flows.population import flow_for
from pyro_hamflow.mcmc.adaptation import estimator, flow, flow_training, walkers
from pyro_hamflow.mcmc.adaptation.flow import gain
from pyro_hamflow.mcmc.adaptation.walkers import Walkers
from pyro_hamflow.mcmc.transitions.base import select_state
from pyro_hamflow.mcmc.transitions.independence import IndependenceTransition
from pyro_hamflow.mcmc.transitions.random_walk import RandomWalkTransition
from pyro_hamflow.smc.annealing import anneal
from tests.helpers.calibration import CHAINS, check_uniform
from tests.helpers.densities import POSITIVE, many_well
from tests.helpers.kinds import long_but
from tests.helpers.laws import scores

SHARE, CENTRE, VARIANCE = 0.25, 2.5, 0.5


def modes(dimension=2):
    """Two Gaussians with shares 1 : 3, as a prior of standard deviation 5 and a factor."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 5.0).expand([dimension]).to_event(1))
        left = math.log(SHARE) - 0.5 * (x + CENTRE).square().sum() / VARIANCE
        right = math.log(1.0 - SHARE) - 0.5 * (x - CENTRE).square().sum() / VARIANCE
        pyro.factor("likelihood", torch.logaddexp(left, right) + x.square().sum() / 50.0)

    return model


class Normals(nn.Module):
    """A guide of Gaussians around given centres, in equal shares; its shift may be trained."""

    def __init__(self, centres, scale=1.0, dimension=2):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(dimension))
        self.centres, self.scale, self.dimension = centres, scale, dimension

    def prepare(self, *args, **kwargs):
        pass

    @property
    def fn(self):
        centres = torch.tensor(self.centres)[:, None] + self.shift
        parts = dist.Independent(dist.Normal(centres, self.scale), 1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(centres))), parts)

    def draw(self, count):
        pick = torch.randint(len(self.centres), (count, 1))
        centre = torch.tensor(self.centres)[pick] + self.shift
        position = centre + self.scale * torch.randn(count, self.dimension)
        return position, self.log_ratio(position)

    def log_ratio(self, position):
        return self.fn.log_prob(position)


def run_of(kernel, *args, draws=500, chains=8, seed=0, **settings):
    mcmc = MCMC(kernel, draws, num_chains=chains, seed=seed, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc


def check_shares(mcmc):
    """Shares and positions of both modes, at 4.5 standard errors."""
    x = mcmc.get_samples(group_by_chain=True)["x"]
    left = (x[..., 0] < 0.0).double()
    assert left.mean(1).std() > 0.0
    assert abs(scores(left.numpy(), SHARE)) < 4.5
    mean = CENTRE * (1.0 - 2.0 * SHARE)
    assert (abs(scores(x.numpy(), mean)) < 4.5).all()
    assert (abs(scores((x - mean).square().numpy(), VARIANCE + CENTRE**2 - mean**2)) < 4.5).all()


@pytest.mark.slow
@pytest.mark.parametrize("local", [None, HMC, MALA, RandomWalk])
def test_shares_of_modes_by_a_trained_guide(local):
    model = modes()
    guide = Normals([-CENTRE, CENTRE])
    kernel = FlowNUTS(model, guide, local and local(model), adapt_flow=False)
    mcmc = run_of(kernel)
    check_shares(mcmc)
    assert kernel.flow is guide
    assert not mcmc.messages
    stats = to_inference_data(mcmc).sample_stats
    assert 0.5 < float(stats["global_accepted"].mean()) < 0.95
    assert abs(stats["global_accepted"].mean() - stats["global_acceptance_rate"].mean()) < 0.05
    assert (stats["local_acceptance_rate"] == stats["acceptance_rate"]).all()
    assert "global_accepted" not in to_inference_data(run_of(NUTS(model), draws=5)).sample_stats


@pytest.mark.parametrize("dimension", long_but([2], [2, 16]))
def test_modes_are_found(dimension):
    mcmc = run_of(FlowNUTS(modes(dimension), num_particles=600))
    check_shares(mcmc)
    assert not mcmc.messages


@pytest.mark.slow
def test_narrow_modes_that_a_population_misses_keep_their_share():
    """One of a quarter of the other's width, in eight dimensions."""
    prior = dist.Normal(torch.zeros(8), 4.0).to_event(1)

    def model():
        x = pyro.sample("x", prior)
        narrow = math.log(0.4) + dist.Normal(0.0, 0.4).log_prob(x).sum()
        wide = math.log(0.6) + dist.Normal(4.0, 1.5).log_prob(x).sum()
        pyro.factor("density", torch.logaddexp(narrow, wide) - prior.log_prob(x))

    mcmc = run_of(FlowNUTS(model))
    inside = (mcmc.get_samples(group_by_chain=True)["x"].mean(-1) < 2.0).double()
    assert abs(scores(inside.numpy(), 0.4)) < 4.5


@pytest.mark.slow
def test_local_moves_beside_a_spike_are_short_where_jumps_lead_further():
    """Steps that suit the spike make trajectories of a thousand elsewhere, to no use."""
    prior = dist.Normal(torch.zeros(1), 3.0).to_event(1)

    def model():
        x = pyro.sample("x", prior)
        spike = dist.Normal(0.0, 1e-3).log_prob(x).sum()
        slab = dist.Normal(0.0, 1.0).log_prob(x).sum()
        pyro.factor("density", torch.logaddexp(spike, slab) - prior.log_prob(x))

    kernel = FlowNUTS(model, num_particles=600)
    mcmc = run_of(kernel, draws=200, chains=32)
    assert kernel.settings["engine"] == "native"  # which would not pay for trajectories of 8 steps
    inside = (mcmc.get_samples(group_by_chain=True)["x"][..., 0].abs() < 5e-3).double()
    assert abs(scores(inside.numpy(), 0.502)) < 4.5
    stats = mcmc.draws.stats
    assert int(stats["n_steps"].max()) <= 127
    assert int((stats["n_steps"] == 127).sum()) > 100
    assert "of the local moves would take more than 127 steps" in " ".join(mcmc.messages)


@pytest.mark.slow
def test_a_flow_is_trained_on_what_the_population_finds():
    """Its Gaussians begin a unit beside the modes, where few jumps are accepted."""
    guide = Normals([-CENTRE, CENTRE], 0.8)
    with torch.no_grad():
        guide.shift += 1.5
    kernel = FlowNUTS(modes(), guide, num_particles=600)
    mcmc = run_of(kernel)
    check_shares(mcmc)
    assert kernel.flow is guide
    assert guide.shift.abs().max() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_of_very_many_modes_none_is_begun_at(seed):
    """A population of 2,000 lacks some of 65,536 modes by chance."""
    mcmc = run_of(FlowNUTS(many_well(16)), draws=1000, chains=10, seed=seed)
    above = (mcmc.get_samples()["x"][:, :16] > 0.0).double().mean(0)
    assert float((above - POSITIVE).abs().max()) < 0.03
    assert not any("descents" in said for said in mcmc.messages)


@pytest.mark.slow
def test_a_flow_of_zuko_is_trained():
    zuko = pytest.importorskip("zuko")
    kernel = FlowNUTS(modes(), zuko.flows.NSF, num_particles=600)
    mcmc = run_of(kernel)
    check_shares(mcmc)
    assert isinstance(kernel.flow, AutoFlow)
    assert float(mcmc.draws.stats["global_accepted"].double().mean()) > 0.5


@pytest.mark.parametrize("hidden", long_but([False], [False, True]))
def test_progress_of_the_population(hidden, monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    kernel = FlowNUTS(modes(), Normals([-CENTRE, CENTRE]), num_particles=100)
    MCMC(kernel, 5, num_chains=2, seed=0, disable_progbar=hidden).run()
    shown = capsys.readouterr().err
    for word in ("Anneal: 100%", "inverse_temperature=", "Sample"):
        assert (word in shown) != hidden


def test_nothing_changes_while_draws_are_kept():
    seen = []

    def note(kernel, params, stage, number):
        if stage == "Sample":
            mass = next(iter(kernel.inverse_mass_matrix.values()))
            state = copy.deepcopy(kernel.flow.state_dict())
            seen.append((kernel.step_size, mass.clone(), state))

    kernel = FlowNUTS(modes(), num_particles=400)
    run_of(kernel, draws=20, chains=2, hook_fn=note)
    (size, mass, state), *others = seen
    for other_size, other_mass, other_state in others:
        assert other_size == size
        assert torch.equal(other_mass, mass)
        assert all(torch.equal(other_state[name], value) for name, value in state.items())


def test_seed_repeats_a_run():
    draws = []
    kernel = FlowNUTS(modes(), num_particles=400)
    for made in (kernel, kernel, FlowNUTS(modes(), num_particles=400)):
        draws.append(run_of(made, draws=10, chains=2).get_samples()["x"])
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.slow
def test_pyros_runner():
    torch.manual_seed(0)
    kernel = FlowNUTS(modes(), Normals([-CENTRE, CENTRE]), adapt_flow=False)
    mcmc = pyro.infer.MCMC(kernel, num_samples=500, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    left = (mcmc.get_samples()["x"][None, :, 0] < 0.0).double()
    assert abs(scores(left.numpy(), SHARE)) < 4.5
    assert "global_accepted" in to_inference_data(mcmc).sample_stats


Y = torch.tensor([1.1, 0.7, 1.6, 0.9], dtype=torch.float64)


def either_sign(y):
    """Data about the absolute value of a mean, each with an effect of its own."""
    mean = pyro.sample("x", dist.Normal(0.5, 2.0).expand([1]).to_event(1))
    with pyro.plate("data", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean[0], 0.5))
        pyro.sample("y", dist.Normal(effect.abs(), 0.3), obs=y)


def exact_share(y):
    """Of negative means, by quadrature over mean and effects."""
    mean, effect = torch.linspace(-6.0, 6.0, 1201), torch.linspace(-6.0, 6.0, 2401)
    terms = dist.Normal(mean[:, None, None], 0.5).log_prob(effect[:, None])
    terms = terms + dist.Normal(effect[:, None].abs(), 0.3).log_prob(y)
    log_density = dist.Normal(0.5, 2.0).log_prob(mean) + terms.logsumexp(1).sum(-1)
    weights = log_density.softmax(0)
    return float(weights[mean < 0.0].sum() + 0.5 * weights[mean == 0.0].sum())


@pytest.mark.slow
def test_modes_of_a_marginal_model():
    """The noise is a part of the state."""
    marginal = marginalize(either_sign, ["effect"], num_particles=16)
    mcmc = run_of(FlowNUTS(marginal, num_particles=200), Y, draws=250)
    left = (mcmc.get_samples(group_by_chain=True)["x"][..., 0] < 0.0).double()
    assert abs(scores(left.numpy(), exact_share(Y))) < 4.5
    idata = to_inference_data(mcmc, log_likelihood=False)
    assert float(idata.sample_stats["global_accepted"].mean()) > 0.1
    same_sign = (idata.posterior["effect"] > 0.0) == (idata.posterior["x"].isel(x_dim_0=0) > 0.0)
    assert float(same_sign.mean()) > 0.9


@pytest.mark.slow
def test_an_estimator_is_not_fitted_between_modes(monkeypatch):
    """There it would serve none; where chains are in one mode, it is."""

    def fit(*args, **settings):
        raise AssertionError("fitted anew")

    monkeypatch.setattr(estimator, "refit_at", fit)
    monkeypatch.setattr(estimator, "_WANTED_FACTORISED_VARIANCE", -1.0)
    marginal = marginalize(either_sign, ["effect"], num_particles=8, proposal="laplace")
    kernel = FlowNUTS(marginal, Normals([-1.0, 1.0], 0.5, 1), adapt_flow=False)
    run_of(kernel, Y, draws=20, chains=4)
    assert kernel.flow is not None
    with pytest.raises(AssertionError, match="fitted anew"):
        run_of(PseudoMarginalNUTS(marginal), Y, draws=20, chains=4)


# --- where jumps do not pay ---------------------------------------------------------------------


def one_mode(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1), obs=y)


def test_jumps_are_dropped_where_local_moves_do():
    kernel = FlowNUTS(one_mode, num_particles=200)
    mcmc = run_of(kernel, Y)
    assert kernel.flow is None
    (message,) = mcmc.messages
    assert message.startswith("FlowNUTS: local moves alone forget")
    assert "global_accepted" not in mcmc.draws.stats
    assert mcmc.warmup_steps == to_inference_data(mcmc).posterior.attrs["tuning_steps"] == 50
    mean = mcmc.get_samples(group_by_chain=True)["mean"]
    assert abs(scores(mean.numpy(), Y.sum() / (len(Y) + 0.25))) < 4.5


def test_a_mode_that_all_chains_lost_is_told():
    """They start in one mode, whence no jump leads: R-hat is one."""
    guide = Normals([-CENTRE, CENTRE], 1e-3)
    guide.shift.requires_grad_(requires_grad=False)
    kernel = FlowNUTS(modes(), guide, num_proposals=1, num_particles=200)
    start = {"x": torch.full((4, 2), CENTRE)}
    mcmc = run_of(kernel, draws=100, chains=4, initial_params=start)
    assert float(mcmc.get_samples()["x"].mean(-1).min()) > 0.0
    assert mcmc.report["max_rhat"] < 1.05
    (told,) = (m for m in mcmc.messages if "of the population that chains started from" in m)
    assert "'x[" in told


def test_a_flow_is_not_trained_where_an_estimate_rejects_jumps(monkeypatch):
    """At a variance of one even the posterior itself would be accepted in half of the tries."""

    def estimated():
        x = pyro.sample("x", dist.Normal(0.0, 5.0))
        modes = torch.logaddexp(-((x - 4.0) ** 2), -((x + 4.0) ** 2))
        pyro.factor("estimate", modes + noise("u", ()) - 0.5)

    def without_layers(*args, num_layers=None, **kwargs):
        assert num_layers == 0
        return flow_for(*args, num_layers=0, **kwargs)

    monkeypatch.setattr(flow_training, "flow_for", without_layers)
    monkeypatch.setattr(walkers, "_TOLERABLE_STAY", 0.0)  # as if proposals did not make up for it
    kernel = FlowNUTS(estimated, local=PseudoMarginalNUTS(estimated), num_particles=200)
    mcmc = run_of(kernel, draws=250)
    right = (mcmc.get_samples(group_by_chain=True)["x"] > 0.0).double()
    assert abs(scores(right.numpy(), 0.5)) < 4.5


def walkers_of(model, position, noise):
    """Walkers at given places, whose local move is a random walk."""
    kernel = PseudoMarginalNUTS(model)
    potential = kernel.prepare((), {})
    move, kinetic = RandomWalkTransition(potential), GaussianKinetic(torch.ones(1))
    return Walkers(potential, kernel.hamiltonian, move, position, noise, kinetic)


@pytest.mark.parametrize("step_size", [0.02, None])
def test_walkers_stop_once_they_have_forgotten_where_they_were(step_size):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    explorers = walkers_of(model, torch.randn(4000, 1), torch.zeros(4000, 0))
    if step_size is None:  # moves that keep nothing
        explorers.transition = IndependenceTransition(explorers.potential, Normals([0.0], 1.0, 1))
    else:
        explorers.tuning = explorers.tuning._replace(step_size=step_size)
    persistence = explorers.persistence()
    made = len(explorers.visited(10**6).position) // 4000
    assert (made, persistence < 0.7) == ((2, True) if step_size is None else (10, False))


@pytest.mark.parametrize(("scale", "suffices"), [(20.0, True), (200.0, False), (0.4, False)])
def test_whether_proposals_make_up_for_a_poor_flow(scale, suffices):
    """Of a standard normal, by one that is as much wider; where it is narrower, tails are stuck."""
    explorers = walkers_of(
        lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), torch.randn(4000, 1), torch.zeros(4000, 0)
    )
    found = explorers.jumps(Normals([0.0], scale, 1))
    assert found.suffices == suffices
    assert (found.acceptance_rate > 0.5) == (scale < 100.0)
    assert found.num_proposals == (16 if suffices else 32)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_what_an_estimate_leaves_of_jumps(spread):
    """A log-normal estimate has noise N(s, 1) in the posterior: 2 Phi(-s / sqrt 2) is accepted."""

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("estimate", spread * noise("u", ()) - 0.5 * spread**2)

    count = 40_000
    explorers = walkers_of(model, torch.randn(count, 1), spread + torch.randn(count, 1))
    expected = 2.0 * float(torch.special.ndtr(torch.tensor(-spread / math.sqrt(2.0))))
    assert abs(explorers.ceiling() - expected) < 4.5 * 0.5 / math.sqrt(count)


@pytest.mark.slow
def test_fewer_particles_of_a_model_that_takes_long(monkeypatch):
    asked = []

    def population(potential, count, **settings):
        asked.append(count)
        return anneal(potential, 100, **settings)

    monkeypatch.setattr(flow, "anneal", population)
    for seconds, number in ((1e-6, 2000), (1e-4, 1200), (1.0, 500)):
        monkeypatch.setattr(flow, "seconds_of", lambda graph, rows, each=seconds: each * rows)
        messages = run_of(FlowNUTS(modes()), draws=5).messages
        assert asked[-2:] == [250, number]
        assert any(f"{number} particles instead of 2000" in m for m in messages) == (number < 2000)
    run_of(FlowNUTS(modes(), num_particles=800), draws=5)
    assert asked[-2:] == [250, 800]


def test_jumps_that_are_never_accepted_are_dropped():
    guide = Normals([-CENTRE, CENTRE], 1e-3)
    kernel = FlowNUTS(modes(), guide, num_proposals=1, adapt_flow=False)
    mcmc = run_of(kernel, draws=60)
    assert kernel.flow is None
    assert any("would be accepted, too few" in message for message in mcmc.messages)
    assert any("No chain ever crosses between 2 clusters" in m for m in mcmc.messages)


def test_gain_of_jumps():
    """Against chains of two states, whose integrated autocorrelation times are known."""
    persistence, rate = 0.9, 0.4
    beside = persistence * (1.0 - rate)
    assert math.isclose(
        gain(persistence, rate),
        ((1 + persistence) / (1 - persistence)) / ((1 + beside) / (1 - beside)),
    )
    assert gain(0.0, 0.9) == 1.0


def test_a_mode_that_the_flow_lacks_is_told():
    kernel = FlowNUTS(modes(), Normals([-CENTRE]), num_proposals=1, num_particles=400)
    messages = run_of(kernel, draws=60).messages
    assert any("the flow has next to no density" in message for message in messages)


class Losing(Normals):
    """Loses its numbers at a part of its draws, and where it is asked for them."""

    def log_ratio(self, position):
        value = super().log_ratio(position)
        return torch.where(position[:, 1] > position[:, 0] + 0.5, torch.nan, value)


def test_lost_numbers_are_rejections():
    mcmc = run_of(FlowNUTS(modes(), Losing([-CENTRE, CENTRE]), adapt_flow=False))
    check_shares(mcmc)


def accept_by_the_target_alone(monkeypatch):
    monkeypatch.setattr(
        IndependenceTransition,
        "log_weight_at",
        lambda self, state: -state.evaluation.value.double() + math.log(0.3),
    )


def jump_from_the_left_alone(monkeypatch):
    honest = IndependenceTransition.step

    def step(self, state, tuning=None, num_steps=0):
        moved, info = honest(self, state)
        return select_state(state.position[:, 0] < 0.0, moved, state), info

    monkeypatch.setattr(IndependenceTransition, "step", step)


@pytest.mark.parametrize(
    "spoil",
    long_but([jump_from_the_left_alone], [accept_by_the_target_alone, jump_from_the_left_alone]),
)
def test_spoilt_jumps_are_found_out(spoil, monkeypatch):
    spoil(monkeypatch)
    model = modes()
    local = NUTS(model, engine="torch")  # machine code makes jumps that are not spoilt
    kernel = FlowNUTS(model, Normals([-CENTRE, CENTRE]), local, adapt_flow=False)
    with pytest.raises(AssertionError):
        check_shares(run_of(kernel))


PRIOR, ERROR = dist.Normal(0.4, 1.5), 0.2


def folded(y):
    """The absolute value of x, with an error: two modes, whose shares the prior tells."""
    x = pyro.sample("x", PRIOR)
    pyro.sample("y", dist.Normal(x.abs(), ERROR), obs=y)


def ranks_of_prior_draws(runs):
    """How many of as many chains' last draws lie below the true value, and below its size."""
    kernel = FlowNUTS(folded, num_particles=200)
    ranks = {"x": [], "size": []}
    for number in range(runs):
        torch.manual_seed(1000 + number)
        true = PRIOR.sample()
        y = true.abs() + ERROR * torch.randn(())
        x = run_of(kernel, y, draws=10, chains=CHAINS, seed=number).get_samples(
            group_by_chain=True
        )["x"][:, -1]
        ranks["x"].append((x < true).sum())
        ranks["size"].append((x.abs() < true.abs()).sum())
    return {name: torch.stack(found) for name, found in ranks.items()}


@pytest.mark.slow
def test_prior_draws_rank_anywhere():
    check_uniform(ranks_of_prior_draws(120))


@pytest.mark.slow
def test_spoilt_jumps_rank_elsewhere(monkeypatch):
    jump_from_the_left_alone(monkeypatch)
    with pytest.raises(AssertionError, match="the ranks of x are not uniform"):
        check_uniform(ranks_of_prior_draws(60))


# --- what is refused ----------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    model = modes()
    with pytest.raises(TypeError, match="`flow` is a str: expected a DensityGuide"):
        FlowNUTS(model, "normal")
    with pytest.raises(TypeError, match="`flow` is a Linear: expected a flow of zuko"):
        FlowNUTS(model, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`local` is .*: expected a kernel that moves locally"):
        FlowNUTS(model, local=HMC)
    with pytest.raises(ValueError, match="`local` is of another model"):
        FlowNUTS(model, local=NUTS(modes()))
    with pytest.raises(ValueError, match="`jit_compile` is True"):
        FlowNUTS(model, local=NUTS(model), jit_compile=True)
    with pytest.raises(ValueError, match="`num_proposals` is 0: expected 1 or more"):
        FlowNUTS(model, num_proposals=0)
    with pytest.raises(ValueError, match="`num_particles` is 1: expected 2 or more"):
        FlowNUTS(model, num_particles=1)
    with pytest.raises(TypeError, match="`adapt_flow` is 1: expected True or False"):
        FlowNUTS(model, adapt_flow=1)
    with pytest.raises(ValueError, match=r"shape \(1, 3\): expected \(1, 2\)"):
        run_of(FlowNUTS(model, Normals([0.0], dimension=3)))


def test_an_improper_prior_is_refused():
    def flat():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("f", -x.square())

    with pytest.raises(ValueError, match="the prior of site 'x' is improper"):
        run_of(FlowNUTS(flat))


def test_flow_is_there_after_a_run():
    with pytest.raises(RuntimeError, match="run it first"):
        _ = FlowNUTS(modes()).flow
