"""How fast the package is, measured; `python -m benchmarks.run` writes RESULTS.md."""
