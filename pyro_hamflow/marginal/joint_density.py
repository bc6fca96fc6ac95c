"""The log joint density of a group's local sites, as a function of Gaussian coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_hamflow.marginal.gaussian_form import gaussian_form, reference_of
from pyro_hamflow.marginal.likelihood_site import log_gaussian
from pyro_hamflow.marginal.noise_layout import Stratum
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.scores import Reference
from pyro_hamflow.marginal.structure import Group

Evaluate = Callable[[dict[str, Tensor] | None], tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]


class Joint(Protocol):
    """The log joint density of a group's elements as a function of its coordinates."""

    def __call__(self, parameters: dict[str, Tensor], times: float) -> Evaluate:
        """Fixes the parameters.

        Arguments:
            parameters: The values of all sites that are not integrated out.
            times: By how much the priors' variance is multiplied.

        Returns:
            A function of the coordinates of each site (prior means if ``None``): the log joint
            density of each element, and each site's prior mean and precision.
        """


def joint_density(
    plan: Plan,
    group: Group,
    stratum: Stratum,
    near: dict[str, Reference],
    parameters: dict[str, Tensor],
    times: float,
) -> Callable[[dict[str, Tensor] | None], Any]:
    """The log joint density of a group's elements, as a function of Gaussian coordinates.

    Arguments:
        plan: The model.
        group: The group of local sites.
        stratum: Which components of mixture priors are meant.
        near: Where the coordinates of priors that are no Gaussians are held.
        parameters: The values of all sites that are not integrated out.
        times: By how much the priors' variance is multiplied.

    Returns:
        What :func:`~pyro_hamflow.marginal.site_fit.fit_sites` maximises.
    """
    components, example = dict(stratum.components), plan.layouts[group.name].example
    parameters = {name: value.detach() for name, value in parameters.items()}

    def evaluate(coordinates: dict[str, Tensor] | None) -> Any:
        parts: list[Tensor] = []
        priors: dict[str, tuple[Tensor, Tensor]] = {}

        def choose(msg: Any) -> Tensor:
            name = msg["name"]
            form = gaussian_form(name, msg["fn"], components.get(name), near.get(name))
            form = form.to(example.dtype)
            form = form._replace(precision=form.precision / times)
            v = form.loc if coordinates is None else coordinates[name]
            parts.append(plan.sum(log_gaussian(v, form), msg, group))
            priors[name] = (form.loc, form.precision)
            return form.value(v)

        terms = plan.run(group, parameters, choose)
        return sum(parts[1:] + terms, start=parts[0]).reshape(group.shape), priors

    return evaluate


def references(
    plan: Plan, group: Group, stratum: Stratum, parameters: dict[str, Tensor], mode: Tensor | None
) -> dict[str, Reference]:
    """Holds the coordinates of priors that are no Gaussians at a mode in normal scores.

    Arguments:
        plan: The model.
        group: The group of local sites.
        stratum: Which components of mixture priors are meant.
        parameters: The values of all sites that are not integrated out.
        mode: The coordinates of each element, ``(*group.shape, dimension)``; the priors' means if
            not given.
    """
    components, blocks = dict(stratum.components), plan.layouts[group.name].blocks
    found: dict[str, Reference] = {}

    def choose(msg: Any) -> Tensor:
        name, fn = msg["name"], msg["fn"]
        form = gaussian_form(name, fn, components.get(name))
        value = form.value(form.loc if mode is None else blocks[name].spread(mode, group))
        held = reference_of(fn, value, components.get(name))
        if held is not None:
            found[name] = held
        return value

    with torch.no_grad():
        plan.run(group, parameters, choose)
    return found
