"""What a user of Pyro may count on after a change of one import: names, positions, behaviour."""

from __future__ import annotations

import inspect
import math
import pickle
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.infer.mcmc
import pytest
import torch
from pyro import infer
from pyro.contrib.conjugate.infer import BetaBinomialPair, collapse_conjugate
from pyro.infer.autoguide.initialization import (
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.mcmc.adaptation import ArrowheadMassMatrix
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import constraints, transforms

import pyro_hamflow as phf
from pyro_hamflow import HMC, MCMC, NUTS
from pyro_hamflow.mcmc.adaptation.mass import mass_form
from pyro_hamflow.model.sites import Site
from pyro_hamflow.model.validity import fault_of
from tests.helpers.kinds import long_but
from tests.helpers.laws import scores

RUNNERS = {"ours": MCMC, "Pyro's": pyro.infer.MCMC}
KERNELS = [phf.HMC, phf.NUTS, phf.PseudoMarginalHMC, phf.PseudoMarginalNUTS]
KERNELS += [phf.HNNHMC, phf.HNNNUTS, phf.FlowMH, phf.MALA, phf.RandomWalk]


def scaled(y):
    scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


Y = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)


# --- names and positions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (HMC, pyro.infer.mcmc.HMC),
        (NUTS, pyro.infer.mcmc.NUTS),
        (MCMC, pyro.infer.mcmc.MCMC),
    ],
    ids=["HMC", "NUTS", "MCMC"],
)
def test_arguments_are_pyros_in_pyros_order(ours, theirs):
    mine, known = (inspect.signature(kind).parameters for kind in (ours, theirs))
    positional = [n for n, p in known.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(mine)[: len(positional)] == positional
    assert set(known) <= set(mine)


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_arguments_are_written_out(kernel):
    kinds = {p.kind for p in inspect.signature(kernel).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert inspect.Parameter.VAR_POSITIONAL not in kinds


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: HMC(scaled, jit_options={"check_trace": False}), "jit_options"),
        (lambda: NUTS(scaled, ignore_jit_warnings=True), "ignore_jit_warnings"),
        (lambda: NUTS(scaled, use_multinomial_sampling=False), "use_multinomial_sampling=False"),
        (lambda: MCMC(NUTS(scaled), 5, mp_context="spawn"), "mp_context"),
    ],
)
def test_what_has_no_meaning_is_accepted_with_a_warning(make, name):
    with pytest.warns(UserWarning, match=f"`{name}` has no meaning in pyro_hamflow") as told:
        make()
    assert len(told) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": None}, ValueError, "expected one of `model` and `potential_fn`"),
        ({"potential_fn": sum}, ValueError, "expected one of `model` and `potential_fn`"),
        ({"init_strategy": 3}, TypeError, "`init_strategy` is 3: expected a function of a site"),
        ({"max_plate_nesting": -1}, ValueError, "`max_plate_nesting` is -1: expected 0 or more"),
        ({"full_mass": ["scale"]}, TypeError, "`full_mass` holds 'scale': expected True, False"),
        ({"full_mass": [("a",), ("a", "b")]}, ValueError, r"`full_mass` names \['a'\] twice"),
        ({"transforms": {"scale": 3}}, TypeError, "`transforms` of site 'scale' is 3: expected a"),
        ({"num_steps": 3.5}, TypeError, "`num_steps` is 3.5: expected an integer"),
        ({"num_steps": 0}, ValueError, "`num_steps` is 0: expected 1 or more"),
        (
            {"min_stepsize": 2.0, "max_stepsize": 1.0},
            ValueError,
            "expected positive numbers in order",
        ),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        HMC(**({"model": scaled} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"full_mass": [("scale", "other")]}, r"`full_mass` names \['other'\]: expected names"),
        (
            {"transforms": {"other": transforms.ExpTransform().inv}},
            r"`transforms` names \['other'\]: expected names",
        ),
        (
            {"transforms": {"scale": transforms.identity_transform}},
            "`transforms` of site 'scale' leads from the real line out of its support",
        ),
        (
            {"inverse_mass_matrix": {("other",): torch.ones(1)}},
            r"`inverse_mass_matrix` names \[\('other',\)\]: expected \[\('scale',\)\]",
        ),
        (
            {"inverse_mass_matrix": {("scale",): torch.ones(2)}},
            r"`inverse_mass_matrix` of \('scale',\) has shape \(2,\): expected \(1,\)",
        ),
        ({"init_strategy": init_to_value(values={"scale": torch.ones(2)})}, "of shape \\(2,\\)"),
        (
            {"init_strategy": init_to_value(values={"scale": torch.tensor(-1.0)})},
            "`init_strategy` gave site 'scale' a value outside its support",
        ),
    ],
)
def test_faults_of_settings_are_found_before_sampling(settings, message):
    with pytest.raises(ValueError, match=message):
        MCMC(NUTS(scaled, **settings), 5, 5, disable_progbar=True).run(Y)


