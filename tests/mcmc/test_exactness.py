"""Samplers keep their targets: many chains, begun from exact draws, follow them after some moves.

The draws and the checks are those of `tests/helpers/exact_draws.py`. Each check is shown to fail on
samplers spoilt in one point.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from pyro_hamflow import CorrelatedRefresh, EllipticalSliceRefresh, StretchRefresh
from pyro_hamflow.dynamics import integrators
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.marginal import estimator as estimator_module
from pyro_hamflow.mcmc.transitions import base, hmc, nuts, pseudo_marginal, tree_builder
from pyro_hamflow.mcmc.transitions import noise_refresh as refresh_module
from pyro_hamflow.mcmc.transitions import trajectory as tree
from pyro_hamflow.mcmc.transitions.base import Decision, State, select, select_evaluation
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks
from pyro_hamflow.mcmc.transitions.nuts import JointNUTSTransition, NUTSTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition, JointTransition
from tests.helpers.exact_draws import (
    CHAINS,
    DEPTH,
    HMC_TARGETS,
    MORE_TARGETS,
    MOST_POINTS,
    TARGETS,
    Extended,
    check,
    check_known,
    make_target,
    potential_of,
)
from tests.helpers.kinds import long_but
from tests.helpers.native import (
    WAYS,
    native_estimate_transition,
    native_transition,
    one_by_one,
    spoil_line,
)

# --- checks -------------------------------------------------------------------------------------

REFRESHES = {
    "fresh": CorrelatedRefresh(0.0),
    "correlated": CorrelatedRefresh(0.9),
    "slice": EllipticalSliceRefresh(),
    "stretches": StretchRefresh(3),
}


def joint(target):
    return JointTransition(target.potential, CHAINS)


def conditional(target, refresh):
    inner = HMCTransition(target.potential, CHAINS)
    return ConditionalTransition(inner, refresh, Blocks(target.potential))


def conditional_hmc(target):
    return conditional(target, CorrelatedRefresh())


def joint_nuts(target):
    return JointNUTSTransition(target.potential, CHAINS, DEPTH)


def conditional_nuts(target):
    inner = NUTSTransition(target.potential, CHAINS, DEPTH)
    return ConditionalTransition(inner, CorrelatedRefresh(), Blocks(target.potential))


ALL_TARGETS = TARGETS | MORE_TARGETS


@pytest.mark.parametrize("name", long_but(["prior-8", "laplace-2", "rqmc-8"], ALL_TARGETS))
def test_invariance_joint(name):
    check(make_target(name), joint(make_target(name)))


# Every refresh of one target, and one refresh of every other.
QUICK_REFRESHES = [
    *(("prior-8", refresh) for refresh in REFRESHES),
    *(("laplace-2", "slice"), ("function-2", "fresh")),
    *(("rqmc-8", "correlated"), ("by_hand-1", "stretches")),
]


@pytest.mark.parametrize(
    ("name", "refresh"), long_but(QUICK_REFRESHES, itertools.product(ALL_TARGETS, REFRESHES))
)
def test_invariance_conditional(name, refresh):
    target = make_target(name)
    check(target, conditional(target, REFRESHES[refresh]))


QUICK_TREES = [
    *(("prior-8", joint_nuts), ("prior-8", conditional_nuts), ("laplace-2", conditional_nuts)),
    *(("function-2", joint_nuts), ("rqmc-8", joint_nuts), ("by_hand-1", conditional_nuts)),
]


@pytest.mark.parametrize(
    ("name", "make"),
    long_but(QUICK_TREES, itertools.product(ALL_TARGETS, [joint_nuts, conditional_nuts])),
)
def test_invariance_pseudo_marginal_nuts(name, make):
    check(make_target(name), make(make_target(name)))


NATIVE_MOVES = {  # of each, how noise moves after the parameters, and the deepest tree
    **{name: (refresh, None) for name, refresh in REFRESHES.items()},
    "NUTS": (CorrelatedRefresh(), DEPTH),
    "joint": (None, None),
    "joint NUTS": (None, DEPTH),
}


@pytest.mark.parametrize(
    ("name", "moves"),
    long_but(
        [("prior-8", moves) for moves in NATIVE_MOVES],
        itertools.product(ALL_TARGETS, NATIVE_MOVES),
    ),
)
def test_invariance_native_estimate(name, moves):
    target = make_target(name)
    check(target, native_estimate_transition(target.potential, *NATIVE_MOVES[moves]))


def test_blocks_conditional():
    """One block for an estimate by hand, one for each element otherwise."""
    assert not Blocks(make_target("by_hand-1").potential).groups
    blocks = Blocks(make_target("prior-8").potential)
    assert [group.shape for group in blocks.groups] == [torch.Size([3])]


def hmc_of(name):
    return HMCTransition(potential_of(name), CHAINS)


def check_hmc(name, mass, *, step=None):
    check_known(name, mass, hmc_of(name), 0.5, 4, step=step)


def check_nuts(name, mass, step_size, *, wrap=None, moves=2, chains=CHAINS):
    transition = NUTSTransition(potential_of(name), chains, DEPTH)
    step = wrap and wrap(transition)
    check_known(
        name, mass, transition, step_size, MOST_POINTS, step=step, moves=moves, chains=chains
    )


@pytest.mark.parametrize("mass", ["diagonal", "dense"])
@pytest.mark.parametrize("name", HMC_TARGETS)
def test_invariance_hmc(name, mass):
    check_hmc(name, mass)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mass", ["diagonal", "dense"])
@pytest.mark.parametrize("name", HMC_TARGETS)
def test_invariance_native_hmc(name, mass, way, monkeypatch):
    WAYS[way](monkeypatch)
    check_known(name, mass, native_transition(potential_of(name), None), 0.5, 4)


@pytest.mark.parametrize(
    ("name", "step_size", "mass"),
    [
        *(("skewed", 0.3, "diagonal"), ("skewed", 0.7, "dense")),
        *(("conjugate", 0.4, "dense"), ("conjugate", 0.7, "diagonal")),
    ],
)
def test_invariance_nuts(name, step_size, mass):
    """Step sizes under which most trajectories have 8 to 31 points, and 2 to 7."""
    check_nuts(name, mass, step_size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mass", ["diagonal", "dense"])
@pytest.mark.parametrize(
    ("name", "step_size"),
    [("skewed", 0.3), ("skewed", 0.7), ("conjugate", 0.4), ("conjugate", 0.7)],
)
def test_invariance_native_nuts(name, step_size, mass, way, monkeypatch):
    WAYS[way](monkeypatch)
    transition = native_transition(potential_of(name), DEPTH)
    check_known(name, mass, transition, step_size, MOST_POINTS)


@pytest.mark.slow
@pytest.mark.parametrize("mass", ["diagonal", "dense"])
@pytest.mark.parametrize("name", HMC_TARGETS)
def test_invariance_nuts_of_many_chains(name, mass):
    check_nuts(name, mass, 0.6, moves=4, chains=10 * CHAINS)
    transition = native_transition(potential_of(name), DEPTH)
    check_known(name, mass, transition, 0.6, MOST_POINTS, moves=4, chains=10 * CHAINS)


# --- the checks fail on spoilt samplers ---------------------------------------------------------


def _always(error, level):
    yes = torch.ones_like(error, dtype=torch.bool)
    return Decision(yes, yes.to(error), error, ~yes)


def accept_always(monkeypatch):
    monkeypatch.setattr(hmc, "metropolis", _always)
    monkeypatch.setattr(pseudo_marginal, "metropolis", _always)


def forget_kinetic_energy(monkeypatch):
    monkeypatch.setattr(GaussianKinetic, "energy", lambda self, r: torch.zeros_like(r[:, 0]))


def forget_noise_norm(monkeypatch):
    monkeypatch.setattr(
        pseudo_marginal, "_half_square_gain", lambda new, old: torch.zeros_like(new[:, 0])
    )


def rotate_wrongly(monkeypatch):
    monkeypatch.setattr(
        integrators,
        "rotate",
        lambda u, p, t: (u * t.cos() + p * t.sin(), p * t.cos() - 0.8 * u * t.sin()),
    )


def keep_rejected_sites(monkeypatch):
    def select_evaluation(accepted, new, old):
        value = select(accepted, new.value, old.value)
        return new._replace(value=value)

    monkeypatch.setattr(base, "select_evaluation", select_evaluation)


def accept_all_blocks(monkeypatch):
    ratios = Blocks.log_ratios

    def zero(self, new, old):
        return {name: torch.zeros_like(ratio) for name, ratio in ratios(self, new, old).items()}

    monkeypatch.setattr(Blocks, "log_ratios", zero)


def confuse_blocks(monkeypatch):
    ratios = Blocks.log_ratios

    def rolled(self, new, old):
        return {name: ratio.roll(1, -1) for name, ratio in ratios(self, new, old).items()}

    monkeypatch.setattr(Blocks, "log_ratios", rolled)


@pytest.mark.slow
def test_mistaken_share_of_the_prior_is_noticed(monkeypatch):
    """As if the defended proposal's weights were those of another mixture."""
    target = make_target("laplace-2")
    check(target, joint(target))
    monkeypatch.setattr(estimator_module, "PRIOR_SHARE", 0.3)
    spoilt = Extended(*TARGETS["laplace-2"])
    spoilt.draws()
    with pytest.raises(AssertionError, match="standard errors"):
        check(spoilt, joint(spoilt))


