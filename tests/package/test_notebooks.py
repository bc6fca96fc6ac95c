"""A run in a notebook shows a bar of what matters at its stage."""

from __future__ import annotations

import pytest

nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))

SETUP = """
import warnings; warnings.simplefilter("ignore")
import pyro, pyro.distributions as dist, pyro_hamflow as phf
def model():
    pyro.sample("x", dist.Normal(0.0, 1.0))
"""
RUN = """
mcmc = phf.MCMC(phf.NUTS(model), 60, 40, num_chains=2, seed=0)
mcmc.run()
"""


def test_a_run_in_a_notebook_shows_a_bar(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(code) for code in (SETUP, RUN)]
    done = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    widgets = done.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    bars = [w["state"] for w in widgets.values() if w["model_name"] == "FloatProgressModel"]
    assert [(bar["value"], bar["max"]) for bar in bars] == [(100.0, 100.0)]
    texts = [w["state"]["value"] for w in widgets.values() if w["model_name"] == "HTMLModel"]
    assert len(texts) == 2 and texts[0].startswith("Sample")
    assert "acc." in texts[1] and "divergences=0" in texts[1]
