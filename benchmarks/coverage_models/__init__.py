"""A zoo of the models that people write, each with small data, grouped by kind."""

from benchmarks.coverage_models.enumerated import ENUMERATIONS
from benchmarks.coverage_models.examples import EXAMPLES
from benchmarks.coverage_models.gaussian import GAUSSIANS
from benchmarks.coverage_models.hierarchical import HIERARCHIES
from benchmarks.coverage_models.idioms import IDIOMS
from benchmarks.coverage_models.regression import REGRESSIONS
from benchmarks.coverage_models.time_series import SERIES

KINDS = {
    "regression": REGRESSIONS,
    "hierarchical": HIERARCHIES,
    "enumerated": ENUMERATIONS,
    "time series": SERIES,
    "Gaussian": GAUSSIANS,
    "examples": EXAMPLES,
    "idioms": IDIOMS,
}
ZOO = {name: case for collection in KINDS.values() for name, case in collection.items()}
