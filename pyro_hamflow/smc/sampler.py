"""What users name: a model's posterior and evidence by a population."""

from __future__ import annotations

import time
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_hamflow.checks import between, flag, whole
from pyro_hamflow.flows.pyro_guides import as_guide
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.model.guides import DensityGuide
from pyro_hamflow.model.kinds import Args, Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.tempered import GuideReference
from pyro_hamflow.process import undisturbed
from pyro_hamflow.smc.annealing import Population, anneal
from pyro_hamflow.smc.importance import ImportanceSamples, importance_sample
from pyro_hamflow.smc.machine import machine_gradient
from pyro_hamflow.smc.reach import extend_reach
from pyro_hamflow.smc.resampling import resample_systematically
from pyro_hamflow.smc.shown import shown
from pyro_hamflow.smc.transport import AFT, CRAFT
from pyro_hamflow.smc.verdict import describe, describe_missed

_ESS, _ESS_OF_FLOWS = 0.97, 0.5  # what a step's weights are to be worth


class AnnealedSampler:
    r"""A population of particles, moved from the prior to the posterior along temperatures.

    At the inverse temperature :math:`\lambda` the density is the prior times the likelihood to the
    power of :math:`\lambda`. The likelihood is all that a model says beside its latent sites:
    observed sites, and what ``pyro.factor`` adds. So modes need not be known: they come apart as
    the temperature falls, each with its share of the particles. A density of one's own, written as
    a ``pyro.factor`` over latent sites, begins at the sites' priors as well: it should hold the
    density divided by that of the priors, and these should cover it.

    The likelihood estimate of a model from :func:`marginalize` is looked at beforehand wherever
    climbs from the prior lead: where a proposal that was fitted at one mode would hide another,
    particles come from the prior if the choice was left open, and :attr:`message` says so.

    A mode much narrower than others holds next to nothing on the way, and a population from the
    prior may miss it. So descents begin at draws of the prior, nearer to its middle and farther,
    and where the population was; if they find modes of which it has much less than there is, the
    path begins there, too, and :attr:`message` says so. It begins there as well where it descends
    from so few of its first particles that its weights are luck. A mode above which no descent
    begins is still missed, and nothing tells: in eight dimensions one of a fifth of another's
    width, in 50 of seven tenths, if it lies away from the prior's middle.

    A first population finds temperatures (by the conditional effective sample size), step sizes and
    masses; a second starts anew, moves by these, and is what one gets. At the end it moves on for a
    while, which changes nothing if it has arrived at the posterior; a drift of the energies shows
    that it has not, counts as an error of the evidence, and is told in :attr:`message`.

    Arguments:
        model: A Pyro model, which may be a marginal one: its noise is then a part of each particle.
        flow: :class:`AFT` or :class:`CRAFT`, for flows that carry particles from one temperature to
            the next, and are trained on the first population. Or a guide to begin at in place of
            the prior, one of Pyro's own too, as a model needs whose prior is improper; the density
            along the path is then that of the guide to the power of :math:`1 - \lambda` times that
            of the posterior to the power of :math:`\lambda`, and the importance weights of the
            guide's own draws are kept beside, as :attr:`importance`. So data can come in parts: a
            guide fitted to the posterior of some is where to begin at for all.
        num_particles: How many particles there are.
        num_replicates: Into how many parts they fall, that are moved and resampled apart from each
            other. How much these differ gives the error of the evidence, with the drift.
        conditional_ess: What the weights of the step to the next temperature are to be worth, as a
            share of the particles, if no flow carries them: the closer to one, the more
            temperatures there are. If not given, 0.97, and 0.5 with flows.
        num_moves: How many trajectories particles follow at each temperature.
        seed: Makes a run repeat itself, and leaves random states alone; torch's if not given.
        jit_compile: Whether to compile the model's programs to machine code.
        disable_progbar: Whether to show no progress: else it is a bar, or where nobody watches (in
            a file, or where ``CI`` is set) a line each half minute.

    Raises:
        TypeError: If the guide lacks a method of the protocol.
        ValueError: If a number lies outside its range.

    Invariant:
        The mean of the weights is the evidence, without bias, and weighted means over the draws are
        consistent, whatever the first population has found.

    References:
        | Sequential Monte Carlo samplers (Del Moral, Doucet, Jasra, 2006)
        | https://doi.org/10.1111/j.1467-9868.2006.00553.x

    Attributes:
        importance: Draws of the guide, if one was given, with their importance weights, whose
            evidence is to agree with the population's.

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean.abs(), 0.1), obs=y)  # two modes
        >>> sampler = AnnealedSampler(model, num_particles=800, seed=0)
        >>> sampler.run(torch.tensor(1.0))
        >>> exact = dist.Normal(0.0, math.sqrt(1.01)).log_prob(torch.tensor(1.0)) + math.log(2.0)
        >>> abs(sampler.log_evidence - float(exact)) < 4 * sampler.log_evidence_error
        True
        >>> abs(float(sampler.mean((sampler.samples["mean"] > 0.0).double())) - 0.5) < 0.1
        True
    """

    separate_noise = True

    def __init__(
        self,
        model: Model,
        flow: DensityGuide | AutoGuide | AFT | CRAFT | None = None,
        *,
        num_particles: int = 2000,
        num_replicates: int = 16,
        conditional_ess: float | None = None,
        num_moves: int = 2,
        seed: int | None = None,
        jit_compile: bool = False,
        disable_progbar: bool = False,
    ) -> None:
        self._target = ModelTarget(model, separate_noise=True, jit_compile=jit_compile)
        self.transport = flow if isinstance(flow, AFT | CRAFT) else None
        self.guide: DensityGuide | None = None
        if flow is not None and self.transport is None:
            self.guide = as_guide("flow", flow, DensityGuide)
        self.num_replicates = whole("num_replicates", num_replicates, 2)
        self.num_particles = whole("num_particles", num_particles, 2 * num_replicates)
        if conditional_ess is None:
            conditional_ess = _ESS if self.transport is None else _ESS_OF_FLOWS
        self.conditional_ess = between("conditional_ess", conditional_ess, 0.0, 1.0, ends="none")
        self.num_moves = whole("num_moves", num_moves, 1)
        self.seed = seed
        self.disable_progbar = flag("disable_progbar", disable_progbar)
        self.sampling_time = 0.0
        self._population: Population | None = None
        self._local: dict[str, Tensor] = {}
        self._remark: str | None = None  # on the estimate of the likelihood
        self.importance: ImportanceSamples | None = None

    def __repr__(self) -> str:
        if self._population is None:
            return f"AnnealedSampler({self.num_particles} particles, not run)"
        return (
            f"AnnealedSampler({len(self.position)} particles, log_evidence="
            f"{self.log_evidence:.4f} +- {self.log_evidence_error:.2g}, ess={self.ess:.0f})"
        )

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Moves a population to the posterior of a model with these arguments."""
        began = time.perf_counter()
        with undisturbed(self.seed):
            self._run(args, kwargs)
        self.sampling_time = time.perf_counter() - began

    def _run(self, args: Args, kwargs: dict[str, Any]) -> None:
        if isinstance(self.model, MarginalModel):
            self.model.untune()
        self._target.prepare(args, kwargs)
        reference = None
        self._remark = extend_reach(self._target) if self.guide is None else None
        potential = self._target.potential
        if self.guide is not None:
            self.guide.prepare(*args, **kwargs)
            reference = GuideReference(self.guide, potential)
        with shown(hidden=self.disable_progbar) as report:
            self._population = anneal(
                potential,
                self.num_particles,
                reference=reference,
                num_replicates=self.num_replicates,
                conditional_ess=self.conditional_ess,
                num_moves=self.num_moves,
                transport=self.transport,
                moves_on=True,
                machine=machine_gradient(potential, self.num_particles),
                report=report,
            )
        self._local = _recovered(potential, self.population)
        if self.guide is not None:
            self.importance = importance_sample(self.model, self.guide, *args, **kwargs)

    @property
    def population(self) -> Population:
        """All particles, on the real line, and what happened to them."""
        if self._population is None:
            raise RuntimeError("there are no draws yet: call `run` first")
        return self._population

    @property
    def potential(self) -> Potential:
        """The posterior."""
        return self._target.potential

    @property
    def model(self) -> Model:
        """The model."""
        assert self._target.model is not None
        return self._target.model

    @property
    def position(self) -> Tensor:
        """The draws on the real line, of shape ``(num_particles, dimension)``."""
        return self.population.position

    @property
    def local(self) -> dict[str, Tensor]:
        """Recovered values of sites that were integrated out."""
        return self._local

    @property
    def log_weights(self) -> Tensor:
        """The logarithms of the draws' weights, whose exponentials have the evidence as mean."""
        return self.population.log_weights

    @property
    def weights(self) -> Tensor:
        """The weights, adding up to one."""
        return self.log_weights.softmax(0)

    @property
    def log_evidence(self) -> float:
        """The logarithm of the estimated evidence."""
        return self.population.log_evidence

    @property
    def log_evidence_error(self) -> float:
        """Its standard error, from how much the population's parts differ, and a drift if any.

        Where draws descend from few of the first particles, it is what that tells, if it is more.
        """
        return self.population.log_evidence_error

    @property
    def ess(self) -> float:
        """How many independent draws these are worth: relatives among them are alike."""
        return self.population.lineages.draws

    @property
    def samples(self) -> dict[str, Tensor]:
        """The draws in their supports, recovered local sites included; they count by weight."""
        return self.potential.constrain(self.position) | self._local

    @property
    def settings(self) -> dict[str, Any]:
        """How the draws were made, in plain values."""
        return {
            "method": "annealed sampling",
            "start": "prior" if self.guide is None else repr(self.guide).splitlines()[0],
            "transport": None if self.transport is None else repr(self.transport),
            "num_particles": len(self.position),
            "num_replicates": self.num_replicates,
            "conditional_ess": self.conditional_ess,
            "num_moves": self.num_moves,
            "num_temperatures": len(self.population.passages),
        }

    @property
    def message(self) -> str:
        """What the run says about its result, after what it says about the likelihood estimate."""
        remarks = self._remark, describe_missed(self.population.num_missed)
        said = [f"{remark[0].upper()}{remark[1:]}" for remark in remarks if remark is not None]
        return " ".join([*said, describe(self.population, self.importance)])

    def pick(self, num_samples: int) -> Tensor:
        """Indices of draws, picked by their weights, in random order.

        Arguments:
            num_samples: How many; where weights are equal, no draw is picked twice before all are.
        """
        index = resample_systematically(self.log_weights[None], num_samples)[0]
        return index[torch.randperm(num_samples, device=index.device)]

    def resample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of equal weight, picked by their weights.

        Arguments:
            num_samples: How many.
        """
        picked = self.pick(num_samples)
        return {name: value[picked] for name, value in self.samples.items()}

    def mean(self, value: Tensor) -> Tensor:
        """The weighted mean of values ``(num_particles, *)`` over the draws."""
        weights = self.weights.to(value).reshape(-1, *[1] * (value.dim() - 1))
        return (weights * value).sum(0)


def _recovered(potential: Potential, population: Population) -> dict[str, Tensor]:
    """A draw of the local sites that were integrated out, given each particle."""
    if not potential.recovery.estimates:
        return {}
    rows = potential.programs.rows_at_once("evaluate", len(population.position))
    pairs = zip(population.position.split(rows), population.noise.split(rows), strict=True)
    parts = [potential.evaluate(*pair).local for pair in pairs]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
