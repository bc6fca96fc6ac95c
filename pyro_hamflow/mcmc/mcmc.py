"""How chains are run: warm-up, draws, progress, and what is kept."""

from __future__ import annotations

import copy
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.mcmc.util import select_samples
from pyro.infer.util import is_validation_enabled
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hamflow import arviz_bridge
from pyro_hamflow.checks import flag, positive, whole
from pyro_hamflow.mcmc.adaptation.base import Phase
from pyro_hamflow.mcmc.chains import Chains
from pyro_hamflow.mcmc.checkpoint import WARM, Checkpoints, Progress, collected
from pyro_hamflow.mcmc.draws import Draws, Record
from pyro_hamflow.mcmc.groups import Group, complete, joined, seeds, split
from pyro_hamflow.mcmc.kernels.base import Kernel, meaningless
from pyro_hamflow.mcmc.messages import FEWEST, report
from pyro_hamflow.mcmc.resume import Found, latest
from pyro_hamflow.mcmc.segment import Task, packed
from pyro_hamflow.mcmc.snapshot import capture, take_up
from pyro_hamflow.mcmc.spread import Executors, Spread
from pyro_hamflow.mcmc.stopping import RunSoFar, StopWhen
from pyro_hamflow.mcmc.store import Store
from pyro_hamflow.mcmc.transitions.base import Info
from pyro_hamflow.model.rounding import describe_ends
from pyro_hamflow.process import HeldSignals, undisturbed
from pyro_hamflow.progress import progress

_LARGEST_SEED = 2**32 - 1  # that NumPy takes
_GROWTH = 1.1  # of the draws of groups, after which `stop_when` is asked
_LONGEST = 4  # times the fewest iterations of warm-up
_METHODS = ("vectorized", "sequential")


class _Left(NamedTuple):
    """What a run left that was interrupted in its warm-up."""

    chains: Chains
    phase: Phase  # of the kernel; another one than the chains' where it was interrupted on its way
    random_states: dict[str, Any]


