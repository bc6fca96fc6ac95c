"""Moves of parameters and noise in machine code: those of torch, in whole runs and in calls."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    MALA,
    MCMC,
    CorrelatedRefresh,
    EllipticalSliceRefresh,
    PseudoMarginalHMC,
    PseudoMarginalNUTS,
    StretchRefresh,
    marginalize,
    to_inference_data,
)
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks
from pyro_hamflow.mcmc.transitions.nuts import JointNUTSTransition, NUTSTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition, JointTransition
from pyro_hamflow.mcmc.transitions.random_walk import RandomWalkTransition
from pyro_hamflow.programs.engines.native import NativeProgram
from tests.helpers.exact_draws import Y, latent, make_target
from tests.helpers.kinds import long_but
from tests.helpers.native import native_estimate_transition

CHAINS, DEPTH = 24, 5
MOVES = {  # of each, how noise moves after the parameters, and the deepest tree if there are any
    "fresh": (CorrelatedRefresh(), None),
    "correlated": (CorrelatedRefresh(0.8), DEPTH),
    "slice": (EllipticalSliceRefresh(), None),
    "stretches": (StretchRefresh(3), None),
    "joint": (None, None),
    "joint NUTS": (None, DEPTH),
    "walk": (CorrelatedRefresh(), "walk"),
}


def torch_transition(potential, refresh, depth):
    if refresh is None:
        return (
            JointTransition(potential, CHAINS)
            if depth is None
            else JointNUTSTransition(potential, CHAINS, depth)
        )
    if depth == "walk":
        inner = RandomWalkTransition(potential)
    elif depth is None:
        inner = HMCTransition(potential, CHAINS)
    else:
        inner = NUTSTransition(potential, CHAINS, depth)
    return ConditionalTransition(inner, refresh, Blocks(potential))


class Numbers:
    """Notes all random numbers of one move by torch, for the same move in machine code."""

    def __init__(self, monkeypatch):
        self.noted = []
        for name in ("rand", "randn", "rand_like", "randn_like"):
            monkeypatch.setattr(torch, name, self._noting(name, getattr(torch, name)))

    def _noting(self, name, draw):
        def noting(*args, **kwargs):
            self.noted.append((name, draw(*args, **kwargs)))
            return self.noted[-1][1]

        return noting

    def given(self, potential, refresh):
        """Momenta, the uniform numbers of trajectories, and all others in their order."""
        momenta, uniforms, tape = [], [], []
        for name, values in self.noted:
            if name.startswith("randn") and not uniforms and not tape:
                momenta.append(values)
            elif name == "rand" and values.shape in ((3, CHAINS), (CHAINS,)):
                uniforms.append(values.expand(3, CHAINS))
            else:
                tape.append((name, values))
        if isinstance(refresh, StretchRefresh):
            tape = self._in_one_vector(tape, potential, refresh)
        rows = [
            values.double().reshape(CHAINS, -1) if values.dim() else values.expand(CHAINS, 1)
            for _, values in tape
        ]
        return {
            "momenta": torch.cat(momenta, -1),
            "uniforms": torch.stack(uniforms).permute(2, 0, 1).contiguous(),
            "tape": torch.cat(rows, -1).contiguous(),
        }

    @staticmethod
    def _in_one_vector(tape, potential, refresh):
        """Machine code draws the noise of all stretches at once: each takes its own part."""
        start = next(i for i, (_, values) in enumerate(tape) if values.dim() == 0)
        noise = [values for name, values in tape if name == "randn_like"]
        offset = float(tape[start][1])
        number = Blocks(potential).stretches(refresh.num_stretches, offset, noise[0])
        whole = sum(torch.where(number == k, part, 0.0) for k, part in enumerate(noise))
        rest = [pair for pair in tape[start + 1 :] if pair[0] != "randn_like"]
        return [*tape[: start + 1], ("randn_like", whole), *rest]


def both(potential, refresh, depth, monkeypatch, *, step_size=0.3):
    """A move by torch, and one in machine code with the same random numbers."""
    slow = torch_transition(potential, refresh, depth)
    walks = depth == "walk"
    depth = None if walks else depth
    native = native_estimate_transition(potential, refresh, depth, walks=walks)
    position, noise = potential.vectors(CHAINS)
    inverse_mass = 0.3 * torch.eye(potential.dimension) + 0.1
    tuning = Tuning(step_size, GaussianKinetic(inverse_mass), torch.rand(CHAINS) + 0.5)
    state = slow.state_at(0.5 * position, noise)
    num_steps = 4 if depth is None else 2**depth - 1
    with monkeypatch.context() as patch:
        numbers = Numbers(patch)
        expected = slow.step(state, tuning, num_steps)
    if walks:  # machine code draws no local sites where it only proposes
        numbers.noted.remove(numbers.noted[1])
    given = numbers.given(potential, refresh)
    moved, made = native.draw(state, tuning, [num_steps], **given)
    return expected, (moved, native.info(made.at(0))), made


def assert_same(expected, found):
    (state, info), (other, other_info) = expected, found
    pairs = {
        "position": (state.position, other.position),
        "noise": (state.noise, other.noise),
        "gradient": (state.gradient, other.gradient),
        "value": (state.evaluation.value, other.evaluation.value),
        "energy": (info.energy, other_info.energy),
        "rate": (info.acceptance_rate, other_info.acceptance_rate),
    }
    for name in ("log_likelihoods", "local"):
        parts = getattr(state.evaluation, name), getattr(other.evaluation, name)
        assert parts[0].keys() == parts[1].keys()
        pairs |= {key: (parts[0][key], parts[1][key]) for key in parts[0]}
    for name, pair in pairs.items():
        assert torch.allclose(*pair, rtol=1e-6, atol=1e-7), name
    assert torch.equal(info.accepted, other_info.accepted)
    none = torch.zeros(CHAINS).long()
    for name in ("n_steps", "n_gradients"):
        assert torch.equal(getattr(info, name) + none, getattr(other_info, name)), name
    assert (other_info.n_densities <= info.n_densities).all()
    assert other_info.n_densities.max() == info.n_densities
    assert info.further.keys() == other_info.further.keys()
    for name, stat in info.further.items():
        assert torch.allclose(stat.double(), other_info.further[name].double()), name


SLOW_TARGETS = ("rqmc-laplace-8", "mixture-3")


@pytest.mark.parametrize(
    ("name", "moves"),
    long_but(
        lambda case: case[0] == "prior-8",
        itertools.product(("prior-8", "by_hand-1", *SLOW_TARGETS), MOVES),
    ),
)
def test_moves_are_those_of_torch(name, moves, monkeypatch):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(2)
    expected, found, made = both(make_target(name).potential, *MOVES[moves], monkeypatch)
    assert_same(expected, found)
    assert found[1].accepted.any()
    share = found[1].further.get("refresh_rate")
    assert share is None or moves == "slice" or 0.1 < share.mean() < 1.0, "no block was refused"
    estimates = found[0].evaluation.log_likelihoods.values()
    if estimates:
        sums = sum(part.reshape(CHAINS, -1).sum(-1) for part in estimates)
        assert torch.allclose(made.estimate[:, 0], sums)


@pytest.mark.slow
def test_moves_along_a_path_are_those_of_torch(monkeypatch):
    """Through factors of banded matrices, their solutions and their gradients."""

    def walk(y):
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        x = pyro.sample("x", Walk(scale, len(y)))
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    y = torch.tensor([1.0, 0.0, 2.0, 3.0, 2.0, 5.0, 4.0, 1.0, 2.0, 0.0]).repeat(3)
    kernel = PseudoMarginalNUTS(marginalize(walk, ["x"], num_particles=3))
    kernel.begin(2, 0, (y,))
    graph = kernel.potential.programs.base("gradient")
    names = {str(node.target) for node in graph.graph.nodes}
    assert "pyro_hamflow.banded_root_adjoint.default" in names
    for refresh in (StretchRefresh(2), None):
        assert_same(*both(kernel.potential, refresh, DEPTH, monkeypatch)[:2])


class Walk(dist.TorchDistribution):
    """A random walk from zero on."""

    arg_constraints = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, scale, length):
        self.scale = scale
        super().__init__(torch.Size(), torch.Size([length]), validate_args=False)

    def log_prob(self, x):
        steps = torch.cat([x[..., :1], x.diff(dim=-1)], -1)
        return dist.Normal(0.0, self.scale).log_prob(steps).sum(-1)

    def rsample(self, sample_shape=()):
        return (self.scale * torch.randn(*sample_shape, *self.event_shape)).cumsum(-1)


def run(kernel, *, draws=40, **settings):
    mcmc = MCMC(kernel, draws, 40, num_chains=3, disable_progbar=True, seed=2, **settings)
    mcmc.run(Y)
    return mcmc


def kernel_of(engine, kind=PseudoMarginalHMC, **settings):
    model = marginalize(latent, ["x"], num_particles=8, proposal="prior")
    return kind(model, engine=engine, **settings)


@pytest.mark.parametrize(
    ("kind", "method"),
    long_but(
        [(PseudoMarginalHMC, "conditional"), (PseudoMarginalNUTS, "joint")],
        itertools.product([PseudoMarginalHMC, PseudoMarginalNUTS], ["joint", "conditional"]),
    ),
)
def test_runs_have_the_statistics_of_torch(kind, method):
    torch.set_default_dtype(torch.float64)
    expected, found = (
        run(kernel_of(engine, kind, method=method)) for engine in ("torch", "native")
    )
    assert found.kernel.settings["engine"] == "native"
    kinds = [
        {name: (stat.dtype, stat.shape) for name, stat in parts.items()}
        for mcmc in (expected, found)
        for parts in (mcmc.draws.stats, mcmc.draws.local)
    ]
    assert kinds[:2] == kinds[2:]
    assert found.draws.position.shape == expected.draws.position.shape
    means = [mcmc.draws.stats["acceptance_rate"].mean() for mcmc in (expected, found)]
    assert abs(means[0] - means[1]) < 0.2
    assert to_inference_data(found).posterior["x"].shape == (3, 40, 3)


def test_sites_that_are_not_wanted_are_not_kept():
    assert not run(kernel_of("native"), keep=[]).draws.local


def test_a_seed_repeats_a_run_whatever_the_calls():
    first = run(kernel_of("native"))
    again = run(kernel_of("native"), hook_fn=lambda *_: None)
    assert torch.equal(first.draws.position, again.draws.position)
    for name in first.draws.local:
        assert torch.equal(first.draws.local[name], again.draws.local[name])
    estimates = [mcmc.draws.stats["log_likelihood_estimate"] for mcmc in (first, again)]
    assert torch.allclose(*estimates, rtol=1e-12)


def test_threads_do_not_change_draws():
    torch.set_default_dtype(torch.float64)
    potential = make_target("prior-8").potential
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(4)
        native = native_estimate_transition(potential, CorrelatedRefresh(), DEPTH)
        native.stream.seed, native._last_call = 7, 1.0
        state = native.state_at(*potential.vectors(6))
        tuning = Tuning(0.4, GaussianKinetic(torch.ones(2)))
        found.append(native.draw(state, tuning, [15] * 20)[1])
    torch.set_num_threads(1)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    mcmc = MCMC(
        kernel_of("native"),
        30,
        60,
        num_chains=3,
        seed=1,
        disable_progbar=True,
    )
    mcmc.run(Y.float())
    assert mcmc.kernel.settings["engine"] == "native"
    assert mcmc.draws.position.dtype == mcmc.draws.local["x"].dtype == torch.float32
    assert mcmc.draws.stats["acceptance_rate"].mean() > 0.5


class Own:
    """A refresh of one's own, which moves nothing."""

    def __call__(self, blocks, noise, current, evaluate):
        return noise, current, torch.zeros(len(noise)), 0

    def __repr__(self):
        return "Own()"


