"""What has come of a run: its draws in the sites' supports, and what they say."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer.mcmc.util import select_samples
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hamflow import arviz_bridge
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.edges import earliest_edge, edge_message
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.messages import report
from pyro_hamflow.mcmc.unvisited import unvisited_message, unvisited_modes
from pyro_hamflow.model.rounding import describe_ends


class Outcome:
    """The draws of a kernel's run, with the surface that :class:`pyro.infer.MCMC` has for them.

    Arguments:
        kernel: The kernel that makes them.
        save_params: The sites that draws, diagnostics and summary are of; all if not given.
        disable_progbar: Whether neither progress nor messages are shown.

    Attributes:
        interrupted: Whether the run ended before its time.
        messages: What its statistics mean for the result, in a sentence each.
        report: The numbers that these sentences are made of.
    """

    def __init__(
        self, kernel: Kernel, save_params: Sequence[str] | None, *, disable_progbar: bool
    ) -> None:
        self.kernel = kernel
        self.save_params = save_params
        self.disable_progbar = disable_progbar
        self.interrupted = False
        self.messages: list[str] = []
        self.report: dict[str, Any] = {}
        self._draws: Draws | None = None
        self._warmup_draws: Draws | None = None
        self._samples: dict[str, Tensor] | None = None

    @property
    def draws(self) -> Draws:
        """All draws with their statistics, as tensors."""
        if self._draws is None:
            raise RuntimeError("there are no draws yet: call `run` first")
        return self._draws

    @property
    def warmup_draws(self) -> Draws | None:
        """The same of the warm-up, where it was saved."""
        return self._warmup_draws

    def get_samples(
        self,
        num_samples: int | None = None,
        group_by_chain: bool = False,  # noqa: FBT001, FBT002  # Pyro's surface
    ) -> dict[str, Tensor]:
        """The draws of the model's parameters, in their supports.

        Arguments:
            num_samples: How many to pick at random, with replacement; all if not given.
            group_by_chain: Whether to keep the chain dimension.
        """
        samples = self._constrained()
        if num_samples is None:  # sites without elements included
            return samples if group_by_chain else {n: v.flatten(0, 1) for n, v in samples.items()}
        return select_samples(samples, num_samples, group_by_chain)

    def _constrained(self) -> dict[str, Tensor]:
        """The draws that were asked for, in the sites' supports."""
        if self._samples is None:
            potential = self.kernel.potential
            samples = potential.constrain(self.draws.position.to(potential.example.device))
            self._samples = {name: samples[name] for name in self.save_params or samples}
        return dict(self._samples)

    def diagnostics(self) -> dict[str, Any]:
        """Effective sample sizes and R-hat of each site, by ArviZ, and divergences.

        R-hat of a single chain compares its halves.
        """
        result: dict[str, Any] = {}
        for name, value in self.get_samples(group_by_chain=True).items():
            values = value.detach().cpu().numpy()
            half = values.shape[1] // 2
            parts = values
            if len(values) == 1:
                parts = values[0, : 2 * half].reshape(2, half, *values.shape[2:])
            with np.errstate(invalid="ignore", divide="ignore"):  # chains that never moved
                found = {
                    "n_eff": arviz_bridge.ess(values),
                    "r_hat": arviz_bridge.rhat(parts),
                }
            result[name] = {key: torch.as_tensor(part) for key, part in found.items()}
        stats = self.draws.stats
        result["divergences"] = {
            f"chain {i}": flags.nonzero().flatten().tolist()
            for i, flags in enumerate(stats["diverging"])
        }
        result["acceptance rate"] = {
            f"chain {i}": float(rates.mean()) for i, rates in enumerate(stats["acceptance_rate"])
        }
        return result

    def summary(self, prob: float = 0.9, **keywords: Any) -> Any:
        """Prints ArviZ's summary of the parameters, as Pyro prints its own, and returns it.

        Arguments:
            prob: The mass of the intervals of highest density.
            keywords: Passed to :func:`arviz.summary`.

        Returns:
            A data frame; none if there are no parameters.
        """
        samples = {k: v.cpu().numpy() for k, v in self.get_samples(group_by_chain=True).items()}
        if not samples:
            return None
        table = arviz_bridge.summary(samples, prob, **keywords)
        divergences = int(self.draws.stats["diverging"].sum())
        tqdm.write(f"{table.to_string()}\nNumber of divergences: {divergences}")
        return table

    def _forget(self) -> None:
        """Forgets the draws of an earlier run."""
        self._draws = self._warmup_draws = self._samples = None
        self.interrupted = False

    def _tell(self, heard: list[str], left_out: int) -> None:
        """Says in a sentence each what the run's statistics mean for its result.

        Arguments:
            heard: What its kernel has said.
            left_out: How many bytes the draws of recovered sites take, if they are too many.
        """
        potential = self.kernel.potential
        aim = self.kernel.settings.get("target_accept_prob", 1.0)
        found = report(self.draws, potential.sites, self.kernel.explored, aim)
        edge = earliest_edge(self.kernel, self.draws)
        if edge is not None and edge.excess > 1.0:
            found.values["beyond_draws"] = edge.share
            found.messages.append(edge_message(edge, potential.sites))
        unvisited = unvisited_modes(self.kernel, self.draws)
        if unvisited is not None:
            found.values["unvisited"] = unvisited.share
            found.messages.append(unvisited_message(unvisited, potential))
        if left_out:
            heard.append(
                f"recovered sites were not kept, for their draws take {left_out / 2**30:.3g} "
                "gigabytes: name those that are wanted in `keep`."
            )
        rest = (
            potential.describe_failures(found.values["divergences"]),
            describe_ends(potential.sites, (rows for _, rows in self.draws.stretches())),
        )
        self.messages = heard + found.messages + [sentence for sentence in rest if sentence]
        self.report = found.values
        if not self.disable_progbar and "CI" not in os.environ:
            for message in self.messages:
                tqdm.write(message, file=sys.stderr)