def shrink_proposal(monkeypatch):
    """As if the noise were added with weight 1 - rho ** 2, not with its root."""
    monkeypatch.setattr(refresh_module, "math", SimpleNamespace(sqrt=lambda value: value))


def choose(transition, other):
    """The transition where the first coordinate is positive, and another step elsewhere."""

    def step(state, tuning, num_steps):
        first, info = transition.step(state, tuning, num_steps)
        second = other(state, tuning, num_steps)
        where = state.position[:, 0] > 0
        parts = (select(where, new, old) for new, old in zip(first[:3], second[:3], strict=True))
        return State(*parts, select_evaluation(where, first.evaluation, second.evaluation)), info

    return step


def adapt_step_size(transition):
    """A step size that depends on the state."""

    def other(state, tuning, num_steps):
        return transition.step(state, tuning._replace(step_size=0.3), num_steps)[0]

    return choose(transition, other)


def redraw_noise(transition):
    """New noise after the move, outside any accepted move."""

    def step(state, tuning, num_steps):
        state, info = transition.step(state, tuning, num_steps)
        noise = torch.randn_like(state.noise)
        return transition.state_at(state.position, noise), info

    return step


def pick_any_particle(transition):
    """Local sites recovered without looking at the weights."""

    def step(state, tuning, num_steps):
        state, info = transition.step(state, tuning, num_steps)
        values = make_target("prior-8").values(state.position, state.noise.reshape(CHAINS, 8, -1))
        evaluation = state.evaluation._replace(local={"x": values[:, 0]})
        return state._replace(evaluation=evaluation), info

    return step


