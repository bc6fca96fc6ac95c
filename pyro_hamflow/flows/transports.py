"""Maps of parameters, from whatever has one: a map itself, or a guide that was trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.checks import fills
from pyro_hamflow.flows.guide import AutoNeuralHamiltonianFlow
from pyro_hamflow.model.kinds import Args, Kwargs
from pyro_hamflow.model.transported import Transport

_CLOSE = 1e-2  # of a coordinate's size, to which single precision finds it again


class TransformTransport:
    """A torch transform from N(0, I) to positions, as a map of rows.

    Arguments:
        transform: The transform.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = self.transform(z)
        return x, self._log_volume(z, x)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.transform.inv(x)
        return z, -self._log_volume(z, x)

    def _log_volume(self, z: Tensor, x: Tensor) -> Tensor:
        log_volume = self.transform.log_abs_det_jacobian(z, x)
        return log_volume.sum(-1) if log_volume.dim() == z.dim() else log_volume


def as_transport(given: Any, example: Tensor, args: Args, kwargs: Kwargs) -> Transport:
    """The map of what a user gave. It must not be trained further while draws are made.

    Arguments:
        given: A :class:`~pyro_hamflow.model.transported.Transport`, a torch transform, or a guide
            with Pyro's ``get_transform``, from N(0, I) to all parameters on the real line.
        example: A tensor of shape ``(dimension,)``, of the type and on the device of positions.
        args: The model's arguments, which a guide may want to see.
        kwargs: Its keyword arguments.

    Raises:
        TypeError: If it has no map of positions alone.
        ValueError: If it is of another dimension, was not trained, or cannot be inverted.
    """
    if isinstance(given, AutoNeuralHamiltonianFlow):
        raise TypeError(
            "`transport` is an AutoNeuralHamiltonianFlow, which moves positions and momenta "
            "together and has no map of positions alone: expected a guide with `get_transform`, "
            "such as AutoIAFNormal"
        )
    transport = _map_of(given, args, kwargs)
    z = example.new_zeros(2, len(example)) + 0.1
    try:
        with torch.no_grad():
            x, log_volume = transport.forward(z)
            again, log_volume_back = transport.inverse(x)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"`transport` does not move vectors of shape {tuple(z.shape)} there and back: {reason}"
        ) from error
    for name, part, expected in (
        ("positions", x, z.shape),
        ("coordinates", again, z.shape),
        ("log determinants", log_volume, z.shape[:1]),
        ("log determinants", log_volume_back, z.shape[:1]),
    ):
        if part.shape != expected:
            raise ValueError(
                f"`transport` gives {name} of shape {tuple(part.shape)}: expected {tuple(expected)}"
            )
    parts = zip((again, log_volume_back), (z, -log_volume), strict=True)
    if not all(torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE) for a, b in parts):
        raise ValueError(
            "`transport` does not lead back to where it came from: expected `inverse` to undo "
            "`forward`, and their log determinants to cancel"
        )
    return transport


def _map_of(given: Any, args: Args, kwargs: Kwargs) -> Transport:
    if hasattr(given, "get_transform"):
        if hasattr(given, "prepare"):
            given.prepare(*args, **kwargs)
        elif getattr(given, "prototype_trace", True) is None:
            raise ValueError(
                f"`transport` is a {type(given).__name__} that has not been trained: train it "
                "first, as by SVI"
            )
        try:
            return TransformTransport(given.get_transform())
        except NotImplementedError:
            raise TypeError(
                f"`transport` is a {type(given).__name__}, which has no map: expected a guide "
                "whose `get_transform` gives one, such as AutoIAFNormal"
            ) from None
    if hasattr(given, "log_abs_det_jacobian"):
        return TransformTransport(given)
    fills("transport", given, Transport)
    return given
