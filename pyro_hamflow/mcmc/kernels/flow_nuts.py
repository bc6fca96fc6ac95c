"""Moves within modes and jumps between them: NUTS, or another kernel, beside a flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_hamflow.checks import flag, whole
from pyro_hamflow.flows.auto_flow import AutoFlow
from pyro_hamflow.flows.pyro_guides import as_guide
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.mcmc.adaptation.base import Phase
from pyro_hamflow.mcmc.adaptation.flow import FlowChoices, FlowSearch, Found, TuneBesideJumps
from pyro_hamflow.mcmc.adaptation.walkers import MOST_STEPS
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.kernels.hmc_nuts import HMC, NUTS
from pyro_hamflow.mcmc.kernels.mala import MALA
from pyro_hamflow.mcmc.kernels.pseudo_marginal import PseudoMarginalHMC, PseudoMarginalNUTS
from pyro_hamflow.mcmc.kernels.random_walk import RandomWalk
from pyro_hamflow.mcmc.transitions.base import State
from pyro_hamflow.model.guides import DensityGuide, draw_from, log_ratio_at
from pyro_hamflow.model.kinds import Args, Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.smc.machine import compiled_gradient
from pyro_hamflow.smc.reach import extend_reach

_LOCAL = (HMC, NUTS, MALA, RandomWalk, PseudoMarginalHMC, PseudoMarginalNUTS)
_ENOUGH = 50  # iterations of warm-up, where walkers have found the mass and nearly the step


class FlowNUTS(Kernel):
    """Jumps between a posterior's modes beside moves within them.

    Before chains start, a population is moved from the prior to the posterior, along a path of
    temperatures, and so finds the modes; descents look for narrow ones that it has missed, where it
    then begins as well. A flow is built on it, and trained in rounds of local moves, jumps and
    training, as long as more of its jumps are accepted. Then flow, step size and
    mass are frozen. Each draw is made by a local move and a jump: proposals of the flow, picked by
    their importance weights. Chains start from the population.

    The likelihood estimate of a model from :func:`marginalize` is looked at beforehand wherever
    climbs from the prior lead: where a proposal that was fitted at one mode would hide another,
    particles come from the prior if the choice was left open, and a message says so.

    Where local moves alone are soon anywhere, as in posteriors of one mode, no flow is trained and
    no jumps are made, and where jumps are too rare for what they cost, they are left out; both are
    said in the run's messages. It runs in :class:`pyro_hamflow.MCMC`, all chains at once, and in
    :class:`pyro.infer.MCMC`.

    Arguments:
        model: A Pyro model.
        flow: What makes jumps: a guide that fills the protocol
            :class:`~pyro_hamflow.model.guides.DensityGuide`, one of Pyro's own, or any flow of
            zuko, of which an :class:`~pyro_hamflow.AutoFlow` is made that begins at the prior. A
            mixture of Gaussians, bent by coupling layers and defended by shares of the prior, of
            the modes that descents found and of a wider self, is built if none is given.
        local: The kernel of the same model that moves within modes, such as ``HMC(model)`` or
            ``MALA(model)``, set up as wished; if not given :class:`NUTS`, or
            :class:`PseudoMarginalNUTS` of a model from :func:`marginalize`. Its ``engine`` makes
            the local moves, of walkers too, and of all draws where there are no jumps.
        adapt_flow: Whether a flow that was given is trained, in place, before draws are kept, if it
            has the methods of a torch module. If not, it has to be trained, and the population is
            drawn from it.
        num_proposals: How many proposals are made for each jump; if not given, as few as are needed
            for half of the jumps to be accepted, up to 32.
        num_particles: How many particles look for the modes; if not given 2000, or fewer, but 500
            at least, of a model whose gradient takes long, which is then said.
        jit_compile: Whether to compile the model's density to machine code; where ``local`` is
            given, that is said there.

    Raises:
        TypeError: If the model is not callable, ``local`` is no kernel that moves locally, or the
            flow lacks a method of the protocol.
        ValueError: If ``local`` is of another model, or a number lies outside its range; when run,
            if the prior is improper and no trained flow is given, or the model has one of the
            faults that :class:`~pyro_hamflow.model.potential.Potential` lists.

    Invariant:
        The posterior, exactly, once warm-up has ended, whatever flow was found; on a model with
        noise sites the extended density of parameters and noise. How soon the modes' shares of the
        draws are right depends on the flow; a mode that the population has missed is found by local
        moves, or not at all.

    References:
        | Adaptive Monte Carlo augmented with normalizing flows (Gabrié et al., 2022)
        | https://arxiv.org/abs/2105.12603
        | Local-global MCMC kernels: the best of both worlds (Samsonov et al., 2022)
        | https://arxiv.org/abs/2111.02702

    Example:
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 5.0))
        ...     pyro.factor("modes", torch.logaddexp(-(x - 4.0) ** 2, -(x + 4.0) ** 2))
        >>> kernel = FlowNUTS(model, num_particles=200)
        >>> mcmc = MCMC(kernel, num_samples=100, num_chains=2, disable_progbar=True)
        >>> mcmc.run()
        >>> share = (mcmc.get_samples()["x"] > 0.0).double().mean()
        >>> bool(0.3 < share < 0.7)
        True
    """

    def __init__(
        self,
        model: Model | None = None,
        flow: Any = None,
        local: Kernel | None = None,
        *,
        adapt_flow: bool = True,
        num_proposals: int | None = None,
        num_particles: int | None = None,
        jit_compile: bool = False,
    ) -> None:
        if callable(flow) and not isinstance(flow, AutoGuide) and not hasattr(flow, "draw"):
            flow = AutoFlow(cast(Model, model), flow, start="prior")
        if flow is not None:
            flow = as_guide("flow", flow, DensityGuide)
        if num_proposals is not None:
            whole("num_proposals", num_proposals, 1)
        if num_particles is not None:
            whole("num_particles", num_particles, 2)
        flag("adapt_flow", adapt_flow)
        if local is None and isinstance(model, MarginalModel):
            local = PseudoMarginalNUTS(model, jit_compile=jit_compile)
        elif local is None:
            local = NUTS(model, jit_compile=jit_compile)
        elif jit_compile:
            raise ValueError("`jit_compile` is True: expected it to be said of `local`")
        _check_local(local, model)
        super().__init__(local.source, local.hamiltonian, engine=local.engine)
        self.local = local
        self._flow_choices = FlowChoices(flow, adapt_flow, num_proposals, num_particles)
        self._found: Found | None = None

    @property
    def can_pool(self) -> bool:
        return False  # it finds a flow, too

    def prepare(
        self,
        args: Args,
        kwargs: dict[str, Any],
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> Potential:
        potential = self.local.prepare(args, kwargs, initial_params)
        flow = self._flow_choices.flow
        if flow is not None:
            flow.prepare(*args, **kwargs)
            with torch.no_grad():
                position, _ = draw_from(flow, potential, 1)  # refuses a flow of another model
                log_ratio_at(flow, position.clone())  # or without an inverse
        return potential

    def start(
        self, num_chains: int, initial_params: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """From the population, once it has been found, unless told where."""
        if self._flow_choices.learns:
            said = extend_reach(self.source)
            if said is not None:
                self.plan.say(said, first=True)
        search = FlowSearch(
            self._flow_choices,
            self.potential,
            self.hamiltonian,
            self.make_transition,
            self.plan,
            self._machine(num_chains),
        )
        self._found = found = search.run()
        if initial_params is not None:
            return super().start(num_chains, initial_params)
        device = found.position.device
        picked = torch.randint(len(found.position), (num_chains,), device=device)
        return found.position[picked], found.noise[picked]

    def _machine(self, num_chains: int) -> Program | None:
        """The gradient by machine code, if the run's draws are to be made by it."""
        potential = self.potential
        if potential.noise_dimension:
            return None
        where = potential.vectors(num_chains)[0]
        steps = self.hamiltonian.trajectories.expected_steps(potential.dimension)
        native = self._engine.is_native(potential, where, self.plan, steps)
        return compiled_gradient(potential) if native else None

    def first_phase(self, position: Tensor, noise: Tensor) -> tuple[Phase, State]:
        """Tunes the local move for so many chains, from what walkers have found of it."""
        found, moves, plan = self._what_was_found, self.hamiltonian, self.plan
        jumps = found.jumps
        potential, step_and_mass = self.potential, moves.step_and_mass
        estimator = moves.estimator if potential.noise_sites else None
        if plan.most_warmup_steps is not None and estimator is None:  # their number is not given
            plan = dataclasses.replace(plan, warmup_steps=min(plan.warmup_steps, _ENOUGH))
        warmup = step_and_mass.warm_up(
            potential, found.tuning, plan.warmup_steps, adapt_mass=estimator is not None
        )
        self.plan.trajectory_steps = float(found.num_steps.mean())
        transition = self.make_transition(potential, position)
        phase = TuneBesideJumps(
            transition,
            moves.trajectories.shortened(MOST_STEPS) if jumps.suffices else moves.trajectories,
            step_and_mass,
            warmup,
            plan,
            estimator,
            guide=found.guide,
            num_proposals=self._flow_choices.num_proposals or jumps.num_proposals,
            asked=self.engine == "native",
        )
        return phase, transition.state_at(position, noise)

    @property
    def _what_was_found(self) -> Found:
        if self._found is None:
            raise RuntimeError("the kernel has not been set up: run it first")
        return self._found

    @property
    def explored(self) -> Tensor | None:
        return None if self._found is None else self._found.position

    @property
    def flow(self) -> DensityGuide | None:
        """What makes the jumps of the latest run; nothing where none were made."""
        return self._what_was_found.guide

    @property
    def settings(self) -> dict[str, Any]:
        choices, found = self._flow_choices, self._found
        guide = None if found is None else found.guide
        return super().settings | {
            "local": type(self.local).__name__,
            "flow": "" if guide is None else repr(guide).splitlines()[0],
            "num_particles": choices.num_particles,
            "num_proposals": choices.num_proposals
            or (0 if found is None else found.jumps.num_proposals),
        }

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_found": None}


def _check_local(local: Any, model: Model | None) -> None:
    """Refuses what does not move chains of this model locally.

    Raises:
        TypeError: If it is no kernel whose moves are tuned.
        ValueError: If it is of another model.
    """
    if not isinstance(
        local, HMC | NUTS | MALA | RandomWalk | PseudoMarginalHMC | PseudoMarginalNUTS
    ):
        raise TypeError(
            f"`local` is {local!r}: expected a kernel that moves locally, such as NUTS(model), "
            "HMC(model) or MALA(model)"
        )
    if model is not None and local.model is not model:
        raise ValueError("`local` is of another model: expected a kernel of the one given first")
