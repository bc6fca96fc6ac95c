"""What the documents show works as they show it."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf
from pyro_hamflow.results.run import Run
from tests.helpers.broken_off import FORK

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts
}
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")} | PAGES
FAST = ("docs/switch.md",)
RUN = sorted(name for name, text in PAGES.items() if "```python" in text)


def blocks(name):
    """The Python of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(code):
    """Runs a script in a process of its own, which is spared the imports."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        process = FORK.Process(target=script, args=(code, *paths))
        process.start()
        process.join()
        return Done(process.exitcode, *(path.read_text() for path in paths))


def script(code, out, err):
    with out.open("w") as sys.stdout, err.open("w") as sys.stderr:
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        main = sys.modules["__main__"] = ModuleType("__main__")
        try:
            exec(code, main.__dict__)
        except BaseException:
            traceback.print_exc()
            sys.exit(1)


def test_readme_example_runs():
    (block,) = blocks("README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    shorter = block.replace("num_samples=500", "num_samples=40, warmup_steps=40")
    assert shorter != block
    done = run(shorter)
    assert done.returncode == 0, done.stderr
    assert "elpd_loo" in done.stdout and "spread" in done.stdout


def test_contributions_run_as_they_are_shown():
    done = run("import pyro\npyro.set_rng_seed(0)\n" + "\n".join(blocks("CONTRIBUTING.md")))
    assert done.returncode == 0, done.stderr


def test_documents_name_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([a-z_/]+(?:/|\.py))`", text)
    places = [ROOT, ROOT / "pyro_hamflow", ROOT / "pyro_hamflow/mcmc"]
    places += [ROOT / "pyro_hamflow/marginal/proposals", ROOT / "pyro_hamflow/marginal"]
    places += [ROOT / "pyro_hamflow/surrogates"]
    assert len(named) > 20
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = re.sub(r"```(?:python|sh)\n.*?```", "", DOCUMENTS[name], flags=re.DOTALL)
    places = re.findall(r"\]\(([^)]+)\)", text)
    places += re.findall(r"```\{(?:figure|include)\} (\S+)", text)
    here = (ROOT / name).parent
    places = [place.split("#")[0] for place in places if "://" not in place]
    assert [place for place in places if place and not (here / place).exists()] == []


def smaller(code):
    """The same with few draws and little training."""
    for name, few in {"num_samples": 60, "num_steps": 5, "num_particles": 64}.items():
        code = re.sub(rf"\b{name}=\d\d\d+", f"{name}={few}", code)
    code = re.sub(r"(MCMC\(.*?num_samples=\d+)", r"\1, warmup_steps=60", code)
    return re.sub(r"(?m)^( *)assert ", r"\1bool() or ", code)  # of few draws nothing is right


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in RUN]
)
def test_pages_run_as_they_are_shown(name, tmp_path):
    code = smaller("\n".join(blocks(name)))
    done = run(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_in_the_reference():
    pytest.importorskip("sphinx")
    entries = runpy.run_path(str(DOCS / "_ext" / "public_names.py"))["entries"]
    page = PAGES["docs/reference.md"]
    listed = re.findall(r"(?m)^\.\. auto\w+:: (\w+)$", page)
    assert len(listed) == len(set(listed)) and set(listed) <= set(phf.__all__)
    assert ".. other-names::" in page
    added = [entry.split(":: ")[1] for entry in entries(page)]
    assert sorted(listed + added) == sorted(phf.__all__)
    without = page.replace(".. autoclass:: NUTS\n", "")
    assert ".. autoclass:: NUTS" in entries(without)


def test_every_statistic_and_attribute_is_explained():
    def model():
        with pyro.plate("row", 3):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(3))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    marginal = phf.marginalize(model, ["x"], num_particles=2)
    kernels = (phf.NUTS(model), phf.PseudoMarginalHMC(marginal, method="conditional"))
    names = {"surrogate_accepted", "surrogate_error", "local_acceptance_rate", "log_weight"}
    names |= {"global_acceptance_rate", "global_accepted", "notes", "pareto_k", "log_evidence"}
    for kernel in kernels:
        mcmc = phf.MCMC(kernel, 5, 5, seed=0)
        mcmc.run()
        names |= mcmc.draws.stats.keys() | Run(mcmc).attributes().keys()
    explained = set(re.findall(r"`(\w+)`", PAGES["docs/statistics.md"]))
    assert names - explained == set()


def test_notebooks_are_those_of_the_scripts():
    pytest.importorskip("jupytext")
    gallery = runpy.run_path(str(DOCS / "gallery.py"))
    shown = {path.stem for path in (DOCS / "gallery").glob("*.ipynb")}
    listed = set(re.findall(r"(?m)^gallery/(\w+)$", PAGES["docs/gallery.md"]))
    assert shown == listed <= {Path(name).name for name in gallery["NAMES"]}
    for name in gallery["NAMES"]:
        if Path(name).name in shown:
            path = DOCS / "gallery" / f"{Path(name).name}.ipynb"
            cells = json.loads(path.read_text())["cells"]
            own = gallery["notebook_of"](name).cells
            assert ["".join(cell["source"]) for cell in cells] == [cell.source for cell in own]


def test_notebooks_are_short_and_end_with_a_check():
    pytest.importorskip("jupytext")
    for name in runpy.run_path(str(DOCS / "gallery.py"))["NAMES"]:
        text = (DOCS.parent / "tutorials" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 150, name
        assert "arviz." in text and "wrong" in text, name


def test_ten_tasks_have_a_page_each():
    rows = re.findall(r"(?m)^\| \d+\. .*$", PAGES["docs/tasks.md"])
    assert len(rows) == 10
    assert all(len(re.findall(r"\]\(", row)) == 1 for row in rows)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_drawn_by_a_browser():
    look = runpy.run_path(str(DOCS / "look.py"))
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(DOCS)]
    done = subprocess.run([*command, str(look["SITE"])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not any(map(shutil.which, look["BROWSERS"])):
        pytest.skip("there is no browser to look with")
    done = subprocess.run([sys.executable, DOCS / "look.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_quickstart_ends_with_good_diagnostics(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tutorials" / "quickstart.py")],
        cwd=tmp_path,
        env=os.environ | {"CI": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"quickstart.nc", "quickstart.png"}
