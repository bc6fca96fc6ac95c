"""Which sites of a model can be a path, and how its variables are laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_hamflow.marginal.path_bands import tell_of_cube
from pyro_hamflow.marginal.path_density import Order
from pyro_hamflow.marginal.structure import sites_named
from pyro_hamflow.marginal.whitening.curvature import (
    find_width,
    full_pattern,
    gradient_and_bands,
    narrow_order,
)
from pyro_hamflow.marginal.whitening.path_prior import Layout, PathPrior, multivariate_normal
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.sites import stack_sites
from pyro_hamflow.model.supports import is_discrete
from pyro_hamflow.model.trace import is_latent

_MOST = 3000  # variables without a band: a factor of as many takes a second
# For each gradient and chain of 1,000 variables without a band, on one core: of a prior whose
# covariance is known, and of others. All that comes before sampling took 34.
_KNOWN_SECONDS, _SECONDS, _BEFORE = 0.2, 0.45, 35.0
_ALIKE = 1e-3  # of a precision, up to which it is the same elsewhere, in the root of rounding


def path_names(potential: Potential, sites: Sequence[str]) -> list[str]:
    """The sites of a path; a name that is no site's stands for the loop of sites that bear it."""
    nodes = potential.runs.plain_trace.nodes
    latent = [name for name, site in nodes.items() if is_latent(site)]
    return list(dict.fromkeys(n for name in sites for n in sites_named(name, latent)))


def check_sites(potential: Potential, names: Sequence[str]) -> None:
    """Raises a ValueError if some names are not those of a path in a model."""
    nodes = potential.runs.plain_trace.nodes
    latent = [name for name, site in nodes.items() if is_latent(site)]
    for name in names:
        if name not in latent:
            what = "observed or computed" if name in nodes else "not in the model"
            raise ValueError(
                f"site '{name}' is {what}: expected a latent site to whiten, one of {latent}"
            )
        if is_discrete(name, nodes[name]):
            raise ValueError(f"site '{name}' is discrete: expected a continuous site to whiten")
    last = max(latent.index(name) for name in names)
    for name in latent[:last]:
        if is_discrete(name, nodes[name]):
            raise ValueError(
                f"discrete site '{name}' comes before the end of the path {list(names)}: its "
                "values would be summed over together with the path's Gaussian sites; expected "
                "discrete sites after the path"
            )


def parameters_before(potential: Potential, names: Sequence[str]) -> list[str]:
    """The continuous latent sites that a model has drawn when its path begins."""
    latent = [site.name for site in potential.sites]
    return latent[: min(latent.index(name) for name in names)]


def refuse_later_parameters(
    prior: PathPrior, u: Tensor, later: Sequence[str], before: Sequence[str]
) -> None:
    """Raises a ValueError if the path's prior depends on sites drawn after its beginning."""
    values = {name: prior.others[name].detach().requires_grad_() for name in later}
    density = prior.log_density(u, values)
    if not values or not density.requires_grad:
        return
    slopes = torch.autograd.grad(
        density, list(values.values()), allow_unused=True, materialize_grads=True
    )
    for name, slope in zip(values, slopes, strict=True):
        if bool((slope != 0.0).any()):
            raise ValueError(
                f"the path's prior depends on site '{name}', which is drawn after the path has "
                f"begun: expected its parameters to be drawn before it, as {list(before)} are"
            )


