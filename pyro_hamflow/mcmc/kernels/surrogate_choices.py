"""What users choose of a kernel that follows a learned energy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyro_hamflow.checks import between, finite, flag, positive, whole
from pyro_hamflow.mcmc.adaptation.surrogate import LearningKernel
from pyro_hamflow.surrogates.amortized.surrogate import AmortizedSurrogate
from pyro_hamflow.surrogates.learner import Lessons
from pyro_hamflow.surrogates.losses import Loss
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

_CORRECTIONS = ("auto", "endpoint", "per leaf")


class Neural(LearningKernel):
    """What makes a kernel follow a learned energy: gathering, training, trial, decision.

    Warm-up begins with true gradients, along trajectories that turn back, and everything that they
    find along the way is kept. A network is fitted to it, sent ahead, corrected by true gradients
    where its proposals end, and fitted again. A trial then measures what it accepts and what it
    costs, and true gradients are followed from there on if that is worth more; the run's messages
    say so.

    Arguments:
        model: A Pyro model; noise sites are moved as by the pseudo-marginal kernels.
        surrogate: An energy that was trained before, to be used as it is, or one of
            :func:`~pyro_hamflow.learn_surrogate`, to be used at the run's data.
        correction: ``"endpoint"`` judges by true energies where surrogate transitions end;
            ``"per leaf"`` weighs every point of its trajectory by the true energy; ``"auto"`` tries
            the first, and the second where the first is refused too often to be worth its cost (and
            ``fallback`` is on).
        num_transitions: How many surrogate transitions lead to the centre of a star of proposals,
            and from there to each of them, where the correction is made at the endpoint.
        num_proposals: How many proposals make a star: they are judged together, by one true energy
            each, and as many draws come of them.
        true_share: How many transitions follow true gradients for each star, on average, where the
            correction is made at the endpoint: where the surrogate is poor, they lead out.
        trust_radius: How far from the centre, in multiples of the distance within which 99 of 100
            training points lie, the learned gradient is followed alone, where the correction is
            per leaf; beyond one and a half times that, the true one is. If infinite, nowhere.
        hidden: The widths of the network's hidden layers.
        outputs: How many outputs of it are summed.
        loss: What is made small in training; if not given, gradients and energies are matched, and
            gradients alone on models with noise, which energies along a trajectory share.
        training_points: How many true gradients are gathered, over all chains, before the first
            training, in three tenths of warm-up at most; 60 for each dimension, and 120, if not
            given.
        training_steps: The most steps of the optimiser in each training.
        rounds: How often the network is sent ahead and fitted again.
        fallback: Whether true gradients are followed where the surrogate would not pay. That
            depends on measured times, so that a seed repeats a run for certain only without it.

    Raises:
        TypeError: If the model is not callable, or the surrogate no network.
        ValueError: If a number lies outside its range; when run, if the surrogate has another
            dimension than the model, or the model has faults.
    """

    def choose_surrogate(
        self,
        *,
        surrogate: PotentialNetwork | AmortizedSurrogate | None,
        correction: str,
        num_transitions: int,
        num_proposals: int,
        true_share: float,
        trust_radius: float,
        hidden: Sequence[int],
        outputs: int,
        loss: Loss | None,
        training_points: int | None,
        training_steps: int,
        rounds: int,
        fallback: bool,
    ) -> None:
        """Settles what is learned, and how it is followed."""
        if not isinstance(surrogate, PotentialNetwork | AmortizedSurrogate | None):
            raise TypeError(
                f"`surrogate` is a {type(surrogate).__name__}: expected a PotentialNetwork, or "
                "what `learn_surrogate` returns"
            )
        if correction not in _CORRECTIONS:
            raise ValueError(f"`correction` is {correction!r}: expected one of {_CORRECTIONS}")
        if surrogate is not None:
            network = surrogate.guess if isinstance(surrogate, AmortizedSurrogate) else surrogate
            finite("surrogate", network)
        whole("num_transitions", num_transitions, 1)
        whole("num_proposals", num_proposals, 1)
        between("true_share", true_share, 0.0, 1.0, ends="both")
        positive("trust_radius", trust_radius, infinite=True)
        flag("fallback", fallback)
        self.lessons = Lessons(
            tuple(hidden), outputs, loss, training_points, training_steps, rounds
        )
        self.correction = correction
        self.num_transitions = num_transitions
        self.num_proposals = num_proposals
        self.true_share = true_share
        self.trust_radius = trust_radius
        self.fallback = fallback
        self.given = surrogate
        self.start_over(0)

    @property
    def settings(self) -> dict[str, Any]:
        report = self.report
        return super().settings | {
            "following": report.following,
            "correction": report.correction,
            "num_transitions": self.num_transitions,
            "num_proposals": self.num_proposals,
            "true_share": self.true_share,
            "training_gradients": report.n_gradients,
            "training_seconds": sum(training.seconds for training in report.trainings),
            "training_loss": report.trainings[-1].best if report.trainings else None,
        }
