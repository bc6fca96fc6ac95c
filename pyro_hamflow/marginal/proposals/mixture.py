r"""Proposals for local posteriors of several modes: each mode's own particles, weighed by them all.

Each mode k has a Gaussian :math:`q_k` from a site of the likelihood, which follows the parameters
as :mod:`~pyro_hamflow.marginal.proposals.laplace` says, and particles of its own. A particle of
mode k has the weight

.. math:: \frac{w_k \, p(v) \, p(y \mid v)}{(1 - \epsilon) \sum_j w_j q_j(v) + \epsilon p(v)},

and one of the prior's has :math:`\epsilon` in place of :math:`w_k`. The means over each kind of
particle are added. The sum is unbiased for any shares :math:`w_k` that sum to one and any numbers
of particles: shares only say which mode's particles answer for a place that several reach. Where
modes lie apart they do not matter, so they are fixed where the sites are fitted. No mode is chosen
at random, so that the estimate is a smooth function of noise and parameters.

Where a single Gaussian has failed its tails may have, too. So the noise z is stretched to
:math:`t = \sinh(\delta z) / \delta`, which has heavier tails than any Gaussian. Each element has
the :math:`\delta` with which its estimate varied least where the sites were fitted.

References:
    | Optimally Combining Sampling Techniques for Monte Carlo Rendering (Veach and Guibas, 1995)
    | Safe and Effective Importance Sampling (Owen and Zhou, 2000)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.marginal.fitted import Anchor, Fit, Fitted
from pyro_hamflow.marginal.gaussian_form import Component, gaussian_form, gaussian_shapes
from pyro_hamflow.marginal.joint_density import Joint
from pyro_hamflow.marginal.likelihood_site import (
    Sites,
    Spread,
    apply,
    log_gaussian,
    origin_of,
    solve,
)
from pyro_hamflow.marginal.modes import MOST_MODES, find_modes
from pyro_hamflow.marginal.noise_layout import Block, Components, Layout, Stratum
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.proposals.base import Draw, Proposal
from pyro_hamflow.marginal.proposals.laplace import (
    LaplaceParticle,
    fit_groups,
    fitted_for,
)
from pyro_hamflow.marginal.scores import Reference
from pyro_hamflow.marginal.site_fit import fit_modes
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.trace import depth_of, plate_shape

_TAIL = 0.5  # until it is settled


class MixtureParticle(LaplaceParticle):
    """A particle from the prior times Gaussian sites about several modes; see the module's text.

    Arguments:
        group: The group of local sites.
        blocks: Their coordinates.
        modes: The sites of each mode.
        spread: How the modes share out an element, and their tails.
        shift: By how much the parameters they follow have moved, on the real line; a vector.
        source: The number of the mode that this particle belongs to; that of modes if the prior's.
        tells_origins: Whether draws tell from what noise the prior would have made them.
    """

    def __init__(
        self,
        group: Group,
        blocks: dict[str, Block],
        modes: tuple[Sites, ...],
        spread: Spread,
        shift: Tensor | None,
        source: Tensor,
        *,
        tells_origins: bool,
    ) -> None:
        super().__init__(group, blocks, modes[0], shift, None, tells_origins=tells_origins)
        self.modes = modes
        self.spread = spread
        self.source = source

    def draw(self, name: str, fn: object, noise: Tensor, component: Component | None) -> Draw:
        form = gaussian_form(name, fn, component, self.sites[name][0].near).to(noise.dtype)
        tail = Block(0, 1, self.group.frames, torch.Size([1])).spread(
            self.spread.tail[..., None], self.group
        )
        stretched = torch.sinh(tail * noise) / tail
        v = form.loc + solve(torch.linalg.cholesky(form.precision), noise)
        densities = []
        for mode, sites in enumerate(self.modes):
            precision, linear = self.site(name, form, sites)
            root = torch.linalg.cholesky(form.precision + precision)
            target = apply(form.precision, form.loc) + linear
            mean = torch.cholesky_solve(target[..., None], root)[..., 0]
            v = torch.where(self.source == mode, mean + solve(root, stretched), v)
            densities.append((mean, root))
        self.before.append(self.blocks[name].gather(v, self.group))
        log_prior = log_gaussian(v, form)
        ratios = [log_prior - _log_density(v, *density, tail) for density in densities]
        origin = origin_of(v, form) if self.tells_origins else None
        return Draw(form.value(v), tuple(ratios), origin)

    def mix(self, log_ratios: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The log ratio of the prior's density to the mixture's, and the particle's log share.

        Arguments:
            log_ratios: The log ratio of the prior's density to each mode's.
        """
        frames = self.group.frames
        shares = self.spread.log_shares.reshape([-1, *plate_shape(frames, depth_of(frames))])
        own = torch.zeros_like(shares[0])
        for mode, share in enumerate(shares):
            own = torch.where(self.source == mode, share, own)
        parts = [share - ratio for share, ratio in zip(shares, log_ratios, strict=True)]
        return -torch.stack(parts).logsumexp(0), own


