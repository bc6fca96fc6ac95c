"""A second run sees what has changed since the first, wherever the model reads it from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import xarray
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_hamflow import HMC, NUTS, PseudoMarginalNUTS, marginalize
from pyro_hamflow.marginal.dependence import Run
from pyro_hamflow.marginal.proposals.prior import PriorProposal
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.fingerprint import take_fingerprint
from tests.helpers.estimates import assert_unbiased, estimates
from tests.helpers.kinds import long_but

Y = [0.3, 1.2, -1.0, 0.4]


@dataclass
class Data:
    y: torch.Tensor


def as_tensor(data):
    """The numbers in any of the holders below."""
    if isinstance(data, torch.Tensor):
        return data
    if isinstance(data, Data):
        return data.y
    if isinstance(data, dict):
        return as_tensor(data["y"])
    if isinstance(data, pd.DataFrame):
        return torch.tensor(data["y"].to_numpy())
    return torch.tensor(np.asarray(data))


HOLDERS = {
    "tensor": lambda: torch.tensor(Y),
    "array": lambda: np.array(Y),
    "list": lambda: list(Y),
    "dictionary": lambda: {"y": torch.tensor(Y)},
    "dictionary of arrays": lambda: {"y": np.array(Y)},
    "table": lambda: pd.DataFrame({"y": Y}),
    "series": lambda: pd.Series(Y),
    "data class": lambda: Data(torch.tensor(Y)),
    "labelled array": lambda: xarray.DataArray(Y, dims="row"),
    "data set": lambda: {"y": xarray.Dataset({"y": ("row", Y)})["y"]},
}


def plain(data):
    y = as_tensor(data)
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def mixed(data):
    y = as_tensor(data)
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 0.5))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def change_in_place(data):
    if isinstance(data, Data):
        data.y[0] = 5.0
    elif isinstance(data, dict):
        data["y"][0] = 5.0
    elif isinstance(data, pd.DataFrame):
        data.loc[0, "y"] = 5.0
    else:
        data[0] = 5.0
    return data


def change_anew(data):
    """Other data of the same kind and shape."""
    return change_in_place(same_kind(data))


def same_kind(data):
    return next(make() for make in HOLDERS.values() if type(make()) is type(data))


def value(potential, at=0.3):
    position = torch.full((1, potential.dimension), at)
    noise = potential.vectors(1)[1]
    return potential.gradients(position, noise)[0]


def kernels():
    marginal = marginalize(mixed, ["x"], num_particles=4)
    return {"plain": HMC(plain), "marginal": PseudoMarginalNUTS(marginal)}


@pytest.mark.parametrize("change", [change_in_place, change_anew])
@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_second_run_sees_new_data(make, change):
    check_second_run("plain", make(), make(), change)


@pytest.mark.parametrize("holder", long_but(["table"], ["tensor", "table", "labelled array"]))
def test_second_run_of_a_marginal_model_sees_new_data(holder):
    check_second_run("marginal", HOLDERS[holder](), HOLDERS[holder](), change_in_place)


def check_second_run(which, data, same, change):
    kernel = kernels()[which]
    first = kernel.prepare((data,), {})
    before = value(first)
    assert kernel.prepare((same,), {}) is first  # the same data, held by another object
    new = change(data)
    potential = kernel.prepare((new,), {})
    assert potential is not first
    assert not torch.equal(value(potential), before)
    fresh = kernels()[which].prepare((torch.tensor([5.0, *Y[1:]]),), {})
    assert torch.allclose(value(potential), value(fresh))


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["tensor", "array"])
def test_programs_keep_the_data_that_they_were_captured_with(make):
    """Data change in place after a run; the next one is of the old data, held elsewhere."""
    kernel, data = HMC(plain), make(Y)
    first = kernel.prepare((data,), {})
    before = value(first)
    data[0] = 5.0
    assert kernel.prepare((make(Y),), {}) is first
    assert torch.equal(value(first), before)


class Holder:
    """A model whose data are its own."""

    def __init__(self):
        self.y = torch.tensor(Y)

    def __call__(self):
        plain(self.y)


def test_second_run_sees_closures_and_attributes():
    held, holder = {"y": np.array(Y)}, Holder()
    for model, change in (
        (lambda: plain(held["y"]), lambda: change_in_place(held)),
        (holder, lambda: setattr(holder, "y", torch.tensor([5.0, *Y[1:]]))),
    ):
        kernel = NUTS(model)
        first = kernel.prepare((), {})
        assert kernel.prepare((), {}) is first
        change()
        potential = kernel.prepare((), {})
        assert torch.equal(
            value(potential), value(Potential(plain, (torch.tensor([5.0, *Y[1:]]),)))
        )


def test_data_in_a_flat_region_are_seen():
    """At the point where the model is looked at, both data give the same density."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.factor("tail", -(y - 30.0 + mean).relu().sum())

    kernel = HMC(model)
    first = kernel.prepare((torch.zeros(3),), {})
    second = kernel.prepare((torch.ones(3),), {})
    assert second is not first
    assert not torch.equal(value(second, 29.5), value(first, 29.5))


def masked_term(y, seen):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)
        with poutine.mask(mask=seen):
            pyro.sample("z", dist.Normal(x, 0.5), obs=y + 2.0)


