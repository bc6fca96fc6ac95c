"""The flow of a population: its density by two routes, what it is fitted to, and its defences."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MCMC, FlowMH, fit_guide, importance_sample
from pyro_hamflow.flows.coupling import couplings
from pyro_hamflow.flows.gaussian_mixture import GaussianMixture
from pyro_hamflow.flows.mixture_flow import DefendedFlow, MixtureFlow
from pyro_hamflow.flows.modes import Mode, mixture_about
from pyro_hamflow.flows.population import flow_for, train_flow
from pyro_hamflow.flows.product_mixture import ProductMixture, independent
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from tests.helpers.kinds import long_but

SHARE = 0.25


def two_modes(dimension):
    """Two Gaussians of variance 1/2 at -2.5 and 2.5 in every coordinate, with shares 1 and 3."""

    def model():
        prior = dist.Normal(torch.zeros(dimension), 5.0).to_event(1)
        x = pyro.sample("x", prior)
        parts = [math.log(w) + _normal(x, m) for w, m in ((SHARE, -2.5), (1 - SHARE, 2.5))]
        pyro.factor("modes", torch.logaddexp(*parts) - prior.log_prob(x))

    return model


def _normal(x, mean):
    return dist.Normal(torch.full_like(x, mean), math.sqrt(0.5)).log_prob(x).sum(-1)


def two_modes_draws(count, dimension):
    mean = torch.where(torch.rand(count, 1) < SHARE, -2.5, 2.5)
    return mean + math.sqrt(0.5) * torch.randn(count, dimension)


def crescents(dimension):
    """Pairs of coordinates, the second about the square of the first."""

    def model():
        prior = dist.Normal(torch.zeros(dimension), 1.0).to_event(1)
        x = pyro.sample("x", prior)
        second = dist.Normal(x[..., ::2].square() - 1.0, 0.5).log_prob(x[..., 1::2]).sum(-1)
        first = dist.Normal(0.0, 1.0).log_prob(x[..., ::2]).sum(-1)
        pyro.factor("bent", first + second - prior.log_prob(x))

    return model


def crescents_draws(count, dimension):
    first = torch.randn(count, dimension // 2)
    second = first.square() - 1.0 + 0.5 * torch.randn_like(first)
    return torch.stack([first, second], -1).flatten(1)


def built(model, draws, **settings):
    potential = Potential(model)
    _, gradient, _ = potential.gradients(draws, draws.new_zeros(len(draws), 0))
    return potential, flow_for(potential, draws, gradient, **settings)


def normal_prior(dimension):
    normal = dist.Normal(torch.zeros(dimension), 3.0).to_event(1)
    return Prior(Potential(lambda: pyro.sample("x", normal)))


def random_flow(dimension, components=3):
    """Nothing fitted: every part of it at random."""
    small = dimension**-0.5
    roots = torch.randn(components, dimension, dimension).tril(-1) * 0.5 * small
    mixture = GaussianMixture(
        torch.randn(components),
        2.0 * torch.randn(components, dimension),
        roots + torch.diag_embed(0.5 + torch.rand(components, dimension)),
    )
    flow = MixtureFlow(
        torch.randn(dimension),
        small * torch.randn(dimension, dimension).tril(-1) + 2.0 * torch.eye(dimension),
        mixture,
        couplings(dimension, 4, (8,)),
    )
    with torch.no_grad():
        for parameter in flow.layers.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return flow


def two_far(dimension):
    """Modes where the random flow has next to nothing."""
    hessian = torch.eye(dimension) + 0.5
    return [Mode(torch.full((dimension,), at), 9.0 * hessian, 0.0) for at in (-15.0, 15.0)]


@pytest.mark.parametrize("dimension", [1, 2, 5, 100])
def test_density_is_the_same_by_two_routes(dimension):
    flow = random_flow(dimension)
    position, log_density = flow.draw(200)
    torch.testing.assert_close(flow.log_ratio(position), log_density, rtol=1e-10, atol=1e-10)
    for prior, modes in ((True, True), (True, False), (False, True)):
        defended = DefendedFlow(
            flow,
            normal_prior(dimension) if prior else None,
            mixture_about(two_far(dimension)) if modes else None,
        )
        position, log_density = defended.draw(200)
        again = defended.log_ratio(position)
        torch.testing.assert_close(again, log_density, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("defended", [False, True])
def test_density_is_that_of_the_draws(defended):
    """It adds up to one on a grid, and tells how many draws there are on each side of a line."""
    flow = random_flow(2)
    if defended:
        flow = DefendedFlow(flow, normal_prior(2), mixture_about(two_far(2)))
    line = torch.linspace(-60.0, 60.0, 1201)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        density = torch.cat([flow.log_ratio(part).exp() for part in grid.split(200_000)]) * 0.01
        draws, _ = flow.draw(40_000)
    assert abs(density.sum() - 1.0) < 5e-3
    for normal in torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]]):
        for level in (draws @ normal).quantile(torch.tensor([0.02, 0.3, 0.7, 0.98])):
            expected = float(density[grid @ normal < level].sum())
            found = float((draws @ normal < level).double().mean())
            assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 40_000) + 5e-3


def test_heavy_components_are_students_t():
    root = torch.tensor([[[2.0]]])
    one = GaussianMixture(torch.zeros(1), torch.ones(1, 1), root)
    exact = dist.StudentT(4.0, 1.0, 2.0)
    x = torch.linspace(-20.0, 20.0, 50)
    torch.testing.assert_close(one.log_density(x[:, None], 4.0).detach(), exact.log_prob(x))
    draws = one.draw(100_000, 4.0)[:, 0]
    for level in (-20.0, -8.0, 0.0, 8.0, 20.0):
        grid = torch.linspace(-400.0, level, 200_001)
        expected = float(torch.trapezoid(exact.log_prob(grid).exp(), grid))
        found = float((draws < level).double().mean())
        assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 100_000) + 1e-5


def test_volume_is_that_of_the_jacobian():
    flow = random_flow(4)
    z = torch.randn(4)
    jacobian = torch.func.jacrev(lambda z: flow.push(z)[0])(z)
    torch.testing.assert_close(flow.push(z)[1], torch.linalg.slogdet(jacobian).logabsdet)
    position, growth = flow.push(z[None])
    back, shrinkage = flow.pull(position)
    torch.testing.assert_close((back[0], shrinkage), (z, -growth))


def test_gradients_flow_through_draws_and_densities():
    flow = random_flow(3)
    position, log_density = flow.draw(50)
    (position.square().sum() + log_density.sum()).backward()
    assert all(p.grad is not None for p in flow.layers.parameters())
    assert flow.mixture.log_shares.grad is None  # which draws come from where is no smooth choice
    flow.log_ratio(position.detach()).sum().backward()
    assert flow.mixture.log_shares.grad.abs().sum() > 0


def test_a_known_mode_that_no_draw_is_of_has_no_large_weights():
    """Else a chain that gets there by luck stays for good, and its share of the draws is luck."""
    model = two_modes(4)
    draws = 2.5 + math.sqrt(0.5) * torch.randn(500, 4)
    modes = [Mode(torch.full((4,), at), 2.0 * torch.eye(4), 0.0) for at in (-2.5, 2.5)]
    there = -2.5 + math.sqrt(0.5) * torch.randn(500, 4)

    @torch.no_grad()
    def largest(**known):
        potential, flow = built(model, draws, num_layers=0, **known)
        log_ratio = flow.log_ratio(there)
        return float((-potential.value(there, there.new_zeros(500, 0)) - log_ratio).max())

    assert largest(modes=modes) < math.log(2.0 / 0.05)
    assert largest(modes=modes[1:]) > 6.0  # of one mode there is no share


def test_gradients_in_positions_are_those_of_all_shares():
    flow = DefendedFlow(random_flow(3), normal_prior(3), mixture_about(two_far(3)))
    within, far, about = torch.randn(3), 40.0 + torch.randn(3), 15.0 + 0.2 * torch.randn(3)
    for position in (within, far, about):  # far away the prior is all
        position = position[None].requires_grad_()
        (gradient,) = torch.autograd.grad(flow.log_ratio(position).sum(), position)
        steps = 1e-5 * torch.eye(3)
        with torch.no_grad():
            ends = flow.log_ratio(position + steps), flow.log_ratio(position - steps)
        torch.testing.assert_close(gradient[0], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dimension", long_but([2, 16], [2, 16, 64]))
def test_two_modes_are_two_gaussians(dimension):
    potential, flow = built(two_modes(dimension), two_modes_draws(1000, dimension), num_steps=50)
    assert flow.flow.mixture.num_components == 2 and not len(flow.flow.layers)
    found = importance_sample(potential.model, flow, num_samples=4000, seed=0)
    assert abs(found.log_evidence) < 3 * found.log_evidence_error < 0.03
    assert found.ess > 0.85 * 4000
    share = float(found.mean((found.position[:, 0] < 0).double()))
    assert abs(share - SHARE) < 4 * math.sqrt(SHARE * (1 - SHARE) / found.ess)


def wells(pairs):
    """Coordinates of two modes each, all independent; and two that hang on each other."""

    def model():
        prior = dist.Normal(torch.zeros(pairs + 2), 5.0).to_event(1)
        x = pyro.sample("x", prior)
        parts = [math.log(w) + _each(x[:pairs], m) for w, m in ((SHARE, -2.5), (1 - SHARE, 2.5))]
        rest = _each(x[pairs], 0.0) + _each(x[pairs + 1] - x[pairs], 1.0)
        pyro.factor("modes", torch.logaddexp(*parts).sum() + rest - prior.log_prob(x))

    return model


def _each(x, mean):
    return dist.Normal(mean, math.sqrt(0.5)).log_prob(x)


def wells_draws(count, pairs):
    mean = torch.where(torch.rand(count, pairs) < SHARE, -2.5, 2.5)
    x, y = mean + math.sqrt(0.5) * torch.randn(count, pairs), torch.randn(2, count, 1) * 0.5**0.5
    return torch.cat([x, y[0], y[0] + 1.0 + y[1]], -1)


def test_more_modes_than_draws_of_coordinates_that_are_independent():
    torch.manual_seed(0)
    potential, flow = built(wells(12), wells_draws(2000, 12), num_layers=0)
    mixture = flow.flow.mixture
    assert isinstance(mixture, ProductMixture)
    assert mixture.groups == [*([i] for i in range(12)), [12, 13]]
    assert mixture.num_components >= 2**12
    found = importance_sample(potential.model, flow, num_samples=4000, seed=0)
    assert abs(found.log_evidence) < 3 * found.log_evidence_error < 0.05
    assert found.ess > 0.7 * 4000
    shares = found.mean((found.position[:, :12] < 0).double())
    assert (abs(shares - SHARE) < 4 * math.sqrt(SHARE * (1 - SHARE) / found.ess)).all()


def test_the_density_of_a_product_is_that_of_its_draws():
    """Against one mixture of all combinations, whose order of coordinates is another."""
    torch.manual_seed(0)
    part = GaussianMixture(
        torch.tensor([0.3, 1.0]), torch.tensor([[-2.0], [1.0]]), torch.tensor([[[0.5]], [[1.5]]])
    )
    pair = GaussianMixture(torch.zeros(1), torch.ones(1, 2), torch.tensor([[[1.0, 0], [0.5, 2]]]))
    product = ProductMixture([torch.tensor([1]), torch.tensor([2, 0])], [part, pair])
    both = GaussianMixture(
        part.log_shares,
        torch.tensor([[1.0, m, 1.0] for m in (-2.0, 1.0)]),
        torch.linalg.cholesky(
            torch.tensor([[[4.25, 0, 0.5], [0, s, 0], [0.5, 0, 1]] for s in (0.25, 2.25)])
        ),
    )
    x = product.draw(20_000)
    torch.testing.assert_close(product.log_density(x), both.log_density(x))
    for one in (x.mean(0) - both.draw(20_000).mean(0), x.mT.cov() - both.draw(20_000).mT.cov()):
        assert one.abs().max() < 0.2
    assert product.draw(20_000, 4.0).std(0)[0] > 1.2 * x.std(0)[0]


def test_modes_that_go_together_are_not_independent():
    """Of each coordinate alone the scores say nothing of the others."""
    for draws, gradient_of in ((two_modes_draws(1000, 3), two_modes(3)), (wells_draws(1000, 1), 0)):
        model = gradient_of or wells(1)
        potential = Potential(model)
        _, gradient, _ = potential.gradients(draws, draws.new_zeros(len(draws), 0))
        alone = independent(draws, -gradient)
        assert alone.tolist() == ([True, False, False] if gradient_of == 0 else [False] * 3)


def test_weights_of_draws_count():
    """Draws of two modes alike, weighted to be 1 to 3."""
    draws = torch.where(torch.rand(2000, 1) < 0.5, -2.5, 2.5) + math.sqrt(0.5) * torch.randn(
        2000, 2
    )
    left = draws[:, 0] < 0
    log_weights = torch.where(left, math.log(SHARE), math.log(1 - SHARE)) + 100.0
    _, flow = built(two_modes(2), draws, log_weights=log_weights, num_layers=0)
    shares = flow.flow.mixture.log_shares.softmax(0).sort().values
    assert abs(shares[0] - SHARE) < 0.03


@pytest.mark.slow
def test_layers_bend_what_gaussians_cannot_cover():
    torch.manual_seed(0)
    draws = crescents_draws(2000, 6)
    potential, flow = built(crescents(6), draws)
    assert len(flow.flow.layers)
    _, straight = built(crescents(6), draws, num_layers=0)
    ess = [
        importance_sample(potential.model, one, num_samples=4000, seed=0).ess
        for one in (straight, flow)
    ]
    assert ess[1] > 3 * ess[0] and ess[1] > 1000


def test_further_training_is_by_held_out_draws():
    torch.manual_seed(0)
    draws = crescents_draws(200, 2)
    potential, defended = built(crescents(2), draws, num_steps=30)
    more = crescents_draws(3000, 2)
    _, gradient, _ = potential.gradients(more, more.new_zeros(len(more), 0))
    fit = train_flow(defended.flow, more, gradient, num_steps=200)
    assert fit.best_loss < fit.checks[0] - 0.02
    judged = more[::5]
    assert abs(-float(defended.flow.log_ratio(judged).detach().mean()) - fit.best_loss) < 1e-8


def test_draws_without_numbers_do_not_count():
    draws = two_modes_draws(500, 2)
    gradient = (draws + 2.5 * torch.where(draws < 0, 1.0, -1.0)) / 0.5
    potential = Potential(two_modes(2))
    gradient[::7] = math.nan
    draws[3] = math.inf
    log_weights = torch.zeros(500)
    log_weights[4] = -math.inf
    flow = flow_for(potential, draws, gradient, log_weights, num_steps=50)
    assert all(bool(v.isfinite().all()) for v in flow.state_dict().values())
    with pytest.raises(ValueError, match="0 of 500 draws have finite gradients"):
        flow_for(potential, draws, torch.full_like(draws, math.nan))


def test_weights_are_bounded_by_the_likelihood():
    """A population that lies in a corner of the prior alone: no weight is large anywhere."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.factor("likelihood", -0.1 * x.square().sum(-1))

    draws = 0.1 * torch.randn(500, 2) + 3.0
    potential, flow = built(model, draws, num_layers=0)
    far = 100.0 * torch.randn(1000, 2)
    likelihood = -0.1 * far.square().sum(-1)
    value = potential.value(far, far.new_zeros(1000, 0))
    with torch.no_grad():
        log_weight = -value - flow.log_ratio(far)
    assert (log_weight <= likelihood - math.log(0.05) + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_is_the_potentials(dtype):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
        pyro.factor("bent", -(x[..., 0] - x[..., 1].square()).square())

    potential = Potential(model)
    position = torch.randn(400, 2, dtype=dtype)
    _, gradient, _ = potential.gradients(position, position.new_zeros(400, 0))
    flow = flow_for(potential, position, gradient, num_steps=50)
    drawn, log_density = flow.draw(10)
    assert drawn.dtype == log_density.dtype == dtype


def test_improper_priors_give_no_share():
    def model():
        real = dist.constraints.real
        x = pyro.sample("x", dist.ImproperUniform(real, (), ()))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.3))

    potential, flow = built(model, 0.3 + torch.randn(500, 1))
    assert flow.prior is None
    found = importance_sample(model, flow, num_samples=4000, seed=0)
    assert abs(found.log_evidence) < 3 * found.log_evidence_error < 0.03


def test_other_corrections_and_training_take_it():
    torch.manual_seed(0)
    potential, defended = built(two_modes(2), two_modes_draws(1000, 2), num_layers=0)
    mcmc = MCMC(FlowMH(potential.model, defended), 1000, 0, disable_progbar=True)
    mcmc.run()
    share = float((mcmc.get_samples()["x"][:, 0] < 0).double().mean())
    assert abs(share - SHARE) < 4 * math.sqrt(SHARE * (1 - SHARE) / 800)
    flow = random_flow(2)
    with pytest.warns(UserWarning, match="lost modes"):  # of which it has one, by chance
        fit = fit_guide(two_modes(2), flow, num_steps=50, seed=0)
    assert fit.best_loss < fit.losses[0]
