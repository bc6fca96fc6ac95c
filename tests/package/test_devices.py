"""Models whose tensors live on a device: every kernel's draws are right, repeat, and come back."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

import pyro_hamflow as phf
from pyro_hamflow.model.potential import Potential
from tests.helpers.kinds import long_but
from tests.helpers.laws import LIMIT, assert_invariant, scores

SINGLE, DOUBLE = torch.float32, torch.float64
DATA = (1.9, -0.4, 0.7, 2.2, 0.3, 1.5)
CHAINS, WARMUP, DRAWS = 16, 100, 100


class Place(NamedTuple):
    """Where and in which precision a model computes.

    Attributes:
        device: Of the data.
        dtype: Of the data.
        by_default: Whether torch makes tensors there that are told nothing else. Otherwise the
            model's own are made beside its data.
    """

    device: str
    dtype: torch.dtype
    by_default: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.device}-{kind}{'-default' if self.by_default else ''}"

    def data(self, values: Any = DATA) -> torch.Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device)

    @contextmanager
    def __call__(self) -> Iterator[Place]:
        """Has torch make tensors here, if that is asked for."""
        torch.set_default_dtype(self.dtype if self.by_default else DOUBLE)
        torch.set_default_device(self.device if self.by_default else None)
        try:
            yield self
        finally:
            torch.set_default_device(None)


PLACES = [Place("cpu", SINGLE)]  # the other tests use double precision
PLACES += [Place("cuda", dtype, style) for dtype in (SINGLE, DOUBLE) for style in (False, True)]


# Where the CPU is for `--slow`, as other tests run there in double precision.
FURTHER = long_but(lambda case: case[0].device != "cpu", [(place,) for place in PLACES])


@pytest.fixture(params=PLACES, ids=str)
def place(request):
    if request.param.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    with request.param() as found:
        yield found


def effects(y, x=None):
    """An effect for each datum about a mean: given the mean, data have unit variance."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("data", len(DATA)):
        x = pyro.sample("x", dist.Normal(mean, 0.8))
        pyro.sample("y", dist.Normal(x, 0.6), obs=y)


def plain(y):
    """The same without effects."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("data", len(DATA)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def correlated(y):
    """A pair with positive and simplex sites beside it, for the maps to the real line."""
    root = y.new_tensor([[1.0, 0.0], [0.9, 0.5]])
    pair = pyro.sample("pair", dist.MultivariateNormal(y.new_zeros(2), scale_tril=root))
    pyro.sample("rate", dist.Gamma(y.new_tensor(3.0), y.new_tensor(2.0)))
    pyro.sample("share", dist.Dirichlet(y.new_tensor([2.0, 3.0, 4.0])))
    pyro.sample("y", dist.Normal(pair.sum(), 1.0), obs=y[0])


def mixture(y):
    """Each datum from one of two normals; which one is summed out."""
    weight = pyro.sample("weight", dist.Beta(y.new_tensor(2.0), y.new_tensor(2.0)))
    with pyro.plate("data", len(DATA)):
        which = pyro.sample("which", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(which, 0.5), obs=y)


PRECISION = 0.25 + len(DATA)
MEAN, SPREAD = sum(DATA) / PRECISION, PRECISION**-0.5
EVIDENCE = dist.MultivariateNormal(
    torch.zeros(len(DATA), dtype=DOUBLE),
    torch.full((len(DATA), len(DATA)), 4.0, dtype=DOUBLE) + torch.eye(len(DATA), dtype=DOUBLE),
).log_prob(torch.tensor(DATA, dtype=DOUBLE))


def weight_moments() -> tuple[float, float]:
    """Mean and standard deviation of the mixture's weight, by quadrature."""
    grid = torch.linspace(0.0, 1.0, 20_001, dtype=DOUBLE)[1:-1]
    y = torch.tensor(DATA, dtype=DOUBLE)[:, None]
    low, high = (dist.Normal(centre, 0.5).log_prob(y).exp() for centre in (0.0, 1.0))
    density = (grid * (1.0 - grid)) * (grid * high + (1.0 - grid) * low).prod(0)
    density = density / density.sum()
    mean = float((density * grid).sum())
    return mean, float((density * (grid - mean).square()).sum().sqrt())


def marginal():
    return phf.marginalize(effects, ["x"], num_particles=4)