# --- a potential that is a function -------------------------------------------------------------


def bowl(params):
    """N(5, 1) for z, and N(z, 4) for each of two coordinates of w."""
    z, w = params["z"], params["w"]
    return 0.5 * (z - 5.0) ** 2 + 0.5 * ((w - z) / 2.0).square().sum()


MOMENTS = {"z": (5.0, 1.0), "w": (5.0, 5.0**0.5)}


def check(draws, mean, spread, most=4.0):
    """First and second moments of draws ``(chains, draws, *)``, against their standard errors."""
    values = draws.double().numpy()
    assert abs(scores(values, mean)).max() < most
    assert abs(scores((values - mean) ** 2, spread**2)).max() < most


@pytest.mark.parametrize("kernel", [HMC, NUTS, phf.HNNNUTS])
@pytest.mark.parametrize("scripted", [False, True])
def test_potential_function_of_many_chains(kernel, scripted):
    start = {"z": torch.zeros(40), "w": torch.zeros(40, 2)}
    function = bowl
    if scripted:
        function = torch.jit.trace(bowl, ({"z": torch.zeros(()), "w": torch.zeros(2)},))
    mcmc = MCMC(kernel(potential_fn=function), 100, 60, start, 40, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples(group_by_chain=True)
    for name, moments in MOMENTS.items():
        check(samples[name], *moments)


@pytest.mark.parametrize("kernel", long_but([HMC], [HMC, NUTS]))
def test_kernel_of_a_function_by_hand(kernel):
    """As Pyro's protocol has it, without any runner."""
    params = {"z": torch.tensor(0.0), "w": torch.zeros(2)}
    moves = kernel(potential_fn=bowl)
    moves.initial_params = params
    moves.setup(150)
    kept = []
    for i in range(550):
        if i % 7 == 0:
            moves.clear_cache()
        params = moves(params)
        kept.append(params)
    for name, moments in MOMENTS.items():
        check(torch.stack([p[name] for p in kept[150:]])[None], *moments)


@pytest.mark.parametrize("runner", RUNNERS)
def test_function_and_transforms_of_a_model(runner):
    """Pyro's way from a model to a potential: the draws come back in the sites' supports."""
    start, function, maps, _ = initialize_model(scaled, model_args=(Y,))
    kernel = HMC(potential_fn=function, transforms=maps)
    mcmc = RUNNERS[runner](kernel, 400, 150, initial_params=start, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["scale"]
    assert draws.min() > 0.0
    check(draws, *moments_of_scale())


def test_function_of_a_model_that_pyro_has_compiled():
    """Where TorchScript compares the model's numbers, its operations cannot be recorded."""
    start, function, maps, _ = initialize_model(
        scaled, model_args=(Y,), jit_compile=True, skip_jit_warnings=True
    )
    plain = initialize_model(scaled, model_args=(Y,))[1]
    kernel = NUTS(potential_fn=function, transforms=maps)
    start = {name: value.expand(2, *value.shape).clone() for name, value in start.items()}
    state = kernel.begin(2, 0, (), {}, start)
    assert kernel.potential.programs.fallback_reason is None
    expected = [plain({name: value[i] for name, value in start.items()}) for i in range(2)]
    torch.testing.assert_close(state.evaluation.value, torch.stack(expected))


def test_function_that_compiles_itself_when_it_is_first_called():
    """As those of Pyro's do with ``jit_compile``: it is not to find itself recorded meanwhile."""
    compiled = []

    def function(params):
        if not compiled:
            compiled.append(torch.jit.trace(bowl, (params,)))
        return compiled[0](params)

    start = {"z": torch.tensor([0.3, 1.0]), "w": torch.ones(2, 2)}
    kernel = NUTS(potential_fn=function)
    state = kernel.begin(2, 0, (), {}, start)
    assert kernel.potential.programs.fallback_reason is None
    expected = [bowl({name: value[i] for name, value in start.items()}) for i in range(2)]
    torch.testing.assert_close(state.evaluation.value, torch.stack(expected))


def moments_of_scale():
    """Of the posterior of the scale, on a grid."""
    grid = torch.linspace(1e-3, 12.0, 20_000)
    density = dist.Gamma(3.0, 2.0).log_prob(grid) + dist.Normal(0.0, grid[:, None]).log_prob(Y).sum(
        1
    )
    weight = density.softmax(0)
    mean = (weight * grid).sum()
    return float(mean), float((weight * (grid - mean) ** 2).sum().sqrt())


def test_function_without_starting_values_is_refused():
    with pytest.raises(ValueError, match="`initial_params` is None: expected values to start from"):
        MCMC(NUTS(potential_fn=bowl), 5)
    with pytest.raises(ValueError, match="`initial_params` is None: expected values to start from"):
        NUTS(potential_fn=bowl).setup(5)


def test_function_that_gives_no_scalar_is_refused():
    mcmc = MCMC(NUTS(potential_fn=lambda z: z["x"]), 5, 5, {"x": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"`potential_fn` returned a tensor of shape \(3,\)"):
        mcmc.run()


def test_function_without_a_finite_start_is_refused():
    mcmc = MCMC(NUTS(potential_fn=lambda z: -z["x"].log()), 5, 5, {"x": torch.tensor(-1.0)})
    with pytest.raises(ValueError, match="no finite starting point .* the log density is nan"):
        mcmc.run()


def test_function_of_other_values_in_a_second_run():
    """What the function reads may change, and its parameters have another shape."""
    centre = [1.0]
    kernel = NUTS(potential_fn=lambda z: 0.5 * (z["x"] - centre[0]).square().sum())
    for value, shape in ((1.0, ()), (9.0, ()), (9.0, (2,))):
        centre[0] = value
        start = {"x": torch.zeros(25, *shape, dtype=torch.long)}
        mcmc = MCMC(kernel, 60, 60, start, 25, disable_progbar=True)
        mcmc.run()
        draws = mcmc.get_samples(group_by_chain=True)["x"]
        assert draws.shape == (25, 60, *shape)
        check(draws, value, 1.0)


@pytest.mark.parametrize("kernel", [HMC, NUTS])
@pytest.mark.parametrize("num_chains", [1, 2])
def test_null_model_with_hook(kernel, num_chains):
    start, function, maps, _ = initialize_model(lambda: torch.tensor(1), num_chains=num_chains)
    seen = []
    mcmc = MCMC(
        kernel(potential_fn=function, transforms=maps),
        num_samples=3,
        warmup_steps=2,
        num_chains=num_chains,
        initial_params=start,
        hook_fn=lambda kernel, params, stage, i: seen.append((params, stage, i)),
        disable_progbar=True,
    )
    mcmc.run()
    assert mcmc.get_samples() == {}
    assert mcmc.summary() is None
    assert mcmc.kernel.inverse_mass_matrix == {}
    assert seen == [({}, "Warmup", i) for i in range(2)] + [({}, "Sample", i) for i in range(3)]


def conjugate(y):
    pair = BetaBinomialPair()
    rate = pyro.sample("rate", pair.latent(2.0, 3.0))
    pyro.sample("y", pair.conditional(total_count=15.0, probs=rate), obs=y.sum())


@infer.config_enumerate
def two_kinds(y):
    with pyro.plate("data", len(y)):
        kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("y", dist.Normal(kind, 1.0), obs=y)


def observing(y):
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1), obs=y)


COUNTS = torch.tensor([1.0, 4.0, 2.0])
EVIDENCES = {  # the log density of all data, with nothing left to sample
    "collapsed": (
        collapse_conjugate(conjugate),
        math.log(math.comb(15, 7))
        + math.lgamma(9.0) + math.lgamma(11.0) - math.lgamma(20.0)
        - math.lgamma(2.0) - math.lgamma(3.0) + math.lgamma(5.0),
    ),
    "summed out": (
        two_kinds,
        sum(
            math.log(0.7 * math.exp(-0.5 * n**2) + 0.3 * math.exp(-0.5 * (n - 1.0) ** 2))
            for n in COUNTS.tolist()
        )
        - 1.5 * math.log(2 * math.pi),
    ),
    "observed": (observing, -0.5 * 21.0 - 1.5 * math.log(2 * math.pi)),
    "nothing": (lambda y: None, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("kernel", [HMC, NUTS, phf.HNNHMC, phf.HNNNUTS])
@pytest.mark.parametrize(("model", "evidence"), EVIDENCES.values(), ids=EVIDENCES)
def test_model_of_which_nothing_is_to_be_sampled(kernel, model, evidence):
    """It runs, as in Pyro, and says so; all draws have the density that it has."""
    mcmc = MCMC(kernel(model), 3, 60, num_chains=2, disable_progbar=True)
    with pytest.warns(UserWarning, match="no continuous latent site, so that there is nothing to"):
        mcmc.run(COUNTS)
    assert mcmc.get_samples() == {} and mcmc.summary() is None
    levels = phf.to_inference_data(mcmc).sample_stats["lp"].values
    assert levels == pytest.approx(np.full((2, 3), evidence), abs=1e-5)


@pytest.mark.parametrize("kernel", [NUTS, pyro.infer.mcmc.NUTS], ids=["ours", "Pyro's"])
def test_nothing_is_sampled_in_pyros_runner(kernel):
    mcmc = pyro.infer.MCMC(kernel(collapse_conjugate(conjugate)), 3, 2, disable_progbar=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        mcmc.run(COUNTS)
    assert mcmc.get_samples() == {}
    told = sum("there is nothing to sample" in str(w.message) for w in seen)
    assert told == (kernel is NUTS)


def test_function_is_exported_and_pickled():
    start = {"z": torch.zeros(2), "w": torch.zeros(2, 2)}
    mcmc = MCMC(NUTS(potential_fn=bowl), 10, 10, start, 2, disable_progbar=True)
    mcmc.run()
    posterior = phf.to_inference_data(mcmc).posterior
    assert posterior["w"].shape == (2, 10, 2)
    assert not hasattr(phf.to_inference_data(mcmc), "log_likelihood")
    copy = pickle.loads(pickle.dumps(mcmc.kernel))
    copy.initial_params = {"z": torch.tensor(0.0), "w": torch.zeros(2)}
    copy.setup(5)
    assert copy.sample(copy.initial_params).keys() == {"z", "w"}


# --- where chains start -------------------------------------------------------------------------


def two_sites():
    pyro.sample("rate", dist.Gamma(9.0, 3.0))
    with pyro.plate("group", 2):
        pyro.sample("share", dist.Beta(torch.tensor([2.0, 8.0]), 2.0))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (init_to_mean, {"rate": 3.0, "share": [0.5, 0.8]}),
        (init_to_median(num_samples=3001), {"rate": 2.89, "share": [0.5, 0.8125]}),
        (init_to_feasible, {"rate": 1.0, "share": [0.5, 0.5]}),
        (init_to_value(values={"rate": torch.tensor(0.2)}, fallback=init_to_mean), {"rate": 0.2}),
        (
            init_to_generated(
                generate=lambda: init_to_value(values={"share": torch.tensor([0.1, 0.9])})
            ),
            {"share": [0.1, 0.9]},
        ),
    ],
)
def test_strategies_of_pyros(strategy, expected):
    kernel = NUTS(two_sites, init_strategy=strategy)
    state = kernel.begin(3, 0)
    found = kernel.potential.constrain(state.position)
    for name, value in expected.items():
        target = torch.as_tensor(value).expand_as(found[name])
        torch.testing.assert_close(found[name], target, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("strategy", [init_to_sample, init_to_uniform(radius=0.01)])
def test_random_strategies_start_chains_apart(strategy):
    kernel = HMC(two_sites, init_strategy=strategy)
    position = kernel.begin(200, 0).position
    assert len(position.unique(dim=0)) == 200
    if strategy is init_to_sample:
        rate = kernel.potential.constrain(position)["rate"]
        assert abs(float(rate.mean()) - 3.0) < 4.0 / 200**0.5
    else:
        assert position.abs().max() <= 0.01


@pytest.mark.parametrize("source", ["torch", "numpy"])
def test_strategies_of_many_chains_take_few_runs(source):
    """One of the model where they can be batched, which draws by NumPy cannot."""
    runs = []

    def counted():
        runs.append(None)
        pyro.sample("x", dist.Normal(1.0, 1.0))

    def strategy(site):
        if source == "torch":
            return site["fn"].sample()
        return torch.tensor(np.random.default_rng().normal(1.0, 1.0))

    kernel = HMC(counted, init_strategy=strategy)
    kernel.begin(1, 0)
    before = len(runs)
    position = kernel.begin(1000, 0).position
    assert len(position.unique(dim=0)) == 1000
    assert abs(float(position.mean()) - 1.0) < 4.5 / 1000**0.5
    assert (len(runs) - before < 20) == (source == "torch")


def test_pyros_median_of_many_chains_is_of_few_runs():
    """Though it draws by filling tensors in place, and looks whether values are fit."""
    runs = []

    def counted():
        runs.append(None)
        pyro.sample("scale", dist.HalfCauchy(2.0))

    kernel = HMC(counted, init_strategy=init_to_median)
    kernel.begin(1, 0)
    before = len(runs)
    torch.manual_seed(0)
    position = kernel.begin(4000, 0).position
    assert len(runs) - before < 20
    assert len(position.unique()) > 3900
    assert abs(float(position.median()) - math.log(2.0)) < 0.05  # sd of a median of 15: .4


def test_strategy_of_a_marginal_model():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(y)):
            x = pyro.sample("x", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Poisson(x.exp()), obs=y)

    marginal = phf.marginalize(model, ["x"], num_particles=4)
    value = init_to_value(values={"mean": torch.tensor(0.7)})
    kernel = phf.PseudoMarginalNUTS(marginal, init_strategy=value)
    state = kernel.begin(2, 0, (torch.tensor([2.0, 0.0, 1.0]),))
    torch.testing.assert_close(state.position, torch.full((2, 1), 0.7))


# --- the mass -----------------------------------------------------------------------------------


def correlated(covariance):
    w = pyro.sample("w", dist.Normal(0, 1000).expand([2]).to_event(1))
    parts = [w] + [pyro.sample(n, dist.Normal(0, 1000).expand([1]).to_event(1)) for n in "xyz"]
    zero = torch.zeros(5)
    pyro.sample("obs", dist.MultivariateNormal(zero, covariance), obs=torch.cat(parts))


COVARIANCE = torch.tensor(
    [
        [1.5, 0.5, 0.2, 0.1, 0.3],
        [0.5, 1.5, 0.0, 0.4, 0.2],
        [0.2, 0.0, 2.0, 1.0, 0.5],
        [0.1, 0.4, 1.0, 3.0, 0.3],
        [0.3, 0.2, 0.5, 0.3, 2.5],
    ],
    dtype=torch.float64,
)


def tuned(**settings):
    kernel = NUTS(correlated, **settings)
    mcmc = MCMC(kernel, 1, 150, num_chains=50, seed=0, disable_progbar=True)
    mcmc.run(COVARIANCE)
    return kernel


def test_mass_in_blocks():
    kernel = tuned(full_mass=[("w",), ("x", "y")])
    found = kernel.inverse_mass_matrix
    assert list(found) == [("w",), ("x", "y"), ("z",)]
    expected = {("w",): slice(0, 2), ("x", "y"): slice(2, 4)}
    for names, part in expected.items():
        torch.testing.assert_close(found[names], COVARIANCE[part, part], rtol=0.1, atol=0.1)
    torch.testing.assert_close(found["z",], COVARIANCE[4:, 4], rtol=0.1, atol=0.0)
    assert (kernel.kinetic.inverse_mass[:2, 2:] == 0.0).all()
    again = NUTS(correlated, full_mass=[("w",), ("x", "y")], inverse_mass_matrix=found)
    again.begin(2, 0, (COVARIANCE,))
    assert torch.equal(again.kinetic.inverse_mass, kernel.kinetic.inverse_mass)


@pytest.mark.parametrize(("full_mass", "shape"), [(True, (5, 5)), (False, (5,)), ("auto", (5, 5))])
def test_mass_by_names(full_mass, shape):
    kernel = NUTS(correlated, full_mass=full_mass)
    kernel.begin(2, 0, (COVARIANCE,))
    assert {n: tuple(p.shape) for n, p in kernel.inverse_mass_matrix.items()} == {
        ("w", "x", "y", "z"): shape
    }


def test_mass_is_named_in_the_order_of_names():
    def model():
        pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("a", dist.Normal(0.0, 1.0))

    given = torch.tensor([1.0, 2.0, 3.0])  # in the model's order
    kernel = NUTS(model, full_mass=False, inverse_mass_matrix=given)
    kernel.begin(1, 0)
    assert torch.equal(kernel.inverse_mass_matrix["a", "b"], torch.tensor([3.0, 1.0, 2.0]))
    again = NUTS(model, inverse_mass_matrix=kernel.inverse_mass_matrix)
    again.begin(1, 0)
    assert torch.equal(again.kinetic.inverse_mass, given)


def test_arrowhead_mass():
    """The precision of the others given the head is diagonal; here truth has that structure."""
    head = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    across = torch.tensor([[0.4, -0.3, 0.2], [0.1, 0.5, -0.2]])
    precision = torch.zeros(5, 5)
    precision[:2, :2], precision[:2, 2:], precision[2:, :2] = head, across, across.mT
    precision[2:, 2:] = torch.diag(torch.tensor([1.0, 2.0, 0.5]))
    kernel = NUTS(correlated, full_mass=[("w",)])
    kernel.mass_matrix_adapter = ArrowheadMassMatrix()
    MCMC(kernel, 1, 150, num_chains=50, seed=0, disable_progbar=True).run(precision.inverse())
    ((names, mass),) = kernel.mass_matrix_adapter.mass_matrix.items()
    assert names == ("w", "x", "y", "z")
    torch.testing.assert_close(mass.top, precision[:2], rtol=0.1, atol=0.1)
    torch.testing.assert_close(mass.bottom_diag, precision.diagonal()[2:], rtol=0.15, atol=0.0)
    exact = torch.linalg.inv(kernel.inverse_mass_matrix[names])
    assert (exact[2:, 2:] - torch.diag(exact.diagonal()[2:])).abs().max() < 1e-10


@pytest.mark.parametrize("arrowhead", [False, True])
@pytest.mark.parametrize("full_mass", [[("b",)], [("b",), ("c", "a")], True, False])
@pytest.mark.parametrize("orders", [0.0, 8.0])
def test_structured_mass_is_positive_definite(orders, arrowhead, full_mass):
    scales = 10.0 ** (orders * torch.rand(6))
    places, real = (("a", 0), ("b", 2), ("c", 4)), torch.float64
    sites = [Site(n, i, i + 2, torch.Size([2]), None, real) for n, i in places]
    form = mass_form(full_mass, sites, arrowhead=arrowhead)
    for _ in range(50):
        root = torch.randn(6, 6) * scales[:, None]
        covariance = root @ root.mT
        shaped = form.shaped(covariance if form.dense else covariance.diag())
        whole = shaped if form.dense else torch.diag(shaped)
        correlation = whole / (whole.diagonal()[:, None] * whole.diagonal()).sqrt()
        assert torch.linalg.eigvalsh(correlation).min() > 0.0
        torch.testing.assert_close(whole.diagonal(), covariance.diagonal())
        assert torch.equal(form.flat(form.by_name(shaped)), shaped)


def test_adapter_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="`mass_matrix_adapter` is a dict: expected a BlockMass"):
        NUTS(scaled).mass_matrix_adapter = {}


# --- the runner ---------------------------------------------------------------------------------


def run(model, *args, **settings):
    mcmc = MCMC(NUTS(model), 30, 20, num_chains=2, seed=0, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc


def test_draws_of_named_sites_alone():
    mcmc = run(two_sites, save_params=["share"])
    assert set(mcmc.get_samples()) == {"share"}
    assert set(mcmc.diagnostics()) == {"share", "divergences", "acceptance rate"}
    assert list(mcmc.summary().index) == ["share[0]", "share[1]"]
    with pytest.raises(ValueError, match=r"`save_params` names \['odd'\]: expected names of the"):
        run(two_sites, save_params=["odd"])


@pytest.mark.parametrize("where", ["kernel", "runner"])
def test_another_map_to_the_real_line(where):
    """The posterior is the same; the map is used, and draws stay in the support."""
    softplus = {"scale": transforms.SoftplusTransform().inv}
    kernel = NUTS(scaled, transforms=softplus if where == "kernel" else None)
    more = {"transforms": softplus} if where == "runner" else {}
    mcmc = MCMC(kernel, 100, 80, num_chains=25, seed=1, disable_progbar=True, **more)
    mcmc.run(Y)
    check(mcmc.get_samples(group_by_chain=True)["scale"], *moments_of_scale())
    position = mcmc.draws.position[..., 0]
    expected = torch.nn.functional.softplus(position)
    torch.testing.assert_close(mcmc.get_samples(group_by_chain=True)["scale"], expected)
    assert kernel.transforms["scale"].inv == softplus["scale"].inv


def test_validation_where_it_is_wanted():
    def model(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("y", dist.Exponential(p), obs=y)

    negative = torch.tensor(-1.0)
    with pytest.raises(ValueError, match="within the support"):
        run(model, negative, disable_validation=False)
    with pyro.validation_enabled(), pytest.raises(ValueError, match="within the support"):
        run(model, negative, disable_validation=None)
    with pyro.validation_enabled(is_validate=False):
        with pytest.warns(RuntimeWarning, match="Expected value argument"):
            run(model, negative, disable_validation=None)
    with pytest.warns(RuntimeWarning, match="fails the checks of its distributions: Expected"):
        run(model, negative)


def test_a_factor_in_place_of_a_covariance_is_told():
    def model(y):
        factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), factor), obs=y)

    with pytest.warns(RuntimeWarning, match="Expected parameter covariance_matrix"):
        run(model, torch.ones(2))


