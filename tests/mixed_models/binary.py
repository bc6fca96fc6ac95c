"""Answers yes or no, and counts out of a total: logistic regressions with normal effects."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from linearmodels.datasets import wage_panel
from torch import Tensor

from tests.mixed_models.frames import Wide, linear, r_data
from tests.mixed_models.priors import half_cauchy, half_normal, normal
from tests.mixed_models.quadrature import Truth, Values


def bernoulli_log(y: Tensor, logit: Tensor) -> Tensor:
    """The log probability of zeros and ones."""
    return y * logit - torch.nn.functional.softplus(logit)


# --- wheeze: 537 children, 4 years --------------------------------------------------------------


def wheeze(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
    with pyro.plate("child", 537, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("year", 4, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=x @ beta + u), obs=y)


def wheeze_data():
    frame = r_data("geepack", "ohio")
    wide = Wide(frame, "id")
    return wide.design(frame.age, frame.smoke), wide(frame.resp)


def log_logistic(t: Values, z: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
    return bernoulli_log(y, linear(t["beta"], x) + t["sigma"] * z[0])


WHEEZE = Truth({"beta": normal(10.0, 3), "sigma": half_normal(3.0)}, log_logistic)


# --- bovine pleuropneumonia: 15 herds of 1 to 4 periods, cases out of 2 to 34 -------------------


def cattle(x, total, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("herd", 15, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("period", 4, dim=-1):  # none out of none where a herd was not visited
            pyro.sample("y", dist.Binomial(total, logits=x @ beta + u), obs=y)


def cattle_data():
    frame = r_data("lme4", "cbpp")
    wide = Wide(frame, "herd")
    x = wide.design(frame.period == 2, frame.period == 3, frame.period == 4)
    return x, wide(frame["size"]), wide(frame.incidence)


def log_binomial(t: Values, z: tuple[Tensor, ...], x: Tensor, total: Tensor, y: Tensor):
    logit = linear(t["beta"], x) + t["sigma"] * z[0]
    choices = torch.lgamma(total + 1) - torch.lgamma(y + 1) - torch.lgamma(total - y + 1)
    return choices + y * logit - total * torch.nn.functional.softplus(logit)


CATTLE = Truth({"beta": normal(10.0, 4), "sigma": half_cauchy(2.5)}, log_binomial)


# --- orobanche: 21 plates of seeds, one count each ----------------------------------------------


def seeds(x, total, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    with pyro.plate("dish", 21):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        pyro.sample("y", dist.Binomial(total, logits=x @ beta + u), obs=y)


def seeds_data():
    frame = r_data("aod", "orob2")
    kind = torch.tensor((frame.seed == "O73").to_numpy(dtype=float))
    root = torch.tensor((frame.root == "CUCUMBER").to_numpy(dtype=float))
    x = torch.stack([torch.ones(21), kind, root, kind * root], -1)
    return x, torch.tensor(frame.n.to_numpy(dtype=float)), torch.tensor(frame.y.to_numpy(float))


def log_seeds(t: Values, z: tuple[Tensor, ...], x: Tensor, total: Tensor, y: Tensor) -> Tensor:
    return log_binomial(t, z, x[:, None], total[..., None], y[..., None])


SEEDS = Truth({"beta": normal(10.0, 4), "sigma": half_cauchy(1.0)}, log_seeds)


# --- bacteria: 50 children with 2 to 5 tests ----------------------------------------------------


def bacteria(x, child, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("children", 50):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
    with pyro.plate("tests", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta + u[child]), obs=y)


def bacteria_data():
    frame = r_data("MASS", "bacteria")
    wide = Wide(frame, "ID")
    x = wide.design(frame.trt == "drug", frame.trt == "drug+", frame.week > 2)
    return x, wide(frame.y == "y"), wide.seen


def bacteria_rows():
    x, y, _ = bacteria_data()
    wide = Wide(r_data("MASS", "bacteria"), "ID")
    return wide.rows(x), wide.index, wide.rows(y)


def log_masked_logistic(t: Values, z: tuple[Tensor, ...], x: Tensor, y: Tensor, seen: Tensor):
    return log_logistic(t, z, x, y) * seen


BACTERIA = Truth({"beta": normal(10.0, 4), "sigma": half_cauchy(2.5)}, log_masked_logistic)


# --- respiratory: 111 patients, 4 visits --------------------------------------------------------


def respiratory(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("patient", 111, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("visit", 4, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=x @ beta + u), obs=y)


def respiratory_data():
    frame = r_data("geepack", "respiratory")
    wide = Wide(frame.assign(patient=frame.center * 1000 + frame.id), "patient")
    x = wide.design(frame.treat == "A", frame.center == 2, frame.baseline)
    return x, wide(frame.outcome)


RESPIRATORY = Truth({"beta": normal(10.0, 4), "sigma": half_cauchy(2.5)}, log_logistic)


# --- contraception: 60 districts of 2 to 118 women, intercept and effect of towns ---------------


def contraception(x, town, district, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("districts", 60):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        v = pyro.sample("v", dist.Normal(0.0, tau))
    with pyro.plate("women", len(y)):
        logits = x @ beta + u[district] + v[district] * town
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def contraception_data():
    frame = r_data("mlmRev", "Contraception")
    wide = Wide(frame, "district")
    x = wide.design(frame.urban == "Y", frame.livch != "0")
    return x, wide(frame.urban == "Y"), wide(frame.use == "Y"), wide.seen


def contraception_rows():
    x, town, y, _ = contraception_data()
    wide = Wide(r_data("mlmRev", "Contraception"), "district")
    return wide.rows(x), wide.rows(town), wide.index, wide.rows(y)


def contraception_cells(x: Tensor, town: Tensor, y: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    """The women of a district who have the same covariates, counted together."""
    covariates = torch.tensor([[1.0, a, b] for a in (0.0, 1.0) for b in (0.0, 1.0)])
    same = (x[:, :, None] == covariates).all(-1) & seen[..., None]
    total, users = same.sum(1), (same * y[..., None]).sum(1)
    return covariates.expand(len(y), 4, 3), covariates[:, 1].expand(len(y), 4), total, users


def log_contraception(t: Values, z, x: Tensor, town: Tensor, total: Tensor, y: Tensor) -> Tensor:
    logit = linear(t["beta"], x) + t["sigma"] * z[0] + t["tau"] * z[1] * town
    return y * logit - total * torch.nn.functional.softplus(logit)


CONTRACEPTION = Truth(
    {"beta": normal(10.0, 3), "sigma": half_normal(1.0), "tau": half_normal(1.0)},
    log_contraception,
    dimension=2,
    summary=contraception_cells,
)


# --- verbal aggression: 316 people, 24 questions ------------------------------------------------


def aggression(x, y):
    ability = pyro.sample("ability", dist.HalfNormal(3.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 5.0).expand([5]).to_event(1))
    with pyro.plate("person", 316, dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, ability))
        with pyro.plate("question", 24, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=theta + (x * beta).sum(-1)), obs=y)


def aggression_data():
    frame = r_data("lme4", "VerbAgg")
    wide = Wide(frame, "id")
    x = wide.design(
        frame.btype == "scold", frame.btype == "shout", frame.situ == "self", frame["mode"] == "do"
    )
    return x, wide(frame.r2 == "Y")


def aggression_cells(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The two questions with the same covariates, counted together."""
    kinds = x[0].unique(dim=0)
    same = (x[:, :, None] == kinds).all(-1).to(x)
    return kinds.expand(len(y), -1, -1), same.sum(1), (same * y[..., None]).sum(1)


