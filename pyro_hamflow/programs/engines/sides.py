"""Numbers of several chains side by side: vectors of one of each, in the place of numbers."""

from __future__ import annotations

import re

import torch

from pyro_hamflow.programs.engines.buffers import NotSupported

# What an expression of numbers is where some of them are vectors, as ``sides.hpp`` has it.
_OF_VECTORS = [
    (re.compile(r"\b(double|float|bool)\("), r"as<\1>("),
    (re.compile(r"\bstd::pow\b"), "power"),
    (re.compile(r"\bstd::"), ""),
    (re.compile(r"\bsgn\b"), "sign_of"),
    (re.compile(r"\bmax_propagate_nan\b"), "larger"),
    (re.compile(r"\bmin_propagate_nan\b"), "smaller"),
    (re.compile(r"\bcalc_digamma\b"), "digamma"),
]
_WHOLE = re.compile(r"\bu?int\d+_t\(")  # conditions as whole numbers, say

# Functions that processors have no vectors for, and how many of them there may be: one chain alone
# waits for those of three others.
_ONE_BY_ONE = re.compile(r"\b(lgamma|calc_digamma|pow)\(")
_MOST_ONE_BY_ONE = 100


class Sides:
    """Which numbers of statements are vectors: those that depend on the position of a chain.

    All else depends on data alone, and is worked out once, by a function of its own.

    Arguments:
        dtype: The type of positions, and of all that is worked out of them but what is true or not.

    Attributes:
        dtype: As given.
        vectors: The numbers.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._slow = 0
        self.vectors: set[int] = set()

    def expression(self, text: str, dtype: torch.dtype) -> str:
        """An expression of numbers as one of vectors.

        Raises:
            NotSupported: If its results are of another type, or too many take one after the other.
        """
        if dtype not in (self.dtype, torch.bool) or _WHOLE.search(text):
            raise NotSupported(f"numbers of several chains of {dtype}")
        self._slow += bool(_ONE_BY_ONE.search(text))
        if self._slow > _MOST_ONE_BY_ONE:
            raise NotSupported("many functions that no processor has vectors for")
        for pattern, other in _OF_VECTORS:
            text = pattern.sub(other, text)
        return text
