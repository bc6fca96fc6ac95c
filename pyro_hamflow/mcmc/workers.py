"""A run whose chains move in workers: their groups, when they have enough, what comes of them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

from pyro_hamflow.mcmc import spread
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.executors import Executors
from pyro_hamflow.mcmc.group_checkpoints import GroupCheckpoints
from pyro_hamflow.mcmc.groups import Group, complete, seeds, split
from pyro_hamflow.mcmc.messages import FEWEST
from pyro_hamflow.mcmc.moving import Counts, Mover
from pyro_hamflow.mcmc.segment import Task, packed
from pyro_hamflow.mcmc.snapshot import capture, take_up
from pyro_hamflow.mcmc.spread import Spread
from pyro_hamflow.mcmc.stopping import GROWTH, RunSoFar
from pyro_hamflow.mcmc.writer import WARM
from pyro_hamflow.process import HeldSignals, random_state_kept, undisturbed
from pyro_hamflow.progress import progress


def divided(mover: Mover, seed: int, most: int) -> list[Group]:
    """The groups of a run, each with a mover of its own; finds faults before any begins.

    Arguments:
        mover: Of all chains.
        seed: What the groups' random numbers are made of.
        most: How many chains a group has at most.
    """
    with random_state_kept():  # so that workers find the parameters that the model makes
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
            tuned_together=mover.tuned_together if mover.pools_warmup else count,
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
        checkpoints: Writes the run, if it is written.

    Attributes:
        kept: The groups whose draws are kept.
        heard: What their kernels have said, and the remarks.
        remarks: What there is to be said of lost workers.
        stopped: What has ended the run before its time.
    """

    def __init__(
        self,
        mover: Mover,
        groups: list[Group],
        began: float,
        checkpoints: GroupCheckpoints | None = None,
    ) -> None:
        self.mover = mover
        self.groups = groups
        self.checkpoints = checkpoints
        self.kept: list[Group] = []
        self.heard: list[str] = []
        self.remarks: list[str] = []
        self.stopped: BaseException | None = None
        self._so_far = RunSoFar(began)
        self._held = HeldSignals()

    def run(self, executor: Executors, patience: float) -> None:
        """Moves all groups to the end of the run, or to where it is interrupted.

        Arguments:
            executor: Where they are moved.
            patience: For how many seconds nothing may come back.
        """
        groups, written = self.groups, self.checkpoints
        if written is not None:
            try:
                written.save(groups, first=True)
            except BaseException:
                written.discard_empty()
                raise
        with self._held if written is not None else nullcontext():
            try:
                self._spread(executor, patience)
            finally:
                if written is not None:
                    written.save(groups)
        self.heard = list(dict.fromkeys(m for g in groups if g.latest for m in g.latest.messages))
        self.heard += self.remarks
        self.kept = complete(groups)

    def _spread(self, executor: Executors, patience: float) -> None:
        mover, groups = self.mover, self.groups
        planned = sum(group.warmup_steps + mover.num_samples for group in groups)
        seconds = spread.SECONDS
        if self.checkpoints is not None:
            seconds = min(seconds, self.checkpoints.every)
        with progress(planned, "Warmup", hidden=mover.hides_progress) as bar:
            goals = self._first_goal(), self._next_goal
            moving = Spread(
                executor, groups, mover.num_samples, patience, bar, *goals, seconds, self._look
            )
            try:
                moving.run()
            except BaseException as error:  # noqa: BLE001  # raised again, once draws are safe
                self.stopped = error
        self.stopped = self.stopped or moving.error
        self.remarks = moving.remarks

    def _look(self) -> None:
        """Writes a checkpoint if it is time; ends the run if a signal was held back."""
        if self.checkpoints is not None and self.checkpoints.is_time:
            self.checkpoints.save(self.groups)
        if self._held.came:
            raise KeyboardInterrupt

    def draws(self) -> Draws:
        """The draws of the groups that are kept."""
        return self._drawn(self.kept)

    def warmup_draws(self) -> Draws | None:
        """The same of the warm-up, if they are kept."""
        if self.mover.save_warmup and all(g.warm or g.written[WARM] for g in self.kept):
            return self._drawn(self.kept, WARM)
        return None

    def ended_early(self) -> dict[str, Draws]:
        """The draws of groups that are not kept, by their names; says so of those without fault."""
        ended = {}
        for group in self.groups:
            if (group.draws or group.written[""]) and group not in self.kept:
                ended[group.name] = self._drawn([group])
                if group.fault is None:
                    told = f"{group.name} came to {group.made} draws, which `ended_early` has"
                    self.heard.append(f"{told}: too few to cut all others to their number.")
        return ended

    def close(self) -> None:
        """Ends the writing of the run."""
        if self.checkpoints is not None:
            self.checkpoints.end(self.groups)

    def _drawn(self, groups: list[Group], prefix: str = "") -> Draws:
        if self.checkpoints is not None:
            return self.checkpoints.draws(groups, prefix)
        return Draws.join([Draws.follow(group.parts(prefix)) for group in groups])

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
        """How many draws all groups are to make before `stop_when` is asked again."""
        stop_when = self.mover.stop_when
        if made == self.mover.num_samples or stop_when is None:
            return None
        going = [group for group in self.groups if group.fault is None]
        if going:
            draws = self._drawn(going)
            self._so_far.update(made, lambda: draws)
            if stop_when(self._so_far):
                return None
        return self._goal_after(made)

    def _first_goal(self) -> int:
        """How many they are to make before it is asked for the next time; all if it never is."""
        if self.mover.stop_when is None:
            return self.mover.num_samples
        goal, furthest = self._goal_after(0), max(group.made for group in self.groups)
        while goal < furthest:
            goal = self._goal_after(goal)
        return goal

    def _goal_after(self, made: int) -> int:
        return min(self.mover.num_samples, max(FEWEST, math.ceil(GROWTH * made)))
