"""Local moves and jumps of a flow in machine code: exact, and the same however calls are cut."""

from __future__ import annotations

from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, MCMC, NUTS, FlowNUTS
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.flows.population import flow_for
from pyro_hamflow.mcmc.transitions import native_cycle
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.mixture import CycleTransition
from pyro_hamflow.mcmc.transitions.native import NativeMoves
from pyro_hamflow.mcmc.transitions.native_cycle import NativeCycle, beside_jumps
from pyro_hamflow.programs.engines.buffers import NotSupported
from tests.helpers.exact_draws import HMC_TARGETS, check_known, potential_of
from tests.helpers.guides import guide_of
from tests.helpers.kinds import long_but
from tests.helpers.native import native_transition, native_walk


@pytest.fixture(autouse=True)
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@cache
def poor_flow(name, factor=1.3):
    """A mixture that is fitted to draws moved aside, and so has uneven weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        position = HMC_TARGETS[name][2](2000)
        moved = factor * position + 0.3 * factor
        small = {"hidden": (16, 16), "num_steps": 100}
        return flow_for(potential_of(name), moved, position - moved, **small)


def cycle_of(
    name, proposals=3, local=lambda potential: native_transition(potential, 5), factor=1.3
):
    potential = potential_of(name)
    return NativeCycle(local(potential), poor_flow(name, factor), proposals)


LOCAL = {
    "tree": lambda potential: native_transition(potential, 5),
    "line": lambda potential: native_transition(potential, None),
    "walk": native_walk,
}


@pytest.mark.parametrize(
    ("local", "proposals"),
    [
        ("line", 1),
        ("walk", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tree", 1), ("tree", 3))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("line", 3), ("walk", 1))),
    ],
)
def test_invariance(local, proposals):
    cycle = cycle_of("skewed", proposals, LOCAL[local])
    steps = 31 if local == "tree" else 3
    check_known("skewed", "diagonal", cycle, 0.7, steps, moves=4)


@pytest.mark.parametrize("name", ["skewed", pytest.param("conjugate", marks=pytest.mark.slow)])
def test_invariance_of_many(name):
    check_known(name, "dense", cycle_of(name), 0.7, 31, moves=4)


def one_proposal_for_all(monkeypatch):
    """As if every jump of a chain used the proposal of the first, with another number to test."""
    honest = NativeCycle._proposals

    def proposals(self, number, state):
        made = honest(self, 0, state)
        return made._replace(uniform=torch.rand_like(made.uniform))

    monkeypatch.setattr(NativeCycle, "_proposals", proposals)


def stale_density(monkeypatch):
    """As if weights of where chains are were those of before the local move."""
    honest = NativeCycle.step

    def step(self, state, tuning, num_steps):
        weights = NativeCycle._log_weights
        before = weights(self, state.position, state.noise, state.evaluation.value, refused=1e9)

        def stale(*args, refused):
            return before if refused == torch.inf else weights(self, *args, refused=refused)

        self._log_weights = stale
        return honest(self, state, tuning, num_steps)

    monkeypatch.setattr(NativeCycle, "step", step)


def half_the_density(monkeypatch):
    """Weights that take the flow's density for its root."""
    honest = NativeCycle._log_weights

    def weights(self, position, noise, value, *, refused):
        found = honest(self, position, noise, value, refused=refused)
        return 0.5 * (found - value.double())

    monkeypatch.setattr(NativeCycle, "_log_weights", weights)


def only_the_picked(monkeypatch):
    """As if the other proposals of a jump weighed nothing."""
    honest = NativeCycle._pool

    def pool(self, moves, chains):
        made = honest(self, moves, chains)
        own = (made.all.exp() - made.others.exp()).log()
        return made._replace(others=torch.full_like(made.others, -torch.inf), all=own)

    monkeypatch.setattr(NativeCycle, "_pool", pool)


SPOILT = [one_proposal_for_all, stale_density, half_the_density, only_the_picked]


@pytest.mark.parametrize("spoil", long_but([half_the_density], SPOILT))
def test_spoilt_jumps_are_found_out(spoil, monkeypatch):
    cycle = cycle_of("skewed", factor=0.5)
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check_known("skewed", "diagonal", cycle, 0.7, 31, moves=4)


def test_a_gradient_that_stays_behind_is_found_out(monkeypatch):
    honest = NativeCycle._pool

    def pool(self, moves, chains):
        made = honest(self, moves, chains)
        return made._replace(gradient=torch.zeros_like(made.gradient))

    monkeypatch.setattr(NativeCycle, "_pool", pool)
    with pytest.raises(AssertionError):
        check_known("skewed", "diagonal", cycle_of("skewed"), 0.7, 31, moves=4)


