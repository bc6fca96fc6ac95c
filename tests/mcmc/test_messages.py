"""What is told at the end of a run: by ArviZ's own numbers, and nothing if all is well."""

from __future__ import annotations

import json
import re
import time

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, MCMC, NUTS, to_inference_data
from pyro_hamflow.mcmc import diagnosis
from pyro_hamflow.mcmc.adaptation.base import RunPlan
from pyro_hamflow.mcmc.diagnosis import worst
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.messages import report
from pyro_hamflow.model.sites import Site

REAL = torch.float64
SITES = [
    Site("a", 0, 1, torch.Size([]), None, REAL),
    Site("b", 1, 7, torch.Size([2, 3]), None, REAL),
]


def draws_of(position, **stats):
    """A run of independent draws, but for what is given."""
    shape = position.shape[:2]
    none = torch.zeros(shape, dtype=torch.bool)
    usual = {
        "lp": torch.randn(shape),
        "energy": torch.randn(shape),
        "diverging": none,
        "reached_max_treedepth": none,
        "acceptance_rate": torch.full(shape, 0.8),
        "n_steps": torch.full(shape, 7),
    }
    return Draws(position, usual | stats, {})


def independent(chains=4, draws=500, dimension=7):
    torch.manual_seed(0)
    return torch.randn(chains, draws, dimension)


def told(position, sites=SITES, **stats):
    return report(draws_of(position, **stats), sites)


@pytest.mark.parametrize("chains", [1, 4])
def test_nothing_is_told_if_all_is_well(chains):
    found = told(independent(chains, 1000))
    assert found.messages == []
    assert found.values["max_rhat"] < 1.01
    assert found.values["min_ess_bulk"] > 100 * chains


@pytest.mark.parametrize("chains", [1, 4])
def test_worst_rhat_is_named(chains):
    position = independent(chains)
    position[0, :250, 5] += 1.0
    found = told(position)
    parts = position if chains > 1 else position.reshape(2, 250, 7)
    expected = float(arviz.rhat(parts[..., 5].numpy()))
    assert found.values["max_rhat"] == pytest.approx(expected)
    assert found.messages[0].startswith(f"R-hat of 'b[1, 1]' is {expected:.4g}, above 1.01")


def correlated(kind):
    """Slow draws; or quick ones whose tails are slow."""
    position = independent(4, 500)
    if kind == "bulk":
        noise, value = 0.05**0.5 * position[..., 0], torch.zeros(4)
        for i in range(500):
            value = 0.95**0.5 * value + noise[:, i]
            position[:, i, 0] = value
    else:
        slow = torch.arange(500) // 100 % 5 == 4
        position[:, slow, 0] = 3.0 * position[:, slow, 0]
    return position


@pytest.mark.parametrize("kind", ["bulk", "tail"])
def test_small_effective_sample_size_is_told(kind):
    position = correlated(kind)
    draws = arviz.convert_to_dataset({"a": position[..., 0].numpy()})
    expected = float(arviz.ess(draws, method=kind)["a"])
    assert expected < 400
    found = told(position)
    assert found.values[f"min_ess_{kind}"] == pytest.approx(expected)
    assert found.values[f"min_ess_{kind}_parameter"] == "a"
    sentence = f"The effective sample size of 'a' ({kind}) is {expected:.0f}, below 100 for each"
    assert any(message.startswith(sentence) for message in found.messages)


class InStretches(Draws):
    """Draws that are looked at seven at a time."""

    def stretches(self):
        for first in range(0, self.position.shape[1], 7):
            yield first, self.position[:, first : first + 7]