SPOILT_PATCHES = {
    "joint": [accept_always, forget_kinetic_energy, forget_noise_norm, rotate_wrongly]
    + [keep_rejected_sites],
    "fresh": [accept_always, forget_kinetic_energy, accept_all_blocks, confuse_blocks],
    "correlated": [accept_all_blocks, shrink_proposal],
    "slice": [accept_all_blocks],
}
SPOILT_STEPS = [adapt_step_size, redraw_noise, pick_any_particle]


def _transition(method):
    target = make_target("prior-8")
    return joint(target) if method == "joint" else conditional(target, REFRESHES[method])


@pytest.mark.parametrize(
    ("method", "spoil"),
    [(method, spoil) for method, patches in SPOILT_PATCHES.items() for spoil in patches],
)
def test_spoilt_sampler_is_found_out(method, spoil, uncaptured, monkeypatch):
    transition = _transition(method)
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check(make_target("prior-8"), transition)


@pytest.mark.parametrize("spoil", SPOILT_STEPS)
@pytest.mark.parametrize("method", ["joint", "fresh"])
def test_spoilt_step_is_found_out(method, spoil):
    transition = _transition(method)
    with pytest.raises(AssertionError, match="standard errors"):
        check(make_target("prior-8"), transition, step=spoil(transition))


