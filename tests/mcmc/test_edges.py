"""Draws that end where the posterior goes on: told where they do, and nowhere else."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import AffineTransform

from pyro_hamflow import MCMC, NUTS
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.flows.transports import as_transport
from pyro_hamflow.mcmc import edges
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.edges import Edge, edge_message, look_beyond
from pyro_hamflow.mcmc.transitions.base import Tuning, select_state
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.transported import TransportedTarget
from tests.helpers.transports import funnel

ENDS = [Edge(column, is_low) for column in (0, 1) for is_low in (True, False)]


def normal():
    pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])).to_event(1))


def exact(chains=8, length=1000):
    return torch.tensor([1.0, 3.0]) * torch.randn(chains, length, 2)


def looked_at(position, ends=ENDS):
    target = TransportedTarget(
        Potential(normal), as_transport(AffineTransform(0.5, 2.0), torch.zeros(1, 2), (), {})
    )
    tuning = Tuning(0.8, GaussianKinetic(torch.ones(2)))
    return look_beyond(target, tuning, Draws(position, {}, {}), ends)


def test_draws_that_are_whole_end_where_they_should():
    torch.manual_seed(0)
    for edge in looked_at(exact()):
        assert edge.share < 0.001
        assert edge.excess < 1.0


def cut(limit):
    """Exact draws, of which those beyond a limit are on the other side of zero."""
    torch.manual_seed(0)
    position = exact()
    position[..., 1] *= torch.where(position[..., 1] < limit, 1.0, -1.0)
    return position


def test_end_of_draws_that_are_cut_is_told():
    found = looked_at(cut(6.0))
    assert [edge.excess > 1.0 for edge in found] == [False, False, False, True]
    sites = Potential(normal).sites
    assert edge_message(found[-1], sites).startswith("Draws end too early where 'x[1]' is large: ")
    there = found[-1]._replace(diverged=True)
    assert edge_message(there, sites).startswith("Divergences lie where 'x[1]' is large, and draws")


def beyond_two():
    """What is found beyond two deviations, of which .0228 is right."""
    (edge,) = looked_at(cut(6.0), [Edge(1, is_low=False)])
    return edge.share


def test_share_beyond_draws_is_found():
    assert beyond_two() == pytest.approx(0.0228, rel=0.2)


def test_chains_that_are_not_kept_out_there_find_another_share(monkeypatch):
    """What is found depends on the wall, without which chains fall back to where most is."""
    free = lambda accepted, new, old: select_state(torch.ones_like(accepted), new, old)  # noqa: E731
    monkeypatch.setattr(edges, "select_state", free)
    assert beyond_two() < 0.01


def test_places_are_where_trajectories_were_before_they_diverged():
    """In a funnel's neck, at finite points whose next leads to none; as many as diverged."""
    torch.manual_seed(0)
    potential = Potential(funnel)
    transition = NUTSTransition(potential, 50, 6)
    tuning = Tuning(1.0, GaussianKinetic(torch.ones(3)))
    position = torch.randn(50, 3) * 0.3
    position[:, 0] = -3.0
    state = transition.state_at(position, position[:, :0])
    count = 0
    for _ in range(5):
        state, info = transition.step(state, tuning, 63)
        count += int(info.diverging.sum())
    places = torch.stack(list(transition.places))
    assert 20 < count == len(places)
    assert places.isfinite().all()
    value, *_ = potential.gradients(places, places[:, :0])
    assert value.isfinite().all()


def product():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a * b, 0.1), obs=torch.tensor(1.0))


@pytest.mark.slow
def test_end_of_a_product_that_no_draw_reaches_is_told():
    """Of a learned map, where two of 3,200 trajectories diverge and a hundredth is not drawn."""
    mcmc = MCMC(
        NUTS(product, transport="flow"),
        800,
        warmup_steps=800,
        num_chains=4,
        seed=1,
        disable_progbar=True,
    )
    mcmc.run()
    assert mcmc.get_samples()["b"].log().max() < 2.1  # .995 of the posterior
    (said,) = [message for message in mcmc.messages if "draws end there too early" in message]
    assert "'b' is large" in said or "'a' is small" in said
    assert mcmc.report["beyond_draws"] > 0.002
