"""Owners of results: never too few, by brute force on operations and random programs."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional

from pyro_hamflow.programs import owner_rules
from pyro_hamflow.programs.connectivity import NONE, SEVERAL, ValueReadError, trace_owners

N = 6
WEIGHTS = torch.tensor([0.7, 0.0, -1.3, 0.4, 0.0, 2.0]).double()
SEEN = torch.tensor([True, False, True, True, False, True])
INDEX = torch.tensor([0, 2, 2, 5, 1, 0, 4, 2])
PAIRS = torch.tensor([[0, 3], [1, 4], [2, 5]])
DESIGN = functional.one_hot(INDEX, N).double()  # one entry of each row is not zero
DENSE = torch.randn(4, N, generator=torch.Generator().manual_seed(1)).double()


def owners(function, values=None):
    values = torch.randn(N) if values is None else values
    elements = torch.arange(1, N + 1)
    return trace_owners(lambda v: {"r": function(v["x"])}, {"x": values}, {"x": elements})["r"].of


def moves(function, tries=40):
    """Which entry of the result moves with which element, at any of many points."""
    moved = False
    for scale in (1.0, 5.0):
        for _ in range(tries):
            x = scale * torch.randn(N)
            base = function(x)
            changes = []
            for element in range(N):
                other = x.clone()
                other[element] = scale * torch.randn(())
                changes.append(function(other) != base)
            moved = moved | torch.stack(changes, -1)
    return moved


def assert_sound(function, *, sharp=False):
    """Whatever moves an entry is its owner; if it is sharp, every entry has but those."""
    found, moved = owners(function), moves(function)
    assert found.shape == moved.shape[:-1]
    count, one = moved.sum(-1), moved.long().argmax(-1) + 1
    assert bool((count[found == NONE] == 0).all())
    held = found > NONE
    assert bool((count[held] <= 1).all())
    assert bool(((one == found) | (count == 0))[held].all())
    if sharp:
        assert bool((found[count == 0] == NONE).all())
        assert bool((found[count == 1] > NONE).all())


def write_part(x):
    out = x.new_zeros(2, N)
    view = out[0]  # taken before it is written to
    out[:, 1:] = x[:-1]
    return view + 1.0


def write_masked(x):
    out = WEIGHTS.clone()
    out[SEEN] = x[SEEN]
    return out


def write_steps(x):
    out = WEIGHTS.repeat(3, 1)
    for step in range(3):
        out[step] = x * step + 0.1 * WEIGHTS
    out.fill_diagonal_(0.0)
    return out


def scatter_vector(x):
    return torch.zeros(10).scatter(0, torch.tensor([9, 1, 3, 0, 2, 5]), x)


def fill_under_own_mask(x):
    out = x * 2
    out[(x > 0) & (WEIGHTS > 0)] = 0.0
    return out


def solve_columns(x):
    root = torch.tensor([[1.0, 0.0], [0.4, 0.8]])
    columns = torch.stack([x, x * x])
    return torch.linalg.solve_triangular(root, columns, upper=False), columns


SHARP = {
    "pointwise": lambda x: (x.exp() + 3.0 * x.sin()).tanh(),
    "flat": lambda x: (x - 3).relu().clamp(max=1.0),
    "comparison": lambda x: (x > 0).to(x.dtype) + x.round(),
    "broadcast": lambda x: x[:, None] * WEIGHTS.abs().add(1)[None],
    "zero constant": lambda x: x * WEIGHTS,
    "constant condition": lambda x: torch.where(SEEN, x, WEIGHTS),
    "own condition": lambda x: torch.where(x > 0, x, WEIGHTS.add(1)),
    "masked fill": lambda x: x.masked_fill(SEEN, 1.0),
    "flip and roll": lambda x: x.flip(0).roll(2),
    "index": lambda x: x[INDEX],
    "index select": lambda x: x.index_select(0, INDEX),
    "gather": lambda x: x.expand(3, N).gather(1, PAIRS),
    "constant mask": lambda x: x[SEEN],
    "take": lambda x: x.take(INDEX),
    "lookup": lambda x: WEIGHTS[(x > 0).long()],
    "lookup by gather": lambda x: DENSE.mT.gather(1, (x > 0).long()[:, None]),
    "two lookups": lambda x: DENSE[(x > 0).long(), (x < 1).long()],
    "lookup of rows": lambda x: DENSE[(x > 0).long()],
    "design": lambda x: DESIGN @ x,
    "design on the right": lambda x: x[None] @ DESIGN.mT,
    "batched design": lambda x: DESIGN.expand(2, -1, -1) @ torch.stack([x, 2 * x])[..., None],
    "sparse design": lambda x: torch.sparse.mm(DESIGN.to_sparse(), x[:, None]),
    "einsum": lambda x: torch.einsum("ij,j->i", DESIGN, x),
    "added product": lambda x: torch.addmm(WEIGHTS[:1, None], DESIGN, x[:, None]),
    "stack": lambda x: torch.stack([x, WEIGHTS, x * x]),
    "join": lambda x: torch.cat([x[2:], WEIGHTS, x[:1]]),
    "pad": lambda x: functional.pad(x, (2, 1), value=3.0),
    "repeat": lambda x: x.repeat(2, 3),
    "repeat interleave": lambda x: x.repeat_interleave(torch.tensor([1, 3, 0, 2, 1, 1])),
    "diagonal": lambda x: x.diag_embed().tril(),
    "sum over own": lambda x: (x[:, None] * DENSE.mT).sum(-1),
    "mean of squares": lambda x: (x[:, None] * DENSE.mT).square().mean(1, keepdim=True),
    "log sum exp": lambda x: (x[:, None] + DENSE.mT).logsumexp(-1),
    "softmax": lambda x: torch.stack([x, x * x], -1).softmax(-1),
    "log softmax": lambda x: torch.stack([x, x.exp()], -1).log_softmax(-1),
    "running sum of own": lambda x: torch.stack([x, x * x], -1).cumsum(-1),
    "sorted own": lambda x: torch.stack([x, -x], -1).sort(-1).values,
    "largest own": lambda x: torch.stack([x, -x], -1).max(-1).values,
    "variance of own": lambda x: torch.stack([x, x * x], -1).var(-1),
    "segment sum": lambda x: torch.zeros(N).index_add(0, INDEX, x[INDEX] * 2.0),
    "sum at places": lambda x: torch.zeros(N).index_put((INDEX,), x[INDEX], accumulate=True),
    "scattered sum": lambda x: torch.zeros(N).scatter_add(0, INDEX, x[INDEX].exp()),
    "scatter": scatter_vector,
    "writing a part": write_part,
    "writing under a mask": write_masked,
    "writing step by step": write_steps,
    "writing under its own mask": fill_under_own_mask,
    "random slopes": lambda x: (x.reshape(3, 2)[torch.tensor([0, 0, 2, 1])][:, 1:] * 3.0).sum(-1),
    "triangular solve": lambda x: solve_columns(x)[0],
    "batched Cholesky": lambda x: torch.linalg.cholesky((x**2)[:, None, None] + torch.eye(2)).sum(
        -1
    ),
    "double precision": lambda x: x.float().double(),
    "complex": lambda x: torch.complex(x, WEIGHTS).abs(),
}
COARSE = {
    "sum": lambda x: x.sum(),
    "running sum": lambda x: x.cumsum(0),
    "centred": lambda x: x - x.mean(),
    "dense product": lambda x: DENSE @ x,
    "inner product": lambda x: x @ x,
    "outer product": lambda x: x[:, None] * x,
    "differences": lambda x: x.diff(),
    "sorted": lambda x: x.sort().values,
    "several rows at one place": lambda x: torch.zeros(2).index_add(0, PAIRS[0] % 2, x[:2]),
    "places chosen by x": lambda x: torch.zeros(N).scatter_add(0, (x > 0).long(), x),
    "own lookup": lambda x: x[(x > 0).long()],
    "distances": lambda x: torch.cdist(x[:, None], WEIGHTS[:, None]),
    "distances of pairs": lambda x: torch.cdist(x[:, None], x[:, None]),
    "convolution": lambda x: functional.conv1d(x[None, None], WEIGHTS[None, None, :3])[0, 0],
    "determinant": lambda x: (x.diag_embed() + torch.eye(N) * 9).logdet(),
    "Fourier transform": lambda x: torch.fft.rfft(x).real,
    "pairs of numbers": lambda x: torch.view_as_real(torch.complex(x, x.exp())).sum(-1),
    "unknown": lambda x: functional.layer_norm(x, (N,)),
}


@pytest.mark.parametrize("function", SHARP.values(), ids=SHARP)
def test_owners_are_those_that_move_the_result(function):
    assert_sound(function, sharp=True)


@pytest.mark.parametrize("function", COARSE.values(), ids=COARSE)
def test_no_owner_is_missed(function):
    assert_sound(function)


# --- random programs ----------------------------------------------------------------------------

STEPS = (
    lambda a, b: a + b,
    lambda a, b: a * WEIGHTS + b.sin(),
    lambda a, b: torch.where(SEEN, a, b),
    lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: a.roll(1),
    lambda a, b: b.flip(0) * 0.5,
    lambda a, b: a[torch.tensor([1, 1, 0, 3, 5, 4])],
    lambda a, b: torch.cat([a[:3], b[3:]]),
    lambda a, b: torch.stack([a, b]).amax(0),
    lambda a, b: torch.stack([a, b])[torch.tensor([0, 1, 0, 1, 0, 1]), torch.arange(N)],
    lambda a, b: a.index_put((torch.tensor([0, 4]),), b[:2]),
    lambda a, b: a.slice_scatter(b[2:4], 0, 1, 3),
    lambda a, b: a.cumsum(0),
    lambda a, b: torch.eye(N)[torch.tensor([3, 4, 5, 0, 1, 2])] @ a,
    lambda a, b: (a - 1).relu(),
    lambda a, b: WEIGHTS + 0.0 * SEEN,
    lambda a, b: a.reshape(2, 3).mT.reshape(-1),
    lambda a, b: a.clone().mul_(2.0).masked_fill_(SEEN, 0.3),
    lambda a, b: torch.zeros(N).index_add(0, torch.tensor([0, 0, 2, 3, 3, 5]), a),
)


def random_program(seed):
    generator = random.Random(seed)
    plan = [(generator.choice(STEPS), generator.random(), generator.random()) for _ in range(6)]

    def program(x):
        made = [x, x.exp()]
        for step, first, second in plan:
            made.append(step(made[int(first * len(made))], made[int(second * len(made))]))
        return made[-1]

    return program


@pytest.mark.parametrize("seed", range(60))
def test_no_owner_is_missed_in_a_random_program(seed):
    assert_sound(random_program(seed))


def test_sabotaged_rule_is_noticed(monkeypatch):
    def keeps_the_first(owners):
        return owners[0].expand(torch.broadcast_shapes(*[owner.shape for owner in owners]))

    monkeypatch.setattr(owner_rules, "join", keeps_the_first)
    with pytest.raises(AssertionError):
        for function in (*SHARP.values(), *COARSE.values()):
            assert_sound(function)


# --- what cannot be told ------------------------------------------------------------------------

READS = {
    "branch": lambda x: x if x.sum() > 0 else -x,
    "number": lambda x: x * x[0].item(),
    "own mask": lambda x: x[x > 0],
    "places": lambda x: (x > 0).nonzero(),
    "different ones": lambda x: x.round().unique(),
    "selection": lambda x: x.masked_select(x > 0),
    "repeats": lambda x: WEIGHTS.repeat_interleave((x > 0).long() + 1),
    "comparison": lambda x: x if torch.equal(x, WEIGHTS) else -x,
    "branch after writing": lambda x: x if write_part(x)[1] > 0 else -x,
}


@pytest.mark.parametrize("function", READS.values(), ids=READS)
def test_reading_of_values_is_noticed(function):
    with pytest.raises(ValueReadError):
        owners(function)


def test_reading_of_constants_is_no_fault():
    def function(x):
        out = torch.zeros(N)
        out[1:] = x[1:]
        last = out[0].item() + WEIGHTS.sum().item()  # no element of x
        return x[SEEN] * last if WEIGHTS[0] > 0 else x

    assert owners(function).tolist() == [1, 3, 4, 6]


def test_several_is_told_from_none():
    assert owners(lambda x: torch.stack([x.sum(), WEIGHTS.sum()])).tolist() == [SEVERAL, NONE]