def test_one_block_for_all_is_found_out_if_all_are_accepted(monkeypatch):
    target = make_target("by_hand-1")
    accept_all_blocks(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, conditional(target, CorrelatedRefresh()))


@pytest.mark.parametrize("spoil", [accept_always, forget_kinetic_energy])
def test_spoilt_hmc_is_found_out(spoil, uncaptured, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors|is not finite"):
        check_hmc("skewed", "diagonal")


def test_adapting_hmc_is_found_out():
    with pytest.raises(AssertionError, match="standard errors"):
        check_hmc("skewed", "diagonal", step=adapt_step_size(hmc_of("skewed")))


# Lines of the trajectories in machine code, and what they are spoilt to.
SPOILT_LINES = {
    "accept always": ("uniform(random, 0) < rate", "true"),
    "forget kinetic energy": ("(after - before)", "0.0"),
    "take every doubling": ("uniform(random, 2) * weight < candidate_weight", "true"),
    "take the first": ("chance * candidate_weight < own", "own == candidate_weight"),
    "keep subtrees that turn": ("(mark ? broken : back) = turned(mark,", "back = turned(0,"),
}
# The same of chains side by side.
SPOILT_SIDES = {
    "accept always": ("together<Wide>(chances) < rate", "rate == rate"),
    "forget kinetic energy": ("(after - before)", "0.0 * (after - before)"),
    "carry over the candidate": ("take(doubles.all(), candidate, Wide{});", ""),
    "take every doubling": ("tree.uniform(2) * weight[k] < candidate[k]", "true"),
    "take the first": ("together<Wide>(chances) * candidate < own", "own == candidate"),
    "keep subtrees that turn": ("(mark ? broken : back) =", "back ="),
    "keep to one end": ("exchange(turned, here.z, other.z), ", ""),
}
QUICK_SPOILT_LINES = ("accept always", "take every doubling")


@pytest.mark.parametrize(
    ("way", "name"),
    [
        pytest.param(way, name, marks=[] if name in QUICK_SPOILT_LINES else pytest.mark.slow)
        for way, lines in (("one by one", SPOILT_LINES), ("side by side", SPOILT_SIDES))
        for name in lines
    ],
)
def test_spoilt_machine_code_is_found_out(way, name, monkeypatch):
    if way == "one by one":
        one_by_one(monkeypatch)
        spoil_line("trajectories", *SPOILT_LINES[name], monkeypatch)
    else:
        spoil_line("side_by_side", *SPOILT_SIDES[name], monkeypatch)
    depth = None if name in ("accept always", "forget kinetic energy") else DEPTH
    transition = native_transition(potential_of("skewed"), depth)
    step_size, num_steps = (0.5, 4) if depth is None else (0.5, MOST_POINTS)
    with pytest.raises(AssertionError, match="standard errors|is not finite"):
        check_known("skewed", "diagonal", transition, step_size, num_steps)


# Lines of how noise moves, and what they are spoilt to, by the moves that it is found out with.
SPOILT_NOISE = {
    "accept all blocks": ("fresh", "std::log(random.uniform()) < ratios[i]", "true"),
    "confuse blocks": ("fresh", "ratios[i] = double(now", "ratios[(i + 1) % 3] = double(now"),
    "keep rejected sites": ("fresh", "kept.local[i] = accepted[call.local_blocks[i]] ?", "true ?"),
    "shrink proposals": ("correlated", "Real(std::sqrt(1.0 - call", "Real((1.0 - call"),
    "renew all": ("stretches", "== k ? fresh[i] : noise[i]", "<= k ? fresh[i] : noise[i] / 2"),
    "leave the slice": ("slice", "!done[i] && ratios[i] > threshold[i]", "!done[i]"),
    "forget the noise": ("joint", "error += 0.5 * (double", "error += 0.0 * (double"),
}
SPOILT_MOTION = {
    "accept always": ("joint", "uniform(random, 0) < rate", "true"),
    "turn too far": ("joint NUTS", "std::cos(time), sine", "std::cos(Real(0.8) * time), sine"),
    "weigh without noise": ("joint NUTS", "half_squares(p.z + d, MOVING)", "0.0"),
}
QUICK_SPOILT_NOISE = ("forget the noise",)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_SPOILT_NOISE else pytest.param(name, marks=pytest.mark.slow)
        for name in SPOILT_NOISE | SPOILT_MOTION
    ],
)
def test_spoilt_machine_code_of_noise_is_found_out(name, monkeypatch):
    header = "noise" if name in SPOILT_NOISE else "trajectories"
    moves, right, wrong = (SPOILT_NOISE | SPOILT_MOTION)[name]
    spoil_line(header, right, wrong, monkeypatch)
    target = make_target("prior-8")
    transition = native_estimate_transition(target.potential, *NATIVE_MOVES[moves])
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, transition)


