"""A run along a learned energy: what users choose of it, and what its phases share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_hamflow.checks import between, finite, flag, positive, whole
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.mcmc.adaptation.base import RunPlan
from pyro_hamflow.mcmc.adaptation.engine import Engine
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.verdict import SurrogateReport
from pyro_hamflow.mcmc.transitions.base import Transition
from pyro_hamflow.programs.machine_code import compiler
from pyro_hamflow.surrogates.amortized.surrogate import AmortizedSurrogate
from pyro_hamflow.surrogates.learner import TrainingSettings
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

_CORRECTIONS = ("auto", "endpoint", "per leaf")


@dataclass(frozen=True)
class SurrogateChoices:
    """What users choose of a kernel that follows a learned energy.

    Warm-up begins with true gradients, along trajectories that turn back, and everything that they
    find along the way is kept. A network is fitted to it, sent ahead, corrected by true gradients
    where its proposals end, and fitted again. A trial then measures what it accepts and what it
    costs, and true gradients are followed from there on if that is worth more; the run's messages
    say so.

    Arguments:
        surrogate: An energy that was trained before, to be used as it is, or one of
            :func:`~pyro_hamflow.learn_surrogate`, to be used at the run's data.
        correction: ``"endpoint"`` judges by true energies where surrogate transitions end;
            ``"per leaf"`` weighs every point of its trajectory by the true energy; ``"auto"`` tries
            the first, and the second where the first is refused too often to be worth its cost (and
            ``fallback`` is on).
        num_transitions: How many surrogate transitions lead to the centre that several proposals
            share, and from there to each of them, where the correction is made at the endpoint.
        num_proposals: How many proposals share a centre: they are judged together, by one true
            energy each, and as many draws come of them.
        true_share: How many transitions follow true gradients for each set of proposals, on
            average, where the correction is made at the endpoint: where the surrogate is poor, they
            lead out.
        trust_radius: How far from the centre, in multiples of the distance within which 99 of 100
            training points lie, the learned gradient is followed alone, where the correction is
            per leaf; beyond one and a half times that, the true one is. If infinite, nowhere.
        training: What is learned, from how much, and how often; its fields are arguments of the
            kernels: ``hidden``, ``outputs``, ``loss``, ``training_points``, ``training_steps`` and
            ``rounds``.
        fallback: Whether true gradients are followed where the surrogate would not pay. That
            depends on measured times, so that a seed repeats a run for certain only without it.

    Raises:
        TypeError: If the surrogate is no network.
        ValueError: If a number lies outside its range.
    """

    surrogate: PotentialNetwork | AmortizedSurrogate | None
    correction: str
    num_transitions: int
    num_proposals: int
    true_share: float
    trust_radius: float
    training: TrainingSettings
    fallback: bool

    def __post_init__(self) -> None:
        given = self.surrogate
        if not isinstance(given, PotentialNetwork | AmortizedSurrogate | None):
            raise TypeError(
                f"`surrogate` is a {type(given).__name__}: expected a PotentialNetwork, or "
                "what `learn_surrogate` returns"
            )
        if self.correction not in _CORRECTIONS:
            raise ValueError(f"`correction` is {self.correction!r}: expected one of {_CORRECTIONS}")
        if given is not None:
            network = given.guess if isinstance(given, AmortizedSurrogate) else given
            finite("surrogate", network)
        whole("num_transitions", self.num_transitions, 1)
        whole("num_proposals", self.num_proposals, 1)
        between("true_share", self.true_share, 0.0, 1.0, ends="both")
        positive("trust_radius", self.trust_radius, infinite=True)
        flag("fallback", self.fallback)


class SurrogateRun:
    """One run along a learned energy: what its phases share.

    Arguments:
        choices: What the user chose.
        hamiltonian: How trajectories end, and what is tuned of them.
        source: The model.
        plan: What the run is to be.
        engine: What makes the draws.

    Attributes:
        surrogate: The network that is followed.
        report: What it took to learn it, and what it is good for.
        iteration: How many iterations there have been.
    """

    def __init__(
        self,
        choices: SurrogateChoices,
        hamiltonian: Hamiltonian,
        source: ModelTarget,
        plan: RunPlan,
        engine: Engine,
    ) -> None:
        self.choices = choices
        self.hamiltonian = hamiltonian
        self.source = source
        self.plan = plan
        self.engine = engine
        self.report = SurrogateReport()
        self.report.correction = "endpoint" if choices.correction == "auto" else choices.correction
        self.surrogate: PotentialNetwork | None = None
        self.iteration = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen and came of it, in plain values."""
        report, choices = self.report, self.choices
        return {
            "following": report.following,
            "correction": report.correction,
            "num_transitions": choices.num_transitions,
            "num_proposals": choices.num_proposals,
            "true_share": choices.true_share,
            "training_gradients": report.n_gradients,
            "training_seconds": sum(training.seconds for training in report.trainings),
            "training_loss": report.trainings[-1].best_loss if report.trainings else None,
        }

    @property
    def draws_ahead(self) -> int:
        """How many draws of each chain follow; twice the warm-up if that is not known."""
        planned = self.plan.num_draws
        return 2 * self.plan.warmup_steps if planned is None else planned

    @property
    def native_draws(self) -> float | None:
        """How many draws there are, if machine code may follow true gradients; else none."""
        on_cpu = self.source.potential.example.device.type == "cpu"
        wanted, unknown = self.engine.wanted, self.plan.num_draws is None
        if wanted == "torch" or not on_cpu or compiler.compiler() is None:
            return None
        if wanted == "auto" and unknown:  # then torch is taken
            return None
        return float(self.plan.warmup_steps + self.draws_ahead)

    def true_moves(self, position: Tensor) -> Transition:
        """What the kernel would be without a surrogate."""
        potential, estimator = self.source.potential, self.hamiltonian.estimator
        if potential.noise_sites and estimator is not None:
            return estimator.transition(potential, position)
        trajectories = self.hamiltonian.trajectories
        steps = trajectories.expected_steps(potential.dimension)
        if self.engine.is_native(potential, position, self.plan, steps, trajectories.kind):
            return trajectories.native_transition(potential)
        return trajectories.parameter_transition(potential, len(position))

    def say(self, sentence: str) -> None:
        """Tells the user, and notes in the report, what is followed and why."""
        self.report.reason = sentence
        self.plan.say(sentence)
