"""Handlers that put an estimate in the place of local sites."""

from __future__ import annotations

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_hamflow.marginal.structure import Structure
from pyro_hamflow.model.trace import Frames


class HideLocalSites(Messenger):
    """Hides local sites, and what depends on them, from outer handlers; records the others."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        rest = self.structure.rest.get(name)
        if rest is not None:  # counted here, and not in an estimate
            msg["mask"] = rest if msg["mask"] is None else msg["mask"] & rest
            msg["infer"] = {**(msg["infer"] or {}), "rest": rest}
        elif name in self.structure.hidden:
            if name in self.structure.placeholders:
                msg["value"] = self.structure.placeholders[name]
                msg["done"] = True
            msg["stop"] = True

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["name"] in self.structure.parameters:
            self.values[msg["name"]] = msg["value"]


class InPlates(Messenger):
    """Puts sites into plates that the model has left."""

    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self.frames = frames

    def _pyro_sample(self, msg: Message) -> None:
        msg["cond_indep_stack"] = tuple(self.frames) + msg["cond_indep_stack"]
