"""Runs the benchmarks and writes RESULTS.md: `python -m benchmarks.run [--only NAME] [--quick]`."""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

import pyro
import torch

from benchmarks import (
    amortized,
    coverage,
    coverage_compiled,
    devices,
    engines,
    flows,
    glmm,
    gradients,
    kernels,
    marginal_guides,
    memory,
    methods,
    mixed,
    mode_peers,
    modes,
    nuts,
    path_noise,
    paths,
    reliability,
    steps,
    surrogate,
)
from benchmarks.report import Table, render, store
from benchmarks.timing import prepare_compiler

TOPICS = {
    "gradients": gradients,
    "coverage": coverage,
    "coverage_compiled": coverage_compiled,
    "kernels": kernels,
    "memory": memory,
    "glmm": glmm,
    "nuts": nuts,
    "engines": engines,
    "steps": steps,
    "methods": methods,
    "paths": paths,
    "path_noise": path_noise,
    "mixed": mixed,
    "flows": flows,
    "modes": modes,
    "mode_peers": mode_peers,
    "marginal_guides": marginal_guides,
    "surrogate": surrogate,
    "amortized": amortized,
    "devices": devices,
    "reliability": reliability,
}


def main() -> None:
    """Measures the topics asked for; renders all that are stored."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=TOPICS, help="a topic; may be repeated")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to try the code")
    parser.add_argument("--render", action="store_true", help="measure nothing, write RESULTS.md")
    parser.add_argument("--folder", type=Path, help="where to write; here unless quick")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    here = Path(__file__).parent
    trial = Path(tempfile.gettempdir()) / "pyro_hamflow_benchmarks"
    folder = options.folder or (trial if options.quick else here)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger = logging.getLogger("benchmarks")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(options.threads)
    torch.set_default_dtype(torch.float64)

    def keep(topic: str, tables: dict[str, Table], began: float, *, finished: bool) -> None:
        minutes = (time.perf_counter() - began) / 60
        about = TOPICS[topic].ABOUT
        store(folder, topic, about, list(tables.values()), minutes, finished=finished)
        render(folder, list(TOPICS), quick=options.quick)

    if not options.render:
        prepare_compiler()
        for topic in options.only or TOPICS:
            logger.info("%s ...", topic)
            began = time.perf_counter()
            pyro.set_rng_seed(0)
            tables: dict[str, Table] = {}
            for table in TOPICS[topic].measure(quick=options.quick):
                tables[table.title] = table  # one of more rows takes the place of its former state
                keep(topic, tables, began, finished=False)
            keep(topic, tables, began, finished=True)
            logger.info("%s took %.1f minutes", topic, (time.perf_counter() - began) / 60)
    path = render(folder, list(TOPICS), quick=options.quick)
    logger.info("written: %s", path)


if __name__ == "__main__":
    main()
