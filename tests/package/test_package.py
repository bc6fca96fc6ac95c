"""The package as a whole: its rooms in their order, its files, and what importing it does."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

import pyro_hamflow
from pyro_hamflow.mcmc.kernels.pyro_face import PyroFace
from pyro_hamflow.model.target import Target

ROOT = Path(pyro_hamflow.__file__).parent
TESTS = ROOT.parent / "tests"
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
    for path in sorted(ROOT.rglob("*.py"))
    if path.parent != ROOT or path.stem not in ("__init__", "conftest")
}

# Imports run from a later one to an earlier one. Moves come first, then populations that are moved
# by them, then the kernels that may start from a population.
ROOMS = ["version", "checks", "process", "progress", "files", "arviz_bridge"]
ROOMS += ["programs", "dynamics", "networks", "model", "marginal"]
ROOMS += ["surrogates", "flows", "mcmc.__init__", "mcmc.transitions", "smc"]
ROOMS += ["mcmc.adaptation", "mcmc.draws", "mcmc.chains", "mcmc.diagnosis", "mcmc.necks"]
ROOMS += [
    "mcmc.messages",
    "mcmc.stopping",
    "mcmc.kernels",
    "mcmc.edges",
    "mcmc.unvisited",
    "mcmc.moving",
]
ROOMS += ["mcmc.outcome"]
ROOMS += ["mcmc.storable", "mcmc.frozen", "mcmc.identity", "mcmc.snapshot", "mcmc.packing"]
ROOMS += ["mcmc.files", "mcmc.chunks", "mcmc.states", "mcmc.store", "mcmc.stored_draws"]
ROOMS += ["mcmc.writer", "mcmc.checkpoint", "mcmc.course"]
ROOMS += ["mcmc.segment", "mcmc.groups", "mcmc.group_checkpoints", "mcmc.resume", "mcmc.latest"]
ROOMS += ["mcmc.executors", "mcmc.spread", "mcmc.workers", "mcmc.mcmc", "results"]

MOST_LINES = 300
LONGER = {
    "mcmc.kernels.base": "one class; a third of it is documentation with a worked example",
    "mcmc.mcmc": "one class, with the surface of Pyro's runner and all of its arguments explained",
}


class Import(NamedTuple):
    """A module of the package, or another one, that a module imports."""

    name: str
    line: int
    inner: bool  # within a function


def imports_of(module: str, sources: Mapping[str, str]) -> Iterator[Import]:
    """All imports of a module; those of the package are named from its root on."""
    tree = ast.parse(sources[module])
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["pyro_hamflow", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [
                whole if whole.removeprefix("pyro_hamflow.") in sources else base
                for whole in (f"{base}.{alias.name}" for alias in node.names)
            ]
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, id(node) in inner)


def own_imports(module: str, sources: Mapping[str, str]) -> Iterator[str]:
    for name, *_ in imports_of(module, sources):
        if name.split(".")[0] == "pyro_hamflow":
            yield name.removeprefix("pyro_hamflow.")


def place(module: str) -> int:
    """Where a module stands in the order; the package itself stands after all."""
    parts = module.split(".")
    if parts == ["pyro_hamflow"]:
        return len(ROOMS)
    if parts == ["mcmc"]:
        parts = ["mcmc", "__init__"]
    return ROOMS.index(".".join(parts[:2] if parts[0] == "mcmc" else parts[:1]))


def wrong_ways(sources: Mapping[str, str]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in sources
        for name in own_imports(module, sources)
        if place(name) > place(module)
    ]


def cycle(sources: Mapping[str, str]) -> list[str]:
    """The modules of a cycle of imports; none if there is none."""
    graph = {module: set(own_imports(module, sources)) for module in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def inner_imports(sources: Mapping[str, str]) -> list[str]:
    """Imports within functions: of the package, or of others without a reason on their line."""
    found = []
    for module, text in sources.items():
        lines = text.splitlines()
        for name, line, inner in imports_of(module, sources):
            own, reason = name.split(".")[0] == "pyro_hamflow", "  # " in lines[line - 1]
            if inner and (own or not reason):
                found.append(f"{module}, line {line}: {name}")
    return found


def long_modules(sources: Mapping[str, str]) -> list[str]:
    lengths = {module: len(text.splitlines()) for module, text in sources.items()}
    return [module for module, length in lengths.items() if length > MOST_LINES]


def is_number(node: ast.expr) -> bool:
    """Whether it is a number, a few of them, or made of numbers alone."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and not isinstance(node.value, bool)
    parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    plain = isinstance(node, ast.UnaryOp | ast.BinOp | ast.Tuple)
    return plain and bool(parts) and all(map(is_number, parts))