HNN = {"fallback": False, "training_steps": 100}
KERNELS: dict[str, Callable[[], Any]] = {
    "HMC": lambda: phf.HMC(plain),
    "NUTS": lambda: phf.NUTS(plain, full_mass=True),
    "NUTS with effects": lambda: phf.NUTS(effects),
    "HNNHMC": lambda: phf.HNNHMC(plain, **HNN),
    "HNNNUTS": lambda: phf.HNNNUTS(plain, correction="per leaf", **HNN),
    "HNNNUTS marginal": lambda: phf.HNNNUTS(marginal(), **HNN),
    "joint HMC": lambda: phf.PseudoMarginalHMC(marginal(), method="joint"),
    "joint NUTS": lambda: phf.PseudoMarginalNUTS(marginal(), method="joint"),
    "conditional HMC": lambda: phf.PseudoMarginalHMC(marginal(), method="conditional"),
    "conditional NUTS": lambda: phf.PseudoMarginalNUTS(marginal(), method="conditional"),
    "auto NUTS": lambda: phf.PseudoMarginalNUTS(marginal()),
    "lattice": lambda: phf.PseudoMarginalHMC(
        phf.marginalize(effects, ["x"], num_particles=4, points="rqmc", proposal="prior"),
        refresh=phf.EllipticalSliceRefresh(),
    ),
}


def sampled(kernel, place, **settings):
    settings = {"num_samples": DRAWS, "warmup_steps": WARMUP, "num_chains": CHAINS} | settings
    mcmc = phf.MCMC(kernel, seed=1, disable_progbar=True, **settings)
    mcmc.run(place.data())
    return mcmc


def assert_right(values, mean, spread):
    """Means and mean squares of ``(chains, draws)`` are those of a normal law."""
    values = np.asarray(values, dtype=float)
    found = np.array([scores(values, mean), scores((values - mean) ** 2, spread**2)])
    assert np.abs(found).max() < LIMIT


# On the CPU these stay, for other tests run all kernels there in double precision.
ON_THE_CPU_TOO = {"HMC", "NUTS", "HNNHMC", "conditional HMC"}


@pytest.mark.parametrize(
    ("place", "name"),
    long_but(
        lambda case: case[0].device != "cpu" or case[1] in ON_THE_CPU_TOO,
        itertools.product(PLACES, KERNELS),
    ),
    indirect=["place"],
    ids=str,
)
def test_kernels(place, name):
    kernel = KERNELS[name]()
    mcmc = sampled(kernel, place)
    samples = mcmc.get_samples(group_by_chain=True)
    assert samples["mean"].device.type == place.device
    assert samples["mean"].dtype == place.dtype
    found = phf.to_inference_data(mcmc)
    assert_right(found.posterior["mean"].to_numpy(), MEAN, SPREAD)
    if "x" in found.posterior:
        weight = 0.64  # of a datum against the mean
        mean = weight * DATA[0] + (1.0 - weight) * MEAN
        spread = math.sqrt(0.36 * weight + (1.0 - weight) ** 2 * SPREAD**2)
        assert_right(found.posterior["x"].to_numpy()[..., 0], mean, spread)


@pytest.mark.parametrize(
    ("place", "name"),
    long_but(
        lambda case: case[0].device != "cpu" or case[1] != "auto NUTS",
        itertools.product(PLACES, ["NUTS", "auto NUTS", "HNNHMC"]),
    ),
    indirect=["place"],
    ids=str,
)
def test_a_seed_repeats_a_run(place, name):
    first, again = (sampled(KERNELS[name](), place, num_samples=3, warmup_steps=70) for _ in "ab")
    assert torch.equal(first.draws.position, again.draws.position)


@pytest.mark.parametrize("place", FURTHER, indirect=True, ids=str)
def test_sites_of_many_supports(place):
    mcmc = phf.MCMC(
        phf.NUTS(correlated), DRAWS, WARMUP, num_chains=CHAINS, seed=1, disable_progbar=True
    )
    mcmc.run(place.data())
    found = phf.to_inference_data(mcmc)
    rate, share = found.posterior["rate"].to_numpy(), found.posterior["share"].to_numpy()
    assert_right(rate, 1.5, math.sqrt(3.0) / 2.0)
    assert_right(share[..., 0], 2.0 / 9.0, math.sqrt(2.0 * 7.0 / (81.0 * 10.0)))
    total, noise = 1.9**2 + 0.5**2, 1.0
    assert_right(
        found.posterior["pair"].to_numpy().sum(-1),
        DATA[0] * total / (total + noise),
        math.sqrt(total * noise / (total + noise)),
    )


@pytest.mark.parametrize("place", FURTHER, indirect=True, ids=str)
def test_discrete_sites_are_summed_out(place):
    mcmc = sampled(phf.NUTS(mixture), place)
    assert_right(phf.to_inference_data(mcmc).posterior["weight"].to_numpy(), *weight_moments())


