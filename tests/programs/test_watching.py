"""Programs are watched without torch's compiler, and apart from it where it is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FIRST_DRAW = """
import sys, time
import torch, pyro, pyro.distributions as dist, pyro_hamflow as phf

def eight_schools(scale, effect):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        school = pyro.sample("school_effect", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mean + spread * school, scale), obs=effect)

data = torch.tensor([[15.0, 10, 16, 11, 9, 11, 10, 18], [28.0, 8, -3, 7, -1, 1, 18, 12]])
phf.NUTS(eight_schools).prepare(tuple(data), {})
assert "sympy" not in sys.modules  # torch itself needs it for some graphs
mcmc = phf.MCMC(phf.NUTS(eight_schools), 1, 0, num_chains=4, seed=0, disable_progbar=True)
mcmc.run(*data)
print("torch._dynamo" in sys.modules, time.process_time())
"""
COMPILING = """
import sys, torch
from pyro_hamflow.programs.capture import capture
from pyro_hamflow.programs.fingerprint import take_fingerprint

data = torch.tensor([1.0, 2.0])

def function(x):
    return torch.compile(lambda a: data * a.sin(), backend="eager")(x)

def of_numbers():
    return take_fingerprint(function, torch.tensor(3.0)).key

assert "torch._dynamo" not in sys.modules
print("sin" in capture(function, torch.ones(2)).code, "torch._dynamo" in sys.modules)
first, _ = of_numbers(), data.mul_(2.0)
print(first == of_numbers())
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"CI": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_a_run_does_without_the_compiler():
    (has_compiler, _), _ = run(FIRST_DRAW)
    assert has_compiler == "False"


@pytest.mark.slow
def test_first_draw_of_eight_schools_takes_two_seconds():
    """Of a processor, from the start of Python on, with files that have been read before."""
    assert min(float(run(FIRST_DRAW)[0][1]) for _ in range(4)) < 2.0


@pytest.mark.slow
def test_what_is_compiled_for_the_first_time_is_seen():
    """Its operations, and the data that they read; nothing is left over that could not end."""
    found, told = run(COMPILING)
    assert found == ["True", "True", "False"]
    assert "Exception ignored" not in told
