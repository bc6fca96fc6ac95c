"""Vector fields that know their own derivatives.

A flow asks for the same two fields, the gradients of its energies, many times in each training
step. Autograd would write down every operation of every call; a field keeps the few tensors that
its derivative is made of, and adds to sums of the parameters' gradients that all calls share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class Field:
    """A vector field at fixed parameters. Called, it can be differentiated, once, by autograd.

    Attributes:
        parameters: What it depends on besides the point.
    """

    parameters: tuple[Tensor, ...]

    def evaluate(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The field at points ``(points, dimension)``, and what its derivative needs of them."""
        raise NotImplementedError

    def derive(
        self, kept: Any, cotangent: Tensor, parameters: Sequence[Tensor], sums: Sequence[Tensor]
    ) -> Tensor:
        """The derivative of the field's product with a cotangent.

        Arguments:
            kept: What :meth:`evaluate` kept.
            cotangent: Of shape ``(points, dimension)``.
            parameters: As given to :meth:`evaluate`.
            sums: One tensor for each parameter, to which its derivative is added in place.

        Returns:
            The derivative by the points.
        """
        raise NotImplementedError

    def new_sums(self) -> list[Tensor]:
        """Zeros for :meth:`derive`, matrices column by column: narrow ones are added to faster."""
        zeros = [p.new_zeros(p.shape[::-1]) for p in self.parameters]
        return [zero.mT if zero.dim() == 2 else zero for zero in zeros]

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return _Evaluation.apply(self, flat, *self.parameters).reshape(x.shape)


class _Evaluation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, field: Field, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.field = field
        ctx.save_for_backward(x, *parameters)
        value, ctx.kept = field.evaluate(x, parameters)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        sums = ctx.field.new_sums()
        _, *parameters = ctx.saved_tensors  # asked for, so that changes in place are told of
        by_x = ctx.field.derive(ctx.kept, cotangent, parameters, sums)
        return None, by_x, *sums


