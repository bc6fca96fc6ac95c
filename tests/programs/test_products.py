"""A matrix of data times a vector is that product, however it is written."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pyro_hamflow.model.gradients import value_and_gradients
from pyro_hamflow.programs import capture as capturing
from pyro_hamflow.programs import pure_recorder
from pyro_hamflow.programs.capture import batch, capture, largest_tensor

CHAINS = 3
torch.manual_seed(0)
DATA = torch.randn(90, 12, dtype=torch.float64)
WORDS = {
    "matmul": lambda x: DATA @ x,
    "row": lambda x: (x[None] @ DATA.mT)[0],
    "einsum": lambda x: torch.einsum("nd,d->n", DATA, x),
    "turned einsum": lambda x: torch.einsum("dn,d->n", DATA.mT, x),
    "tensordot": lambda x: torch.tensordot(DATA, x, 1),
    "inner": lambda x: torch.inner(DATA, x),
    "linear": lambda x: functional.linear(x, DATA),
    "sum": lambda x: (DATA * x).sum(-1),
    "sum over rows": lambda x: (x[:, None] * DATA.mT).sum(0),
    "kept sum": lambda x: (DATA * x).sum(-1, keepdim=True),
}


def slopes(words):
    """From a vector to a sum that words make of it, and its gradient."""

    def run(x):
        x = x.detach().requires_grad_()
        return value_and_gradients(words(x).sin().sum(), x)

    return run


def in_batch(words):
    """The same for some chains together."""
    return batch(capture(slopes(words), DATA[0]), DATA[:CHAINS])


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_no_chain_has_data_of_its_own(words):
    program, known = in_batch(words), in_batch(WORDS["matmul"])
    torch.testing.assert_close(list(program(DATA[:CHAINS])), list(known(DATA[:CHAINS])))
    assert largest_tensor(program) == CHAINS * len(DATA)
    assert max(data.numel() for data in program.buffers()) == DATA.numel()


@pytest.mark.parametrize("name", ["einsum", "tensordot", "inner", "sum", "sum over rows"])
def test_by_torch_alone_it_would(name, monkeypatch):
    monkeypatch.setattr(capturing, "PURE", {})
    monkeypatch.setattr(pure_recorder, "_MANY", torch.inf)
    if name.startswith("sum"):
        assert largest_tensor(in_batch(WORDS[name])) == CHAINS * DATA.numel()
    else:
        assert "bmm" in {
            getattr(n.target, "__name__", "") for n in in_batch(WORDS[name]).graph.nodes
        }


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (DATA * x.sum()).sum(-1),  # of a number
        lambda x: (DATA * DATA[:, :1] * x).sum(0),
        lambda x: (x * torch.stack([x, x])).sum(-1),
        lambda x: (x.outer(x).repeat(9, 9) * x.repeat(9)).sum(0),
        lambda x: ((DATA > 0.0) * x).sum(-1),
        lambda x: (x[:, None] * x.repeat(90)).sum(1),  # an outer product
        lambda x: (x * DATA.float()).sum(-1),
        lambda x: (x.float() * DATA.float()).sum(-1, dtype=torch.float64),
        lambda x: (x * DATA).sum(dim=None),
        lambda x: (x * DATA).sum(dim=(0, 1)),
        lambda x: (x * DATA).sum(()),
    ],
)
def test_other_sums_are_what_they_were(other):
    graph, known = capture(slopes(other), DATA[0]), slopes(other)(DATA[1])
    torch.testing.assert_close(list(graph(DATA[1])), list(known), rtol=1e-9, atol=1e-9)
