"""Captured programs within larger ones: copied or called, they do what they do alone."""

from __future__ import annotations

import pytest
import torch

from pyro_hamflow.programs.capture import batch, capture
from pyro_hamflow.programs.pure_recorder import PureRecorder

DATA = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
INPUTS = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)


def _names(graph):
    return [node.target.__name__.split(".")[0] for node in graph.graph.nodes if _is_call(node)]


def _is_call(node):
    return node.op == "call_function"


def _same(one, other):
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.fixture
def part():
    def misfit(x):
        error = (x.exp() - DATA).tanh()
        return error.square().sum(), error, x

    return capture(misfit, torch.ones(5))


@pytest.mark.parametrize("flat", [True, False])
def test_a_part_is_copied_or_called_and_not_written_down_again(part, monkeypatch, flat):
    def step(x, size):
        value, error, same = part(x - size)
        return value.log(), size * error, same

    performed, perform = [], PureRecorder._perform

    def watched(self, target, arguments, inputs, *, varies):
        performed.append(str(target))
        return perform(self, target, arguments, inputs, varies=varies)

    monkeypatch.setattr(PureRecorder, "_perform", watched)
    graph = capture(step, torch.ones(5), torch.tensor(1.0), flat=flat)
    assert "aten.exp.default" not in performed
    _same(graph(*INPUTS), step(*INPUTS))
    assert _names(graph).count("exp") == flat
    assert _names(graph).count("run") == (not flat)


def test_several_parts_do_once_what_they_share(part):
    other = capture(lambda x: x.exp().prod(), torch.ones(5))
    graph = capture(lambda x: part(x)[0] + other(x), torch.ones(5), flat=False)
    assert _names(graph).count("exp") == 1
    _same(graph(INPUTS[0]), part(INPUTS[0])[0] + other(INPUTS[0]))


def test_parts_are_derived_and_batched(part):
    def gradient(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(part(x)[0], x)[0]

    graph = capture(gradient, torch.ones(5))
    error = (INPUTS[0].exp() - DATA).tanh()
    exact = 2.0 * error * (1.0 - error.square()) * INPUTS[0].exp()
    torch.testing.assert_close(graph(INPUTS[0]), exact)
    rows = torch.stack([INPUTS[0], exact])
    batched = batch(graph, torch.ones(2, 5))
    torch.testing.assert_close(batched(rows), torch.stack([gradient(row) for row in rows]))


def test_a_part_draws_anew_each_time():
    part = capture(lambda x: x + torch.rand(3), torch.ones(3))
    for flat in (True, False):
        graph = capture(lambda x: part(x) - part(x), torch.ones(3), flat=flat)
        first, second = graph(torch.ones(3)), graph(torch.ones(3))
        assert bool((first != 0.0).all()) and bool((first != second).all())


def test_results_of_a_part_keep_their_structure():
    part = capture(lambda x: {"sine": x.sin(), "all": (x, 2)}, torch.ones(3))
    graph = capture(lambda x: part(2.0 * x)["sine"] + part(2.0 * x)["all"][1], torch.ones(3))
    _same(graph(torch.ones(3)), torch.full((3,), 2.0).sin() + 2)
    single = capture(lambda x: part(2.0 * x)["all"][0], torch.ones(3), flat=False)
    _same(single(torch.ones(3)), torch.full((3,), 2.0))
