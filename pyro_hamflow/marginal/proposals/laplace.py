r"""Proposals that know the data: the prior times a Gaussian approximation of the likelihood.

No proposal fitted at one parameter value serves a whole posterior. But the likelihood of a local
variable changes less with the parameters than its prior does. So what is fitted, at a *pilot* value
of the parameters, is a Gaussian approximation of the likelihood alone, a *site*
:math:`s(v) \propto \exp(\eta^\top v - \tfrac12 v^\top I v)`. For every parameter value it is
multiplied in closed form with the prior :math:`N(m_\theta, P_\theta^{-1})`,

.. math:: q_\theta(v) = N\big((P_\theta + I)^{-1} (P_\theta m_\theta + \eta),\;
                              (P_\theta + I)^{-1}\big),

which follows the parameters by itself. Several local sites are proposed one after the other, each
given those before it, as the pilot's Laplace approximation of them all says. Mixture priors are
taken component by component.

Where parameters move a likelihood along, as an intercept does that is added to the variable, the
site has to move with it, or particles held would hold the parameters too. So :math:`\eta` follows
the parameters to first order.

A likelihood that is no Gaussian looks like another one where a wider prior lets the variable go. So
two sites are fitted, under the pilot's prior and under one of a many times larger variance, and for
every parameter value their mean is taken, weighted by how wide the prior is there.

Priors that are no Gaussians are taken in coordinates in which they are; see
:mod:`pyro_hamflow.marginal.scores`.

Where the true likelihood falls off more slowly than the site, or has another mode, such a proposal
alone would have unbounded weights. So some particles come from the prior, and every value is shared
out between the two kinds: the part

.. math:: (1 - \epsilon) q(v) / \big((1 - \epsilon) q(v) + \epsilon p(v)\big)

of its likelihood is left to the proposal's, the rest to the prior's. The estimate is the mean over
the proposal's particles plus that over the prior's. It is unbiased whatever :math:`\epsilon` and
the numbers of particles, and no weight exceeds the likelihood by more than :math:`1 / \epsilon`. A
small :math:`\epsilon` leaves those places to the proposal that it serves well. With the shares of
the numbers of particles (the balance heuristic) the prior's would add noise there, for each of them
is close to the posterior or not by chance.

Where there is but one particle for each component, none comes from the prior. The normal noise
:math:`z` is stretched then, :math:`z + 10^{-4} z^5`, which is next to nothing for :math:`|z| < 2`
and gives the proposal heavier tails than any Gaussian prior.

References:
    | Optimally Combining Sampling Techniques for Monte Carlo Rendering (Veach and Guibas, 1995)
    | Safe and Effective Importance Sampling (Owen and Zhou, 2000)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Self

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.marginal.fitted import Anchor, Fit, Fitted, keep_what_moves
from pyro_hamflow.marginal.gaussian_form import (
    Component,
    GaussianForm,
    gaussian_form,
    gaussian_shapes,
)
from pyro_hamflow.marginal.joint_density import Joint, joint_density, references
from pyro_hamflow.marginal.likelihood_site import (
    Sites,
    apply,
    chosen,
    log_gaussian,
    origin_of,
    solve,
)
from pyro_hamflow.marginal.noise_layout import Block, Components, Layout, Stratum
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.proposals.base import Draw, Proposal, stretched
from pyro_hamflow.marginal.scores import Reference
from pyro_hamflow.marginal.site_fit import fit_sites
from pyro_hamflow.marginal.structure import Group


class LaplaceParticle:
    """A particle from the prior times a Gaussian site of the likelihood; see the module's text.

    Arguments:
        group: The group of local sites.
        blocks: Their coordinates.
        sites: The fitted sites.
        shift: By how much the parameters they follow have moved, on the real line; a vector.
        from_prior: Whether this particle comes from the prior, true or false; ``None`` where no
            particle does.
        tells_origins: Whether draws tell from what noise the prior would have made them.
    """

    def __init__(
        self,
        group: Group,
        blocks: dict[str, Block],
        sites: Sites,
        shift: Tensor | None,
        from_prior: Tensor | None,
        *,
        tells_origins: bool,
    ) -> None:
        self.group = group
        self.blocks = blocks
        self.sites = sites
        self.shift = shift
        self.from_prior = from_prior
        self.tells_origins = tells_origins
        self.before: list[Tensor] = []

    def draw(self, name: str, fn: object, noise: Tensor, component: Component | None) -> Draw:
        form = gaussian_form(name, fn, component, self.sites[name][0].near).to(noise.dtype)
        precision, linear = self.site(name, form, self.sites)
        v, log_proposal = _propose(form, precision, linear, noise, self.from_prior)
        self.before.append(self.blocks[name].gather(v, self.group))
        origin = origin_of(v, form) if self.tells_origins else None
        return Draw(form.value(v), (log_gaussian(v, form) - log_proposal,), origin)

    def site(self, name: str, form: GaussianForm, sites: Sites) -> tuple[Tensor, Tensor]:
        """The precision and linear term of a site, for a prior and given what comes before."""
        narrow, wide = sites[name]
        site = narrow.moved(self.shift).towards(wide.moved(self.shift), form.precision)
        if site.coupling is None:
            return site.precision, site.linear
        batch = torch.broadcast_shapes(*[part.shape[:-1] for part in self.before])
        earlier = torch.cat([part.expand(*batch, -1) for part in self.before], -1)
        return site.precision, site.linear + apply(site.coupling, earlier)

    def mix(self, log_ratios: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return log_ratios[0], None


@dataclass(frozen=True)
class LaplaceProposal(Proposal):
    """Particles from the prior times a Gaussian approximation of the likelihood.

    Attributes:
        fitted: The approximation; none before the fit.
        is_defended: Whether some particles come from the prior.
        tells_origins: Whether draws tell from what noise the prior would have made them.
    """

    fitted: Fit | None = None
    is_defended: bool = True
    tells_origins: bool = False
    name = "laplace"
    joins_components = True
    enough_particles = 16
    needs_fit = True
    is_final = False

    def noise_shapes(
        self, plan: Plan, group: Group, trace: poutine.Trace, splits: Mapping[str, int | None]
    ) -> dict[str, torch.Size]:
        return gaussian_shapes(trace, splits)

    def particle(
        self,
        plan: Plan,
        group: Group,
        stratum: Stratum,
        coordinates: Tensor,
        parameters: dict[str, Tensor],
        source: Tensor | None,
    ) -> LaplaceParticle:
        layout, tells = plan.layouts[group.name], self.tells_origins
        found, shift = fitted_for(self.fitted, group, layout.choices, parameters)
        sites, from_prior = found[layout.choices.index(stratum.components)].sites[0], None
        if source is not None and len(found) > 1:
            choice = layout.each([layout.choices.index(s.components) for s in layout.strata])
            sites = chosen([fit.sites[0] for fit in found], choice[source])
        if stratum.is_shared:
            number = layout.strata.index(stratum) if source is None else source
            from_prior = layout.each([s.from_prior for s in layout.strata])[number]
        blocks = layout.blocks
        return LaplaceParticle(group, blocks, sites, shift, from_prior, tells_origins=tells)

    def fit(self, plan: Plan, pilot: Mapping[str, Tensor]) -> Self:
        def fit_one(
            group: Group, layout: Layout, joint: Joint, anchor: Anchor, held: dict[str, Reference]
        ) -> Fitted:
            return fit_sites(group, layout, joint, anchor, None, held)

        return replace(self, fitted=fit_groups(plan, pilot, fit_one))

    def follow(self, plan: Plan, pilot: Mapping[str, Tensor]) -> Self:
        if self.fitted is None:
            return self.fit(plan, pilot)
        anchor = Anchor({name: value.detach() for name, value in pilot.items()}, ())
        sites = {}
        for group, stratum in _choices(plan):
            key, layout = (group.name, stratum.components), plan.layouts[group.name]
            joint = partial(joint_density, plan, group, stratum, {})
            near = self.fitted.sites[key].mode
            sites[key] = fit_sites(group, layout, joint, anchor, near, {})
        return replace(self, fitted=Fit(anchor, sites))

    def undefended(self) -> Self:
        return replace(self, is_defended=False)

    def telling_origins(self) -> Self:
        return replace(self, tells_origins=True)


def fitted_for(
    fit: Fit | None,
    group: Group,
    choices: Sequence[Components],
    parameters: dict[str, Tensor],
) -> tuple[list[Fitted], Tensor | None]:
    """What was fitted for choices of components, and how far the parameters have moved since.

    Raises:
        RuntimeError: If nothing was.
    """
    if fit is None:
        raise RuntimeError("the proposal is not fitted yet: call `fit` with the model's data")
    return [fit.sites[group.name, of] for of in choices], fit.anchor.shift(parameters)


def fit_groups(
    plan: Plan,
    pilot: Mapping[str, Tensor],
    fit_one: Callable[[Group, Layout, Joint, Anchor, dict[str, Reference]], Fitted],
) -> Fit:
    """Fits the sites of all groups, for all choices of components of mixture priors.

    Arguments:
        plan: The model.
        pilot: Constrained parameter values.
        fit_one: Fits the sites of one group, for one choice: from the group, its layout, its log
            joint density, what the sites follow, and where the coordinates of some are held.
    """
    values = {name: value.detach() for name, value in pilot.items()}
    continuous = set(plan.structure.parameters) - set(plan.structure.placeholders)
    anchor = Anchor(values, tuple(name for name in values if name in continuous))
    sites: dict[tuple[str, Components], Fitted] = {}
    for group, stratum in _choices(plan):
        layout = plan.layouts[group.name]
        joint = partial(joint_density, plan, group, stratum, {})
        held: dict[str, Reference] = {}
        if references(plan, group, stratum, values, None):
            mode = fit_sites(group, layout, joint, Anchor(values, ()), None, held).mode
            held = references(plan, group, stratum, values, mode)
            joint = partial(joint_density, plan, group, stratum, held)
        sites[group.name, stratum.components] = fit_one(group, layout, joint, anchor, held)
    return Fit(*keep_what_moves(anchor, sites))


def _choices(plan: Plan) -> Iterator[tuple[Group, Stratum]]:
    """Each group with the first of its particles for each choice of components."""
    for group in plan.structure.groups:
        strata = plan.layouts[group.name].strata
        for _, alike in groupby(strata, lambda stratum: stratum.components):
            yield group, next(alike)


def _propose(
    form: GaussianForm, precision: Tensor, linear: Tensor, z: Tensor, from_prior: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Draws v from prior times site, or from the prior; log q(v) + (k/2) log 2 pi is the former's.

    Where none come from the prior, the noise is stretched.
    """
    total, own = form.precision + precision, form.precision
    if z.shape[-1] == 1:
        total, own = total[..., 0], own[..., 0]
        mean = (own * form.loc + linear) / total
        log_det = 0.5 * total[..., 0].log()
        if from_prior is None:
            stretched, log_noise = _stretch(z)
            return mean + stretched * total.rsqrt(), log_noise + log_det
        centre = torch.where(from_prior, form.loc, mean)
        v = centre + z * torch.where(from_prior, own, total).rsqrt()
        return v, log_det - 0.5 * (total * (v - mean).square())[..., 0]
    root = torch.linalg.cholesky(total)
    target = (own @ form.loc[..., None])[..., 0] + linear
    mean = torch.cholesky_solve(target[..., None], root)[..., 0]
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if from_prior is None:
        stretched, log_noise = _stretch(z)
        return mean + solve(root, stretched), log_noise + log_det
    centre = torch.where(from_prior, form.loc, mean)
    v = centre + solve(torch.where(from_prior, torch.linalg.cholesky(own), root), z)
    return v, log_det - 0.5 * apply(root.mT, v - mean).square().sum(-1)


def _stretch(z: Tensor) -> tuple[Tensor, Tensor]:
    """Noise with heavier tails, and its log density."""
    noise, log_growth = stretched(z)
    return noise, -0.5 * z.square().sum(-1) - log_growth