def test_statistics_are_those_of_a_cycle():
    cycle = cycle_of("skewed")
    slow = beside_jumps(cycle.local, cycle.target, cycle.guide, 3, 100)
    assert isinstance(slow, CycleTransition)
    assert isinstance(beside_jumps(cycle.local, cycle.target, cycle.guide, 3, 1000), NativeCycle)
    position = HMC_TARGETS["skewed"][2](4000)
    tuning = Tuning(0.7, GaussianKinetic(torch.ones(position.shape[1])))
    rates = []
    for transition in (cycle, slow):
        state = transition.state_at(position, position[:, :0])
        _, info = transition.step(state, tuning, 31)
        rates.append(info.further["global_acceptance_rate"].mean())
        share = info.further["global_accepted"].double().mean()
        assert abs(share - rates[-1]) < 0.03
        assert (info.energy >= state.evaluation.value.min()).all()
    assert abs(rates[0] - rates[1]) < 0.03
    assert list(info.further) == list(cycle.step(state, tuning, 31)[1].further)


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [12]])
def test_draws_do_not_depend_on_calls(cuts, monkeypatch):
    """Nor on what else draws random numbers, nor on whether a pool is made again."""
    monkeypatch.setattr(native_cycle, "_ROWS", 4 * 3 * 5)
    found = []
    for parts in ([12], cuts):
        torch.manual_seed(0)
        cycle = cycle_of("skewed")
        state = cycle.state_at(torch.zeros(4, cycle.target.dimension), torch.zeros(4, 0))
        tuning = Tuning(0.7, GaussianKinetic(torch.ones(cycle.target.dimension)))
        blocks = []
        for count in parts:
            torch.rand(count)
            cycle._known = None
            state, block = cycle.block(state, tuning, [15] * count)
            blocks.append(block)
        found.append(torch.cat([block.position for block in blocks], 1))
        assert torch.equal(found[-1][:, -1], state.position)
    assert torch.equal(*found)
    assert len(found[0][0].unique(dim=0)) > 6


def test_a_density_that_is_drawn_is_refused():
    local = native_transition(potential_of("skewed"), 5)
    with pytest.raises(NotSupported, match="random"):
        NativeCycle(local, guide_of("skewed"), 1)


def test_what_is_not_machine_code_says_why():
    said = []
    cycle, drawn = cycle_of("skewed"), guide_of("skewed")
    for local, guide in ((cycle.local, cycle.guide), (cycle.local, drawn)):
        beside_jumps(local, cycle.target, guide, 3, 10, said.append)
    assert len(said) == 1 and said[0].startswith("jumps are made by torch, for the native engine")
    assert "random" in said[0]
    estimate = object.__new__(type("Moves", (NativeMoves,), {"target": cycle.target}))
    beside_jumps(estimate, cycle.target, drawn, 3, 10, said.append)
    assert "noise moves" in said[1]
    beside_jumps(cycle.local, cycle.target, drawn, 3, 1000)
    assert len(said) == 2


def two_signs():
    x = pyro.sample("x", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x.square(), 1.0).to_event(1), obs=torch.tensor([4.0, 4.0]))


def test_a_run_that_asks_for_machine_code_is_told(monkeypatch):
    """Also where it is too short for code to be worth its time otherwise."""

    def no_code(*args):
        raise NotSupported("such a density")

    monkeypatch.setattr(native_cycle, "_density_of", no_code)
    local = NUTS(two_signs, engine="native")
    mcmc = MCMC(FlowNUTS(two_signs, local=local, num_particles=200), 20, num_chains=2, seed=0)
    mcmc.run()
    said = [text for text in mcmc.messages if "jumps are made by torch" in text]
    assert len(said) == 1 and "for such a density" in said[0]


@pytest.mark.parametrize("local", long_but([NUTS], [NUTS, HMC]))
def test_runs_are_repeated_and_go_on(local, tmp_path, monkeypatch):
    kinds = []
    honest = NativeCycle.block
    monkeypatch.setattr(
        NativeCycle, "block", lambda *args: kinds.append(len(args[3])) or honest(*args)
    )

    def run(draws=600, seen=None, **settings):
        kernel = FlowNUTS(two_signs, local=local(two_signs, engine="native"), num_particles=200)

        def note(kernel, params, stage, number):
            if stage == "Sample" and number == 300:
                raise KeyboardInterrupt

        mcmc = MCMC(
            kernel,
            draws,
            num_chains=4,
            seed=0,
            disable_progbar=True,
            hook_fn=note if seen else None,
            **settings,
        )
        mcmc.run()
        return mcmc

    whole = run()
    assert sum(kinds) == 600
    path = tmp_path / "run.zarr"
    with pytest.warns(RuntimeWarning, match="301 of 600"):
        run(seen=True, checkpoint=path)
    resumed = MCMC.resume(path, two_signs, disable_progbar=True)
    assert torch.equal(whole.draws.position, resumed.draws.position)
    share = (whole.draws.position > 0.0).double().mean((0, 1))
    assert (abs(share - 0.5) < 0.1).all()