@dataclass(frozen=True)
class MixtureProposal(Proposal):
    """Particles from the prior times Gaussian approximations about several modes of each element.

    Attributes:
        num_particles: How many an element may have; ``None`` if as many as the modes need.
        fitted: The approximations; none before the fit.
        is_defended: Whether some particles come from the prior.
        tells_origins: Whether draws tell from what noise the prior would have made them.
    """

    num_particles: int | None
    fitted: Fit | None = None
    is_defended: bool = True
    tells_origins: bool = False
    name = "laplace"
    enough_particles = 16
    needs_fit = True
    is_final = False
    tails = (0.1, 0.4, 0.8)

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
    ) -> MixtureParticle:
        (found,), shift = fitted_for(self.fitted, group, [stratum.components], parameters)
        if found.spread is None:
            raise RuntimeError("the proposal was fitted about one mode: expected several")
        layout, tells = plan.layouts[group.name], self.tells_origins
        number = layout.strata.index(stratum) if source is None else source
        modes, spread = found.sites, found.spread
        mode = layout.each([len(modes) if s.from_prior else s.mode for s in layout.strata])[number]
        blocks = layout.blocks
        return MixtureParticle(group, blocks, modes, spread, shift, mode, tells_origins=tells)

    def modes(self, group: Group) -> dict[Components, int]:
        if self.fitted is None:
            return {}
        fits = self.fitted.sites.items()
        return {
            components: len(fit.sites) for (name, components), fit in fits if name == group.name
        }

    def fit(self, plan: Plan, pilot: Mapping[str, Tensor]) -> Self:
        return replace(self, fitted=fit_groups(plan, pilot, self._fit))

    def _fit(
        self, group: Group, layout: Layout, joint: Joint, anchor: Anchor, held: dict[str, Reference]
    ) -> Fitted:
        """Finds the modes of one group, and fits the sites about them."""
        most = self._most(layout)
        places, shares = find_modes(group, layout, joint, anchor.values, most)
        spread = Spread(shares, torch.full_like(shares[0], _TAIL))
        return fit_modes(group, layout, joint, anchor, places, spread, held)

    def _most(self, layout: Layout) -> int:
        """How many modes have particles, and one is left for the prior."""
        if self.num_particles is None:
            return MOST_MODES
        choices = len({stratum.components for stratum in layout.strata})
        return max(1, min(MOST_MODES, self.num_particles // choices - 1))

    def stretched(self, tails: Mapping[str, Tensor]) -> Self:
        if self.fitted is None:
            return self
        sites = {
            key: fit._replace(spread=fit.spread and fit.spread._replace(tail=tails[key[0]]))
            for key, fit in self.fitted.sites.items()
        }
        return replace(self, fitted=replace(self.fitted, sites=sites))

    def undefended(self) -> Self:
        return replace(self, is_defended=False)

    def telling_origins(self) -> Self:
        return replace(self, tells_origins=True)


def _log_density(v: Tensor, mean: Tensor, root: Tensor, tail: Tensor) -> Tensor:
    """That of stretched noise about a mean, plus (k/2) log 2 pi."""
    stretched = tail * apply(root.mT, v - mean)
    log_noise = -0.5 * (stretched.asinh() / tail).square() - 0.5 * stretched.square().log1p()
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + log_noise.sum(-1)