def test_a_refresh_of_ones_own_is_left_to_torch():
    kernel = kernel_of("native", refresh=Own(), method="conditional")
    kernel.begin(3, 10, (Y,))
    reason = "the native engine has no code for the refresh Own()"
    assert kernel.settings["engine_reason"] == reason
    assert f"PseudoMarginalHMC: draws are made by torch, for {reason}." in kernel.messages


def test_wrong_evaluations_are_not_taken(monkeypatch):
    """By a thousandth of one factor of the estimate."""
    right = NativeProgram.look

    def wrong(self, *args):
        place = right(self, *args)
        place.likelihoods[:, 0] *= 1.001
        return place

    monkeypatch.setattr(NativeProgram, "look", wrong)
    kernel = kernel_of("native")
    kernel.begin(3, 10, (Y,))
    assert kernel.settings["engine_reason"] == "machine code and graph do not agree"


def test_long_runs_are_native_where_nothing_is_said():
    kernel = kernel_of("auto")
    for draws, engine in ((10**5, "native"), (20, "torch")):
        kernel.planned_draws = draws
        kernel.begin(4, 10, (Y,))
        assert kernel.settings["engine"] == engine


def test_mala_moves_noise_in_machine_code():
    mcmc = run(kernel_of("native", MALA))
    assert mcmc.kernel.settings["engine"] == "native"
    assert (mcmc.draws.stats["n_steps"] == 1).all()
    assert 0.2 < mcmc.draws.stats["acceptance_rate"].mean() < 0.95
