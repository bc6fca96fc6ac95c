"""Warm-up: step size, mass, schedule; and that nothing is tuned afterwards."""

from __future__ import annotations

import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, MCMC, NUTS, PseudoMarginalHMC, marginalize
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.metric import Covariance
from pyro_hamflow.mcmc.adaptation.watch import Standstill
from pyro_hamflow.mcmc.adaptation.window import DualAveraging, WarmUp, mass_windows
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from tests.helpers.outcomes import outcome

SCALES = torch.tensor([0.1, 1.0, 5.0]).double()


def scaled():
    pyro.sample("x", dist.Normal(0.0, SCALES).to_event(1))


def latent():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 3):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([0.5, -1.0, 2.0]))


# --- step size ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("start", [1e-3, 0.5, 30.0])
@pytest.mark.parametrize("gently", [False, True])
def test_dual_averaging_solves_for_target(target, start, gently):
    """At an acceptance of exp(-step size) the answer is -log(target)."""
    averaging = DualAveraging(start, target, gently=gently)
    for _ in range(3000):
        averaging.update(math.exp(-averaging.step_size))
    assert abs(math.exp(-averaging.final()) - target) < 0.01


@pytest.mark.parametrize(("gently", "low", "high"), [(False, 0.61, 0.75), (True, 0.55, 0.60)])
def test_what_is_sought_gently_is_found_soon(gently, low, high):
    """Of single steps along the gradient of a normal in so many dimensions as limits the error.

    Fifty iterations of four chains, from twice the size that is sought.
    """
    normal = NormalDist()
    best = -2.0 * normal.inv_cdf(0.574 / 2.0)  # the spread of the energy error, as the size's cube

    def mean(log_size):
        return 2.0 * normal.cdf(-0.5 * best * math.exp(3.0 * log_size))

    torch.manual_seed(0)
    found = []
    for _ in range(200):
        averaging = DualAveraging(2.0, 0.574, gently=gently)
        for _ in range(50):
            spread = best * averaging.step_size**3
            error = 0.5 * spread**2 + spread * torch.randn(4, dtype=torch.float64)
            averaging.update(float(torch.exp(-error).clamp(max=1.0).mean()))
        found.append(mean(math.log(averaging.final())))
    assert low < sum(found) / len(found) < high


def test_dual_averaging_before_any_update():
    assert DualAveraging(0.3, 0.8).final() == 0.3


@pytest.mark.parametrize("target", [0.65, 0.9])
def test_acceptance_reaches_target(target):
    """Of chains moved with the tuned step size, within what jitter of the length leaves open."""
    torch.manual_seed(1)
    inverse_mass = SCALES.square()
    kernel = HMC(
        scaled,
        target_accept_prob=target,
        inverse_mass_matrix=inverse_mass,
        adapt_mass_matrix=False,
    )
    state = kernel.begin(64, 300)
    rates = []
    for i in range(600):
        state, info = kernel.advance(state)
        if i >= 300:
            rates.append(info.acceptance_rate.mean().item())
    assert abs(np.mean(rates) - target) < 0.05


def test_fixed_step_size_stays():
    kernel = HMC(scaled, step_size=0.05, adapt_step_size=False)
    state = kernel.begin(4, 30)
    for _ in range(40):
        state, _ = kernel.advance(state)
        assert kernel.step_size == 0.05


# --- mass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
def test_covariance_is_that_within_chains(dense):
    """Pooled over the chains, each about its own mean, however far apart they are."""
    torch.manual_seed(2)
    chains = torch.randn(7, 40, 3) @ torch.randn(3, 3) + 100.0 * torch.randn(7, 1, 3)
    covariance = Covariance(3, dense=dense)
    for batch in chains.unbind(1):
        covariance.update(batch)
    expected = np.mean([np.cov(chain.numpy().T) for chain in chains], 0)
    expected = expected if dense else np.diag(expected)
    assert covariance.count == 7 * 39
    computed = covariance._sum / covariance.count
    assert np.allclose(computed.numpy(), expected, rtol=1e-12, atol=1e-10)


