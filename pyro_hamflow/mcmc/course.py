"""The course of a run in this process: chains come to its end, or to where it is interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn

from pyro.util import get_rng_state, set_rng_state

from pyro_hamflow.mcmc.adaptation.base import Phase
from pyro_hamflow.mcmc.chains import Chains
from pyro_hamflow.mcmc.checkpoint import Checkpoints, Progress, collected
from pyro_hamflow.mcmc.draws import Draws, Record
from pyro_hamflow.mcmc.moving import Mover
from pyro_hamflow.mcmc.packing import StoreGone
from pyro_hamflow.mcmc.stopping import RunSoFar
from pyro_hamflow.mcmc.writer import WARM
from pyro_hamflow.process import HeldSignals, random_state_kept
from pyro_hamflow.progress import progress


class Left(NamedTuple):
    """What a run left that was interrupted in its warm-up."""

    chains: Chains
    phase: Phase  # of the kernel; another one than the chains' where it was interrupted on its way
    random_states: dict[str, Any]
    checkpoints: Checkpoints | None

    def take_up(self, mover: Mover, *, seeded: bool) -> Chains | None:
        """The chains whose warm-up was interrupted, at their last whole iteration.

        None if other data are given, or the kernel has done something else since.
        """
        kernel, chains = mover.kernel, self.chains
        if kernel.phase is not self.phase:
            return None
        potential = kernel.potential
        with random_state_kept():
            if kernel.prepare(mover.args, mover.kwargs) is not potential:
                return None
        kernel._phase, state = chains.begun()
        chains.state = kernel.phase.transition.state_at(state.position, state.noise)
        if seeded:
            set_rng_state(self.random_states)
        return chains


class Course:
    """Moves chains to the end of a run, at once or one after the other, and keeps their draws.

    Arguments:
        mover: Moves them.
        is_vectorized: Whether they move at once.
        settings: What a run that goes on from a checkpoint is set up with.
        checkpoints: Writes the run, if it is written.
        heard: What the kernel has said so far.

    Attributes:
        finished: The chains that have draws.
        stopped: What has ended the run before its time.
    """

    def __init__(
        self,
        mover: Mover,
        settings: dict[str, Any],
        checkpoints: Checkpoints | None,
        heard: Sequence[str] = (),
        *,
        is_vectorized: bool,
    ) -> None:
        self.mover = mover
        self.heard = list(heard)
        self.finished: list[Chains] = []
        self.stopped: BaseException | None = None
        self._settings = settings
        self._checkpoints = checkpoints
        self._is_vectorized = is_vectorized
        self._so_far = RunSoFar(time.monotonic())

    def go_on(self, finished: list[Chains], left: Chains | None) -> None:
        """Moves chains to the end of the run.

        Arguments:
            finished: The chains that have come there.
            left: Those that are on their way, if any are.

        Raises:
            StoreGone: If the run is written, and can be no more.
        """
        mover, self.finished = self.mover, finished
        for number in range(len(finished), 1 if self._is_vectorized else mover.num_chains):
            chain = None if self._is_vectorized else number
            self._chains, left = left or mover.new_chains(chain), None
            try:
                self._advance(self._chains, chain)
            except StoreGone:  # and all draws with it
                raise
            except BaseException as error:  # noqa: BLE001  # raised again, once draws are safe
                self.stopped = error
            self.heard += [m for m in mover.kernel.messages if m not in self.heard]
            if self._chains.kept.count:
                finished.append(self._chains)
            if self.stopped is not None:
                break

    def drop_just_begun(self) -> int:
        """Drops a chain just begun, or all would be cut to its length; says how far it had come."""
        made = self.finished[-1].kept.made
        if made * len(self.finished) < self.mover.num_samples * (len(self.finished) - 1):
            self.finished.pop()
        return made

    def draws(self) -> Draws:
        """The draws of all chains."""
        return self._collected([chains.kept for chains in self.finished])

    def warmup_draws(self) -> Draws | None:
        """The same of the warm-up, if they are kept."""
        if self.finished:
            wanted = self.mover.save_warmup and all(c.warm.count for c in self.finished)
            return self._collected([c.warm for c in self.finished], WARM) if wanted else None
        warm = self._chains.warm
        return self._collected([warm], WARM) if self._chains.iteration and warm.count else None

    def close(self) -> None:
        """Ends the writing of the run."""
        if self._checkpoints is not None:
            self._checkpoints.close(max(chains.kept.stored for chains in self.finished))

    def left(self) -> Left | None:
        """What warm-up has found, so that the next run goes on from there."""
        if not self._chains.iteration:
            return None
        phase = self.mover.kernel.phase
        return Left(self._chains, phase, get_rng_state(), self._checkpoints)

    def raise_without_draws(self, stopped: BaseException) -> NoReturn:
        """Lets others have the store, and raises what has ended the run before its first draw."""
        if self._checkpoints is not None:
            self._checkpoints.store.close()
        if not isinstance(stopped, KeyboardInterrupt):
            raise stopped
        made = self._chains.iteration
        raise KeyboardInterrupt(
            "interrupted before the first draw"
            + f", after {made} iterations of warm-up: `run` goes on from there" * bool(made)
        ) from stopped

    def _collected(self, records: Sequence[Record], prefix: str = "") -> Draws:
        """The draws of all chains, those that were written included."""
        written = self._checkpoints
        if written is None:
            return Draws.join([record.stacked() for record in records])
        return collected(written, records, at_once=self._is_vectorized, prefix=prefix)

    def _advance(self, chains: Chains, chain: int | None) -> None:
        """Moves chains to the end of their run: all at once, or one of them."""
        writes = self._checkpoints is not None
        if chains.state is None:
            try:
                self.mover.begin(chains, chain)
                self._save(chains, chain, first=True, waits=True)
            except BaseException:
                if self._checkpoints is not None:
                    self._checkpoints.discard_empty()
                raise
        with HeldSignals() if writes else nullcontext() as held:
            try:
                self._move_all(chains, chain, held)
            finally:
                if chains.is_whole:
                    self._save(chains, chain, waits=True)

    def _move_all(self, chains: Chains, chain: int | None, held: HeldSignals | None) -> None:
        mover, kernel = self.mover, self.mover.kernel
        hidden = mover.hides_progress
        planned = chains.iteration + kernel.warmup_left + mover.num_samples
        with progress(planned, mover.stage(chains), hidden=hidden) as bar:
            bar.update(chains.iteration)
            while not self._has_enough(chains):
                bar.set_description(mover.stage(chains), refresh=False)
                before = chains.iteration + chains.kept.made
                info = mover.move(chains)
                made = chains.iteration + chains.kept.made
                bar.total = chains.iteration + kernel.warmup_left + mover.num_samples
                shown = max(1, bar.total // 200)
                if not hidden and made // shown > before // shown:
                    bar.set_postfix(refresh=False, **kernel.progress(info, chains.kept))
                bar.update(made - before)
                if self._checkpoints is not None and self._checkpoints.is_due(kernel):
                    self._save(chains, chain)
                if held is not None and held.came:
                    raise KeyboardInterrupt

    def _save(
        self, chains: Chains, chain: int | None, *, first: bool = False, waits: bool = False
    ) -> None:
        """Writes a checkpoint, if any are written."""
        if self._checkpoints is None or chains.state is None:
            return
        mover, counts = self.mover, self.mover.counts
        ended = [[done.kept.stored, done.warm.stored] for done in self.finished]
        times = counts.warmup_steps, counts.warmup_time, counts.sampling_time
        run = Progress(self._settings, chain, ended, self.heard, *times)
        of = mover.kernel, chains, run, mover.args, mover.kwargs
        self._checkpoints.save(*of, first=first, waits=waits)

    def _has_enough(self, chains: Chains) -> bool:
        """Whether all draws are made, or the user's function says that they are enough."""
        made, kept, mover = chains.kept.made, chains.kept, self.mover
        if made == mover.num_samples or not made or mover.stop_when is None:
            return made == mover.num_samples
        self._so_far.update(made, lambda: self._collected([kept]))
        return bool(mover.stop_when(self._so_far))
