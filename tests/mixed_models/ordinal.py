"""Ordered categories: cumulative logits between cut points, with normal effects."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor

from tests.mixed_models.frames import Wide, linear, r_data
from tests.mixed_models.priors import half_cauchy, half_normal, normal, ordered
from tests.mixed_models.quadrature import Truth, Values


def category_probabilities(cuts: Tensor, eta: Tensor) -> Tensor:
    """The probabilities of all categories, as a user would write them."""
    below = torch.sigmoid(cuts - eta.unsqueeze(-1))
    none = torch.zeros_like(below[..., :1])
    return torch.cat([below, none + 1], -1) - torch.cat([none, below], -1)


def ordinal_log(y: Tensor, cuts: Tensor, eta: Tensor) -> Tensor:
    """The log probability of categories 0, 1, ... under cut points ``(*, categories - 1)``."""
    padded = torch.nn.functional.pad(cuts, (1, 0), value=-200.0)
    padded = torch.nn.functional.pad(padded, (0, 1), value=200.0)[:, None, None, None]
    category = y.long().expand(torch.broadcast_shapes(y.shape, eta.shape))
    padded = padded.expand(*category.shape, -1)
    low = padded.gather(-1, category[..., None])[..., 0] - eta
    high = padded.gather(-1, category[..., None] + 1)[..., 0] - eta
    # log(sigmoid(high) - sigmoid(low))
    softplus = torch.nn.functional.softplus
    return high + torch.log(-torch.expm1(low - high)) - softplus(low) - softplus(high)


# --- wine: 9 judges, 8 bottles, 5 grades of bitterness ------------------------------------------


def wine(warm, contact, grade):
    first = dist.Normal(0.0, 3.0).expand([4]).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(first, [OrderedTransform()]))
    heat = pyro.sample("heat", dist.Normal(0.0, 10.0))
    skin = pyro.sample("skin", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("judge", 9, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("bottle", 8, dim=-1):
            probs = category_probabilities(cuts, heat * warm + skin * contact + u)
            pyro.sample("grade", dist.Categorical(probs), obs=grade)


def wine_data():
    frame = r_data("ordinal", "wine")
    wide = Wide(frame, "judge")
    return wide(frame.temp == "warm"), wide(frame.contact == "yes"), wide(frame.rating - 1).long()


def log_wine(t: Values, z, warm: Tensor, contact: Tensor, grade: Tensor) -> Tensor:
    eta = t["heat"] * warm + t["skin"] * contact + t["sigma"] * z[0]
    return ordinal_log(grade, t["cuts"], eta)


WINE = Truth(
    {
        "cuts": ordered(3.0, 4),
        "heat": normal(10.0),
        "skin": normal(10.0),
        "sigma": half_cauchy(2.5),
    },
    log_wine,
)


# --- arthritis: 302 patients, 3 visits, 5 grades, some missing ----------------------------------


def arthritis(x, grade, seen):
    low = pyro.sample("low", dist.Normal(0.0, 10.0))
    gaps = pyro.sample("gaps", dist.HalfNormal(5.0).expand([3]).to_event(1))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
    cuts = low + torch.cat([torch.zeros(1), gaps]).cumsum(0)
    with pyro.plate("patient", 302, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("visit", 3, dim=-1), poutine.mask(mask=seen):
            probs = category_probabilities(cuts, x @ beta + u)
            pyro.sample("grade", dist.Categorical(probs), obs=grade)


def arthritis_data():
    frame = r_data("multgee", "arthritis")
    wide = Wide(frame, "id")
    x = torch.stack([wide(frame.trt == 2), wide(frame.baseline - 3)], -1)
    return x, wide((frame.y - 1).fillna(0)).long(), wide(frame.y.notna()).bool()


def log_arthritis(t: Values, z, x: Tensor, grade: Tensor, seen: Tensor) -> Tensor:
    gaps = torch.nn.functional.pad(t["gaps"], (1, 0))
    cuts = t["low"].flatten()[:, None] + gaps.cumsum(-1)
    return ordinal_log(grade, cuts, linear(t["beta"], x) + t["sigma"] * z[0]) * seen


ARTHRITIS = Truth(
    {
        "low": normal(10.0),
        "gaps": half_normal(5.0, 3),
        "beta": normal(10.0, 2),
        "sigma": half_normal(3.0),
    },
    log_arthritis,
)
