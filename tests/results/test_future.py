"""What comes is foretold as Kalman's filter does, and as a filter on a grid."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MCMC, NUTS, PseudoMarginalNUTS, leave_future_out, marginalize
from tests.helpers.paths import Y, filtered, kalman, one_by_one, returns, vector, volatility

TIMES = (14, 15)


def run(model, y, draws):
    kernel = PseudoMarginalNUTS(marginalize(model, ["x"]))
    mcmc = MCMC(kernel, draws, 10, num_chains=4, seed=0, disable_progbar=True)
    mcmc.run(y)
    return mcmc


@pytest.mark.slow
def test_gaussian_series_are_foretold_as_by_kalman():
    mcmc = run(vector, Y, 10)
    found = leave_future_out(mcmc, lambda t: (Y[:t],), TIMES)
    draws = {name: value.double() for name, value in mcmc.get_samples().items()}
    one = torch.ones(1, dtype=torch.float64)

    def exact(i, length):
        phi, s, r = (float(draws[name][i]) for name in ("phi", "s", "r"))
        start = one_by_one(s**2 / (1 - phi**2))
        return kalman(Y[:length], one_by_one(phi), one_by_one(s**2), start, one, r)

    logs = torch.stack([torch.stack([exact(i, t) for t in (14, 15, 16, 20)]) for i in range(40)])
    ahead = logs[:, 1:3] - logs[:, :2]
    torch.testing.assert_close(found.log_predictive, ahead, rtol=1e-9, atol=1e-9)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    # Of few draws the weights' tails are hardly smoothed; their sum is that of the filter's.
    plain = ((logs[:, :2] - logs[:, -1:]).log_softmax(0) + ahead).logsumexp(0)
    torch.testing.assert_close(found.elpd, plain, rtol=0.0, atol=0.05)
    assert found.pareto_k.max() < 0.7
    few = leave_future_out(mcmc, lambda t: (Y[:t],), TIMES, num_draws=4)
    spread = ahead[[0, 13, 26, 39]]
    torch.testing.assert_close(few.log_predictive, spread, rtol=1e-9, atol=1e-9)


def test_other_series_are_foretold_as_by_a_filter_on_a_grid():
    y = returns(20)
    mcmc = run(volatility, y, 5)
    found = leave_future_out(mcmc, lambda t: (y[:t],), [15])
    draws = mcmc.get_samples()
    exact = torch.stack(
        [
            filtered(y[:16], float(phi), float(s), 401)
            - filtered(y[:15], float(phi), float(s), 401)
            for phi, s in zip(draws["phi"], draws["s"], strict=True)
        ]
    )
    difference = found.log_predictive[:, 0] - exact
    assert float(difference.square().mean().sqrt()) < 2.0 * 2.0**0.5 * found.error + 1e-3
    assert found.error < 0.06


def test_parameters_that_depend_on_the_length_are_refused():
    def joint(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    mcmc = MCMC(NUTS(joint), 5, 5, num_chains=1, disable_progbar=True)
    mcmc.run(torch.zeros(4))
    with pytest.raises(ValueError, match="expected the same, paths integrated out"):
        leave_future_out(mcmc, lambda t: (torch.zeros(t),), [2])
    with pytest.raises(ValueError, match="`times` are"):
        leave_future_out(mcmc, lambda t: (torch.zeros(t),), [])
