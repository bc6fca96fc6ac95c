"""Modes of a posterior where no chain of a run has been.

Chains that all start in the basin of one mode agree with each other, whatever there is elsewhere.
So descents begin at draws of the prior, in the box where chains start by default, and at the run's
own draws; what the modes hold that they end in is told by Laplace's approximation.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.flows.descent import Descent
from pyro_hamflow.flows.lost_modes import place_of
from pyro_hamflow.flows.modes import find_modes
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.model.supports import RADIUS
from pyro_hamflow.process import undisturbed
from pyro_hamflow.smc.machine import compiled_gradient

_COST = 0.1  # of the run's gradients, that descents may take
_LENGTH = 40  # gradients of a descent, about
_FEWEST, _MOST = 16, 60  # descents: where fewer are all that pays, none
_OWN = 6  # of them, for each that begins at a draw of the run
_ROWS = 4000  # of the draws, that modes are compared with
_MOST_DIMENSIONS = 200  # of which descents keep a Hessian each
_MOST_MODES = 12  # that are looked at, the highest first
_FEW = 0.2  # of its share, below which chains have not been at a mode
_LEAST = 0.05  # of the posterior, less of which is not worth a word


class Unvisited(NamedTuple):
    """Modes where no chain has been.

    Attributes:
        share: Of the posterior, that they hold together.
        position: The top of the largest, of shape ``(dimension,)``.
    """

    share: float
    position: Tensor


def unvisited_modes(kernel: Kernel, draws: Draws) -> Unvisited | None:
    """What descents find beside a run's draws, at a small part of its cost; mostly nothing.

    Kernels that have looked beforehand, and likelihood estimates, whose pilots have, are left out.
    """
    potential = kernel.potential
    count = int(_COST * float(draws.stats["n_gradients"].sum()) / _LENGTH)
    if kernel.explored is not None or potential.noise_dimension or count < _FEWEST:
        return None
    if not 0 < potential.dimension <= _MOST_DIMENSIONS:
        return None
    by_machine_code = kernel.settings["engine"] == "native"
    chains, length, _ = draws.extent
    thinning = max(1, chains * length // _ROWS)
    position = draws.position[:, ::thinning].flatten(0, 1).to(potential.example)
    with undisturbed(0), torch.no_grad():
        machine = compiled_gradient(potential) if by_machine_code else None
        descent = Descent(potential, position.std(0), potential.draw_noise(1), machine)
        starts = _starts(potential, position, min(count, _MOST))
        modes = find_modes(descent, starts, _MOST_MODES)
        if len(modes) < 2:
            return None
        share = position.new_tensor([mode.log_mass for mode in modes]).double().softmax(0)
        nearest = torch.stack([mode.log_density(position) for mode in modes]).argmax(0)
        drawn = nearest.bincount(minlength=len(modes)) / len(position)
        lost = torch.where(drawn < _FEW * share, share, 0.0)
    if float(lost.sum()) < _LEAST:
        return None
    return Unvisited(float(lost.sum()), modes[int(lost.argmax())].position)


def _starts(potential: Potential, drawn: Tensor, count: int) -> Tensor:
    """So many places where descents begin."""
    own = count // _OWN
    picked = drawn[torch.randint(len(drawn), (own,), device=drawn.device)]
    box = torch.empty_like(drawn[:1].expand(count - own, -1)).uniform_(-RADIUS, RADIUS)
    half = len(box) // 2
    with suppress(Exception):  # of improper priors, or whatever a model raises at its prior's draws
        box[:half] = Prior(potential).draw(half)[0]
    return torch.cat([picked, box])


def unvisited_message(found: Unvisited, potential: Potential) -> str:
    """One sentence, and the remedy."""
    return (
        f"The posterior has modes where no chain has been, with about {found.share:.0%} of it, the "
        f"largest at {place_of(potential, found.position)}: chains that agree cannot tell. Where "
        "modes differ by the names of their parts alone, as components of a mixture do, nothing is "
        "lost; else let `FlowNUTS` or `AnnealedSampler` find their shares."
    )
