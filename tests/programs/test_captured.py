"""Programs are captured once for all that look at one model and its data."""

from __future__ import annotations

import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import (
    MCMC,
    NUTS,
    AutoNeuralHamiltonianFlow,
    FlowMH,
    PseudoMarginalNUTS,
    fit_guide,
    importance_sample,
    marginalize,
)
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs import captured, program_cache

Y = torch.tensor([0.3, 1.2, -1.0, 0.4])


def plain(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def mixed(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 0.5))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.fixture
def kinds(monkeypatch):
    """The kinds of the programs that are captured of models, one by one."""
    seen, capture = [], program_cache.capture

    def counted(function, *examples, **options):
        if function.__qualname__.startswith(("Potential.function", "gradient_functions")):
            seen.append(function.__name__)
        return capture(function, *examples, **options)

    monkeypatch.setattr(program_cache, "capture", counted)
    return seen


def run(kernel, y=Y):
    mcmc = MCMC(kernel, 5, 5, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(y)
    return mcmc


def trained(model, y=Y):
    guide = AutoNeuralHamiltonianFlow(model, hidden=(4,), num_steps=1)
    fit_guide(model, guide, y, num_steps=3, seed=0, disable_progbar=True)
    return guide


@pytest.mark.parametrize("with_kernel", [True, False], ids=["kernel", "guide"])
def test_kernel_guide_and_correction_capture_once(kinds, with_kernel):
    def model(y):
        plain(y)

    kernel = NUTS(model)
    if with_kernel:
        run(kernel)
        assert kinds == ["gradient"]
    guide = trained(model)
    importance_sample(model, guide, Y.clone(), num_samples=10)
    run(FlowMH(model, guide))
    assert kinds == ["gradient"]
    importance_sample(model, guide, 2.0 * Y, num_samples=10)  # which looks for lost modes too
    assert kinds == ["gradient", "evaluate", "gradient"]


def test_marginal_model_is_captured_once(kinds):
    marginal = marginalize(mixed, ["x"], num_particles=2)
    kernel = PseudoMarginalNUTS(marginal, method="conditional")
    run(kernel)
    once = ["evaluate", "gradient"]
    assert sorted(kinds) == once
    importance_sample(marginal, trained(marginal), Y, num_samples=10)
    assert sorted(kinds) == once


def test_shared_programs_change_no_draw():
    def other(y):
        plain(y)

    guide, kernel = trained(plain), NUTS(plain)
    alone = importance_sample(other, guide, Y, num_samples=100, seed=0)
    run(kernel)
    shared = importance_sample(plain, guide, Y, num_samples=100, seed=0)
    assert torch.equal(alone.log_weights, shared.log_weights)


def value(potential, at=0.3):
    position = torch.full((1, potential.dimension), at)
    return potential.programs.program("gradient", 1)(position, potential.vectors(1)[1])[0]


def test_other_data_closures_and_parameters_are_captured_anew(kinds):
    held = {"shift": 0.0}

    def model(y):
        factor = pyro.param("factor", torch.tensor(1.0))
        plain(factor * y + held["shift"])

    pyro.clear_param_store()
    looks = [Potential(model, (Y,)), Potential(model, (2.0 * Y,))]
    held["shift"] = 1.0
    looks.append(Potential(model, (Y,)))
    pyro.get_param_store()["factor"] = torch.tensor(3.0)
    looks.append(Potential(model, (Y,)))
    pyro.clear_param_store()
    held["shift"] = 0.0
    looks.append(Potential(model, (Y,)))
    for potential in looks[:1] + looks[-1:]:  # the same data, closure and parameter
        value(potential)
    assert kinds == ["gradient"]
    contents = [Y, 2.0 * Y, Y + 1.0, 3.0 * Y + 1.0, Y]
    pyro.clear_param_store()
    for potential, y in zip(looks, contents, strict=True):
        assert potential.programs.captured is looks[0].programs.captured or y is not Y
    assert looks[1].programs.captured is not looks[0].programs.captured
    for y in contents:  # captured while nothing has changed since the look
        assert torch.allclose(value(Potential(model, (y,))), value(Potential(plain, (y,))))


def test_what_is_captured_after_a_change_is_not_shared():
    def model(y):
        plain(y)

    y = Y.clone()
    first, second = Potential(model, (y,)), Potential(model, (Y.clone(),))
    assert first.programs.captured is second.programs.captured
    y.mul_(3.0)  # under the first, before it has captured anything
    assert torch.allclose(value(first), value(Potential(plain, (3.0 * Y,))))
    assert torch.allclose(value(second), value(Potential(plain, (Y,))))


def test_tuned_estimator_stays_with_those_who_look_at_it():
    marginal = marginalize(mixed, ["x"], num_particles=2, proposal="laplace")

    def look():
        return Potential(marginal, (Y,), separate_noise=True)

    def density(potential):
        return potential.value(torch.full((1, 1), 0.4), torch.ones(1, potential.noise_dimension))

    before = look()
    marginal.adopt(marginal.refined(8, "iid"))
    tuned = look()
    assert tuned.noise_dimension > before.noise_dimension
    assert tuned.programs.captured is not before.programs.captured
    marginal.adopt(shifted := marginal.refined(2, "iid"))
    shifted.fit(Y, pilot={"mean": torch.tensor(2.0)})
    marginal.adopt(shifted)
    elsewhere = look()
    before_captured = before.programs.captured
    density(before)  # captures the estimator that is there now
    assert before.programs.captured is not before_captured
    marginal.untune()
    after, fresh = look(), marginalize(mixed, ["x"], num_particles=2, proposal="laplace")
    exact = density(Potential(fresh, (Y,), separate_noise=True))
    assert torch.equal(density(after), exact)
    assert not torch.equal(density(before), exact)
    assert elsewhere.programs.captured is not after.programs.captured


class Unhashable:
    __hash__ = None

    def __call__(self, y):
        plain(y)


def test_model_without_a_hash_is_captured_by_itself(kinds):
    model = Unhashable()
    potentials = [Potential(model, (Y,)) for _ in range(2)]
    assert torch.equal(*map(value, potentials))
    assert kinds == ["gradient"] * 2


def test_nothing_is_kept_alive():
    class Model:
        def __call__(self, y):
            plain(y)

    model = Model()
    potentials = [Potential(model, (Y + i,)) for i in range(4)]
    for potential in potentials:
        value(potential)
    programs = weakref.ref(potentials[0].programs.captured)
    del potential, potentials
    gc.collect()
    assert programs() is None and not captured._known[model]
    guides = [trained(model, Y), trained(model, Y + 1.0)]
    gc.collect()
    assert len(captured._known[model]) == 2
    fit_guide(model, guides[0], Y + 1.0, num_steps=3, disable_progbar=True)
    gc.collect()
    assert len(captured._known[model]) == 1
    known = weakref.ref(model)
    del model, guides
    gc.collect()
    assert known() is None