def far_prior():
    """Its scale is no number at some draws of the prior."""
    wide = pyro.sample("wide", dist.Normal(0.0, 1e3))
    pyro.sample("y", dist.Normal(0.0, wide.exp()), obs=torch.tensor(1.0))


def masked_data():
    mean = pyro.sample("mean", dist.Gamma(2.0, 1.0))
    with pyro.poutine.mask(mask=torch.tensor([True, False])):
        pyro.sample("y", dist.Poisson(mean.expand([2])), obs=torch.tensor([1.0, -999.0]))


def improper():
    mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.0))


@pytest.mark.parametrize("model", [far_prior, masked_data, improper, two_sites])
def test_nothing_is_told_of_a_model_without_fault(model, recwarn):
    torch.manual_seed(4)  # of the first draw of the far one the scale is zero
    assert fault_of(model, (), {}) is None
    assert not recwarn


def test_summary_is_printed_and_returned(capsys):
    mcmc = run(two_sites)
    table = mcmc.summary(prob=0.5)
    assert {"hdi_25%", "hdi_75%"} <= set(table.columns)
    assert table.to_string() in capsys.readouterr().out


def test_convergence_of_one_chain_is_judged_by_its_halves():
    mcmc = MCMC(NUTS(scaled), 40, 20, seed=0, disable_progbar=True)
    mcmc.run(Y)
    found = mcmc.diagnostics()["scale"]
    assert isinstance(found["n_eff"], torch.Tensor)
    assert isinstance(found["r_hat"], torch.Tensor)
    assert 0.9 < found["r_hat"] < 2.0
    mcmc._samples["scale"] = torch.linspace(0.0, 1.0, 40)[None]
    assert mcmc.diagnostics()["scale"]["r_hat"] > 1.7