def silent_constants(sources: Mapping[str, str]) -> list[str]:
    """Numbers of modules that no comment explains, on their lines or just above."""
    found = []
    for module, text in sources.items():
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                above, own = lines[node.lineno - 2], lines[node.lineno - 1 : node.end_lineno]
                told = above.startswith("#") or any("  # " in line for line in own)
                if is_number(node.value) and not told:
                    found.append(f"{module}: {own[0]}")
    return found


def classes() -> Iterator[type]:
    for name in SOURCES:
        module = importlib.import_module(f"pyro_hamflow.{name.removesuffix('.__init__')}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield value


def depth(cls: type) -> int:
    """How many classes of the package are built on each other, protocols and the adapter aside."""
    ours = cls.__module__.startswith("pyro_hamflow")
    counts = ours and cls is not PyroFace and not getattr(cls, "_is_protocol", False)
    return int(counts) + max((depth(base) for base in cls.__bases__), default=0)


def test_imports_run_one_way():
    assert wrong_ways(SOURCES) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("model.start", "from pyro_hamflow.results.rows import Rows"),
        ("model.start", "import pyro_hamflow.results.rows"),
        ("model.start", "from pyro_hamflow import MCMC"),
        ("model.start", "from ..results import rows"),
        ("model.start", "def late():\n    from pyro_hamflow.results.rows import Rows"),
        ("mcmc.transitions.nuts", "from pyro_hamflow.mcmc.adaptation.base import Plan"),
        ("mcmc.messages", "from ..mcmc.kernels import base"),
    ],
)
def test_an_import_of_a_later_room_is_noticed(module, text):
    assert len(wrong_ways({module: text})) == 1


def test_a_room_without_a_place_is_noticed():
    with pytest.raises(ValueError, match="'cellar' is not in list"):
        wrong_ways({"cellar.wine": "from pyro_hamflow.checks import positive"})


def test_modules_do_not_import_each_other():
    assert cycle(SOURCES) == []


def test_a_cycle_is_noticed():
    there = {"model.one": "from pyro_hamflow.model import two\nfrom pyro_hamflow import checks"}
    back = {"model.two": "from pyro_hamflow.model.three import function"}
    again = {"model.three": "def late():\n    from pyro_hamflow.model.one import value"}
    assert set(cycle(there | back | again)) == {"model.one", "model.two", "model.three"}


def test_functions_import_nothing_without_a_reason():
    assert inner_imports(SOURCES) == []


def test_an_import_in_a_function_is_noticed():
    text = """import math
def plain():
    import arviz
async def late():
    from pyro_hamflow.checks import positive  # reasons do not help
class Holder:
    def method(self):
        import matplotlib  # slow to import
"""
    found = inner_imports({"model.one": text})
    assert found == ["model.one, line 3: arviz", "model.one, line 5: pyro_hamflow.checks"]


def test_long_modules_have_a_reason_and_no_others_do():
    assert set(long_modules(SOURCES)) == LONGER.keys()


def test_a_long_module_is_noticed():
    assert long_modules({"short": "x = 0\n" * 300, "long": "x = 0\n" * 301}) == ["long"]


def test_numbers_of_algorithms_are_explained():
    rooms = ("marginal", "surrogates", "mcmc")
    chosen = {name: text for name, text in SOURCES.items() if name.split(".")[0] in rooms}
    assert silent_constants(chosen) == []


