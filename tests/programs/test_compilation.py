"""Compiled programs give what their graphs give, or are not used."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_hamflow.programs import compilation
from pyro_hamflow.programs.agreement import is_near, same_but_for_order
from pyro_hamflow.programs.compilation import compile_graph

PLACES, NUMBERS = torch.tensor([1, 3, 4]), torch.zeros(3, dtype=torch.float64)
X = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

WRITES = {
    "index_put": lambda whole: whole.index_put((PLACES,), NUMBERS),
    "sums": lambda whole: whole.index_put((PLACES,), NUMBERS + 1.0, accumulate=True),
    "index_add": lambda whole: whole.index_add(0, PLACES, NUMBERS + 1.0),
    "index_copy": lambda whole: whole.index_copy(0, PLACES, NUMBERS),
    "index_fill": lambda whole: whole.index_fill(0, PLACES, 7.0),
    "diagonal": lambda whole: whole.expand(6, 6).diagonal_scatter(torch.arange(6).double())[2],
}


def written_to(name):
    """A graph that writes to some places where one number stands for all of them."""

    def function(x):
        return ((WRITES[name](x.sum().expand(6)) * torch.arange(6)).sum(),)

    return make_fx(function)(X)


@pytest.mark.filterwarnings("ignore:.*prims_common.check:FutureWarning")  # torch's, of its own
@pytest.mark.parametrize("name", WRITES)
def test_a_write_leaves_other_places_as_they_are(name):
    graph = written_to(name)
    program = compile_graph(graph, X)
    assert program is not graph
    assert torch.allclose(program(X)[0], graph(X)[0], rtol=1e-12)


def test_machine_code_that_does_not_agree_is_left(monkeypatch):
    """Inductor's own fault, where writes are not given copies."""
    monkeypatch.setattr(compilation, "writing_to_copies", lambda graph: graph)
    graph = written_to("index_put")
    with pytest.warns(RuntimeWarning, match="machine code and graph do not agree"):
        assert compile_graph(graph, X) is graph


def test_what_counts_as_the_same():
    infinite = torch.tensor(float("inf"))
    assert same_but_for_order([X * (1.0 + 1e-10)], [X])
    assert not same_but_for_order([X + 1e-6], [X])
    assert not same_but_for_order([X / 0.0], [X])
    assert same_but_for_order([infinite, X / 0.0], [infinite, X])
    assert not same_but_for_order([infinite, X + 1.0], [infinite, X])
    assert same_but_for_order([X.float() + 1e-5], [X.float()])
    assert same_but_for_order([X + 1e-5, X.float()], [X, X.float()])  # may come of the latter
    assert same_but_for_order([X > 0.0, PLACES], [X > 0.0, PLACES])
    assert not same_but_for_order([X > 0.0], [X > 1.0])
    gap = torch.cat([X, X[:1] / 0.0 * 0.0])
    assert is_near(gap, gap, 1e-8) and not is_near(gap + 1.0, gap, 1e-8)
    assert not is_near(torch.ones(len(gap)).to(gap), gap, 1e-8)
