"""The guide whose density is a normalising flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from pyro_hamflow.checks import positive
from pyro_hamflow.flows.bases import students_t
from pyro_hamflow.flows.drawn import DrawnWithDensity
from pyro_hamflow.flows.flow_guide import FlowGuide
from pyro_hamflow.flows.zuko_flow import ZukoFlow, make_lazy, refuse_other_flows
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.process import random_state_kept


class AutoFlow(FlowGuide):
    """A guide made of any flow of `zuko <https://zuko.readthedocs.io>`_.

    Its density is known exactly. It trains by :func:`~pyro_hamflow.fit_guide`, or as any guide
    does; what it leaves of the posterior's shape, :func:`~pyro_hamflow.importance_sample` and
    :class:`~pyro_hamflow.FlowMH` correct; and :class:`pyro.infer.reparam.NeuTraReparam` takes its
    map. The flow covers all parameters, moved to the real line and standardised, and no noise or
    discrete sites, as :class:`~pyro_hamflow.AutoNeuralHamiltonianFlow` does. Zuko comes with
    ``pip install pyro-hamflow[flows]``.

    Arguments:
        model: A Pyro model.
        flow: What makes the flow of the number of parameters: a class of ``zuko.flows``, a
            ``functools.partial`` of one with its settings, or a function; or a flow of that many
            features, which is then the guide's own.
        start: Where the flow begins. ``"laplace"``: around the posterior's mode, in coordinates in
            which a Gaussian fitted there is standard. ``"prior"``: at the prior. Or a distribution
            of all parameters on the real line, with event shape ``(dimension,)``, of torch or Pyro,
            such as a Gaussian whose coupling is known. Both stand in for the flow's own base.
        degrees_of_freedom: With ``"laplace"``, has Student's t stand in for the flow's own base, so
            that the guide's tails are not thinner than the posterior's; some 5 to 20 of them.
        init_loc_fn: Where the search for the mode begins; one of Pyro's.

    Raises:
        TypeError: If the model is not callable, or ``flow`` no flow of zuko.
        ValueError: If an argument lies outside its range; at the first call, if the flow is of
            another dimension or does not cover the real line, a latent site lies in a subsampled
            plate, or the model has one of the faults that
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    References:
        | Normalizing flows for probabilistic modeling and inference (Papamakarios et al., 2021)
        | https://arxiv.org/abs/1912.02762

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)
        >>> guide = AutoFlow(model, partial(zuko.flows.NSF, transforms=2, hidden_features=(16,)))
        >>> fit = fit_guide(model, guide, torch.ones(2), num_steps=50, disable_progbar=True)
        >>> guide.median()["mean"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: Model,
        flow: Any,
        *,
        start: Any = "laplace",
        degrees_of_freedom: float | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
    ) -> None:
        super().__init__(model, start, init_loc_fn)
        refuse_other_flows(flow)
        if degrees_of_freedom is not None:
            positive("degrees_of_freedom", degrees_of_freedom)
            if start != "laplace":
                raise ValueError(
                    f"`degrees_of_freedom` is {degrees_of_freedom}, and `start` {start!r}, which "
                    "has tails of its own: expected one of them"
                )
        self._given_flow = (flow,)
        self._freedom = degrees_of_freedom

    def make_flow(self, position: Tensor, base: Any) -> ZukoFlow:
        (flow,) = self._given_flow
        if self._freedom is not None:
            base = students_t(position, self._freedom)
        made = ZukoFlow(make_lazy(flow, position), base)
        if not isinstance(flow, nn.Module):
            with random_state_kept():
                made.begin_near_base()
        return made

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Positions on the real line ``(num_samples, dimension)``, and their log densities.

        Gradients flow through both.
        """
        posterior = self.get_posterior()
        position = posterior.rsample((num_samples,))
        return position, posterior.log_prob(position)

    def log_ratio(self, position: Tensor) -> Tensor:
        """The log density of positions ``(positions, dimension)``, ``(positions,)``."""
        return self.get_posterior().log_prob(position)

    # --- what Pyro calls ------------------------------------------------------------------------

    def get_posterior(self, *args: Any, **kwargs: Any) -> DrawnWithDensity:
        """The distribution of positions."""
        flow, log_volume = self.flow, self.log_volume()

        def draw(shape: Any) -> tuple[Tensor, Tensor]:
            q, log_density = flow.draw(shape)
            return self.to_position(q), log_density - log_volume

        def log_density(position: Tensor) -> Tensor:
            return flow.log_density(self.standardise(position)) - log_volume

        return DrawnWithDensity(self.dimension, draw, log_density)

    def get_base_dist(self) -> Any:
        """The distribution that the flow starts from, in its own coordinates."""
        base = self.flow.distribution()
        return DrawnWithDensity(
            self.dimension, lambda shape: _with_density(base, shape), base.log_prob
        )

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """The map from the base to positions."""
        place = dist.transforms.LowerCholeskyAffine(self.loc, self.scale_tril)
        return dist.transforms.ComposeTransform([self.flow.transform().inv, place])


def _with_density(base: Any, shape: Any) -> tuple[Tensor, Tensor]:
    z = base.sample(shape)
    return z, base.log_prob(z)