# --- and on spoilt No-U-Turn samplers -----------------------------------------------------------


def spoil_uniforms(change):
    """Trajectories whose random numbers are changed before they are used."""

    def spoil(monkeypatch):
        honest = tree.extend

        def extend(grown, motion, *settings):
            *settings, uniform = settings
            return honest(grown, motion, *settings, change(grown, uniform.clone()))

        monkeypatch.setattr(tree_builder, "extend", extend)

    spoil.__name__ = change.__name__
    return spoil


@spoil_uniforms
def pick_the_last_point(grown, uniform):
    uniform[1] = 0.0
    return uniform


@spoil_uniforms
def pick_any_point(grown, uniform):
    """Every point of a doubling with the same probability, whatever its weight."""
    number = grown.num_points + 1
    place = number - 2 ** number.double().log2().floor() + 1
    uniform[1] = torch.where(uniform[1] < 1 / place, 0.0, 1.0)
    return uniform


@spoil_uniforms
def accept_every_doubling(grown, uniform):
    uniform[2] = 0.0
    return uniform


@spoil_uniforms
def grow_forwards(grown, uniform):
    uniform[0] = 0.0
    return uniform


def spoil_turns(change):
    """Trajectories that judge by other U-turns."""

    def spoil(monkeypatch):
        honest = tree._turned
        monkeypatch.setattr(tree, "_turned", lambda *marks: change(honest, *marks))

    spoil.__name__ = change.__name__
    return spoil


@spoil_turns
def ignore_turns_of_subtrees(honest, *marks):
    turned = honest(*marks)
    turned[1:] = False
    return turned


@spoil_turns
def judge_turns_at_the_end(honest, starts, previous, sums, momentum_sum, end):
    return (end * (momentum_sum - sums[:-1])).sum(1) <= 0


@spoil_turns
def judge_turns_at_the_start(honest, starts, previous, sums, momentum_sum, end):
    return (starts[:-1] * (momentum_sum - sums[:-1])).sum(1) <= 0


def spoil_energy(change):
    """Points that are weighed by another energy."""

    def spoil(monkeypatch):
        plain, joint = nuts._energy, JointNUTSTransition._energy

        def spoilt(energy, point, value):
            return energy._replace(total=change(energy, point, value.double()))

        monkeypatch.setattr(nuts, "_energy", lambda *at: spoilt(plain(*at), *at))
        monkeypatch.setattr(
            JointNUTSTransition, "_energy", lambda self, *at: spoilt(joint(self, *at), *at)
        )

    spoil.__name__ = change.__name__
    return spoil


@spoil_energy
def turn_energy_round(energy, point, value):
    return -energy.total