def test_a_number_without_a_comment_is_noticed():
    told = (
        "NAME = 'word'\nFEW = 3  # draws\n# of both\nLOW, HIGH = 1.0, 2.0\nSCHEMES = {1: 'one'}\n"
    )
    silent = "_FEWEST = 32\n_LOW, _HIGH = -1.0, 2**5\n_RATE: float = 0.5"
    assert silent_constants({"one": told}) == []
    assert silent_constants({"one": told + silent}) == [f"one: {x}" for x in silent.splitlines()]


def test_classes_are_built_on_one_other_at_most():
    assert [cls for cls in classes() if depth(cls) > 2] == []


@pytest.mark.parametrize("first", [object, nn.Module, PyroFace, Target])
def test_a_third_level_of_classes_is_noticed(first):
    ours = {"__module__": "pyro_hamflow.one"}
    one = type(first)("One", (first,), ours)
    assert depth(one) == 1
    two = type("Two", (one,), ours)
    three = type("Three", (dict, two), ours)
    assert [depth(cls) for cls in (one, two, three)] == [1, 2, 3]


def test_all_classes_are_looked_at():
    names = {cls.__name__ for cls in classes()}
    assert {"NUTS", "Kernel", "PyroFace", "Target", "MarginalModel", "Phase"} <= names


def importers_of_tests(sources: Mapping[str, str]) -> list[str]:
    found = []
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                words = re.findall(r"\w+", ast.unparse(node))
                ours = "tests" in words or getattr(node, "level", 0) > 0
                found += [name] if ours and any(w.startswith("test_") for w in words) else []
    return found


def test_tests_lie_in_rooms_and_do_not_import_each_other():
    paths = [path.relative_to(TESTS) for path in TESTS.rglob("*.py")]
    rooms = {str(path.parent) for path in paths if path.stem.startswith("test_")}
    assert rooms <= {*(room.split(".")[0] for room in ROOMS), "package", "."}
    assert importers_of_tests({str(p): (TESTS / p).read_text() for p in paths}) == []


@pytest.mark.parametrize(
    "text",
    [
        "from tests.mcmc.test_nuts import latent",
        "from tests.mcmc import test_nuts",
        "import tests.mcmc.test_nuts",
        "from .test_nuts import latent",
        "def late():\n    from tests.mcmc.test_nuts import latent",
    ],
)
def test_a_test_that_imports_another_is_noticed(text):
    assert importers_of_tests({"mine": text, "other": "import pytest"}) == ["mine"]


def test_random_states_are_put_back_in_one_place():
    """Torch's own way starts CUDA (:func:`pyro_hamflow.process.random_state_kept`)."""
    assert [name for name, text in SOURCES.items() if "fork_rng(" in text] == ["process"]


def test_import_leaves_validation_as_it_found_it():
    code = (
        "import torch, pyro; D = torch.distributions.Distribution; before = D._validate_args;"
        "dtype = torch.get_default_dtype(); import pyro_hamflow;"
        "raise SystemExit(D._validate_args != before or torch.get_default_dtype() != dtype)"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0


def test_import_leaves_to_later_what_takes_long():
    code = (
        "import sys, pyro_hamflow;"
        "raise SystemExit(not {'arviz', 'xarray', 'matplotlib', 'zuko'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0


FILLED = """
import sys, torch
from pyro_hamflow.programs.capture import capture
graph = capture(lambda x: (x * x).masked_fill_(x < 0.5, -1.0).exp(), torch.arange(3.0))
right = graph(torch.tensor([0.0, 1.0, 2.0])).log().tolist() == [-1.0, 1.0, 4.0]
raise SystemExit(not right or "sympy" in sys.modules)
"""


def test_a_capture_does_not_import_symbolic_shapes():
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", FILLED]).returncode == 0


IMPORTS = """
from time import process_time as now
start = now(); import pyro; middle = now(); import pyro_hamflow
print((now() - start) / (middle - start))
"""


@pytest.mark.slow
def test_import_takes_hardly_longer_than_pyro():
    run = [sys.executable, "-W", "ignore", "-c", IMPORTS]
    ratios = [float(subprocess.check_output(run)) for _ in range(6)]
    assert min(ratios[1:]) < 1.15  # the first run compiles


def test_public_names_are_documented():
    for name in pyro_hamflow.__all__:
        assert (getattr(pyro_hamflow, name).__doc__ or "").strip(), name
