"""A run whose chains move in workers: their groups, when they have enough, what comes of them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.groups import Group, complete, joined, seeds, split
from pyro_hamflow.mcmc.messages import FEWEST
from pyro_hamflow.mcmc.moving import Counts, Mover
from pyro_hamflow.mcmc.segment import Task, packed
from pyro_hamflow.mcmc.snapshot import capture, take_up
from pyro_hamflow.mcmc.spread import Executors, Spread
from pyro_hamflow.mcmc.stopping import RunSoFar
from pyro_hamflow.process import undisturbed
from pyro_hamflow.progress import progress

_GROWTH = 1.1  # of the draws of groups, after which `stop_when` is asked


def divided(mover: Mover, seed: int, most: int) -> list[Group]:
    """The groups of a run, each with a mover of its own; finds faults before any begins.

    Arguments:
        mover: Of all chains.
        seed: What the groups' random numbers are made of.
        most: How many chains a group has at most.
    """
    with torch.random.fork_rng():  # so that workers find the parameters that the model makes
        mover.kernel.prepare(mover.args, mover.kwargs, mover.initial(None))
    mover.refuse_unknown_sites()
    chains = split(mover.num_chains, most)
    groups = []
    for numbers, own_seed in zip(chains, seeds(seed, len(chains)), strict=True):
        initial, count = mover.initial_params, len(numbers)
        if initial is not None and mover.num_chains > 1:
            part = slice(numbers.start, numbers.stop) if count > 1 else numbers.start
            initial = {n: v[part] for n, v in initial.items()}
        own = replace(
            mover,
            num_chains=count,
            tuned_together=count,
            initial_params=initial,
            stop_when=None,
            hides_progress=True,
        )
        try:
            task = packed(Task(own, own_seed))
        except Exception as error:
            raise TypeError(
                f"the run cannot be sent to workers ({error}): expected a model, kernel and "
                "`hook_fn` that can be pickled; where cloudpickle is installed, those of a "
                "script or a notebook can be, too"
            ) from error
        groups.append(Group(numbers.start, count, task, own.planned_warmup_steps))
    return groups


class Workers:
    """Moves groups of chains where an executor takes them, and collects their draws.

    Arguments:
        mover: Of all chains.
        groups: Their groups.
        began: When the run began, by :func:`time.monotonic`.

    Attributes:
        kept: The groups whose draws are kept.
        heard: What their kernels have said, and the remarks.
        remarks: What there is to be said of lost workers.
        stopped: What has ended the run before its time.
    """

    def __init__(self, mover: Mover, groups: list[Group], began: float) -> None:
        self.mover = mover
        self.groups = groups
        self.kept: list[Group] = []
        self.heard: list[str] = []
        self.remarks: list[str] = []
        self.stopped: BaseException | None = None
        self._so_far = RunSoFar(began)

    def run(self, executor: Executors, patience: float) -> None:
        """Moves all groups to the end of the run, or to where it is interrupted.

        Arguments:
            executor: Where they are moved.
            patience: For how many seconds nothing may come back.
        """
        mover, groups = self.mover, self.groups
        planned = sum(group.planned + mover.num_samples for group in groups)
        with progress(planned, "Warmup", hidden=mover.hides_progress) as bar:
            spread = Spread(executor, groups, mover.num_samples, patience, bar, self._next_goal)
            try:
                spread.run()
            except BaseException as error:  # noqa: BLE001  # raised again, once draws are safe
                self.stopped = error
        self.stopped = self.stopped or spread.error
        self.heard = list(dict.fromkeys(m for g in groups if g.latest for m in g.latest.messages))
        self.remarks = spread.remarks
        self.heard += self.remarks
        self.kept = complete(groups)

    def draws(self) -> Draws:
        """The draws of the groups that are kept."""
        return joined(self.kept, lambda group: group.draws)

    def warmup_draws(self) -> Draws | None:
        """The same of the warm-up, if they are kept."""
        if self.mover.save_warmup and all(group.warm for group in self.kept):
            return joined(self.kept, lambda group: group.warm)
        return None

    def ended_early(self) -> dict[str, Draws]:
        """The draws of groups that are not kept, by their names; says so of those without fault."""
        ended = {}
        for group in self.groups:
            if group.draws and group not in self.kept:
                ended[group.name] = Draws.follow(group.draws)
                if group.fault is None:
                    told = f"{group.name} came to {group.made} draws, which `ended_early` has"
                    self.heard.append(f"{told}: too few to cut all others to their number.")
        return ended

    def counts(self) -> Counts:
        """What all groups have taken together."""
        return Counts(
            max(group.iteration for group in self.kept),
            sum(group.warmup_time for group in self.groups),
            sum(group.sampling_time for group in self.groups),
        )

    def take_up(self) -> int:
        """Puts the kernel of the run where that of the first group is.

        Returns:
            How many bytes the draws of recovered sites would take, if they were not kept.
        """
        saved = self.kept[0].saved
        if saved is None:
            return 0
        with undisturbed():
            capture(self.mover.kernel, self.mover.args, self.mover.kwargs, saved.source)
            take_up(self.mover.kernel, saved.found)
        return saved.kept.left_out

    def _next_goal(self, made: int) -> int | None:
        """How many draws all groups are to make before `stop_when` is asked."""
        num_samples, stop_when = self.mover.num_samples, self.mover.stop_when
        if made == num_samples:
            return None
        if stop_when is None:
            return num_samples
        going = [group for group in self.groups if group.fault is None]
        if made and going:
            draws = joined(going, lambda group: group.draws)
            self._so_far.update(made, lambda: draws)
            if stop_when(self._so_far):
                return None
        return min(num_samples, max(FEWEST, math.ceil(_GROWTH * made)))