@pytest.mark.parametrize(
    "masks", [(False, True), (torch.zeros(4).bool(), torch.ones(4).bool())], ids=["flag", "tensor"]
)
def test_term_that_was_masked_out_is_found_again(masks):
    marginal = marginalize(masked_term, ["x"], num_particles=64, proposal="prior")
    y, at = torch.tensor(Y), {"mean": torch.tensor(0.5)}

    x = torch.linspace(-8.0, 8.0, 4001)[:, None]
    for seen in masks:
        exact = dist.Normal(0.5, 1.0).log_prob(x) + dist.Normal(x, 0.5).log_prob(y)
        exact = exact + torch.as_tensor(seen) * dist.Normal(x, 0.5).log_prob(y + 2.0)
        exact = exact.logsumexp(0) + torch.tensor(16.0 / 4000).log()
        assert_unbiased(estimates(marginal, at, y, seen)["x"], exact, resolution=0.05)


def test_rows_that_moved_to_other_elements_are_found_again():
    def model(y, subject):
        with pyro.plate("subject", 2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            pyro.sample("y", dist.Normal(x[subject], 1.0), obs=y)

    marginal, y, subject = marginalize(model, ["x"], num_particles=2), torch.tensor(Y), [0, 0, 1, 1]
    for _ in range(2):
        rows = marginal.plan(y, torch.tensor(subject)).structure.groups[0].rows["y"]
        assert rows.tolist() == subject
        subject.reverse()


def test_proposal_is_chosen_anew_where_the_prior_changes():
    def model(y, prior):
        with pyro.plate("row", len(y)):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    marginal, y = marginalize(model, ["x"]), torch.tensor(Y)
    marginal.plan(y, dist.Normal(0.0, 1.0))
    marginal.take(PriorProposal(), 32)  # as where sites miss something
    marginal.plan(y, dist.Normal(0.0, 1.0))
    assert marginal.proposal.name == "prior"
    marginal.plan(y, dist.Gamma(2.0, 1.0))
    assert marginal.proposal.name == "laplace"


def test_unchanged_model_is_analysed_once(monkeypatch):
    marginal = marginalize(mixed, ["x"], num_particles=2)
    structure = marginal.plan(torch.tensor(Y)).structure
    assert marginal.plan(torch.tensor(Y)).structure is structure
    looks = []
    look = Run.look
    monkeypatch.setattr(Run, "look", lambda run: (looks.append(run), look(run))[1])
    with marginal.hold(structure):
        poutine.trace(marginal).get_trace(torch.tensor(Y))
    assert not looks


# --- the key --------------------------------------------------------------------------------------


def key(function, *inputs):
    return take_fingerprint(function, *inputs).key


def test_key_tells_programs_and_contents_apart():
    x, data, other = torch.ones(3), torch.arange(3.0), torch.arange(3.0)
    programs = {
        "base": lambda x: (x * data).sum(),
        "operation": lambda x: (x + data).sum(),
        "contents": lambda x: (x * (data + 1)).sum(),
        "number": lambda x: (x * data).sum() * 2.0,
        "order": lambda x: (data * x).sum(),
        "shape": lambda x: (x * data).sum(0, keepdim=True),
        "result": lambda x: (x * data, "name"),
        "expanded": lambda x: (x * data[1:2].expand(3)).sum(),
        "one": lambda x: (x * data[1].expand(1)).sum(),
        "view": lambda x: (x * data.flip(0)).sum(),
        "part": lambda x: (x * torch.arange(4.0)[1:]).sum(),
    }
    programs |= {
        f"sparse {size}": lambda x, size=size: torch.eye(3).mul(size).to_sparse() @ x
        for size in (1, 2)
    }
    keys = {name: key(program, x) for name, program in programs.items()}
    assert len(set(keys.values())) == len(programs)
    assert key(lambda x: (x * other).sum(), 2 * x) == keys["base"]
    assert key(programs["base"], torch.ones(3, dtype=torch.float32)) != keys["base"]


def test_single_number_that_was_expanded_is_read():
    scale = torch.tensor(2.0).expand(1)
    first = take_fingerprint(lambda x: scale * x, torch.tensor(3.0)).key
    assert first == take_fingerprint(lambda x: scale * x, torch.tensor(3.0)).key


class Keeping(TorchDispatchMode):
    """Keeps all results, as a debugger or a profiler does that looks at the frames of a run."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, target, types, args=(), kwargs=None):
        result = target(*args, **(kwargs or {}))
        self.kept.append((target, result))
        return result


def test_key_is_the_same_whoever_else_keeps_results():
    def program(x):
        parts = torch.full_like(x, 2.0), x.new_zeros(2), torch.ones(2)
        return x[torch.arange(2)] * (parts[0][:2] + parts[1] + parts[2])

    keeping = Keeping()

    def kept(x):
        with keeping:
            return program(x)

    x = torch.ones(3)
    assert key(kept, x) == key(program, x)
    made = [target for target, _ in keeping.kept]
    assert torch.ops.aten.detach.default in made, "torch does not do anything else there"
    assert key(lambda x: program(x).detach(), x) != key(program, x)


def test_key_is_none_where_python_reads_inputs():
    assert key(lambda x: x if x.sum() > 0 else -x, torch.ones(2)) is None
    assert key(lambda x: x[x > 0], torch.ones(2)) is None

    def written(x):
        out = torch.zeros(2)
        out[0] = x[0]
        return x * out.max().item()

    assert key(written, torch.ones(2)) is None
    assert key(lambda x: x * torch.ones(2).max().item(), torch.ones(2)) is not None


def test_random_results_are_told():
    def function(x):
        return x + 1, x * torch.randn(2).relu(), torch.zeros(2).bernoulli_(0.5)

    assert take_fingerprint(function, torch.ones(2)).random == [False, True, True]