class LinearField(Field):
    """Points times a matrix.

    Arguments:
        matrix: Of shape ``(dimension, dimension)``.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.parameters = (matrix,)

    def evaluate(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return x @ parameters[0], x

    def derive(
        self, kept: Any, cotangent: Tensor, parameters: Sequence[Tensor], sums: Sequence[Tensor]
    ) -> Tensor:
        sums[0].mT.addmm_(cotangent.mT, kept)
        return cotangent @ parameters[0].mT


class PerceptronField(Field):
    r"""The gradient of a multilayer perceptron, or of its even part, and of a quadratic one.

    Arguments:
        weights: The matrices of its layers.
        biases: And what is added in them.
        last: The weights of the last layer's outputs in the sum that the perceptron is.
        stiffness: k, of a quadratic part :math:`\tfrac12 k \lVert x \rVert^2`; none if not given.
        symmetric: Whether the mean of the perceptron at x and -x is meant.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        last: Tensor,
        stiffness: Tensor | None = None,
        *,
        symmetric: bool = False,
    ) -> None:
        self.count, self.symmetric = len(weights), symmetric
        self.parameters = (last, *weights, *biases, *(() if stiffness is None else (stiffness,)))

    def _split(self, parts: Sequence[Tensor]) -> tuple[Any, Any, Tensor | None]:
        """Matrices, biases and stiffness."""
        weights, biases = parts[1 : self.count + 1], parts[self.count + 1 : 2 * self.count + 1]
        return weights, biases, parts[-1] if len(parts) > 2 * self.count + 1 else None

    def evaluate(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Any]:
        weights, biases, stiffness = self._split(parameters)
        outputs = [torch.cat([x, -x]) if self.symmetric else x]
        for weight, bias in zip(weights, biases, strict=True):
            outputs.append(_tanh_layer(outputs[-1], weight, bias))
        adjoints = [_derivative(outputs[-1]).mul_(parameters[0])]
        for weight, output in zip(weights[:0:-1], outputs[-2:0:-1], strict=True):
            adjoints.append((adjoints[-1] @ weight).mul_(_derivative(output)))
        adjoints.reverse()
        value = _narrow_product(adjoints[0], weights[0])
        if self.symmetric:
            there, back = value.chunk(2)
            value = (there - back).mul_(0.5)
        if stiffness is not None:
            value.addcmul_(x, stiffness)
        return value, (outputs, adjoints)

    def energy_and_field(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The perceptron's energy, without a quadratic part, and the field; both differentiable."""
        flat = x.reshape(-1, x.shape[-1])
        energy, value = _EnergyAndField.apply(self, flat, *self.parameters)
        return energy.reshape(x.shape[:-1]), value.reshape(x.shape)

    def energy(self, kept: Any, parameters: Sequence[Tensor]) -> Tensor:
        """The perceptron's energy, from what :meth:`evaluate` kept."""
        energy = kept[0][-1] @ parameters[0]
        return energy.reshape(2, -1).mean(0) if self.symmetric else energy

    def derive(
        self,
        kept: Any,
        cotangent: Tensor,
        parameters: Sequence[Tensor],
        sums: Sequence[Tensor],
        by_energy: Tensor | None = None,
    ) -> Tensor:
        outputs, adjoints = kept
        weights, _, stiffness = self._split(parameters)
        by_weights, by_biases, by_stiffness = self._split(sums)
        # Derivatives are not kept: to fetch them from afar would cost more than to make them again.
        derivatives = [_derivative(output) for output in outputs[1:]]
        # Along the adjoints, which the gradient was made of, from the first layer to the last.
        incoming = torch.cat([0.5 * cotangent, -0.5 * cotangent]) if self.symmetric else cotangent
        bent = []
        for i in range(self.count):
            by_weights[i].mT.addmm_(incoming.mT, adjoints[i])
            along = incoming @ weights[i].mT
            bent.append(along * adjoints[i])
            incoming = along.mul_(derivatives[i])
        sums[0].add_(incoming.sum(0))
        # And back along the layers, whose derivatives have changed with their inputs.
        outgoing = bent[-1].mul_(outputs[-1]).mul_(-2.0)
        if by_energy is not None:  # whose own way back the adjoints are
            by_energy = torch.cat([0.5 * by_energy] * 2) if self.symmetric else by_energy
            sums[0].add_(by_energy @ outputs[-1])
            outgoing.addcmul_(adjoints[-1], by_energy[:, None])
        for i in range(self.count - 1, -1, -1):
            by_weights[i].mT.addmm_(outputs[i].mT, outgoing)
            by_biases[i].add_(outgoing.sum(0))
            if i > 0:
                outgoing = (outgoing @ weights[i]).mul_(derivatives[i - 1])
                outgoing.addcmul_(bent[i - 1], outputs[i], value=-2.0)
        outgoing = _narrow_product(outgoing, weights[0])
        if self.symmetric:
            there, back = outgoing.chunk(2)
            outgoing = there - back
        if stiffness is not None and by_stiffness is not None:
            by_stiffness.add_((cotangent * outputs[0][: len(cotangent)]).sum())
            outgoing.addcmul_(cotangent, stiffness)
        return outgoing


class _EnergyAndField(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, field: PerceptronField, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.field = field
        ctx.save_for_backward(x, *parameters)
        value, ctx.kept = field.evaluate(x, parameters)
        return field.energy(ctx.kept, parameters), value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_energy: Tensor | None, cotangent: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        sums = ctx.field.new_sums()
        x, *parameters = ctx.saved_tensors
        cotangent = torch.zeros_like(x) if cotangent is None else cotangent
        by_x = ctx.field.derive(ctx.kept, cotangent, parameters, sums, by_energy)
        return None, by_x, *sums


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent; through the logistic function, which CPUs have ten times as fast."""
    return torch.tanh(x) if x.is_cuda else 2.0 * torch.sigmoid(2.0 * x) - 1.0


def _tanh_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same of a linear layer, in fewer passes."""
    if x.is_cuda:
        return torch.addmm(bias, x, weight.mT).tanh_()
    return torch.addmm(bias, x, weight.mT, beta=2.0, alpha=2.0).sigmoid_().mul_(2.0).sub_(1.0)


def _narrow_product(x: Tensor, weight: Tensor) -> Tensor:
    """Rows times a matrix of few columns: several times as fast if these lie in rows."""
    return linear(x, weight.mT.contiguous())


def _derivative(output: Tensor) -> Tensor:
    """The derivative of the hyperbolic tangent, from its value."""
    return torch.addcmul(output.new_ones(()), output, output, value=-1)
