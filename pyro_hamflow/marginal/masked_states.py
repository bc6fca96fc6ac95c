"""Local values whose prior a mask takes away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.model.trace import log_density
from pyro_hamflow.model.unused import find_unused, masked_entries
from pyro_hamflow.programs.validation import no_validation


def refuse_masked_states(
    trace: poutine.Trace,
    names: Iterable[str],
    trace_at: Callable[[Mapping[str, Tensor]], poutine.Trace],
) -> None:
    """Raises a ValueError if terms depend on local values whose prior a mask takes away.

    An estimate gives each local value its own prior, which integrates to one where no term depends
    on the value, as beyond the end of a short series. Elsewhere the model says something else.

    Arguments:
        trace: A run of the model.
        names: The local sites.
        trace_at: A run with values of these in place of its own.
    """
    nodes = {name: trace.nodes[name] for name in names}

    def total(values: Mapping[str, Tensor]) -> Tensor:
        with no_validation():
            sites = (site for site in trace_at(values).nodes.values() if site["type"] == "sample")
            return torch.stack([log_density(site).sum() for site in sites]).sum()

    unused = find_unused(nodes, total)
    for name, node in nodes.items():
        used = masked_entries(node)
        if name in unused:
            used = used & ~unused[name]
        if bool(used.any()):
            raise ValueError(
                f"local site '{name}' is masked: {int(used.sum())} of its {used.numel()} values "
                "have no prior, though other terms depend on them; expected the mask around "
                "observed sites alone where data are missing, or from there on around all sites"
            )
