"""A function for each of many elements: at once where its operations allow it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.programs.capture import Program, batched_graph, capture, row_by_row


class Vectorized:
    """Applies functions to each row of their arguments, in the fastest way that they allow.

    Three ways are tried in turn: torch's ``vmap`` of the function; ``vmap`` of the operations that
    it performs on one row, recorded as a graph without writes in place and without masks; and one
    row after the other. A way that has failed is not tried again.

    Arguments:
        what: What the rows are, in words.

    Example:
        >>> def function(row):
        ...     total = torch.zeros(3)
        ...     total[1:] = row  # which `torch.func.vmap` refuses
        ...     return total
        >>> Vectorized("rows")(function, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[0., 1., 2.],
                [0., 3., 4.]])
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._ways: list[Callable[..., Any]] = [_at_once, _recorded, row_by_row]

    def __call__(self, function: Program, *rows: Tensor) -> Any:
        """The results for all rows, stacked: a tensor, or any nest of them.

        Arguments:
            function: Takes one row of each; gradients flow to them and to whatever else it uses.
            rows: Each of shape ``(rows, *)``.
        """
        failed: list[str] = []
        for way in self._ways[:-1]:
            try:
                result = way(function, *rows)
            except torch.linalg.LinAlgError:  # of this row's numbers, not of the way
                raise
            except Exception as error:  # whatever the function's own code may raise
                failed.append(str(error).strip().partition("\n")[0])
            else:
                del self._ways[: len(failed)]
                return result
        result = row_by_row(function, *rows)
        if failed:
            del self._ways[:-1]
            warnings.warn(
                f"{self.what} could not be computed at once, so they are computed one by one, more "
                f"slowly. The reason: {failed[-1]}",
                RuntimeWarning,
                stacklevel=2,
            )
        return result

    def __reduce__(self) -> Any:
        return Vectorized, (self.what,)


def _at_once(function: Program, *rows: Tensor) -> Any:
    return torch.func.vmap(function, randomness="different")(*rows)


def _recorded(function: Program, *rows: Tensor) -> Any:
    return batched_graph(capture(function, *(row[0] for row in rows), live=True), *rows)
