"""Python functions as flat programs: recorded, captured, batched, compiled, run."""
