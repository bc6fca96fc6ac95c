"""A run of chains as users see it: how it is set up, begun, and gone on with."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.checks import flag, positive, whole
from pyro_hamflow.mcmc.chains import Chains
from pyro_hamflow.mcmc.checkpoint import Checkpoints
from pyro_hamflow.mcmc.course import Course, Left
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.executors import Executors, InThisProcess
from pyro_hamflow.mcmc.group_checkpoints import Division, GroupCheckpoints
from pyro_hamflow.mcmc.kernels.base import Kernel, meaningless
from pyro_hamflow.mcmc.latest import latest
from pyro_hamflow.mcmc.moving import Counts, Mover, planned_warmup
from pyro_hamflow.mcmc.outcome import Outcome
from pyro_hamflow.mcmc.packing import CheckpointError
from pyro_hamflow.mcmc.resume import Found
from pyro_hamflow.mcmc.stopping import StopWhen
from pyro_hamflow.mcmc.store import Store
from pyro_hamflow.mcmc.workers import Workers, divided
from pyro_hamflow.model.kinds import Args
from pyro_hamflow.process import settings_kept, undisturbed

_LARGEST_SEED = 2**32 - 1  # that NumPy takes
_METHODS = ("vectorized", "sequential")


class MCMC(Outcome):
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
        disable_validation: Whether a model that fails the checks of its distributions, at draws
            from its prior before sampling, is sampled with a warning, and not refused; if None, as
            Pyro's own setting says.
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
            by Ctrl-C or SIGTERM first writes one, after the iteration under way; of chains in other
            processes, one has what these have brought back.
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
        pool_warmup: Whether groups share what warm-up finds: a mass of the positions of all chains
            at the end of each window, the step size and whether it goes on at the end of all. They
            then wait for each other there, and need fewer iterations. Of ``HMC``, ``NUTS``,
            ``MALA`` and the pseudo-marginal ones; others learn more than they can share.
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
        pool_warmup: bool = False,
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
        flag("pool_warmup", pool_warmup)
        if pool_warmup and executor is None:
            raise ValueError(
                "`pool_warmup` is True without an `executor`: expected one, as chains in this "
                "process are tuned together"
            )
        if pool_warmup and not kernel.can_pool:
            raise ValueError(
                f"`pool_warmup` is True of {type(kernel).__name__}: expected a kernel that tunes "
                "step size and mass alone, as HMC or NUTS"
            )
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
        super().__init__(kernel, save_params, disable_progbar=disable_progbar)
        self.num_samples = num_samples
        self.num_chains = num_chains
        self.initial_params = initial_params
        self.chain_method = chain_method
        pooled = num_chains if chain_method == "vectorized" else 1
        apart = executor is not None and not pool_warmup
        self._tuned_together = min(pooled, chains_per_worker) if apart else pooled
        self._given_warmup_steps = warmup_steps
        self._counts = Counts(planned_warmup(warmup_steps, self._tuned_together))
        self.seed = seed
        self.save_warmup = save_warmup
        self.stop_when = stop_when
        self.checkpoint = None if checkpoint is None else os.fspath(checkpoint)
        self.checkpoint_every = checkpoint_every
        self.thin = thin
        self.keep = None if keep is None else list(keep)
        self.executor = executor
        self.chains_per_worker = chains_per_worker
        self.pool_warmup = pool_warmup
        self.worker_timeout = worker_timeout
        self.ended_early: dict[str, Draws] = {}
        self.hook_fn = hook_fn
        self.disable_validation = disable_validation
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._left: Left | None = None

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Warms up and draws.

        Arguments:
            args: The model's arguments.
            kwargs: The model's keyword arguments.

        Raises:
            ValueError: Before any sampling, if model, data or starting values have faults.
        """
        mover = self._mover(args, kwargs)
        if self.executor is not None:
            self._run_in_workers(self.executor, mover)
            return
        with undisturbed(self.seed):
            self._run(mover)

    def _mover(self, args: Args, kwargs: dict[str, Any]) -> Mover:
        """Takes the model's arguments; returns what moves the chains of a run with them."""
        self._args, self._kwargs = args, kwargs
        return Mover(
            kernel=self.kernel,
            num_samples=self.num_samples,
            num_chains=self.num_chains,
            tuned_together=self._tuned_together,
            warmup_steps=self._given_warmup_steps,
            initial_params=self.initial_params,
            hook_fn=self.hook_fn,
            stop_when=self.stop_when,
            save_params=self.save_params,
            save_warmup=self.save_warmup,
            thin=self.thin,
            keep=self.keep,
            hides_progress=self.disable_progbar,
            args=args,
            kwargs=kwargs,
            pools_warmup=self.pool_warmup,
            counts=self._counts,
        )

    def _run(self, mover: Mover) -> None:
        mover.validate(disabled=self.disable_validation)
        left, self._left = self._left, None
        chains = None if left is None else left.take_up(mover, seeded=self.seed is not None)
        checkpoints: Checkpoints | None = None
        if left is None or chains is None:
            self._counts = mover.counts = Counts()
            if self.checkpoint is not None:
                store = Store(self.checkpoint, new=True)
                checkpoints = Checkpoints(store, self.checkpoint_every, self.num_chains)
        elif left.checkpoints is not None:
            checkpoints = left.checkpoints
            checkpoints.store.hold()
        self._go_on(self._course(mover, checkpoints), [], chains)

    def _course(
        self, mover: Mover, checkpoints: Checkpoints | None, heard: Sequence[str] = ()
    ) -> Course:
        vectorized = self.chain_method == "vectorized"
        return Course(mover, self._settings, checkpoints, heard, is_vectorized=vectorized)

    def _go_on(self, course: Course, finished: list[Chains], left: Chains | None) -> None:
        """Moves chains to the end of the run, and collects their draws.

        Arguments:
            course: Moves them.
            finished: The chains that have come there.
            left: Those that are on their way, if any are.
        """
        self._forget()
        course.go_on(finished, left)
        self.interrupted = course.stopped is not None
        if course.stopped is not None and not course.finished:
            self._left = course.left()
            self._warmup_draws = course.warmup_draws()
            course.raise_without_draws(course.stopped)
        made = course.drop_just_begun()
        try:
            self._draws = course.draws()
            self._warmup_draws = course.warmup_draws()
        finally:
            course.close()
        self._tell(course.heard, course.finished[0].kept.left_out)
        if course.stopped is not None:
            self._say_interrupted(course.stopped, made)

    def _run_in_workers(self, executor: Executors, mover: Mover) -> None:
        """Runs groups of chains where an executor takes them."""
        with undisturbed(self.seed):
            mover.validate(disabled=self.disable_validation)
            seed = int(torch.randint(_LARGEST_SEED, ())) if self.seed is None else self.seed
            groups = divided(mover, seed, self.chains_per_worker)
        checkpoints = None
        if self.checkpoint is not None:
            store = Store(self.checkpoint, new=True)
            checkpoints = self._group_checkpoints(store, mover, seed)
        self._move_groups(executor, Workers(mover, groups, time.monotonic(), checkpoints))

    def _group_checkpoints(self, store: Store, mover: Mover, seed: int) -> GroupCheckpoints:
        division = Division(seed, self.chains_per_worker)
        return GroupCheckpoints(store, self.checkpoint_every, mover, self._settings, division)

    def _move_groups(self, executor: Executors, workers: Workers) -> None:
        """Moves groups to the end of the run, and collects their draws."""
        self._forget()
        self._left, self.ended_early = None, {}
        workers.run(executor, self.worker_timeout)
        self.interrupted = workers.stopped is not None
        if not workers.kept:
            workers.close()
            told = " ".join(["no draw was made.", *workers.remarks])
            raise workers.stopped or RuntimeError(told)
        try:
            self._draws, self._warmup_draws = workers.draws(), workers.warmup_draws()
            self.ended_early, self._counts = workers.ended_early(), workers.counts()
        finally:
            workers.close()
        self._tell(workers.heard, workers.take_up())
        if workers.stopped is not None:
            self._say_interrupted(workers.stopped, workers.kept[0].made)

    def _say_interrupted(self, stopped: BaseException, made: int) -> None:
        told = f"interrupted: {made} of {self.num_samples} draws were made and are kept"
        if not isinstance(stopped, KeyboardInterrupt):
            stopped.add_note(told)
            raise stopped
        warnings.warn(told, RuntimeWarning, stacklevel=4)

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
        executor: Executors | None = None,
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
            executor: Likewise, for a run that had one; its chains move in this process if not
                given.
            disable_progbar: Whether to show no progress.
            kwargs: The model's keyword arguments.

        Returns:
            The run, at its end.

        Raises:
            OtherVersion: If what is there was written by another version of the format, or is none.
            DamagedCheckpoint: If the latest one is not as it was written; says which one is.
            OtherModel: If it is of another model or kernel.
            OtherData: If it is of other data: arrays, tables and collections are compared whole, of
                other objects what is public.
            PermissionError: If nothing can be written there.
            CheckpointError: If an executor is given for a run that had none, or there is no
                compiler for one that machine code moved.
        """
        with latest(path, at) as found:
            if executor is not None and found.division is None:
                raise CheckpointError(
                    f"{path} is of a run whose chains are tuned together in one process: expected "
                    "no `executor`"
                )
            given: dict[str, Any] = {
                "hook_fn": hook_fn,
                "stop_when": stop_when,
                "executor": executor,
                "disable_progbar": disable_progbar,
            }
            if found.division is None:
                with undisturbed(seed=0):
                    mcmc = cls._of(found, path, model, num_samples, given)
                    mcmc._go_on_from(found, args, kwargs)
                return mcmc
            given["executor"] = executor = executor or InThisProcess()
            with settings_kept():
                mcmc = cls._of(found, path, model, num_samples, given)
                mcmc._go_on_with_groups(executor, found, found.division, args, kwargs)
            return mcmc

    @classmethod
    def _of(
        cls,
        found: Found,
        path: str | os.PathLike[str],
        model: Any,
        num_samples: int | None,
        given: dict[str, Any],
    ) -> MCMC:
        """A run as it was set up when a state was written, in a process like that one."""
        settings = found.settings(num_samples) | given
        return cls(found.kernel(model), **settings, checkpoint=path)

    def _go_on_with_groups(
        self,
        executor: Executors,
        found: Found,
        division: Division,
        args: Args,
        kwargs: dict[str, Any],
    ) -> None:
        """Goes on from a state of a run whose chains move in workers."""
        mover = self._mover(args, kwargs)
        with undisturbed(seed=0):
            groups = divided(mover, division.seed, division.together)
            found.take_up_groups(self.kernel, args, kwargs, groups)
        checkpoints = self._group_checkpoints(found.store, mover, division.seed)
        self._move_groups(executor, Workers(mover, groups, time.monotonic(), checkpoints))

    def _go_on_from(self, found: Found, args: Args, kwargs: dict[str, Any]) -> None:
        """Goes on from a state that was found."""
        mover, run = self._mover(args, kwargs), found.progress
        chains = mover.new_chains(run.chain)
        chains.kept = found.record("kept", self.num_samples, self.thin)
        chains.warm = found.record("warm", 0, self.thin)
        found.take_up(self.kernel, args, kwargs, chains)
        checkpoints = Checkpoints(found.store, self.checkpoint_every, self.num_chains)
        self._counts = Counts(run.warmup_steps, run.warmup_time, run.sampling_time)
        mover.counts = self._counts
        found.set_random_states()
        self._go_on(self._course(mover, checkpoints, run.heard), found.finished(), chains)

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
            "chains_per_worker": self.chains_per_worker,
            "pool_warmup": self.pool_warmup,
            "worker_timeout": self.worker_timeout,
        }

    @property
    def warmup_steps(self) -> int:
        """How many iterations of warm-up were made; before a run, how many are planned."""
        return self._counts.warmup_steps

    @property
    def warmup_time(self) -> float:
        """Seconds of warm-up."""
        return self._counts.warmup_time

    @property
    def sampling_time(self) -> float:
        """Seconds of drawing."""
        return self._counts.sampling_time

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: with draws in their supports, for the maps to these are not pickled."""
        if self._draws is not None:
            self._constrained()
        return self.__dict__ | {"_left": None, "executor": None}