@pytest.mark.parametrize("length", [60, 61])
def test_of_many_coordinates_those_are_looked_at_that_are_apart_or_slow(length):
    position = independent(3, length, 200)
    position[:, : length // 2, 3] += 5.0
    position[:, :, 150] = position[:, :, 150].cumsum(1)
    half = length // 2
    parts = torch.cat([position[:, :half], position[:, -half:]]).double()
    apart = parts.mean(1).var(0) / parts.var(1).mean(0)
    centred = (position - position.mean(1, keepdim=True)).double()
    together = (centred[:, 1:] * centred[:, :-1]).sum((0, 1)) / centred.square().sum((0, 1))
    expected = {*apart.topk(40).indices.tolist(), *together.topk(40).indices.tolist()}
    for kind in (Draws, InStretches):
        assert set(worst(kind(position, {}, {}))) == expected
    assert {3, 150} <= expected


def test_coordinates_are_judged_a_few_at_a_time(monkeypatch):
    draws = draws_of(correlated("bulk"))
    whole = report(draws, SITES)
    monkeypatch.setattr(diagnosis, "_AT_ONCE", 2 * draws.position[..., 0].numel())
    assert report(draws, SITES) == whole


def test_slow_energies_are_told():
    energy = independent(4, 500, 1)[..., 0]
    energy[2] = 0.3 * energy[2].cumsum(0)
    found = told(independent(), energy=energy)
    expected = arviz.bfmi(energy.numpy())
    assert found.values["min_bfmi"] == pytest.approx(expected.min())
    assert found.messages == [m for m in found.messages if m.startswith("BFMI of chain 2 is 0.0")]
    assert told(independent(), energy=energy, n_steps=torch.zeros(4, 500)).messages == []


def test_levels_of_the_log_density_are_told():
    lp = independent(4, 500, 1)[..., 0] + torch.tensor([0.0, 0.0, 0.0, 5.0])[:, None]
    (message,) = told(independent(), lp=lp).messages
    assert message.startswith("The chains are at different levels of the log density")


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ("diverging", "100 of 2000 transitions diverged"),
        ("reached_max_treedepth", "100 of 2000 trajectories reached `max_tree_depth`"),
    ],
)
def test_counts_are_told(stats, message):
    flags = torch.zeros(4, 500, dtype=torch.bool)
    flags[1, 100:200] = True
    (found,) = told(independent(), **{stats: flags}).messages
    assert found.startswith(message)


@pytest.mark.parametrize("where", ["stuck apart", "stuck together"])
def test_chains_that_never_moved_are_told(where):
    position = independent()
    position[..., 3] = torch.arange(4.0)[:, None] if where == "stuck apart" else 1.0
    assert told(position).messages[0].startswith("R-hat of 'b[0, 2]' is inf")


@pytest.mark.parametrize(("shift", "groups"), [(0.5, None), (20.0, "1, 3"), (-20.0, "3, 1")])
def test_clusters_that_no_chain_leaves_are_told(shift, groups):
    position = independent()
    position[1:, :, 3] += shift
    messages = [m for m in told(position).messages if "ever crosses" in m]
    assert len(messages) == (groups is not None)
    assert all(f"2 clusters of draws of 'b[0, 2]' (with {groups} chains)" in m for m in messages)
    position[0, 7, 3] += shift  # one draw of the other cluster
    assert not [m for m in told(position).messages if "ever crosses" in m]


def test_few_draws_are_not_judged():
    assert told(independent(2, 20).cumsum(1)).messages == []


def test_no_parameters():
    assert told(independent(2, 100, 0), []).messages == []


def test_worst_of_many_parameters_is_found_in_short_time():
    position = independent(4, 200, 8000)
    position[0, :, 4321] += 1.0
    position[:, :, 77] = 0.3 * position[:, :, 77].cumsum(1)
    position[:, :, 77] -= position[:, :, 77].mean(1, keepdim=True)
    sites = [Site("x", 0, 8000, torch.Size([8000]), None, REAL)]
    began = time.process_time()
    found = report(draws_of(position), sites)
    assert time.process_time() - began < 5.0
    assert found.values["max_rhat_parameter"] in ("x[4321]", "x[77]")
    assert found.values["min_ess_bulk_parameter"] == "x[77]"


# --- whole runs ---------------------------------------------------------------------------------


def funnel():
    width = pyro.sample("width", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (width / 2.0).exp()).expand([9]).to_event(1))


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 100.0))
    pyro.factor("modes", torch.stack([-0.5 * (x - 30.0) ** 2, -0.5 * (x + 30.0) ** 2]).logsumexp(0))


def separated():
    slope = pyro.sample("slope", dist.Normal(0.0, 1000.0))
    x = torch.linspace(-2.0, 2.0, 20)
    pyro.sample("y", dist.Bernoulli(logits=slope * x).to_event(1), obs=(x > 0.0).to(x))