def test_transitions_keep_exact_draws(place):
    """Chains that start from the posterior stay there, whatever step they take."""
    torch.manual_seed(0)
    chains = 4000
    start = MEAN + SPREAD * torch.randn(chains, dtype=place.dtype, device=place.device)
    kernel = phf.NUTS(plain, step_size=0.3, adapt_step_size=False, adapt_mass_matrix=False)
    state = kernel.begin(chains, 0, (place.data(),), {}, {"mean": start})
    before = {"mean": state.position.cpu()}
    for _ in range(3):
        state, _ = kernel.advance(state)
    assert_invariant(before, {"mean": state.position.cpu()})


def estimated(data, **settings):
    model = phf.marginalize(effects, ["x"], num_particles=4, proposal="prior")
    return Potential(model, (data,), separate_noise=True, **settings)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_cpu(place, compiled, compiled_at_once):
    """In both precisions, to some hundred times rounding."""
    if compiled and place.device == "cpu":
        pytest.skip("other tests compile for the CPU")
    here = estimated(place.data(), compile_graphs=compiled)
    with torch.device("cpu"):
        there = estimated(torch.tensor(DATA, dtype=DOUBLE))
        position, noise = there.vectors(5)
        wanted = there.gradients(position, noise)
    ours = here.gradients(position.to(here.example), noise.to(here.example))
    tolerance = 500.0 * torch.finfo(place.dtype).eps
    for one, other in zip(ours, wanted, strict=True):
        assert one.device.type == place.device
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=tolerance)


@cache
def trained(place):
    guide = phf.AutoNeuralHamiltonianFlow(plain, hidden=(8, 8), reverse_encoder=True)
    fit = phf.fit_guide(plain, guide, place.data(), num_steps=150, seed=0, disable_progbar=True)
    return guide, fit


def test_guides_and_their_corrections(place):
    guide, fit = trained(place)
    assert guide.loc.device.type == place.device
    assert float(fit.losses[-50:].mean()) == pytest.approx(-float(EVIDENCE), abs=0.1)
    found = phf.importance_sample(plain, guide, place.data(), num_samples=4000, seed=0)
    error = float(found.log_evidence_error)
    assert abs(float(found.log_evidence) - float(EVIDENCE)) < LIMIT * error + 1e-4
    assert found.samples["mean"].device.type == place.device
    assert float(found.resample(4000)["mean"].mean()) == pytest.approx(MEAN, abs=0.05)
    assert phf.to_inference_data(found).posterior["mean"].dtype == str(place.dtype)[6:]
    assert_right(
        sampled(phf.FlowMH(plain, guide), place, warmup_steps=0).draws.position[..., 0].numpy(),
        MEAN,
        SPREAD,
    )


def test_pyro_trains_a_guide_and_predicts(place):
    guide = phf.AutoNeuralHamiltonianFlow(plain, hidden=(8, 8))
    svi = SVI(plain, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(num_particles=16))
    losses = [svi.step(place.data()) for _ in range(20)]
    assert np.mean(losses) == pytest.approx(-float(EVIDENCE), abs=0.2)
    predictive = Predictive(plain, guide=guide, num_samples=200)
    found = predictive(place.data())["mean"]
    assert found.device.type == place.device
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.1)


def test_a_model_with_noise_runs_under_pyro(place):
    model = marginal()
    kernel = phf.PseudoMarginalHMC(model)
    mcmc = pyro.infer.MCMC(kernel, 100, 100, num_chains=1, disable_progbar=True)
    mcmc.run(place.data())
    draws = mcmc.get_samples()
    assert draws["mean"].device.type == place.device
    assert float(draws["mean"].mean()) == pytest.approx(MEAN, abs=0.25)
    x = Predictive(effects, {"mean": draws["mean"]}, return_sites=["x"])(place.data())["x"]
    assert x.device.type == place.device
    assert float(x.mean()) == pytest.approx(float(draws["mean"].mean()), abs=0.2)
    found = phf.estimator_quality(model, {"mean": place.data(MEAN)}, place.data())
    assert math.isfinite(float(found.standard_deviation))


ON_THE_CPU = """
import pyro, torch
import pyro.distributions as dist
import pyro_hamflow as phf

def model(y):
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)

y = torch.tensor([0.3, -0.2])
marginal = phf.marginalize(model, ["x"])
for kernel in (phf.NUTS(model), phf.PseudoMarginalHMC(marginal), phf.FlowNUTS(model)):
    mcmc = phf.MCMC(kernel, 20, 20, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(y)
    phf.to_inference_data(mcmc)
guide = phf.AutoNeuralHamiltonianFlow(model, hidden=(4,))
phf.fit_guide(model, guide, y, num_steps=5, seed=0, disable_progbar=True)
phf.importance_sample(model, guide, y, num_samples=20, seed=0)
raise SystemExit(torch.cuda.is_initialized())
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_model_on_the_cpu_leaves_cuda_alone():
    subprocess.run([sys.executable, "-W", "ignore", "-c", ON_THE_CPU], check=True)
