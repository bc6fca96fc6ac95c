"""Groups of chains spread over the workers of an executor, segment by segment.

A group whose worker is lost makes its segment again. Which of several groups has cost the worker
is not known, so that those that were under way are tried one at a time; a group that loses its
worker three times when it is alone ends with the draws it has.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pyro_hamflow.mcmc.adaptation.window import Findings
from pyro_hamflow.mcmc.executors import Executors, like
from pyro_hamflow.mcmc.groups import Group
from pyro_hamflow.mcmc.segment import Segment, make_segment, packed
from pyro_hamflow.progress import Bar

SECONDS = 10.0  # of a segment: what a lost worker costs at most
_MOST_LOSSES = 3  # of a group's workers, while it was alone
_GLANCE = 0.5  # seconds, after which it is looked whether a wait has been too long


@dataclass
class _Await:
    """A segment that is under way."""

    group: Group
    since: float
    alone: bool


class Spread:
    """Moves groups to the end of their run.

    Arguments:
        executor: Where segments are made; or what makes such a thing, when one is broken.
        groups: The groups.
        num_samples: How many draws each is to make.
        patience: For how many seconds nothing may come back, before what is awaited is lost.
        bar: Is told how far they all are.
        goal: How many draws each is to make before it is asked how to go on.
        next_goal: Is asked, with the number of draws that all groups have made: up to how many they
            go on; none at the end of the run.
        seconds: How long a segment is.
        look: Is called now and then, whatever has come back.

    Attributes:
        remarks: What there is to be said of lost workers.
        error: What was raised by the model or a function of the user's in a worker.
    """

    def __init__(
        self,
        executor: Executors,
        groups: list[Group],
        num_samples: int,
        patience: float,
        bar: Bar,
        goal: int,
        next_goal: Callable[[int], int | None],
        seconds: float,
        look: Callable[[], None],
    ) -> None:
        self._make = executor if not isinstance(executor, Executor) else None
        self._executor = executor if isinstance(executor, Executor) else executor()
        self._own = not isinstance(executor, Executor)
        self.groups = groups
        self.num_samples = num_samples
        self.patience = patience
        self.bar = bar
        self.next_goal = next_goal
        self.seconds = seconds
        self.look = look
        self.error: BaseException | None = None
        self._awaited: dict[Future[bytes], _Await] = {}
        self._ready = deque(group for group in self._going if not group.waits)
        self._suspects: deque[Group] = deque()
        self._goal: int | None = goal
        self._attempts = 0
        self._heard = time.monotonic()
        self._lost: dict[str, int] = {}

    def run(self) -> None:
        """Moves all groups to their end; an interruption keeps what has come back so far."""
        try:
            while self._goal is not None and self.error is None and self._going:
                self._share()
                self._submit()
                self._collect(_GLANCE)
                self._give_up_what_is_overdue()
                self._look_at_goal()
                self.look()
        finally:
            try:
                self._end()
            finally:
                self._shut_down()

    @property
    def remarks(self) -> list[str]:
        """What there is to be said of lost workers."""
        told = [
            f"Workers were lost {count} time{'s' if count > 1 else ''} ({reason}): the segments "
            "that they were at were made again."
            for reason, count in self._lost.items()
        ]
        for group in self.groups:
            if group.fault is not None:
                told.append(
                    f"{group.name} ended after {group.made} of {self.num_samples} draws, which "
                    f"`ended_early` has: {group.fault}."
                )
        return told

    @property
    def _going(self) -> list[Group]:
        return [g for g in self.groups if g.fault is None and g.made < self.num_samples]

    # --- submitting -------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Submits what may be under way: all that is ready, or one of those that are suspected."""
        if self._suspects:
            if not self._awaited:
                self._submit_group(self._suspects.popleft(), alone=True)
            return
        while self._ready and not self._suspects:
            self._submit_group(self._ready.popleft(), alone=False)

    def _share(self) -> None:
        """Lets groups that wait for each other go on, with what all of them have found."""
        waiting = [group for group in self._going if group.waits]
        if not waiting or self._awaited or self._suspects or self._ready:
            return
        parts = [group.saved.findings for group in waiting if group.saved is not None]
        findings = Findings.joined([part for part in parts if part is not None])
        for group in waiting:
            group.findings = findings
        self._ready.extend(waiting)

    def _submit_group(self, group: Group, *, alone: bool) -> None:
        self._attempts += 1
        saved = None if group.saved is None else packed(group.saved)
        findings = None if group.findings is None else packed(group.findings)
        assert self._goal is not None
        how = (self.seconds, self._goal, self._attempts)
        segment = partial(make_segment, group.task, saved, findings, *how)
        for fresh in (False, True):
            try:
                future = self._executor.submit(segment)
            except Exception as error:  # noqa: BLE001  # what executors raise differs
                if fresh or not self._renew():
                    group.fault = f"the executor takes no more work ({_words(error)})"
                    return
            else:
                self._awaited[future] = _Await(group, time.monotonic(), alone)
                return

    def _renew(self, *, hanging: bool = False) -> bool:
        """Exchanges a broken executor for another like it; says whether that could be done."""
        try:
            made = like(self._executor) if self._make is None else self._make()
        except Exception:  # noqa: BLE001  # what executors raise differs
            return False
        self._shut_down(kill=hanging)
        self._executor, self._own = made, True
        return True

    def _shut_down(self, *, kill: bool = False) -> None:
        """Shuts down an executor that was made here; its processes are ended if they hang."""
        if not self._own:
            return
        processes = list((getattr(self._executor, "_processes", None) or {}).values())
        with suppress(Exception):  # what executors raise differs
            self._executor.shutdown(wait=False)
        for process in processes if kill else ():
            process.kill()

    # --- what comes back --------------------------------------------------------------------------

    def _collect(self, seconds: float) -> None:
        """Takes in the segments that have come back, after some seconds at most."""
        if not self._awaited:
            return
        come, _ = wait(self._awaited, seconds, FIRST_COMPLETED)
        for future in come:
            self._heard = time.monotonic()
            self._take(self._awaited.pop(future), future)
        self._show()

    def _take(self, awaited: _Await, future: Future[bytes]) -> None:
        group = awaited.group
        try:
            lost = future.exception(0)
        except CancelledError as error:
            lost = error
        if lost is not None:
            self._lose(awaited, _words(lost))
            return
        try:
            segment: Segment = pickle.loads(future.result(0))
        except Exception as error:  # noqa: BLE001  # an executor of a kind of its own
            self._lose(awaited, _words(error))
            return
        group.take(segment)
        group.losses = 0
        if segment.error is not None:
            self.error = self.error or segment.error
        elif group.made < self.num_samples and not group.waits:
            self._ready.append(group)

    def _lose(self, awaited: _Await, reason: str) -> None:
        """A worker was lost: its group makes the segment again, alone, or ends."""
        group = awaited.group
        group.losses += awaited.alone
        if group.losses == _MOST_LOSSES:
            group.fault = f"its worker was lost {_MOST_LOSSES} times ({reason})"
        else:
            self._lost[reason] = self._lost.get(reason, 0) + 1
            self._suspects.append(group)

    def _give_up_what_is_overdue(self) -> None:
        """Takes for lost what has not come back though nothing else came either."""
        now = time.monotonic()
        overdue = [
            (future, awaited)
            for future, awaited in self._awaited.items()
            if now - max(self._heard, awaited.since) > self.patience
        ]
        for future, awaited in overdue:
            del self._awaited[future]
            future.cancel()
            self._lose(awaited, f"nothing came back for {self.patience:g} seconds")
        if overdue:  # workers that hang would be asked again
            self._renew(hanging=True)

    def _look_at_goal(self) -> None:
        """Asks how to go on, once all groups have come to where they were to come."""
        goal = self._goal
        assert goal is not None
        going = self._going
        if self._awaited or self._suspects or any(group.made < goal for group in going):
            waiting = [group for group in self._ready if group.made >= goal]
            for group in waiting:
                self._ready.remove(group)
            return
        self._goal = self.next_goal(goal)
        self._ready = deque(going)

    def _show(self) -> None:
        """Tells how far all groups are together."""
        self.bar.total = sum(group.warmup_steps + self.num_samples for group in self.groups)
        done = sum(group.iteration + group.made for group in self.groups)
        ended = len(self.groups) - len(self._going)
        warming = any(group.made == 0 for group in self._going)
        self.bar.set_description("Warmup" if warming else "Sample", refresh=False)
        self.bar.set_postfix(refresh=False, groups=f"{ended} of {len(self.groups)} done")
        self.bar.update(done - self.bar.n)

    def _end(self) -> None:
        """Calls back what has not begun, and waits a while for the rest."""
        for future in list(self._awaited):
            if future.cancel():
                del self._awaited[future]
        ends = time.monotonic() + 2.0 * self.seconds
        while self._awaited and time.monotonic() < ends:
            self._collect(_GLANCE)


def _words(error: BaseException) -> str:
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