def lay_out(
    prior: PathPrior,
    log_rest: Callable[[Tensor], Tensor],
    names: Sequence[str],
    potential: Potential,
) -> tuple[Layout, int]:
    """Orders the variables of a path so that its precision has few bands.

    Arguments:
        prior: The path's prior, its variables in the order of the sites.
        log_rest: The rest of the model's log density, as a function of these variables.
        names: The path's sites.
        potential: The model.

    Returns:
        The layout, and the bands of the rest's Hessian.
    """
    layout = prior.layout
    n = len(layout.order.places)
    generator = torch.Generator().manual_seed(0)
    u = 0.3 * torch.randn(n, generator=generator, device="cpu").to(potential.example)
    u = u.to(layout.order.places.device)
    nodes = potential.runs.plain_trace.nodes
    words = f"site '{names[0]}'" if len(names) == 1 else f"sites '{names[0]}' to '{names[-1]}'"
    if len(names) == 1 and multivariate_normal(nodes[names[0]]) is not None:
        tell_of_cube(words, n, _KNOWN_SECONDS, _BEFORE)
        return replace(layout, width=None), find_width(log_rest, u)

    def log_prior(u: Tensor) -> Tensor:
        return prior.log_density_to_fit(u, {})

    def widths(order: Order) -> tuple[int, int]:
        def width(part: Callable[[Tensor], Tensor]) -> int:
            return find_width(lambda v: part(order.to_sites(v)), order.from_sites(u))

        return width(log_prior), width(log_rest)

    best = (n + 1, n + 1)
    for order in _orders(layout):
        if order.lag and max(best) < n:
            break
        if max(found := widths(order)) < max(best):
            best, chosen = found, order
    if max(best) == n and n <= _MOST:
        pattern = full_pattern(lambda v: log_prior(v) + log_rest(v), u)
        order = Order(narrow_order(pattern))
        if max(found := widths(order)) < n:
            best, chosen = found, order
    if max(best) == n > _MOST:
        where = "prior" if best[0] == n else "likelihood"
        raise ValueError(
            f"the {where} of the path {list(names)} has no band: each of its {n} variables meets "
            f"many others; expected a Markov path, or at most {_MOST} variables"
        )
    if max(best) == n:
        tell_of_cube(words, n, _SECONDS, _BEFORE)
    laid_out = replace(layout, order=chosen, width=best[0])
    return replace(laid_out, is_gaussian=_is_gaussian(prior, laid_out, u)), best[1]


def _orders(layout: Layout) -> Iterator[Order]:
    """Ways in which variables that meet may lie close together.

    Sites one after the other; together, each place of one beside those of the others; time by time
    where a site has several dimensions; and all of these summed up, for sites that are the steps of
    a path, or the steps of its steps.
    """
    natural = layout.order.places
    found = {1: natural}
    if len(layout.sites) > 1:
        sizes = [site.stop - site.start for site in layout.sites]
        places = torch.cat([(torch.arange(size) + 0.5) / size for size in sizes])
        found[len(sizes)] = places.argsort(stable=True).to(natural.device)
    elif len(shape := layout.sites[0].shape) > 1:
        for dim, size in enumerate(shape):
            if size > 1:
                moved = natural.reshape(shape).movedim(dim, 0).flatten()
                found[len(natural) // size] = moved
    for times in (0, 1, 2):
        for states, places in found.items():
            if times == 0 or (len(natural) % states == 0 and states < len(natural)):
                yield Order(places, states if times else 0, times)


def _is_gaussian(prior: PathPrior, layout: Layout, u: Tensor) -> bool:
    """Whether the prior's precision is the same at two places."""
    assert layout.width is not None
    laid_out, found = prior._replace(layout=layout), []
    for place in (u, 2.0 * u + 0.1):
        free = place.detach().requires_grad_()
        found.append(
            gradient_and_bands(laid_out.log_density_to_fit(free, {}), free, layout.width)[1]
        )
    tolerance = _ALIKE * torch.finfo(u.dtype).eps ** 0.5
    return bool((found[0] - found[1]).abs().max() <= tolerance * found[0].abs().max())


def flat_layout(potential: Potential, names: Sequence[str]) -> Layout:
    """The variables of some sites in the order of the model."""
    names = [site.name for site in potential.sites if site.name in names]
    sites = stack_sites(potential.runs.latent, names)
    places = torch.arange(sites[-1].stop, device=potential.example.device)
    return Layout(sites, Order(places))
