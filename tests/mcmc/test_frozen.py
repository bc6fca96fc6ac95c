"""Values as words and arrays: what comes back is what was, and no file makes anything else run."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict

import pytest
import torch

from pyro_hamflow import PotentialNetwork
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.base import RunPlan
from pyro_hamflow.mcmc.frozen import Unstorable, freeze, thaw
from pyro_hamflow.mcmc.transitions.base import Tuning


def and_back(value, parts=None, others=None):
    table, arrays = freeze(value, parts or {})
    words = json.loads(json.dumps(table))
    return thaw(words, arrays, others if others is not None else (parts or {}))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, -2.5, "three", True, 10**30, 1e-320, -0.0],
        {"a": (1, {2: frozenset({3})}), 4: [[], {}, ()]},
        OrderedDict(b=1, a=2),
        [torch.Size([2, 3]), torch.float32, torch.device("cpu"), slice(None, 3)],
        RunPlan("NUTS", 4, 100, messages=["a sentence"]),
    ],
)
def test_plain_values_come_back(value):
    found = and_back(value)
    assert found == value
    assert type(found) is type(value)
    assert str(found) == str(value)  # the signs of zeros, the order of keys


def test_numbers_that_are_none_come_back():
    nan, inf, low = and_back([math.nan, math.inf, -math.inf])
    assert math.isnan(nan) and (inf, low) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64],
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3)])
def test_tensors_come_back_bit_for_bit(dtype, shape):
    value = torch.randn(shape).to(dtype)
    found = and_back(value)
    assert (found.dtype, found.shape, found.stride()) == (dtype, value.shape, value.stride())
    assert torch.equal(found, value)


def test_tensors_keep_how_they_lie_in_memory():
    rows = torch.randn(4, 6)
    for value in (rows.mT, rows[:, ::2], rows[1:3, 2], rows[0].expand(5, -1), rows[:, :1]):
        found = and_back(value)
        assert torch.equal(found, value)
        assert found.stride() == value.stride()


def test_a_value_that_changes_later_is_stored_as_it_was():
    value = torch.zeros(3)
    table, arrays = freeze(value, {})
    value += 1.0
    assert torch.equal(thaw(table, arrays, {}), torch.zeros(3))


def test_one_object_stays_one_and_circles_close():
    position = torch.ones(2)
    shared = Tuning(0.5, GaussianKinetic(position))
    circle = {"first": shared, "second": shared, "position": position}
    circle["self"] = circle
    found = and_back(circle)
    assert found["first"] is found["second"]
    assert found["self"] is found
    assert found["first"].kinetic.inverse_mass is found["position"]


def test_networks_come_back_with_their_weights():
    network = PotentialNetwork(3, hidden=(4,))
    x = torch.randn(5, 3)
    found = and_back(network)
    assert found is not network
    assert torch.equal(found(x), network(x))
    assert [p.requires_grad for p in found.parameters()] == [
        p.requires_grad for p in network.parameters()
    ]


def test_what_the_other_side_has_is_not_stored():
    mine, yours = torch.zeros(1000), torch.ones(1000)
    table, arrays = freeze({"x": mine}, {"data": mine})
    assert not arrays
    assert thaw(table, arrays, {"data": yours})["x"] is yours
    with pytest.raises(ValueError, match="there is no part 'data'"):
        thaw(table, arrays, {})


class Stranger:
    pass


@pytest.mark.parametrize("value", [print, lambda: 1, Stranger(), object(), os, type, iter([])])
def test_code_and_strangers_are_refused_by_their_place(value):
    plan = RunPlan("NUTS", 4, 100, messages=[{"x": value}])
    with pytest.raises(Unstorable, match=r"`state.messages\[0\]\['x'\]` is .*no file can hold"):
        freeze(plan, {})


@pytest.mark.parametrize(
    "entry",
    [
        ["made", "os:system", {"at": 2}, {"at": 3}],
        ["made", "builtins:eval", {"at": 2}, {"at": 3}],
        ["made", "pyro_hamflow.mcmc.frozen:os", {"at": 2}, {"at": 3}],
        ["made", "pyro_hamflow.mcmc.frozen:thaw", {"at": 2}, {"at": 3}],
        ["made", "pyro_hamflow.mcmc.frozen:sys.exit", {"at": 2}, {"at": 3}],
        ["made", "pyro_hamflow.mcmc.mcmc:MCMC", {"at": 2}, {"at": 3}],
        ["object", "subprocess:Popen", []],
        ["object", "pyro_hamflow.mcmc.frozen:Any", []],
        ["named", "pyro_hamflow.mcmc.adaptation.base:RunPlan", ["x", 1, 1]],
        ["method", {"at": 2}, "__class__"],
        ["method", {"at": 2}, "append"],
        ["code", "print(1)"],
        ["tensor", 0, "torch.load", "cpu", [1], [1], False, False],
        ["tuple", [{"at": 1}]],
    ],
)
def test_a_forged_table_makes_nothing_run(entry, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("it ran")

    monkeypatch.setattr(os, "system", never)
    table = [{"at": 1}, entry, ["tuple", ["touch /tmp/forged"]], ["dict", []]]
    with pytest.raises((ValueError, TypeError)):
        thaw(table, [torch.zeros(1).numpy()], {})
