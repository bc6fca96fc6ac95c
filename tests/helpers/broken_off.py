"""Runs that are broken off, and what they have to be like when they have been taken up."""

from __future__ import annotations

import multiprocessing

import torch

FORK = multiprocessing.get_context("fork")  # a process of its own, without another import


def assert_same(one, other):
    assert torch.equal(one.draws.position, other.draws.position)
    assert one.draws.stats.keys() == other.draws.stats.keys()
    for name, stat in one.draws.stats.items():
        assert torch.equal(stat, other.draws.stats[name]), name
    assert list(one.draws.local) == list(other.draws.local)
    for name, value in one.draws.local.items():
        assert torch.equal(value, other.draws.local[name]), name
    assert one.messages == other.messages
    assert one.warmup_steps == other.warmup_steps


class Ended(Exception):
    pass


def ended_at(stage, number):
    """A function for ``hook_fn`` that ends the run after an iteration."""

    def hook(kernel, params, at, i):
        if (at, i) == (stage, number):
            raise Ended

    return hook
