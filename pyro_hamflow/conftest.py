"""What doctests start from."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Distribution

import pyro_hamflow
from pyro_hamflow.flows.coupling import AffineCoupling
from pyro_hamflow.flows.gaussian_mixture import GaussianMixture, fit_mixture, geometric_mean
from pyro_hamflow.flows.population import flow_for
from pyro_hamflow.flows.product_mixture import ProductMixture, independent
from pyro_hamflow.flows.pyro_guides import PyroGuide
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.transitions.base import (
    Info,
    State,
    draw_uniform,
    metropolis_of_point,
    select_state,
)
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation

_ASKED = Distribution._validate_args, Distribution.arg_constraints
import zuko  # noqa: E402  # it has torch's distributions accept any argument

Distribution._validate_args, Distribution.arg_constraints = _ASKED  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, Any]) -> None:
    torch.manual_seed(0)
    pyro.clear_param_store()
    doctest_namespace.update(
        {name: getattr(pyro_hamflow, name) for name in pyro_hamflow.__all__},
        dist=dist,
        math=math,
        pyro=pyro,
        torch=torch,
        AffineCoupling=AffineCoupling,
        Evaluation=Evaluation,
        GaussianMixture=GaussianMixture,
        ProductMixture=ProductMixture,
        Info=Info,
        Kernel=Kernel,
        ModelTarget=ModelTarget,
        Potential=Potential,
        PyroGuide=PyroGuide,
        State=State,
        draw_uniform=draw_uniform,
        fit_mixture=fit_mixture,
        flow_for=flow_for,
        independent=independent,
        geometric_mean=geometric_mean,
        metropolis_of_point=metropolis_of_point,
        partial=partial,
        select_state=select_state,
        zuko=zuko,
    )