def log_aggression(t: Values, z, x: Tensor, total: Tensor, y: Tensor) -> Tensor:
    logit = linear(t["beta"], x) + t["ability"] * z[0]
    return y * logit - total * torch.nn.functional.softplus(logit)


AGGRESSION = Truth(
    {"ability": half_normal(3.0), "beta": normal(5.0, 5)}, log_aggression, summary=aggression_cells
)


# --- union membership: 545 men in 8 years, 280 of them never ------------------------------------


def union(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("man", 545, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("year", 8, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=x @ beta + u), obs=y)


def union_data():
    frame = wage_panel.load()
    wide = Wide(frame, "nr")
    return wide.design((frame.educ - 12) / 2, frame.black, frame.married), wide(frame.union)


UNION = Truth({"beta": normal(10.0, 4), "sigma": half_normal(5.0)}, log_logistic)


# --- schizophrenia: 44 patients, 5 months, some missing -----------------------------------------


def schizophrenia(month, early, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    onset = pyro.sample("onset", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
    patients, months = y.shape
    missing = y.isnan()
    with pyro.plate("patient", patients, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("month", months, dim=-1), poutine.mask(mask=~missing):
            logits = alpha + slope * month + onset * early + u
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y.nan_to_num())


def schizophrenia_data():
    frame = r_data("HSAUR", "schizophrenia2").sort_values(["subject", "month"])
    wide = Wide(frame, "subject")
    y = frame.disorder.map({"present": 1.0, "absent": 0.0})
    return wide(frame.month / 10), wide(frame.onset == "< 20 yrs"), wide(y)


def log_schizophrenia(t: Values, z, month: Tensor, early: Tensor, y: Tensor) -> Tensor:
    logit = t["alpha"] + t["slope"] * month + t["onset"] * early + t["sigma"] * z[0]
    return bernoulli_log(y.nan_to_num(), logit) * ~y.isnan()


SCHIZOPHRENIA = Truth(
    {name: normal(10.0) for name in ("alpha", "slope", "onset")} | {"sigma": half_normal(3.0)},
    log_schizophrenia,
)
