"""How a run goes on from a checkpoint: what was found there, and whether it is of this model.

Model and data are given again by the user, and compared with what is said of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyro_hamflow.mcmc.chains import Chains
from pyro_hamflow.mcmc.checkpoint import Progress
from pyro_hamflow.mcmc.draws import Record
from pyro_hamflow.mcmc.frozen import thaw
from pyro_hamflow.mcmc.group_checkpoints import Division, take_up_places
from pyro_hamflow.mcmc.groups import Group
from pyro_hamflow.mcmc.identity import digest_of, set_random_states, structure_of
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.packing import CheckpointError, Saved
from pyro_hamflow.mcmc.snapshot import Frozen, capture, kernel_of, kernel_words, take_up
from pyro_hamflow.mcmc.store import Store
from pyro_hamflow.mcmc.transitions.base import State
from pyro_hamflow.mcmc.writer import GROUPS, WARM
from pyro_hamflow.model.kinds import Args, Kwargs
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.engines.buffers import NotSupported

_CLOSE = 1e4  # roundings, by which a density of the same model may differ on another machine


class OtherModel(CheckpointError):
    """A model, or a kernel, that is not the one that a checkpoint is of."""


class OtherData(CheckpointError):
    """Data that are not those that a checkpoint is of."""


@dataclass
class Found:
    """A state of a run, and the store that it is in.

    Attributes:
        store: The store.
        saved: The state.
        progress: How far the run had come.
        lasting: The numbers of all states, and which of them are kept.
    """

    store: Store
    saved: Saved
    progress: Progress
    lasting: dict[int, bool]

    def table(self, name: str) -> Frozen:
        """A table of the state, with its arrays."""
        table, start, stop = self.saved.words[name]
        return table, self.saved.arrays[start:stop]

    def record(self, name: str, num_samples: int, thin: int) -> Record:
        """A record of draws that are all in the store."""
        made, stored, divergences = self.saved.words[name]
        return Record(
            thin=thin,
            room=num_samples // thin,
            keep=self._keep,
            made=made,
            stored=stored,
            divergences=divergences,
        )

    @property
    def division(self) -> Division | None:
        """How chains are divided, where they move in workers."""
        words = self.saved.words.get("division")
        return None if words is None else Division(**words)

    @property
    def _keep(self) -> frozenset[str] | None:
        local = self.saved.words["local"]
        return None if local is None else frozenset(local)

    def finished(self) -> list[Chains]:
        """The chains that had come to the end of their run, where one moves after the other."""
        return [
            Chains(
                f" [{chain}]",
                1,
                warm=Record(keep=self._keep, made=warm, stored=warm),
                kept=Record(keep=self._keep, made=kept, stored=kept),
            )
            for chain, (kept, warm) in enumerate(self.progress.ended)
        ]

    def settings(self, wanted: int | None) -> dict[str, Any]:
        """What the run was set up with; torch's precision and number of threads are set to it.

        Arguments:
            wanted: How many draws of each chain there are to be, if not as many as before.

        Raises:
            ValueError: If there are more already, or chains that have ended would have to go on.
        """
        dtype, threads = self.saved.words["process"]
        torch.set_default_dtype(getattr(torch, dtype.removeprefix("torch.")))
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        settings, made = dict(self.progress.settings), self.saved.words["kept"][0]
        before = settings["num_samples"]
        if wanted is None:
            return settings
        if wanted < made:
            raise ValueError(
                f"`num_samples` is {wanted}: expected {made} or more, as many as were made"
            )
        if wanted > before and settings["chain_method"] == "sequential":
            raise CheckpointError(
                f"`num_samples` is {wanted}: chains that moved one after the other end at {before}"
            )
        return settings | {"num_samples": wanted}

    def set_random_states(self) -> None:
        """Sets random states to what they were."""
        set_random_states(thaw(*self.table("random"), {}))

    def kernel(self, given: Any) -> Kernel:
        """The kernel of the run: the one that was given, or made again for a model.

        Raises:
            OtherModel: If it is another, or cannot be made again.
        """
        words = self.saved.words
        if isinstance(given, Kernel):
            if type(given).__name__ != words["kernel class"]:
                raise OtherModel(
                    f"{self.store.path} is of a kernel {words['kernel class']}: got one of kind "
                    f"{type(given).__name__}"
                )
            if words["unstorable"] is None and _differ(kernel_words(given), self.table("kernel")):
                raise OtherModel(
                    f"{self.store.path} is of a {words['kernel class']} with other settings than "
                    "the one that was given"
                )
            return given
        if words["unstorable"] is not None:
            raise OtherModel(
                f"{self.store.path} needs the kernel, made as it was before, in place of the "
                f"model: {words['unstorable']}"
            )
        return kernel_of(self.table("kernel"), given)

    def take_up(self, kernel: Kernel, args: Args, kwargs: Kwargs, chains: Chains) -> None:
        """Puts a kernel and chains where they were.

        Raises:
            OtherModel: If the model has other sites, or another density.
            OtherData: If the data are others.
        """
        words = self.saved.words
        self._capture(kernel, args, kwargs, self.table("source"))
        self._refuse_others(kernel, args, kwargs)
        chains.state = self._taken_up(kernel, self.table("found"))
        self._refuse_another_density(kernel, chains.state)
        self._make_ready([(self.progress.chain or 0, words["kept"][1], words["warm"][1])])
        chains.phase, chains.iteration = kernel.phase, words["iteration"]

    def take_up_groups(
        self,
        kernel: Kernel,
        args: Args,
        kwargs: Kwargs,
        groups: Sequence[Group],
    ) -> None:
        """Puts groups, whose model has been captured, where they were.

        Raises:
            OtherModel: If the model has other sites, or another density.
            OtherData: If the data are others.
        """
        self._refuse_others(kernel, args, kwargs)
        take_up_places(groups, self.saved.words, self.saved.arrays)
        begun = next((group.saved for group in groups if group.saved is not None), None)
        if begun is not None:
            self._capture(kernel, args, kwargs, begun.source)
            self._refuse_another_density(kernel, self._taken_up(kernel, begun.found))
        self._make_ready([(g.first, g.written[""], g.written[WARM]) for g in groups])

    def _taken_up(self, kernel: Kernel, found: Frozen) -> State:
        try:
            return take_up(kernel, found)
        except NotSupported as error:
            raise CheckpointError(
                f"{self.store.path} is of a run that machine code moved, of which there is none "
                f"here ({error}): other programs would not make the same draws"
            ) from error

    def _capture(self, kernel: Kernel, args: Args, kwargs: Kwargs, source: Frozen) -> None:
        try:
            capture(kernel, args, kwargs, source)
        except Exception as error:
            error.add_note(f"while the model of {self.store.path} was captured again")
            raise

    def _refuse_others(self, kernel: Kernel, args: Args, kwargs: Kwargs) -> None:
        words, path = self.saved.words, self.store.path
        structure = structure_of(kernel.potential)
        if structure != words["structure"]:
            raise OtherModel(f"{path} is of another model: {_difference(words, structure)}")
        if digest_of(kernel.potential, args, kwargs) != words["data"]:
            raise OtherData(
                f"{path} is of other data: expected the arguments, what is observed and Pyro's "
                "parameters to be the same, bit for bit"
            )

    def _make_ready(self, counts: Sequence[tuple[int, int, int]]) -> None:
        """Goes on in the store from this state: drops what was made after it.

        Arguments:
            counts: First chains, and how many draws of each, and of the warm-up, it counts.
        """
        self.store.go_on_from(self.saved, self.lasting)
        for chain, kept, warm in counts:
            for prefix, count in (("", kept), (WARM, warm)):
                for group in GROUPS:
                    self.store.forget_draws(prefix + group, chain, count)

    def _refuse_another_density(self, kernel: Kernel, state: State) -> None:
        with random_state_kept():
            shown = kernel.shown(state)
            was, now = shown.evaluation.value, kernel.potential.value(shown.position, shown.noise)
        close = _CLOSE * torch.finfo(now.dtype).eps
        if not torch.allclose(now, was.to(now), rtol=close, atol=close, equal_nan=True):
            raise OtherModel(
                f"{self.store.path} is of another model: minus the log density at the chains' "
                f"positions was {was.tolist()}, and is {now.tolist()}"
            )


def _differ(one: Frozen, other: Frozen) -> bool:
    same = one[0] == other[0] and len(one[1]) == len(other[1])
    pairs = zip(one[1], other[1], strict=False)
    return not same or any(a.tobytes() != b.tobytes() for a, b in pairs)


def _difference(words: Mapping[str, Any], structure: Mapping[str, Any]) -> str:
    """In which sites two models differ."""
    for kind, found in structure.items():
        was = {name: rest for name, *rest in words["structure"][kind]}
        now = {name: rest for name, *rest in found}
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                before, after = was.get(name, "absent"), now.get(name, "absent")
                return f"site '{name}' was {before}, and is {after}"
    return "its sites come in another order"