def test_chains_in_two_modes_keep_the_scale_of_each():
    def two_modes():
        x = pyro.sample("x", dist.Normal(0.0, 100.0))
        near = torch.stack([-0.5 * (x - 30.0) ** 2, -0.5 * (x + 30.0) ** 2])
        pyro.factor("modes", near.logsumexp(0))

    torch.manual_seed(3)
    kernel = HMC(two_modes)
    start = torch.tensor([30.0, -30.0]).repeat(8)
    state = kernel.begin(16, 200, initial_params={"x": start})
    for _ in range(200):
        state, _ = kernel.advance(state)
    assert state.position.sign().sum() == 0, "a chain has crossed: the test is of no use"
    assert 0.8 < kernel.phase.tuning.kinetic.inverse_mass.item() < 1.25


@pytest.mark.parametrize("dense", [False, True])
def test_inverse_mass_is_covariance_shrunk_to_its_diagonal(dense):
    torch.manual_seed(2)
    covariance = Covariance(2, dense=dense)
    draws = torch.randn(51, 2) * torch.tensor([1e-9, 1e9])
    for draw in draws:
        covariance.update(draw[None])
    full = torch.cov(draws.T)
    expected = 50 / 55 * full + 5 / 55 * torch.diag(full.diag())
    expected = expected if dense else full.diag()
    assert torch.allclose(covariance.inverse_mass(torch.eye(2)), expected, rtol=1e-12, atol=0.0)


def test_infinite_positions_are_left_out():
    """Those alone: the chain's other positions count."""
    covariance = Covariance(2, dense=False)
    covariance.update(torch.tensor([[1.0, 2.0], [torch.inf, 0.0]]))
    covariance.update(torch.tensor([[3.0, 5.0], [7.0, 0.0]]))
    covariance.update(torch.tensor([[torch.nan, 0.0], [9.0, 4.0]]))
    assert covariance.count == 2
    assert torch.allclose(covariance._sum, torch.tensor([2.0 + 2.0, 4.5 + 8.0]))


@pytest.mark.parametrize("full_mass", [False, True])
def test_mass_finds_posterior_scales(full_mass):
    torch.manual_seed(3)
    kernel = HMC(scaled, full_mass=full_mass)
    state = kernel.begin(32, 300)
    for _ in range(300):
        state, _ = kernel.advance(state)
    found = kernel.phase.tuning.kinetic.inverse_mass
    found = found.diagonal() if full_mass else found
    assert torch.allclose(found.sqrt(), SCALES, rtol=0.1)


def test_identity_mass_stays():
    kernel = HMC(scaled, full_mass=False, adapt_mass_matrix=False)
    state = kernel.begin(4, 100)
    for _ in range(100):
        state, _ = kernel.advance(state)
    assert torch.equal(kernel.phase.tuning.kinetic.inverse_mass, torch.ones(3))