def test_pickled_run_keeps_its_draws():
    mcmc = run(scaled, Y)
    copy = pickle.loads(pickle.dumps(mcmc))
    assert torch.equal(copy.get_samples()["scale"], mcmc.get_samples()["scale"])
    assert copy.diagnostics().keys() == mcmc.diagnostics().keys()
    copy.run(Y)
    assert torch.equal(copy.get_samples()["scale"], mcmc.get_samples()["scale"])


def test_chains_in_turn_leave_nothing_behind(monkeypatch):
    """In Pyro's runner; a kernel's `setup` may be extended, as here to seed each chain."""
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)

    class Seeded(NUTS):
        def setup(self, warmup_steps, *args, **kwargs):
            pyro.set_rng_seed(self.seeds.pop())
            super().setup(warmup_steps, *args, **kwargs)

    draws = []
    for seeds in ([0, 1], [1, 0]):
        kernel = Seeded(scaled)
        kernel.seeds = seeds
        mcmc = pyro.infer.MCMC(kernel, 20, 20, num_chains=2, disable_progbar=True)
        mcmc.run(Y)
        draws.append(mcmc.get_samples(group_by_chain=True)["scale"])
    assert torch.equal(draws[0], draws[1].flip(0))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("num_chains", [1, 2])
def test_hook_sees_what_pyros_runner_shows_it(runner, num_chains, monkeypatch):
    """One chain at a time has no dimension of chains, and its number in the stage."""
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)
    seen = []
    in_turn = {"chain_method": "sequential"} if runner == "ours" else {}
    mcmc = RUNNERS[runner](
        NUTS(two_sites),
        num_samples=2,
        warmup_steps=1,
        num_chains=num_chains,
        hook_fn=lambda kernel, params, stage, i: seen.append((params["share"].shape, stage, i)),
        disable_progbar=True,
        **in_turn,
    )
    mcmc.run()
    labels = [""] if num_chains == 1 else [" [0]", " [1]"]
    stages = [("Warmup", 0), ("Sample", 0), ("Sample", 1)]
    assert seen == [(torch.Size([2]), stage + label, i) for label in labels for stage, i in stages]


def test_number_of_steps_is_what_was_asked_for():
    kernel = HMC(scaled, step_size=0.3, num_steps=4)
    state = kernel.begin(3, 30, (Y,))
    for _ in range(40):
        state, info = kernel.advance(state)
        assert info.n_steps == 4
    assert kernel.num_steps == 4
    assert kernel.step_size != 0.3
    long = HMC(scaled, step_size=0.25, num_steps=4, trajectory_length=2.0, adapt_step_size=False)
    long.begin(1, 0, (Y,))
    assert long.num_steps == 8


def test_step_size_stays_within_its_bounds():
    kernel = HMC(scaled, min_stepsize=0.09, max_stepsize=0.11)
    kernel.begin(3, 30, (Y,))
    assert 0.09 <= kernel.step_size <= 0.11
