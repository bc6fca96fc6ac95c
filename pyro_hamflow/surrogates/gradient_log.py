"""What true gradients find on their way, kept to learn from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.surrogates.fit import BLOCK, HELD_OUT
from pyro_hamflow.surrogates.losses import Points, TrajectorySegments

_TYPICAL = 3  # nats for each dimension, and six more, from the median energy
_FEWEST = 32  # finite gradients, to learn anything from


class LeapfrogSettings(NamedTuple):
    """How the chains of a trajectory move.

    Attributes:
        step_sizes: Of each chain, of shape ``(chains,)``.
        inverse_mass: Of shape ``(dimension,)`` or ``(dimension, dimension)``.
    """

    step_sizes: Tensor
    inverse_mass: Tensor


class Entry(NamedTuple):
    """True gradients of all chains.

    Attributes:
        position: Of shape ``(chains, dimension)``.
        value: The potential, of shape ``(chains,)``.
        gradient: Of shape ``(chains, dimension)``.
        wanted: Whether the chain's trajectory had not ended before, of shape ``(chains,)``.
        motion: That of the trajectory; none of points that lie on none.
        begins: Whether the chain's point does not follow the one before along a trajectory.
    """

    position: Tensor
    value: Tensor
    gradient: Tensor
    wanted: Tensor
    motion: LeapfrogSettings | None
    begins: Tensor


class GradientLog:
    """Keeps what true gradients find, in order.

    Attributes:
        entries: What was found.
        motion: That of the trajectories that are observed.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.motion: LeapfrogSettings | None = None

    def observe(
        self, position: Tensor, value: Tensor, gradient: Tensor, wanted: Tensor, begins: Tensor
    ) -> None:
        """Keeps a step of all chains' trajectories; the arguments are those of :class:`Entry`."""
        self.entries.append(Entry(position, value, gradient, wanted, self.motion, begins))

    def add(self, position: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Keeps points that lie on no trajectory."""
        wanted = torch.ones_like(value, dtype=torch.bool)
        self.entries.append(Entry(position, value, gradient, wanted, None, wanted))

    @property
    def num_gradients(self) -> int:
        """How many gradients were computed, over all chains."""
        return sum(int(entry.wanted.sum()) for entry in self.entries)

    def points(self, most: int) -> tuple[Points, Tensor | None]:
        """What was found where draws may lie, the latest of it if there is more than asked for.

        Where chains came from, energies are so far from the typical ones that these would be lost.

        Returns:
            The points; and which of them are held out, every time, if there are enough.

        Raises:
            ValueError: If there is hardly anything.
        """
        if not self.entries:
            raise ValueError("no gradients were found")
        first, found = len(self.entries), 0
        while found < most and first > 0:
            first -= 1
            found += len(self.entries[first].value)
        pairs = list(zip(self.entries, self._held_out(), strict=True))[first:]
        held_out = torch.cat([torch.full_like(entry.wanted, out) for entry, out in pairs])
        parts = zip(*(entry[:4] for entry, _ in pairs), strict=True)
        position, value, gradient, wanted = map(torch.cat, parts)
        good = wanted & value.isfinite() & gradient.isfinite().all(-1)
        if int(good.sum()) < _FEWEST:
            raise ValueError(f"{int(good.sum())} finite gradients were found, fewer than {_FEWEST}")
        latest = value[good][-max(_FEWEST, int(good.sum()) // 4) :]
        good &= (value - latest.median()).abs() < _TYPICAL * (position.shape[1] + 6)
        position, value, gradient = position[good], value[good], gradient[good]
        held_out = held_out[good]
        points = Points(position, value, gradient, position[:, :0])
        return points, held_out if int(held_out.sum()) >= BLOCK else None

    def _held_out(self) -> list[bool]:
        """Whether each entry is held out of training.

        Of entries along trajectories every tenth block of neighbours is, for neighbours are alike;
        of the others, every tenth.
        """
        steps, others, held_out = 0, 0, []
        for entry in self.entries:
            alone = entry.motion is None
            block = others if alone else steps // BLOCK
            steps, others = steps + (not alone), others + alone
            held_out.append(block % HELD_OUT == 1)
        return held_out

    def trajectories(self, num_steps: int, most: int) -> TrajectorySegments:
        """Stretches of true trajectories, the latest if there are more than asked for.

        Raises:
            ValueError: If no trajectory was as long.
        """
        stretches = []
        first = max(0, len(self.entries) - most)
        for start in range(first, len(self.entries) - num_steps):
            steps = self.entries[start : start + num_steps + 1]
            motion = steps[0].motion
            if motion is None or any(step.motion is None for step in steps):
                continue
            rows = torch.stack([step.position for step in steps], 1)  # chains, steps, dimension
            kept = torch.stack([step.wanted for step in steps]).all(0)
            kept &= ~torch.stack([step.begins for step in steps[1:]]).any(0)
            kept &= rows.isfinite().all(-1).all(-1)
            mass = motion.inverse_mass
            matrix = torch.diag(mass) if mass.dim() == 1 else mass
            masses = matrix.expand(int(kept.sum()), *matrix.shape)
            stretches.append((rows[kept], motion.step_sizes[kept], masses))
        if not stretches:
            raise ValueError(f"there is no true trajectory of {num_steps} steps to learn from")
        return TrajectorySegments(*(torch.cat(part) for part in zip(*stretches, strict=True)))
