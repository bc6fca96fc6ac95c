"""How a model of the zoo gets its data: recipes, carried out with a seed when it is asked for."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

Recipe = Callable[[Generator], Tensor]


@dataclass(frozen=True)
class Case:
    """A model that people write, and how its data are made.

    Attributes:
        model: The model, or a class of modules to make it from.
        recipes: How each of its keyword arguments is made.
    """

    model: Callable[..., Any]
    recipes: dict[str, Recipe]

    @property
    def name(self) -> str:
        return self.model.__name__

    def make(self) -> tuple[Callable[..., Any], dict[str, Tensor]]:
        """The model and its arguments, in torch's default type, the same each time."""
        generator = Generator().manual_seed(zlib.crc32(self.name.encode()))
        data = {name: recipe(generator) for name, recipe in self.recipes.items()}
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of modules' weights
            return self.model() if isinstance(self.model, type) else self.model, data


class Collection(dict[str, Case]):
    """Cases by name, filled by decoration."""

    def case(self, **recipes: Recipe) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Adds a model with recipes for its arguments."""

        def add(model: Callable[..., Any]) -> Callable[..., Any]:
            self[model.__name__] = Case(model, recipes)
            return model

        return add


def normal(*shape: int, loc: float = 0.0, scale: float = 1.0) -> Recipe:
    """Normal numbers."""
    return lambda generator: loc + scale * torch.randn(*shape, generator=generator)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Recipe:
    """Numbers of an interval."""
    return lambda generator: low + (high - low) * torch.rand(*shape, generator=generator)


def positive(*shape: int) -> Recipe:
    """Log-normal numbers."""
    return lambda generator: (0.5 * torch.randn(*shape, generator=generator)).exp()


def counts(*shape: int, rate: float = 3.0) -> Recipe:
    """Poisson numbers."""
    return lambda generator: torch.poisson(torch.full(shape, rate), generator=generator)


def labels(*shape: int, of: int) -> Recipe:
    """Whole numbers below another."""
    return lambda generator: torch.randint(of, shape, generator=generator)


def binary(*shape: int) -> Recipe:
    """Zeros and ones."""
    return lambda generator: torch.randint(2, shape, generator=generator).to(
        torch.get_default_dtype()
    )


def members(number: int, of: int) -> Recipe:
    """Which of some groups each of a number of rows belongs to; none is empty."""
    return lambda generator: torch.arange(number) % of


def values(*numbers: Any) -> Recipe:
    """Given numbers."""
    return lambda generator: torch.tensor(numbers)


def grid(number: int, low: float = 0.0, high: float = 1.0) -> Recipe:
    """Evenly spaced numbers."""
    return lambda generator: torch.linspace(low, high, number)


def missing(recipe: Recipe, share: float = 0.2) -> Recipe:
    """Replaces a share of a recipe's numbers by NaN."""

    def make(generator: Generator) -> Tensor:
        data = recipe(generator)
        lost = torch.rand(data.shape, generator=generator) < share
        return data.masked_fill(lost, torch.nan)

    return make