@spoil_energy
def forget_kinetic_energy_of_points(energy, point, value):
    return energy.total - (energy.parameters - value)


@spoil_energy
def forget_energy_of_noise(energy, point, value):
    return energy.parameters


@spoil_energy
def forget_momentum_of_noise(energy, point, value):
    return energy.total - 0.5 * point.momentum[2:].double().square().sum(0)


def limit_by_state(transition):
    """Trajectories of one point where the first coordinate is negative."""
    return choose(transition, lambda state, tuning, _: transition.step(state, tuning, 1)[0])


def choose_step_size_by_state(transition):
    """Small steps where the first coordinate is negative; too small for trajectories to turn."""

    def other(state, tuning, num_steps):
        small = tuning._replace(step_size=0.1 * tuning.step_size)
        return transition.step(state, small, num_steps)[0]

    return choose(transition, other)


# What changes the law of a few moves so little that only many chains show it.
FAINT = [pick_any_point, grow_forwards, judge_turns_at_the_end, judge_turns_at_the_start]
SPOILT_TREES = [pick_the_last_point, accept_every_doubling, ignore_turns_of_subtrees]
SPOILT_TREES += [turn_energy_round, forget_kinetic_energy_of_points]
SPOILT_NUTS = {
    joint_nuts: [ignore_turns_of_subtrees, turn_energy_round, forget_kinetic_energy_of_points]
    + [forget_energy_of_noise, forget_momentum_of_noise],
    conditional_nuts: [ignore_turns_of_subtrees, turn_energy_round, accept_all_blocks],
}


@pytest.mark.parametrize("spoil", long_but(SPOILT_TREES[1:4], SPOILT_TREES))
def test_spoilt_nuts_is_found_out(spoil, uncaptured, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check_nuts("skewed", "diagonal", 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", FAINT)
def test_faintly_spoilt_nuts_is_found_out(spoil, uncaptured, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check_nuts("skewed", "diagonal", 0.6, moves=4, chains=10 * CHAINS)


@pytest.mark.parametrize("wrap", [limit_by_state, choose_step_size_by_state])
def test_nuts_of_two_minds_is_found_out(wrap):
    with pytest.raises(AssertionError, match="standard errors"):
        check_nuts("skewed", "diagonal", 0.5, wrap=wrap)


@pytest.mark.parametrize(
    ("make", "spoil"),
    long_but(
        [(joint_nuts, forget_energy_of_noise), (joint_nuts, forget_momentum_of_noise)]
        + [(conditional_nuts, ignore_turns_of_subtrees), (conditional_nuts, accept_all_blocks)],
        [(make, spoil) for make, all_ in SPOILT_NUTS.items() for spoil in all_],
    ),
)
def test_spoilt_pseudo_marginal_nuts_is_found_out(make, spoil, uncaptured, monkeypatch):
    target = make_target("prior-8")
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, make(target))


@pytest.mark.parametrize(
    ("make", "wrap"),
    long_but(
        [(joint_nuts, limit_by_state), (joint_nuts, redraw_noise)]
        + [(conditional_nuts, pick_any_particle)],
        itertools.product(
            [joint_nuts, conditional_nuts], [limit_by_state, redraw_noise, pick_any_particle]
        ),
    ),
)
def test_spoilt_pseudo_marginal_nuts_step_is_found_out(make, wrap):
    target = make_target("prior-8")
    transition = make(target)
    with pytest.raises(AssertionError, match="standard errors"):
        check(target, transition, step=wrap(transition))


@pytest.mark.parametrize("make", [conditional_hmc, conditional_nuts])
def test_gradient_at_old_noise_is_found_out(make, monkeypatch):
    """By itself: it changes the law of a few moves too little to be seen."""
    target = make_target("prior-8")
    transition = make(target)
    monkeypatch.setattr(transition.inner, "refreshed", lambda state, tuning: state)
    with pytest.raises(AssertionError, match="a gradient of elsewhere"):
        check(target, transition)