# --- schedule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_steps", [0, 1, 10, 19, 20, 27, 50, 100, 333, 500, 1000, 5000])
def test_windows(warmup_steps):
    """They lie in order inside the warm-up, with its first and last part left free."""
    ends = mass_windows(warmup_steps)
    assert ends == sorted(set(ends))
    last = warmup_steps - max(warmup_steps // 10, min(50, warmup_steps // 5))
    assert all(5 < end <= last for end in ends)
    lengths = np.diff([5, *ends])
    assert all(lengths >= 5)
    assert all(lengths[1:] >= 2 * lengths[:-1])
    if warmup_steps >= 100:
        assert ends[-1] == last


def test_mass_changes_at_ends_of_windows():
    kinetic = GaussianKinetic(torch.ones(2))
    warmup = WarmUp(0.1, kinetic, 500, target=0.8, adapt_step_size=True, adapt_mass=True)
    changed = [i + 1 for i in range(500) if warmup.update(*outcome(torch.randn(8, 2)))]
    assert changed == mass_windows(500)
    assert warmup.finished


def test_opening_positions_do_not_enter_mass():
    """Chains on their way to the typical set do not count."""
    kinetic = GaussianKinetic(torch.ones(1))
    warmup = WarmUp(0.1, kinetic, 100, target=0.8, adapt_step_size=False, adapt_mass=True)
    for i in range(100):
        position = torch.randn(8, 1) if i >= 15 else torch.full((8, 1), 1e6)
        warmup.update(*outcome(position))
    assert warmup.tuning.kinetic.inverse_mass < 2.0


# --- nothing is tuned afterwards ----------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: HMC(scaled),
        lambda: HMC(scaled, full_mass=True),
        lambda: PseudoMarginalHMC(marginalize(latent, ["x"], num_particles=4), method="joint"),
        lambda: PseudoMarginalHMC(
            marginalize(latent, ["x"], num_particles=4), method="conditional"
        ),
    ],
    ids=["diagonal", "dense", "joint", "conditional"],
)
@pytest.mark.parametrize("warmup_steps", [0, 60])
def test_tuning_is_frozen_after_warmup(make, warmup_steps):
    kernel = make()
    marginal = isinstance(kernel, PseudoMarginalHMC)
    site, shape = ("mean", (8,)) if marginal else ("x", (8, 3))
    state = kernel.begin(8, warmup_steps, initial_params={site: 0.1 * torch.randn(shape)})
    for _ in range(warmup_steps):
        state, _ = kernel.advance(state)
    size, mass = kernel.step_size, kernel.phase.tuning.kinetic.inverse_mass.clone()
    tuning = kernel.phase.tuning
    for _ in range(20):
        state, _ = kernel.advance(state)
    assert kernel.step_size == size
    assert torch.equal(kernel.phase.tuning.kinetic.inverse_mass, mass)
    assert kernel.phase.tuning is tuning


def test_number_of_steps_does_not_depend_on_state():
    """It is the same for all chains, and drawn from the step size alone."""
    kernel = HMC(scaled, step_size=0.1, adapt_step_size=False, jitter=0.4)
    state = kernel.begin(16, 0)
    counts = set()
    for _ in range(60):
        state, info = kernel.advance(state)
        counts.add(info.n_steps)
    mean = math.pi / 2 / 0.1
    assert min(counts) >= round(0.6 * mean)
    assert max(counts) <= round(1.4 * mean)
    assert len(counts) > 5


def test_few_positions_give_a_diagonal_mass():
    """A whole matrix from fewer positions than dimensions would have directions without spread."""
    torch.manual_seed(0)
    few, many = Covariance(20, dense=True), Covariance(20, dense=True)
    mixed = torch.randn(20, 20)
    for _ in range(10):
        few.update(torch.randn(4, 20))
        many.update(torch.randn(300, 20) @ mixed)
    ones = torch.eye(20)
    assert torch.equal(few.inverse_mass(ones), torch.diag(few.inverse_mass(ones).diag()))
    assert (many.inverse_mass(ones).fill_diagonal_(0.0) != 0).sum() == 380


def test_mass_stays_where_nothing_moves():
    still = Covariance(3, dense=True)
    for _ in range(100):
        still.update(torch.zeros(2, 3))
    old = torch.diag(torch.tensor([1e-3, 1.0, 1e3]))
    assert torch.equal(still.inverse_mass(old), old)


@pytest.mark.parametrize(("dimension", "dense"), [(500, True), (501, False)])
def test_mass_is_dense_where_that_is_cheap(dimension, dense):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([dimension]).to_event(1))

    kernel = HMC(model)
    kernel.begin(2, 10)
    assert kernel.phase.tuning.kinetic.inverse_mass.dim() == (2 if dense else 1)


