"""Whether a learned energy pays: what a kernel measures of it, and what follows from that."""

from __future__ import annotations

import math

from torch import Tensor

from pyro_hamflow.mcmc.kernels.pseudo_marginal import PseudoMarginal
from pyro_hamflow.mcmc.transitions.multiple_proposal import EndpointTransition
from pyro_hamflow.surrogates.amortized.surrogate import AmortizedSurrogate
from pyro_hamflow.surrogates.costs import Costs, SurrogateReport, Trial, costs_of, not_worth_it
from pyro_hamflow.surrogates.learner import Learner
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from pyro_hamflow.surrogates.targets import JudgedDensity

_FEWEST_WARMUP = 60
_GUESSED_STEPS = 16


class WeighingKernel(PseudoMarginal):
    """A kernel that can tell whether its surrogate is worth more than true gradients.

    It asks four times: before anything is gathered, before the first training, at each training
    after that, and at the end of warm-up.

    Attributes:
        report: What was measured.
    """

    correction: str
    fallback: bool
    given: PotentialNetwork | AmortizedSurrogate | None
    report: SurrogateReport
    _judged: JudgedDensity | None
    _learner: Learner | None
    _total: int
    _trial: Trial
    _steps: float
    true_share: float

    def _hopeless(self, learner: Learner, position: Tensor) -> str | None:
        """Why not even to begin, if so."""
        total, fewest = self._total, _FEWEST_WARMUP
        if self.given is None and total < fewest:
            if not self.fallback:
                raise ValueError(
                    f"`warmup_steps` is {total}: expected {fewest} or more, to learn a surrogate in"
                )
            return f"nothing can be learned in {total} iterations of warm-up, below {fewest}"
        if not self.fallback or self.given is not None:
            return None
        seconds = learner.recorder.seconds_later(len(position))
        return learner.too_dear(_GUESSED_STEPS * seconds * self._draws_ahead())

    def _too_dear(self, chains: int) -> str | None:
        """Why not to train after all, if so."""
        if not self.fallback:
            return None
        learner = self._learning()
        seconds = learner.recorder.seconds_later(chains) * self._trial.mean("n_steps")
        return learner.too_dear(seconds * self._draws_ahead())

    def _not_worth_it(self, hope: float = 1.0) -> str | None:
        """Why the surrogate is worth less than true gradients, by what was measured, if so.

        Arguments:
            hope: How many times as good it may become.
        """
        report, costs = self.report, self._costs()
        report.true_seconds, report.surrogate_seconds = costs.true, costs.mine
        return self._loses_by(costs, hope) if self.fallback else None

    def _loses_by(self, costs: Costs, hope: float = 1.0) -> str | None:
        """Why these costs speak for true gradients, if so."""
        endpoint = isinstance(self._running()[1], EndpointTransition)
        efficiency = self._trial.efficiency if endpoint else 1.0
        return not_worth_it(self._trial.rate, hope * efficiency, costs.true, costs.mine)

    def _leaves_promise_more(self) -> bool:
        """Whether a correction at every point would be worth it, were nothing refused then.

        Where that at the endpoint is, it is kept.
        """
        if self.correction != "auto" or not self.fallback:
            return False
        costs = self._costs()
        if self._loses_by(costs) is None:
            return False
        return not_worth_it(1.0, 1.0, costs.true, costs.per_leaf) is None

    def _costs(self) -> Costs:
        steps, transition = self._steps_of_trajectory(), self._running()[1]
        star, length, true_share = 1, steps, 0.0
        calls = 0.0 if self._judged is None else self._judged.calls
        if isinstance(transition, EndpointTransition):
            star, calls = transition.num_proposals, transition.num_stars
            length = 2 * transition.num_transitions * steps
            true_share = 0.0 if self._learning().recorder.recording else self.true_share / star
        return costs_of(
            self._trial,
            self._learning().recorder,
            star=star,
            calls=calls,
            length=length,
            steps=steps,
            true_share=true_share,
        )

    def _steps_of_trajectory(self) -> float:
        """Of the latest whose number of steps was not changed by a correction at each of them."""
        transition = self._running()[1]
        if not self._trial.infos:
            return _GUESSED_STEPS
        if isinstance(transition, EndpointTransition):
            legs = transition.num_transitions * (1.0 + 1.0 / transition.num_proposals)
            return self._trial.mean("n_steps") / legs
        return self._trial.mean("n_steps") if math.isnan(self._steps) else self._steps

    def _draws_ahead(self) -> int:
        planned = self.planned_draws
        return 2 * self._total if planned is None else planned

    def _learning(self) -> Learner:
        assert self._learner is not None
        return self._learner
