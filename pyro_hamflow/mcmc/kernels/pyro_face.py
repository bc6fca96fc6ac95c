"""The face that kernels show to Pyro's runner, which moves one chain at a time."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_hamflow.mcmc.draws import Record
from pyro_hamflow.mcmc.transitions.base import Info, State
from pyro_hamflow.model.kinds import Args, Kwargs
from pyro_hamflow.model.potential import Potential


class PyroFace(MCMCKernel):
    """One chain of a kernel, in Pyro's protocol: ``setup``, ``sample``, ``cleanup``.

    It takes the path that many chains take, :meth:`begin` and :meth:`advance`, and keeps a record,
    which comes back among the diagnostics.
    """

    def __init__(self) -> None:
        super().__init__()
        self._initial_params: Mapping[str, Tensor] | None = None
        self._state: State | None = None
        self._returned: dict[str, Tensor] | None = None
        self._record = Record()
        self._last: Info | None = None

    @abstractmethod
    def begin(
        self,
        num_chains: int,
        warmup_steps: int,
        args: Args = (),
        kwargs: Kwargs | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Prepares a run of all chains."""

    @abstractmethod
    def advance(self, state: State) -> tuple[State, Info]:
        """One iteration of all chains."""

    @abstractmethod
    def moved_to(self, position: Tensor, noise: Tensor) -> State:
        """The state of chains that were put somewhere."""

    @abstractmethod
    def shown(self, state: State) -> State:
        """A state in the model's own coordinates."""

    @abstractmethod
    def progress(self, info: Info, record: Record) -> dict[str, str]:
        """What a progress bar shows."""

    @property
    @abstractmethod
    def warming(self) -> bool:
        """Whether warm-up lasts."""

    @property
    @abstractmethod
    def step_size(self) -> float | None:
        """The current step size."""

    @property
    @abstractmethod
    def potential(self) -> Potential:
        """The target of the latest run."""

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Prepares one chain; called by :class:`pyro.infer.MCMC`."""
        initial = self._initial_params
        chains_first = None if initial is None else {n: v[None] for n, v in initial.items()}
        self._record = Record()
        self._state = self.begin(1, warmup_steps, args, kwargs, chains_first)
        self._returned = self._params(self._state)

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Unconstrained values that the chain starts from."""
        if self._state is not None:
            return self._params(self._state)
        return dict(self._initial_params or {})

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor] | None) -> None:
        self._initial_params = params
        self._state = None

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One iteration of one chain; unconstrained values in and out."""
        state = self._state
        if state is None:
            raise RuntimeError("the kernel has not been set up: call `setup` first")
        if self._returned is None or any(
            params[name] is not value and not torch.equal(params[name], value)
            for name, value in self._returned.items()
        ):
            position = self.potential.ravel({n: v[None] for n, v in params.items()}, 1)
            state = self.moved_to(position, state.noise)
        warming = self.warming
        self._state, info = self.advance(state)
        self._last = info
        if not warming:
            self._record.append(self.shown(self._state), info, self.step_size)
        self._returned = self._params(self._state)
        return self._returned

    def clear_cache(self) -> None:
        """Has the potential evaluated anew before the next iteration."""
        self._returned = None

    def _params(self, state: State) -> dict[str, Tensor]:
        position = self.shown(state).position
        return {n: v[0] for n, v in self.potential.unravel(position).items()}

    def logging(self) -> dict[str, str] | None:
        """What Pyro's progress bar shows."""
        return None if self._last is None else self.progress(self._last, self._record)

    def diagnostics(self) -> dict[str, Any]:
        """Divergences, acceptance rate, and the whole record of the chain."""
        stats = self._record.stats
        divergences = [i for i, d in enumerate(stats.get("diverging", [])) if bool(d)]
        rates = stats.get("acceptance_rate", [])
        return {
            "divergences": divergences,
            "acceptance rate": float(torch.cat(rates).mean()) if rates else math.nan,
            "record": self._record,
        }

    def cleanup(self) -> None:
        """Forgets the chain, keeps what the model's capture and the tuning found."""
        self._initial_params = None
        self._state = None
        self._returned = None