def steep():
    """Tails in which only short steps are accepted."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.factor("tail", -x.pow(4).sum())


def distance_after_warmup():
    kernel = HMC(steep)
    start = torch.zeros(16, 2)
    start[3] = 40.0
    state = kernel.begin(16, 100, initial_params={"x": start})
    for _ in range(100):
        state, _ = kernel.advance(state)
    assert kernel.phase.tuning.step_scale is None
    return state.position.abs().max().item()


def test_chain_that_starts_badly_arrives():
    assert distance_after_warmup() < 3.0


def test_it_would_not_with_one_step_for_all(monkeypatch):
    monkeypatch.setattr(WarmUp, "_set_step_scale", lambda self, acceptance_rate: None)
    assert distance_after_warmup() > 30.0


def distance_of_draws():
    start = torch.zeros(16, 2)
    start[3] = 1000.0
    mcmc = MCMC(HMC(steep), 20, None, {"x": start}, 16, seed=0, disable_progbar=True)
    mcmc.run()
    assert any("went on" in message for message in mcmc.messages)
    return mcmc.draws.position.abs().max().item()


def test_chain_that_starts_very_badly_arrives_as_warmup_goes_on():
    assert distance_of_draws() < 3.0


def test_it_would_not_if_steps_differed_at_first_alone(monkeypatch):
    honest = WarmUp._set_step_scale

    def at_first(self, acceptance_rate):
        if self.opening:
            honest(self, acceptance_rate)
        else:
            self.tuning = self.tuning._replace(step_scale=None)

    monkeypatch.setattr(WarmUp, "_set_step_scale", at_first)
    assert distance_of_draws() > 30.0


# --- a density without a bound --------------------------------------------------------------------


def fitted_exactly(y, least):
    """At the mean of constant data the density has no bound, unless the error has a least value."""
    one = torch.ones((), dtype=torch.float32)  # whose rounding stops the chains
    mean = pyro.sample("mean", dist.Normal(0.0 * one, 2.0))
    error = least + pyro.sample("error", dist.HalfNormal(one))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, error), obs=y)


def run_near_the_pole(least):
    """Four chains that start where the density is steep: beside the mean, with a tiny error."""
    start = {"mean": torch.full((4,), 1.001), "error": torch.full((4,), -20.0)}
    kernel = NUTS(fitted_exactly, max_tree_depth=6)
    mcmc = MCMC(kernel, 2, None, start, 4, seed=0, disable_progbar=True)
    mcmc.run(torch.ones(24, dtype=torch.float32), least)
    return mcmc


@pytest.mark.slow
def test_density_without_a_bound_is_told_and_ends(monkeypatch):
    taken = []
    step = NUTSTransition.step

    def counted(transition, state, tuning, most, *args):
        taken.append(most)
        return step(transition, state, tuning, most, *args)

    monkeypatch.setattr(NUTSTransition, "step", counted)
    mcmc = run_near_the_pole(0.0)
    told = [message for message in mcmc.messages if "led nowhere" in message]
    assert len(told) == 1 and "The density may have no bound" in told[0]
    assert "Or torch.float32 rounds it away" in told[0]
    assert sum("went on to" in message for message in mcmc.messages) == 0  # it was not worth it
    assert taken.count(63) < 0.6 * len(taken) and 31 in taken


def test_bounded_density_is_left_alone():
    assert not any("led nowhere" in message for message in run_near_the_pole(0.3).messages)


def info_of(*cut):
    return SimpleNamespace(further={"reached_max_treedepth": torch.tensor(cut)})


def test_trajectories_are_shortened_while_they_lead_nowhere():
    watch = Standstill()
    for cut, size in ((False, 1e-4), (True, 0.1)):  # they turn back, or go far
        for _ in range(50):
            watch.update(info_of(cut, cut), 1023, size)
    watch.update(info_of(True, True), 20, 1e-4)  # short as they are
    assert not watch.found and watch.shortened(1023) == 1023
    for number in range(10):
        assert not watch.found and watch.shortened(1023) == 1023, number
        watch.update(info_of(True, False), 1023, 1e-4)
    assert watch.found
    assert [watch.shortened(steps) for steps in (1023, 127, 20)] == [63, 31, 20]
    watch.restart()
    assert watch.found and watch.shortened(1023) == 1023
