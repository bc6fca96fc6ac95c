"""One sampler on one posterior, in a process of its own that imports nothing else."""
