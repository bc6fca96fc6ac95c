"""Executes tutorials as notebooks, and writes them with what they show: ``make gallery``.

``python docs/gallery.py [NAME ...]`` executes the tutorials named, or all. Their sources are the
scripts of ``tutorials``; the notebooks in ``docs/gallery`` are what the site shows.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs" / "gallery"
NAMES = (
    "quickstart",
    "pseudo_marginal",
    "item_response",
    "neural_nuts",
    "hamiltonian_flow_guide",
    "neutra",
    "paper/supernova",
    "lecture/exoplanet",
    "gallery/phi4",
    "comparing_models",
    "many_patients",
    "stochastic_volatility",
    "gallery/term_premium",
)
_PLAIN = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def notebook_of(name: str) -> nbformat.NotebookNode:
    """A tutorial as a notebook that has not been executed."""
    text = (ROOT / "tutorials" / f"{name}.py").read_text()
    # Figures are to be shown below their cells, which a backend without windows forbids.
    text = text.replace('matplotlib.use("Agg")\n', "")
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(_PLAIN)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(notebook: nbformat.NotebookNode, **environment: str) -> nbformat.NotebookNode:
    """Runs a notebook in a folder of its own."""
    os.environ |= {"PYTHONPATH": str(ROOT)} | environment
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}})
        return client.execute()


def stripped(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from run to run, and without progress bars and warnings."""
    notebook.metadata = nbformat.from_dict(_PLAIN)
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        path = GALLERY / f"{Path(name).name}.ipynb"
        print(f"{name}: executed", flush=True)
        nbformat.write(stripped(execute(notebook_of(name), CI="true")), path)


if __name__ == "__main__":
    main()