class MCMC:
    """Runs a kernel, with the surface of :class:`pyro.infer.MCMC`, vectorised chains, statistics.

    A run that is interrupted keeps the draws it has made: from the keyboard, with a warning; by an
    exception of the model or of ``hook_fn``, which is raised again. Before the first draw, it keeps
    what warm-up has found, and :meth:`run` goes on from there if it is called with the same data
    (a new object starts anew). What its statistics mean for the result is told at the end, in a
    sentence each, and nothing if all is well. Runs in several threads take turns.

    Arguments:
        kernel: One of this package's kernels.
        num_samples: Draws of each chain that are kept.
        warmup_steps: Iterations before them, in which the kernel is tuned. If not given, as many as
            it takes: chains that move at once are tuned on together and need fewer, so at least
            100, and 600 shared among them; and up to four times that, until the last half of them
            has converged. After a run, the number that was made.
        initial_params: Unconstrained starting values, chains first (with one chain, the chain
            dimension may be left out); found near the pilot or near zero if not given.
        num_chains: How many chains.
        hook_fn: Called as ``hook_fn(kernel, params, stage, i)`` after each iteration, with
            unconstrained values (chains first, where several move at once) and the stage,
            ``"Warmup"`` or ``"Sample"``; of chains that run one after the other, ``"Warmup [0]"``.
        mp_context: Has no meaning here, where chains share a process.
        disable_progbar: Whether to show no progress: else it is a bar, or where nobody watches (in
            a file, or where ``CI`` is set) a line each half minute.
        disable_validation: Whether the model is run without the checks of its distributions. If
            not, it is run with them once before sampling, at a draw from the prior; if None, where
            Pyro's own setting says so.
        transforms: The kernel's ``transforms``, where it has none of its own.
        save_params: The sites that draws, diagnostics and summary are of; all if not given.
        chain_method: ``"vectorized"`` moves all chains at once and tunes on all of them;
            ``"sequential"`` runs one after the other.
        seed: Makes a run repeat itself, and leaves random states (torch's, NumPy's, Python's) as
            they were; torch's current one is used, and goes on, if not given.
        save_warmup: Whether to keep the draws of the warm-up too.
        checkpoint: Where draws are written as they come, and what is needed to go on from there
            (:meth:`resume`): a directory that is not there yet. Memory then does not grow with the
            number of draws; recovered sites are read when they are asked for. A run that is ended
            by Ctrl-C or SIGTERM first writes one, after the iteration under way.
        checkpoint_every: Seconds between two of them; there is another at the end of warm-up.
        thin: Of how many draws one, the last, is kept, with its statistics.
        keep: Which recovered local sites are kept; if not given, all if they take a gigabyte (2^30
            bytes) at most, and none if they take more, which is told. Parameters always are.
        stop_when: Called after each draw of all chains with what is known of the run
            (:class:`~pyro_hamflow.mcmc.stopping.RunSoFar`); where it says yes, the run is over,
            with fewer than ``num_samples`` draws. :func:`~pyro_hamflow.ess_above`,
            :func:`~pyro_hamflow.rhat_below` and :func:`~pyro_hamflow.time_over` make some.
        executor: Moves chains in other processes, or on other machines: any
            :class:`concurrent.futures.Executor`, as a pool of processes, or dask's
            ``client.get_executor()``; or a function that makes one, which is called again where one
            is broken. Draws are the same whichever it is, and however many workers it has. A
            worker that is lost costs ten seconds' work; a group whose worker is lost three times
            ends, and a message tells which (``ended_early`` has the draws of such groups). Model
            and ``hook_fn`` are pickled (by cloudpickle, if it is installed) and run in the workers.
        chains_per_worker: How many chains make a group with an ``executor``: they move at once,
            and are tuned together, apart from other groups.
        worker_timeout: After how many seconds in which an executor brings nothing back what it was
            to bring is taken for lost.

    Raises:
        TypeError: If the kernel is none of this package's, or starting values have no names.
        ValueError: If a number lies outside its range, or a kernel of a ``potential_fn`` has no
            starting values.

    Example:
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> mcmc = MCMC(HMC(model), num_samples=100, num_chains=2, seed=0, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples(group_by_chain=True)["x"].shape
        torch.Size([2, 100])
    """

    def __init__(
        self,
        kernel: Kernel,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        hook_fn: Callable[..., None] | None = None,
        mp_context: str | None = None,
        disable_progbar: bool = False,  # noqa: FBT001, FBT002  # Pyro's order, up to the star
        disable_validation: bool | None = True,  # noqa: FBT001, FBT002
        transforms: Mapping[str, Any] | None = None,
        save_params: Sequence[str] | None = None,
        *,
        chain_method: str = "vectorized",
        seed: int | None = None,
        save_warmup: bool = False,
        stop_when: StopWhen | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 60.0,
        thin: int = 1,
        keep: Sequence[str] | None = None,
        executor: Executors | None = None,
        chains_per_worker: int = 1,
        worker_timeout: float = 3600.0,
    ) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(
                f"`kernel` is a {type(kernel).__name__}: expected a kernel of pyro_hamflow; other "
                "kernels run in pyro.infer.MCMC"
            )
        for name, number, least in (
            ("num_samples", num_samples, 1),
            ("warmup_steps", 0 if warmup_steps is None else warmup_steps, 0),
            ("num_chains", num_chains, 1),
        ):
            whole(name, number, least)
        if seed is not None:
            whole("seed", seed, 0, _LARGEST_SEED)
        flag("save_warmup", save_warmup)
        flag("disable_progbar", disable_progbar)
        if hook_fn is not None and not callable(hook_fn):
            raise TypeError(f"`hook_fn` is {hook_fn!r}: expected a function")
        if stop_when is not None and not callable(stop_when):
            raise TypeError(f"`stop_when` is {stop_when!r}: expected a function of a run so far")
        if stop_when is not None and chain_method == "sequential" and num_chains > 1:
            raise ValueError(
                "`stop_when` is given with `chain_method='sequential'`: expected 'vectorized', for "
                "it looks at all chains at once"
            )
        if not isinstance(initial_params, Mapping | None):
            raise TypeError(
                f"`initial_params` is {initial_params!r}: expected values of each site by name"
            )
        whole("chains_per_worker", chains_per_worker, 1)
        positive("worker_timeout", worker_timeout)
        if executor is not None and not (isinstance(executor, Executor) or callable(executor)):
            raise TypeError(
                f"`executor` is {executor!r}: expected a concurrent.futures.Executor, or a "
                "function that makes one"
            )
        if executor is not None and chain_method == "sequential":
            raise ValueError(
                "`executor` is given with `chain_method='sequential'`: expected 'vectorized', as "
                "the chains of each group move at once"
            )
        if executor is not None and checkpoint is not None:
            raise ValueError(
                "`checkpoint` is given with `executor`: expected one of them, as checkpoints are "
                "written of chains in this process"
            )
        if chain_method not in _METHODS:
            raise ValueError(f"`chain_method` is {chain_method!r}: expected one of {_METHODS}")
        if kernel.source.potential_fn is not None and initial_params is None:
            raise ValueError(
                "`initial_params` is None: expected values to start from, as the names and shapes "
                "of the parameters of `potential_fn` are theirs"
            )
        positive("checkpoint_every", checkpoint_every)
        whole("thin", thin, 1, num_samples)
        if isinstance(keep, str):
            raise TypeError(f"`keep` is {keep!r}: expected a list of names of sites")
        meaningless("mp_context", given=mp_context is not None)
        if transforms is not None:
            kernel.transform_by(transforms)
        self.kernel = kernel
        self.num_samples = num_samples
        self.num_chains = num_chains
        self.initial_params = initial_params
        self.chain_method = chain_method
        pooled = num_chains if chain_method == "vectorized" else 1
        self._pool(pooled if executor is None else min(pooled, chains_per_worker))
        self._given_warmup_steps = warmup_steps
        self.warmup_steps = self._planned_warmup_steps
        self.seed = seed
        self.save_warmup = save_warmup
        self.stop_when = stop_when
        self.checkpoint = None if checkpoint is None else os.fspath(checkpoint)
        self.checkpoint_every = checkpoint_every
        self.thin = thin
        self.keep = None if keep is None else list(keep)
        self.executor = executor
        self.chains_per_worker = chains_per_worker
        self.worker_timeout = worker_timeout
        self.ended_early: dict[str, Draws] = {}
        self._checkpoints: Checkpoints | None = None
        self._finished: list[Chains] = []
        self.hook_fn = hook_fn
        self.disable_progbar = disable_progbar
        self.disable_validation = disable_validation
        self.save_params = save_params
        self.interrupted = False
        self.messages: list[str] = []
        self.report: dict[str, Any] = {}
        self.sampling_time = 0.0
        self.warmup_time = 0.0
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._draws: Draws | None = None
        self._warmup_draws: Draws | None = None
        self._samples: dict[str, Tensor] | None = None
        self._left: _Left | None = None

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Warms up and draws.

        Arguments:
            args: The model's arguments.
            kwargs: The model's keyword arguments.

        Raises:
            ValueError: Before any sampling, if model, data or starting values have faults.
        """
        if self.executor is not None:
            self._run_spread(self.executor, args, kwargs)
            return
        with undisturbed(self.seed):
            self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs
        self._validate()
        left = self._taken_up()
        if left is None:
            self.warmup_steps = 0
            self.sampling_time = self.warmup_time = 0.0
            self._checkpoints = None
            if self.checkpoint is not None:
                store = Store(self.checkpoint, new=True)
                self._checkpoints = Checkpoints(store, self.checkpoint_every, self.num_chains)
        elif self._checkpoints is not None:
            self._checkpoints.store.hold()
        self._heard: list[str] = []
        self._go_on([], left)

    def _go_on(self, finished: list[Chains], left: Chains | None) -> None:
        """Moves chains to the end of the run, and collects their draws.

        Arguments:
            finished: The chains that have come there.
            left: Those that are on their way, if any are.
        """
        self._draws = self._warmup_draws = self._samples = None
        self.interrupted = False
        self._so_far = RunSoFar(time.monotonic())
        vectorized = self.chain_method == "vectorized"
        self._finished = finished
        stopped: BaseException | None = None
        for chain in range(len(finished), 1 if vectorized else self.num_chains):
            chains, left = left or self._new_chains(None if vectorized else chain), None
            try:
                self._advance(chains, None if vectorized else chain)
            except BaseException as error:  # noqa: BLE001  # raised again, once draws are safe
                stopped = error
            self._heard += [m for m in self.kernel.messages if m not in self._heard]
            if chains.kept.count:
                finished.append(chains)
            if stopped is not None:
                break
        self.interrupted = stopped is not None
        if not finished:
            self._leave(chains, stopped)
        made = finished[-1].kept.made
        if made * len(finished) < self.num_samples * (len(finished) - 1):
            finished.pop()  # a chain just begun: all would be cut to its length
        self._draws = self._collected([chains.kept for chains in finished])
        if self.save_warmup and all(chains.warm.count for chains in finished):
            self._warmup_draws = self._collected([chains.warm for chains in finished], WARM)
        if self._checkpoints is not None:
            self._checkpoints.close([chains.kept for chains in finished])
            self._checkpoints = None
        self._tell()
        self._finished = []
        if stopped is not None:
            self._say_interrupted(stopped, made, stacklevel=4)

    # --- chains in other processes ----------------------------------------------------------------

    def _run_spread(
        self, executor: Executors, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Runs groups of chains where an executor takes them."""
        self._args, self._kwargs = args, kwargs
        self._draws = self._warmup_draws = self._samples = self._left = None
        self.interrupted, self.ended_early = False, {}
        self._so_far = RunSoFar(time.monotonic())
        with undisturbed(self.seed):
            self._validate()
            groups = self._groups()
        stopped: BaseException | None = None
        planned = sum(group.planned + self.num_samples for group in groups)
        with progress(planned, "Warmup", hidden=self.disable_progbar) as bar:
            goal = partial(self._next_goal, groups)
            spread = Spread(executor, groups, self.num_samples, self.worker_timeout, bar, goal)
            try:
                spread.run()
            except BaseException as error:  # noqa: BLE001  # raised again, once draws are safe
                stopped = error
        stopped = stopped or spread.error
        self.interrupted = stopped is not None
        self._heard = list(dict.fromkeys(m for g in groups if g.latest for m in g.latest.messages))
        self._heard += spread.remarks
        kept = complete(groups)
        if not kept:
            raise stopped or RuntimeError(" ".join(["no draw was made.", *spread.remarks]))
        self._collect(groups, kept)
        self._tell()
        if stopped is not None:
            self._say_interrupted(stopped, kept[0].made, stacklevel=4)

    def _groups(self) -> list[Group]:
        """The groups of the run, each with a run of its own; finds faults before any begins."""
        given = self.seed
        seed = int(torch.randint(_LARGEST_SEED, ())) if given is None else given
        with torch.random.fork_rng():  # so that workers find the parameters that the model makes
            self.kernel.prepare(self._args, self._kwargs, self._initial(None))
        self._refuse_unknown_sites()
        chains = split(self.num_chains, self.chains_per_worker)
        groups = []
        for numbers, own_seed in zip(chains, seeds(seed, len(chains)), strict=True):
            run = copy.copy(self)
            run.executor = run.stop_when = run.seed = None
            run._finished = []
            run.disable_progbar, run.num_chains = True, len(numbers)
            run._pool(len(numbers))
            if self.initial_params is not None and self.num_chains > 1:
                part = slice(numbers.start, numbers.stop) if len(numbers) > 1 else numbers.start
                run.initial_params = {n: v[part] for n, v in self.initial_params.items()}
            try:
                task = packed(Task(run, own_seed))
            except Exception as error:
                raise TypeError(
                    f"the run cannot be sent to workers ({error}): expected a model, kernel and "
                    "`hook_fn` that can be pickled; where cloudpickle is installed, those of a "
                    "script or a notebook can be, too"
                ) from error
            groups.append(Group(numbers.start, len(numbers), task, run._planned_warmup_steps))
        return groups

    def _next_goal(self, groups: list[Group], made: int) -> int | None:
        """How many draws all groups are to make before `stop_when` is asked."""
        if made == self.num_samples:
            return None
        if self.stop_when is None:
            return self.num_samples
        going = [group for group in groups if group.fault is None]
        if made and going:
            draws = joined(going, lambda group: group.draws)
            self._so_far.update(made, lambda: draws.position)
            if self.stop_when(self._so_far):
                return None
        return min(self.num_samples, max(FEWEST, math.ceil(_GROWTH * made)))

    def _collect(self, groups: list[Group], kept: list[Group]) -> None:
        """Takes the draws of groups, and what one of them has found."""
        self._draws = joined(kept, lambda group: group.draws)
        if self.save_warmup and all(group.warm for group in kept):
            self._warmup_draws = joined(kept, lambda group: group.warm)
        for group in groups:
            if group.draws and group not in kept:
                self.ended_early[group.name] = Draws.follow(group.draws)
                if group.fault is None:
                    told = f"{group.name} came to {group.made} draws, which `ended_early` has"
                    self._heard.append(f"{told}: too few to cut all others to their number.")
        self.warmup_steps = max(group.iteration for group in kept)
        self.warmup_time = sum(group.warmup_time for group in groups)
        self.sampling_time = sum(group.sampling_time for group in groups)
        saved = kept[0].saved
        self._finished = [Chains("", self.num_chains)]
        if saved is not None:
            self._finished[0].kept = saved.kept
            with undisturbed():
                capture(self.kernel, self._args, self._kwargs, saved.source)
                take_up(self.kernel, saved.found)

    def _say_interrupted(self, stopped: BaseException, made: int, stacklevel: int) -> None:
        told = f"interrupted: {made} of {self.num_samples} draws were made and are kept"
        if not isinstance(stopped, KeyboardInterrupt):
            stopped.add_note(told)
            raise stopped
        warnings.warn(told, RuntimeWarning, stacklevel=stacklevel)

    # --- chains in this process -------------------------------------------------------------------

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *args: Any,
        num_samples: int | None = None,
        at: int | None = None,
        hook_fn: Callable[..., None] | None = None,
        stop_when: StopWhen | None = None,
        disable_progbar: bool = False,
        **kwargs: Any,
    ) -> MCMC:
        """Goes on with a run from its latest checkpoint, to the draws that it would have made.

        They are the same, bit for bit, where torch, the machine and its precision are; but for
        kernels whose choices depend on measured times, and programs that are compiled while they
        run (``jit_compile``). The caller's random state is left as it is.

        Arguments:
            path: Where checkpoints were written.
            model: The model; or the kernel, made as it was before, where this was given something
                that no file can hold, as a function or a flow.
            args: The model's arguments.
            num_samples: How many draws of each chain there are to be in the end; as many as before
                if not given.
            at: The number of a checkpoint that is not the latest.
            hook_fn: As in a new run; checkpoints hold no functions.
            stop_when: Likewise.
            disable_progbar: Whether to show no progress.
            kwargs: The model's keyword arguments.

        Returns:
            The run, at its end.

        Raises:
            OtherVersion: If what is there was written by another version of the format, or is none.
            DamagedCheckpoint: If the latest one is not as it was written; says which one is.
            OtherModel: If it is of another model or kernel.
            OtherData: If it is of other data.
        """
        with undisturbed(seed=0), latest(path, at) as found:
            settings = found.settings(num_samples)
            settings |= {"hook_fn": hook_fn, "stop_when": stop_when}
            kernel = found.kernel(model)
            mcmc = cls(kernel, **settings, disable_progbar=disable_progbar, checkpoint=path)
            mcmc._go_on_from(found, args, kwargs)
        return mcmc

    def _go_on_from(self, found: Found, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Goes on from a state that was found."""
        self._args, self._kwargs = args, kwargs
        run = found.progress
        chains = self._new_chains(run.chain)
        chains.kept = found.record("kept", self.num_samples, self.thin)
        chains.warm = found.record("warm", 0, self.thin)
        found.take_up(self.kernel, args, kwargs, chains)
        self._checkpoints = Checkpoints(found.store, self.checkpoint_every, self.num_chains)
        self._heard = list(run.heard)
        self.warmup_steps = run.warmup_steps
        self.warmup_time, self.sampling_time = run.warmup_time, run.sampling_time
        found.set_random_states()
        self._go_on(found.finished(), chains)

    def _new_chains(self, chain: int | None) -> Chains:
        if chain is None:
            return Chains("", self.num_chains)
        return Chains("" if self.num_chains == 1 else f" [{chain}]", 1)

    def _collected(self, records: Sequence[Record], prefix: str = "") -> Draws:
        """The draws of all chains, those that were written included."""
        written = self._checkpoints
        if written is None:
            return Draws.join([record.stacked() for record in records])
        if self.chain_method == "vectorized":
            return collected(written, records[0], None, prefix)
        parts = [collected(written, record, i, prefix) for i, record in enumerate(records)]
        return Draws.join(parts)

    def _leave(self, chains: Chains, stopped: BaseException | None) -> NoReturn:
        """Keeps what warm-up has found, so that the next run goes on from there."""
        assert stopped is not None
        if chains.iteration:
            self._left = _Left(chains, self.kernel.phase, get_rng_state())
            if chains.warm.count:
                self._warmup_draws = self._collected([chains.warm], WARM)
        if self._checkpoints is not None:
            self._checkpoints.store.close()
        if not isinstance(stopped, KeyboardInterrupt):
            raise stopped
        raise KeyboardInterrupt(
            "interrupted before the first draw"
            + (f", after {chains.iteration} iterations of warm-up: `run` goes on from there")
            * bool(chains.iteration)
        ) from stopped

    def _taken_up(self) -> Chains | None:
        """The chains whose warm-up was interrupted, at their last whole iteration.

        None if other data are given, or the kernel has done something else since.
        """
        left, self._left = self._left, None
        kernel = self.kernel
        if left is None or kernel.phase is not left.phase:
            return None
        potential = kernel.potential
        with torch.random.fork_rng():
            if kernel.prepare(self._args, self._kwargs) is not potential:
                return None
        chains = left.chains
        assert chains.phase is not None and chains.state is not None
        place = chains.state.position, chains.state.noise
        kernel._phase, chains.state = chains.phase, chains.phase.transition.state_at(*place)
        if self.seed is not None:
            set_rng_state(left.random_states)
        return chains

    def _validate(self) -> None:
        """Runs the model once with the checks of its distributions, if that is wanted."""
        model, wanted = self.kernel.model, self.disable_validation is False
        if model is None or not (
            wanted or (self.disable_validation is None and is_validation_enabled())
        ):
            return
        with torch.random.fork_rng(), poutine.block(), pyro.validation_enabled():
            poutine.trace(model).get_trace(*self._args, **self._kwargs).compute_log_prob()

    def _pool(self, num_chains: int) -> None:
        """Plans the warm-up of chains that are tuned together."""
        self._fewest_warmup_steps = 100 + math.ceil(600 / num_chains)

    @property
    def _planned_warmup_steps(self) -> int:
        given = self._given_warmup_steps
        return self._fewest_warmup_steps if given is None else given

    def _advance(self, chains: Chains, chain: int | None) -> None:
        """Moves chains to the end of their run: all at once, or one of them."""
        writes = self._checkpoints is not None
        if chains.state is None:
            try:
                self._begin(chains, chain)
                self._save(chains, chain, first=True)
            except BaseException:
                if self._checkpoints is not None:
                    self._checkpoints.discard_empty()
                raise
        with HeldSignals() if writes else nullcontext() as held:
            try:
                self._move_all(chains, chain, held)
            finally:
                if chains.is_whole:
                    self._save(chains, chain)

    def _move_all(self, chains: Chains, chain: int | None, held: HeldSignals | None) -> None:
        kernel = self.kernel
        hidden = self.disable_progbar
        planned = chains.iteration + kernel.warmup_left + self.num_samples
        with progress(planned, self._stage(chains), hidden=hidden) as bar:
            bar.update(chains.iteration)
            while not self._has_enough(chains):
                bar.set_description(self._stage(chains), refresh=False)
                before = chains.iteration + chains.kept.made
                info = self._move(chains)
                made = chains.iteration + chains.kept.made
                bar.total = chains.iteration + kernel.warmup_left + self.num_samples
                shown = max(1, bar.total // 200)
                if not hidden and made // shown > before // shown:
                    bar.set_postfix(refresh=False, **kernel.progress(info, chains.kept))
                bar.update(made - before)
                if self._checkpoints is not None and self._checkpoints.is_due(kernel):
                    self._save(chains, chain)
                if held is not None and held.came:
                    raise KeyboardInterrupt

    def _save(self, chains: Chains, chain: int | None, *, first: bool = False) -> None:
        """Writes a checkpoint, if any are written."""
        if self._checkpoints is None or chains.state is None:
            return
        ended = [[done.kept.stored, done.warm.stored] for done in self._finished]
        times = self.warmup_steps, self.warmup_time, self.sampling_time
        progress = Progress(self._settings, chain, ended, self._heard, *times)
        data = self._args, self._kwargs
        self._checkpoints.save(self.kernel, chains, progress, *data, first=first)

    @property
    def _settings(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint is set up with."""
        initial = self.initial_params
        return {
            "num_samples": self.num_samples,
            "warmup_steps": self._given_warmup_steps,
            "initial_params": initial
            and {name: torch.as_tensor(value) for name, value in initial.items()},
            "num_chains": self.num_chains,
            "disable_validation": self.disable_validation,
            "save_params": self.save_params and list(self.save_params),
            "chain_method": self.chain_method,
            "seed": self.seed,
            "save_warmup": self.save_warmup,
            "checkpoint_every": self.checkpoint_every,
            "thin": self.thin,
            "keep": self.keep,
        }

    def _begin(self, chains: Chains, chain: int | None) -> None:
        """Prepares the kernel, and finds where chains start."""
        kernel, planned = self.kernel, self._planned_warmup_steps
        kernel.planned_draws = self.num_samples
        kernel.hides_progress = self.disable_progbar
        given = self._given_warmup_steps
        kernel.most_warmup_steps = None if given is not None else _LONGEST * planned
        began = time.perf_counter()
        initial = self._initial(chain)
        chains.state = kernel.begin(chains.num_chains, planned, self._args, self._kwargs, initial)
        chains.phase = kernel.phase
        self._refuse_unknown_sites()
        chains.kept = Record(thin=self.thin, room=self.num_samples // self.thin, keep=self._keep)
        chains.warm = Record(thin=self.thin, keep=self._keep)
        self.warmup_time += time.perf_counter() - began

    def _has_enough(self, chains: Chains) -> bool:
        """Whether all draws are made, or the user's function says that they are enough."""
        made, kept = chains.kept.made, chains.kept
        if made == self.num_samples or not made or self.stop_when is None:
            return made == self.num_samples
        self._so_far.update(made, lambda: self._collected([kept]).position)
        return bool(self.stop_when(self._so_far))

    def _stage(self, chains: Chains) -> str:
        return ("Warmup" if self.kernel.warming else "Sample") + chains.label

    def _move(self, chains: Chains) -> Info:
        """One iteration: keeps what it leads to, and calls the user's function.

        Where nobody wants to see each draw, a kernel may make many at once.
        """
        kernel, began = self.kernel, time.perf_counter()
        assert chains.state is not None
        warming, stage = kernel.warming, self._stage(chains)
        chains.is_whole = False
        if not warming and self.hook_fn is None and self.stop_when is None:
            left = self.num_samples - chains.kept.made
            many = kernel.advance_many(chains.state, left)
            if many is not None:
                chains.state, info, draws = many
                chains.kept.extend(draws)
                chains.is_whole = True
                self.sampling_time += time.perf_counter() - began
                return info
        state, info = kernel.advance(chains.state)
        record, number = (
            (chains.warm, chains.iteration) if warming else (chains.kept, chains.kept.made)
        )
        if self.save_warmup or not warming:
            record.append(kernel.shown(state), info, kernel.step_size)
        chains.state, chains.phase = state, kernel.phase
        chains.iteration += warming
        chains.is_whole = True
        self.warmup_steps = max(chains.iteration, self.warmup_steps)
        if self.hook_fn is not None:
            position = kernel.shown(state).position
            moved = position if chains.num_chains > 1 else position[0]
            self.hook_fn(kernel, kernel.potential.unravel(moved), stage, number)
        seconds = time.perf_counter() - began
        if warming:
            self.warmup_time += seconds
        else:
            self.sampling_time += seconds
        return info

    def _refuse_unknown_sites(self) -> None:
        names = [site.name for site in self.kernel.potential.sites]
        unknown = sorted(set(self.save_params or ()) - set(names))
        if unknown:
            raise ValueError(f"`save_params` names {unknown}: expected names of the sites {names}")
        estimates = self.kernel.potential.recovery.estimates
        names += [name for estimate in estimates for name in estimate.group.sites]
        unknown = sorted(set(self.keep or ()) - set(names))
        if unknown:
            raise ValueError(f"`keep` names {unknown}: expected names of the sites {names}")

    @property
    def _keep(self) -> frozenset[str] | None:
        return None if self.keep is None else frozenset(self.keep)

    def _initial(self, chain: int | None) -> Mapping[str, Tensor] | None:
        if self.initial_params is None:
            return None
        values = {n: torch.as_tensor(v) for n, v in self.initial_params.items()}
        if self.num_chains == 1 and self.kernel.model is None:
            return {n: v[None] for n, v in values.items()}
        if self.num_chains == 1:
            shapes = self.kernel.site_shapes(self._args, self._kwargs)
            return {n: v[None] if v.shape == shapes.get(n) else v for n, v in values.items()}
        for name, value in values.items():
            if value.dim() == 0 or value.shape[0] != self.num_chains:
                raise ValueError(
                    f"`initial_params` of site '{name}' has shape {tuple(value.shape)}: expected "
                    f"a first dimension of {self.num_chains}, one entry for each chain"
                )
        return values if chain is None else {n: v[chain : chain + 1] for n, v in values.items()}

    def _tell(self) -> None:
        """Says in a sentence each what the run's statistics mean for its result."""
        potential = self.kernel.potential
        found = report(self.draws, potential.sites)
        too_large = self._finished[0].kept.left_out
        if too_large:
            self._heard.append(
                f"recovered sites were not kept, for their draws take {too_large / 2**30:.3g} "
                "gigabytes: name those that are wanted in `keep`."
            )
        rest = (
            potential.describe_failures(found.values["divergences"]),
            describe_ends(potential.sites, self.draws.position),
        )
        self.messages = self._heard + found.messages + [sentence for sentence in rest if sentence]
        self.report = found.values
        if not self.disable_progbar and "CI" not in os.environ:
            for message in self.messages:
                tqdm.write(message, file=sys.stderr)

    @property
    def draws(self) -> Draws:
        """All draws with their statistics, as tensors."""
        if self._draws is None:
            raise RuntimeError("there are no draws yet: call `run` first")
        return self._draws

    @property
    def warmup_draws(self) -> Draws | None:
        """The same of the warm-up, where it was saved."""
        return self._warmup_draws

    def get_samples(
        self,
        num_samples: int | None = None,
        group_by_chain: bool = False,  # noqa: FBT001, FBT002  # Pyro's surface
    ) -> dict[str, Tensor]:
        """The draws of the model's parameters, in their supports.

        Arguments:
            num_samples: How many to pick at random, with replacement; all if not given.
            group_by_chain: Whether to keep the chain dimension.
        """
        samples = self._constrained()
        if num_samples is None:  # sites without elements included
            return samples if group_by_chain else {n: v.flatten(0, 1) for n, v in samples.items()}
        return select_samples(samples, num_samples, group_by_chain)

    def _constrained(self) -> dict[str, Tensor]:
        """The draws that were asked for, in the sites' supports."""
        if self._samples is None:
            potential = self.kernel.potential
            samples = potential.constrain(self.draws.position.to(potential.example.device))
            self._samples = {name: samples[name] for name in self.save_params or samples}
        return dict(self._samples)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: with draws in their supports, for the maps to these are not pickled."""
        if self._draws is not None:
            self._constrained()
        return (
            self.__dict__
            | {"_left": None, "_so_far": RunSoFar(0.0)}
            | dict.fromkeys(("_checkpoints", "executor"))
        )

    def diagnostics(self) -> dict[str, Any]:
        """Effective sample sizes and R-hat of each site, by ArviZ, and divergences.

        R-hat of a single chain compares its halves.
        """
        result: dict[str, Any] = {}
        for name, value in self.get_samples(group_by_chain=True).items():
            values = value.detach().cpu().numpy()
            half = values.shape[1] // 2
            parts = values
            if len(values) == 1:
                parts = values[0, : 2 * half].reshape(2, half, *values.shape[2:])
            with np.errstate(invalid="ignore", divide="ignore"):  # chains that never moved
                found = {
                    "n_eff": arviz_bridge.ess(values),
                    "r_hat": arviz_bridge.rhat(parts),
                }
            result[name] = {key: torch.as_tensor(part) for key, part in found.items()}
        stats = self.draws.stats
        result["divergences"] = {
            f"chain {i}": flags.nonzero().flatten().tolist()
            for i, flags in enumerate(stats["diverging"])
        }
        result["acceptance rate"] = {
            f"chain {i}": float(rates.mean()) for i, rates in enumerate(stats["acceptance_rate"])
        }
        return result

    def summary(self, prob: float = 0.9, **keywords: Any) -> Any:
        """Prints ArviZ's summary of the parameters, as Pyro prints its own, and returns it.

        Arguments:
            prob: The mass of the intervals of highest density.
            keywords: Passed to :func:`arviz.summary`.

        Returns:
            A data frame; none if there are no parameters.
        """
        samples = {k: v.cpu().numpy() for k, v in self.get_samples(group_by_chain=True).items()}
        if not samples:
            return None
        table = arviz_bridge.summary(samples, prob, **keywords)
        divergences = int(self.draws.stats["diverging"].sum())
        tqdm.write(f"{table.to_string()}\nNumber of divergences: {divergences}")
        return table
