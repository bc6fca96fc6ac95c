"""Results that differ by rounding are told from those of another function."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs import program_cache
from pyro_hamflow.programs.capture import capture
from pyro_hamflow.programs.engines.choice import choose_engine
from pyro_hamflow.programs.engines.native import NativeProgram
from pyro_hamflow.programs.rounding import moves_by_rounding, same_but_for_rounding


def far():
    """Numbers whose probability is next to one."""
    return torch.linspace(8.0, 30.0, 23)


def well_rounded(x):
    return torch.sigmoid(-x), torch.nn.functional.softplus(-x)


def badly_rounded(x):
    """The same, by differences from one that keep few digits or none."""
    near_one = torch.sigmoid(x)
    return 1.0 - near_one, -torch.log(near_one)


def same(one, other, x):
    *_, moves = zip(*(moves_by_rounding(lambda f=f: f(x)) for f in (one, other)), strict=True)
    return same_but_for_rounding(one(x), other(x), list(map(torch.maximum, *moves)), 1e-11)


def test_digits_that_a_difference_loses_are_known():
    lost = (badly_rounded(far())[0] / well_rounded(far())[0] - 1.0).abs()
    assert lost.max() > 1e-5  # no tolerance of results would do
    *_, (moves, _) = moves_by_rounding(lambda: badly_rounded(far()))
    assert (moves / well_rounded(far())[0] > 0.05 * lost).all()
    assert same(well_rounded, badly_rounded, far())


@pytest.mark.parametrize("factor", [1.0 + 1e-9, 1.0 - 1e-9])
def test_another_function_is_told_where_digits_are_kept(factor):
    """One number of many is another one, by a hundred times less than others are unknown."""

    def other(x):
        first, second = badly_rounded(x)
        return first, torch.where(x == x[0], factor, 1.0) * second + 0.0 * first

    x = torch.cat([torch.zeros(1), far()])
    assert same(well_rounded, badly_rounded, x)
    assert not same(well_rounded, other, x)


def test_gaps_and_infinities_are_the_same_or_not():
    x = torch.tensor([-1.0, 0.0, 2.0])
    plain = lambda x: [torch.log(x)]  # noqa: E731
    assert same(plain, plain, x)
    assert not same(plain, lambda x: [torch.log(x.abs())], x)
    assert not same(lambda x: [torch.log(x).nan_to_num(nan=7.0)], plain, x)


def test_another_function_is_told_where_rounding_leaves_nothing():
    """Where a number may be none for rounding, how far it moves is unknown."""
    sharp = lambda x: [torch.where(torch.exp(x.clone()) >= torch.exp(x), x, torch.nan)]  # noqa: E731
    x = torch.tensor([0.3, 0.7])
    *_, (moves,) = moves_by_rounding(lambda: sharp(x))
    assert moves.isinf().all()
    assert same(sharp, lambda x: [1.0 * x], x)
    assert not same(sharp, lambda x: [2.0 * x], x)


def guesses():
    """A model of answers of which some are guessed: probabilities are next to one far out.

    Each is another function, so that no two share what is captured.
    """

    def model(y):
        with pyro.plate("questions", 4, dim=-1):
            slope = pyro.sample("slope", dist.LogNormal(0.0, 1.0))
            guess = pyro.sample("guess", dist.Beta(5.0, 23.0))
        with pyro.plate("people", 6, dim=-2):
            skill = pyro.sample("skill", dist.Normal(0.0, 4.0))
            right = guess + (1.0 - guess) * torch.sigmoid(slope * skill)
            with pyro.plate("answers", 4, dim=-1):
                pyro.sample("y", dist.Bernoulli(right), obs=y)

    return Potential(model, (torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]] * 3),))


def test_a_model_that_loses_digits_is_captured():
    potential = guesses()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The model could not be captured")
        graph = potential.programs.base("gradient")
    position, noise = potential.vectors(4)
    assert choose_engine("native", graph, 3.0 * position, noise[0], None).name == "native"


def stale(function, *examples):
    """A graph of other data than the model's, in one number by a millionth."""
    graph = capture(function, *examples)
    for name, value in dict(graph.named_buffers()).items():
        if value.numel() == 24:
            moved = value.clone()
            moved.view(-1)[0] += 1e-6
            graph.register_buffer(name, moved)
    return graph


def one_sided(function, *examples):
    """A graph of one branch, as where control flow was not seen: another side is off by little."""
    sign = examples[0][:1].sign()

    def branch(position, *others):
        beyond = (-sign * position[:1]).clamp(min=0.0)
        return function(torch.cat([position[:1] + 1e-6 * beyond, position[1:]]), *others)

    return capture(branch, *examples)


@pytest.mark.parametrize("wrong", [stale, one_sided])
def test_a_graph_of_another_function_is_refused(wrong, monkeypatch):
    monkeypatch.setattr(program_cache, "capture", wrong)
    potential = guesses()
    with pytest.warns(RuntimeWarning, match="the graph and the model disagree"):
        assert potential.programs.base("gradient") is None


def test_wrong_machine_code_of_a_model_that_loses_digits_is_not_taken(monkeypatch):
    potential = guesses()
    graph = potential.programs.base("gradient")
    position, noise = potential.vectors(4)
    right = NativeProgram.gradient

    def wrong(self, position, noise):
        value, gradient = right(self, position, noise)
        return value, gradient * torch.where(torch.arange(gradient.shape[1]) == 3, 1.0 + 1e-4, 1.0)

    monkeypatch.setattr(NativeProgram, "gradient", wrong)
    found = choose_engine("native", graph, position, noise[0], None)
    assert found.name == "torch" and "do not agree" in found.reason