def labels():
    """A mixture of two components that may change places."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    y = torch.cat([torch.linspace(-4.0, -2.0, 20), torch.linspace(2.0, 4.0, 20)])
    near = dist.Normal(mean, 1.0).log_prob(y[:, None])
    pyro.factor("y", near.logsumexp(-1).sum())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (funnel, ["R-hat", "effective"]),
        (two_modes, ["R-hat of 'x'"]),
        (separated, ["effective|diverged|BFMI"]),
        (labels, ["R-hat of 'mean"]),
    ],
)
def test_what_no_warmup_can_mend_is_told(model, words):
    mcmc = MCMC(NUTS(model, max_tree_depth=4), 200, 100, num_chains=4, seed=3)
    mcmc.run()
    text = "\n".join(mcmc.messages)
    for word in words:
        assert any(part in text for part in word.split("|")), text


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_report_is_kept_with_the_results(chain_method):
    mcmc = MCMC(HMC(two_modes), 100, 50, num_chains=2, seed=0, chain_method=chain_method)
    mcmc.initial_params = {"x": torch.tensor([30.0, -30.0])}
    mcmc.run()
    assert mcmc.report["max_rhat_parameter"] == "x"
    expected = float(arviz.rhat(np.asarray(mcmc.draws.position[..., 0])))
    assert mcmc.report["max_rhat"] == pytest.approx(expected)
    attributes = to_inference_data(mcmc).posterior.attrs
    assert json.loads(attributes["messages"]) == mcmc.messages
    assert json.loads(attributes["diagnostics"])["max_rhat"] == pytest.approx(expected)


def with_modes(chains, draws, share, seed):
    """Draws of seven parameters, the fourth of which has two modes, this share in the upper."""
    torch.manual_seed(seed)
    position = torch.randn(chains, draws, 7)
    position[..., 3] += 6.0 * (torch.rand(chains, draws) < share) - 3.0
    return position


def compared(position, explored):
    found = report(draws_of(position), SITES, explored)
    gap = found.values["explored_gap"]
    return gap, [message for message in found.messages if "of the population" in message]


def test_a_mode_that_all_chains_lack_is_told():
    """Of which no difference between chains tells."""
    explored = with_modes(1, 1000, 0.5, 0)[0]
    position = with_modes(4, 500, 1.0, 1)
    assert report(draws_of(position), SITES).messages == []
    gap, (message,) = compared(position, explored)
    assert gap > 8.0
    assert message.startswith("48% of the population that chains started from have 'b[0, 2]' below")
    assert "but 0% of the draws" in message
    assert compared(with_modes(4, 500, 0.5, 1), explored)[1] == []
    assert compared(with_modes(4, 500, 1.0, 1), with_modes(1, 1000, 0.8, 0)[0])[1] != []
    assert compared(with_modes(1, 500, 0.9, 1), with_modes(1, 1000, 0.6, 0)[0])[1] != []


def test_chance_is_not_told():
    """Neither of walkers that are worth a fifth of their number, nor of draws that are repeated."""
    gaps = []
    for seed in range(60):
        explored = with_modes(1, 200, 0.3, seed)[0].repeat_interleave(5, 0)
        held = with_modes(8, 50, 0.3, 1000 + seed).repeat_interleave(10, 1)
        gap, messages = compared(held, explored)
        assert not messages
        gaps.append(gap)
    assert 1.0 < np.median(gaps) < 3.5


def test_what_is_said_again_is_said_once():
    plan = RunPlan("NUTS", 4, 100)
    for sentence, first in (("one.", False), ("two.", False), ("two.", True), ("one.", False)):
        plan.say(sentence, first=first)
    assert plan.messages == ["NUTS: two.", "NUTS: one."]


@pytest.mark.parametrize(
    ("rate", "aim", "few"), [(0.25, 0.234, False), (0.1, 0.234, True), (0.25, 0.8, True)]
)
def test_few_are_accepted_beside_what_was_wanted(rate, aim, few):
    """A random walk wants a quarter of its proposals accepted."""
    position = independent()
    draws = draws_of(position, acceptance_rate=torch.full(position.shape[:2], rate))
    assert any("were accepted" in text for text in report(draws, SITES, aim=aim).messages) == few


@pytest.mark.parametrize("end", ["small", "large"])
def test_divergences_are_located(end):
    """At an end of one parameter; spread over all of them they are not."""
    position = independent()
    sign = 1.0 if end == "small" else -1.0
    diverging = (sign * position[..., 3] < -1.0) & (torch.rand(4, 500) < 0.05)
    found = told(position, diverging=diverging)
    said = f"Divergences lie where 'b[0, 2]' is {end}: too few draws may be there."
    assert found.messages[-1] == said
    assert found.values["diverging_at"] == "b[0, 2]"
    spread = told(position, diverging=torch.rand(4, 500) < 0.02)
    assert not any("Divergences lie" in message for message in spread.messages)


@pytest.mark.parametrize(("sign", "end"), [(1.0, "small"), (-1.0, "large")])
def test_what_is_narrow_where_trajectories_diverge_is_named(sign, end):
    """Where most of a site diverges, the scale alone is named; what lies elsewhere is not."""
    position = independent()
    log_scale = sign * position[..., :1]
    centre = 2.0 * position[..., :1]
    position[..., 1:4] = centre + log_scale.exp() * position[..., 1:4]
    position[..., 4] = centre[..., 0] + position[..., 4]
    diverging = (log_scale[..., 0] < -1.5) & (torch.rand(4, 500) < 0.5)
    found = told(position, diverging=diverging)
    told_of = re.fullmatch(
        r"Divergences lie where 'a' is (\w+), and 'b\[0, [012]\]' .*", found.messages[-1]
    )
    assert told_of is not None and told_of[1] == end
    share = float(re.search(r"has ([.\d]+) of its usual spread", found.messages[-1])[1])
    assert share == pytest.approx(np.exp(-1.755), rel=0.2)  # the mean of the lowest tenth


def test_effects_are_narrow_about_a_mean_that_is_not_known():
    """By themselves they are as wide as this is, at whichever scale."""
    position = independent(4, 1000)
    log_scale, mean = position[..., :1], 3.0 * position[..., 1:2]
    position = torch.cat([log_scale, mean + log_scale.exp() * position[..., 1:]], -1)
    position[..., 1:2] = mean + log_scale.exp() * torch.randn(4, 1000, 1)
    diverging = (log_scale[..., 0] < -1.5) & (torch.rand(4, 1000) < 0.5)
    found = told(position, diverging=diverging)
    share = re.search(r"'a' is small, and 'b.*' has ([.\d]+) of its usual", found.messages[-1])
    assert share is not None
    assert float(share[1]) == pytest.approx(np.exp(-1.755), rel=0.25)


def effects(sampled_in_units, error):
    values = torch.tensor([1.2, -2.0, 0.3])

    def model():
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))[..., None]
        if sampled_in_units:
            theta = tau * pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        else:
            theta = pyro.sample("theta", dist.Normal(torch.zeros(3), tau).to_event(1))
        pyro.sample("y", dist.Normal(theta, error).to_event(1), obs=values)

    return model


@pytest.mark.parametrize(
    ("sampled_in_units", "error", "end", "narrow", "remedy"),
    [
        (False, 30.0, "small", "theta", "in its units"),
        (True, 0.1, "large", "z", "sample the effect itself"),
    ],
)
def test_divergences_of_effects_in_either_form_are_told_rightly(
    sampled_in_units, error, end, narrow, remedy
):
    """Few data leave a neck at small scales of centred effects; many, at large ones of others."""
    mcmc = MCMC(
        NUTS(effects(sampled_in_units, error), target_accept_prob=0.6),
        1000,
        warmup_steps=500,
        num_chains=16,
        seed=0,
        disable_progbar=True,
    )
    mcmc.run()
    (said,) = [message for message in mcmc.messages if "Divergences lie" in message]
    assert said.startswith(f"Divergences lie where 'tau' is {end}, and '{narrow}[")
    assert remedy in said


@pytest.mark.parametrize(("length", "is_told"), [(45, True), (8, False)])
def test_noise_that_stays_for_long_is_told(length, is_told):
    torch.manual_seed(0)
    renewed = (torch.rand(4, 1000) < 0.9).double()
    renewed[2, 700 : 700 + length] = 0.0
    renewed[2, 699] = renewed[2, 700 + length] = 1.0
    found = told(independent(4, 1000), refresh_rate=renewed)
    assert found.values["longest_stay"] == length
    begins = f"Chain 2 kept the noise of its estimate for {length} draws in a row"
    assert any(text.startswith(begins) for text in found.messages) == is_told


def test_stays_by_chance_and_of_parts_are_not_told():
    torch.manual_seed(0)
    by_chance = (torch.rand(4, 1000) < 0.35).double()
    assert told(independent(4, 1000), refresh_rate=by_chance).messages == []
    parts = torch.rand(4, 1000)
    parts[1, 200:300] = 0.0
    assert told(independent(4, 1000), refresh_rate=parts).messages == []
