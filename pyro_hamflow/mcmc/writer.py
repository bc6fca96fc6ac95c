"""Writes to a run's store now and then, and goes on where that fails."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable

from pyro_hamflow.mcmc.files import state_numbers, told
from pyro_hamflow.mcmc.storable import Unstorable
from pyro_hamflow.mcmc.store import Store

WARM = "warmup_"  # before the names of groups that hold draws of the warm-up
GROUPS = ("unconstrained_posterior", "sample_stats", "posterior")


class Writer:
    """Writes to a run's store now and then.

    Arguments:
        store: Where to.
        every: How many seconds lie between two times.
        num_chains: How many chains the run has in all.
    """

    def __init__(self, store: Store, every: float, num_chains: int) -> None:
        self.store = store
        self.every = every
        self.num_chains = num_chains
        self._last = time.monotonic()
        self._has_failed = False

    @property
    def is_time(self) -> bool:
        """Whether the last time is so long ago."""
        return time.monotonic() - self._last >= self.every

    def attempt(self, write: Callable[[], None], *, first: bool, waits: bool) -> bool:
        """Writes, and says whether that went well; the run goes on if not, but for the first time.

        Arguments:
            write: What to do.
            first: Whether the run has just begun: then it ends where nothing can be written.
            waits: Whether to wait for the disk.
        """
        well = True
        try:
            with told(self.store.path):
                write()
                if waits and self.store.settle():
                    self._has_failed = False
        except (OSError, Unstorable) as error:
            if first:
                raise
            well = self._tell(error)
        self._last = time.monotonic()
        return well

    def is_settled(self) -> bool:
        """Waits for the disk, and says whether what was written is there."""
        try:
            with told(self.store.path):
                if self.store.settle():
                    self._has_failed = False
        except OSError as error:
            return self._tell(error)
        return True

    def _tell(self, error: Exception) -> bool:
        """Says that nothing could be written, once until it can; not well."""
        if not self._has_failed:
            warnings.warn(
                f"{error}: the run goes on, and it is tried again after {self.every:g} seconds",
                RuntimeWarning,
                stacklevel=3,
            )
        self._has_failed = True
        return False

    def close(self, draws: int) -> None:
        """Gives up room beyond so many draws, and lets other processes have the store."""
        for group in GROUPS if draws else ():
            try:
                self.store.resize(group, draws)
            except OSError:  # nothing is lost: draws are counted by the state
                break
        self.store.close()

    def discard_empty(self) -> None:
        """Removes the store of a run that could not begin."""
        if not state_numbers(self.store.path):
            self.store.close()
            shutil.rmtree(self.store.path, ignore_errors=True)
