"""Operations of torch on single numbers, as expressions in C++."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from pyro_hamflow.programs.engines.buffers import kind_of
from pyro_hamflow.programs.engines.regions import ZERO
from pyro_hamflow.programs.engines.statements import Statements

Rule = Callable[[Statements, torch.dtype, list[int]], int]

_LEAST = 4  # numbers of which a loop is written that g++ makes vectors of


def operand(writer: Statements, number: int, dtype: torch.dtype) -> str:
    """A number in an expression of some type."""
    same = number != ZERO and writer.numbers[number].dtype == dtype
    return writer.name(number) if same else f"{kind_of(dtype)}({writer.name(number)})"


def is_constant(writer: Statements, number: int, value: float) -> bool:
    """Whether a number is known to be this."""
    known = writer.numbers[number]
    return known.is_constant and known.text in (f"double({value!r})", f"float({value!r})")


def cast(writer: Statements, number: int, dtype: torch.dtype) -> int:
    """A number as one of another type."""
    if number == ZERO or writer.numbers[number].dtype == dtype:
        return number
    text = operand(writer, number, dtype)
    if dtype == torch.bool:
        text = f"({writer.name(number)} != 0)"
    return writer.made(text, [number], dtype)


def _expression(pattern: str, result: torch.dtype | None = None, *, of_masks: bool = False) -> Rule:
    """The rule of an expression.

    Arguments:
        pattern: The expression.
        result: The type of its result, if it is not that of its numbers.
        of_masks: Whether it is right of conditions of several chains as they are, masks of zeros
            and minus ones; else these are numbers in it, zeros and ones.
    """

    def rule(writer: Statements, dtype: torch.dtype, numbers: list[int]) -> int:
        kind = dtype
        if dtype == torch.bool and writer.sides and not of_masks:
            kind = writer.sides.dtype
            numbers = [cast(writer, number, kind) for number in numbers]
        texts = [operand(writer, n, kind) for n in numbers]
        made = pattern.format(*texts, kind=kind_of(kind))
        return cast(writer, writer.made(made, numbers, result or kind), result or dtype)

    return rule


def added(writer: Statements, dtype: torch.dtype, numbers: list[int]) -> int:
    """The sum of two numbers; of zero and a number, the number."""
    first, second = (cast(writer, number, dtype) for number in numbers)
    if first == ZERO or is_constant(writer, first, -0.0):
        return second
    return first if second == ZERO else _ADD(writer, dtype, [first, second])


def _subtracted(writer: Statements, dtype: torch.dtype, numbers: list[int]) -> int:
    return cast(writer, numbers[0], dtype) if numbers[1] == ZERO else _SUB(writer, dtype, numbers)


def multiplied(writer: Statements, dtype: torch.dtype, numbers: list[int]) -> int:
    """The product of two numbers; of one and a number, the number."""
    first, second = (cast(writer, number, dtype) for number in numbers)
    if is_constant(writer, first, 1.0):
        return second
    return first if is_constant(writer, second, 1.0) else _MUL(writer, dtype, [first, second])


def _divided(writer: Statements, dtype: torch.dtype, numbers: list[int]) -> int:
    if is_constant(writer, numbers[1], 1.0):
        return cast(writer, numbers[0], dtype)
    vectors = writer.sides.vectors if writer.sides else ()
    if numbers[0] in vectors and numbers[1] not in vectors:  # the same for all chains
        one = writer.constant(1.0, dtype)
        return _MUL(writer, dtype, [numbers[0], _DIV(writer, dtype, [one, numbers[1]])])
    return _DIV(writer, dtype, numbers)


def _power(writer: Statements, dtype: torch.dtype, numbers: list[int]) -> int:
    base, exponent = numbers
    known = {2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}", 0.5: "std::sqrt({0})", -1.0: "1 / {0}"}
    for value, pattern in known.items():
        if is_constant(writer, exponent, value):
            return _expression(pattern)(writer, dtype, [base])
    if is_constant(writer, exponent, 1.0):
        return cast(writer, base, dtype)
    return _expression("{kind}(std::pow({0}, {1}))")(writer, dtype, numbers)


def chosen(writer: Statements, dtype: torch.dtype, numbers: list[int]) -> int:
    """The second number where the first is true, else the third."""
    condition, first, second = numbers
    if first == second or condition == ZERO:
        return cast(writer, second, dtype)
    texts = [operand(writer, n, dtype) for n in (first, second)]
    made = f"choose({writer.name(condition)}, {texts[0]}, {texts[1]})"
    return writer.made(made, numbers, dtype)


_ADD, _SUB = _expression("{0} + {1}"), _expression("{0} - {1}")
_MUL, _DIV = _expression("{0} * {1}"), _expression("{0} / {1}")

# In the type of the arguments together.
SAME: Mapping[str, Rule] = {
    "add": added,
    "sub": _subtracted,
    "mul": multiplied,
    "neg": _expression("-{0}"),
    "abs": _expression("std::abs({0})"),
    "sign": _expression("{kind}(sgn({0}))"),
    "sgn": _expression("{kind}(sgn({0}))"),
    "maximum": _expression("max_propagate_nan({0}, {1})"),
    "minimum": _expression("min_propagate_nan({0}, {1})"),
    "bitwise_and": _expression("{kind}({0} & {1})", of_masks=True),
    "bitwise_or": _expression("{kind}({0} | {1})", of_masks=True),
    "pow": _power,
}
# In a type of floating numbers.
FLOATING: Mapping[str, Rule] = {
    "div": _divided,
    "true_divide": _divided,
    "reciprocal": _expression("1 / {0}"),
    "xlogy": _expression("({0} == 0 && {1} == {1} ? {0} : {0} * {kind}(std::log({1})))"),
    "digamma": _expression("{kind}(calc_digamma({0}))"),
    "sqrt": _expression("std::sqrt({0})"),
    "rsqrt": _expression("1 / std::sqrt({0})"),
    "round": _expression("std::nearbyint({0})"),
    "floor": _expression("std::floor({0})"),
    "ceil": _expression("std::ceil({0})"),
    "trunc": _expression("std::trunc({0})"),
}
# Of floating numbers, one each, by functions that g++ makes vectors of.
CALLS = {
    name: f"std::{name}"
    for name in (
        *("exp", "expm1", "log", "log1p", "sin", "cos", "tan", "tanh", "sinh", "cosh"),
        *("asin", "acos", "atan", "asinh", "acosh", "atanh", "erf", "erfc", "lgamma"),
    )
}
# With a result that is true or not.
LOGICAL: Mapping[str, Rule] = {
    **{
        name: _expression(f"({{0}} {sign} {{1}})", torch.bool, of_masks=sign in ("&&", "||"))
        for name, sign in {
            **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
            **{"logical_and": "&&", "logical_or": "||"},
        }.items()
    },
    "logical_not": _expression("!{0}", torch.bool, of_masks=True),
    "bitwise_not": _expression("!{0}", torch.bool, of_masks=True),
    "isnan": _expression("({0} != {0})", torch.bool),
    "isinf": _expression("std::isinf({0})", torch.bool),
}


def called(
    writer: Statements, function: str, numbers: Sequence[int], dtype: torch.dtype
) -> list[int]:
    """A function of some numbers; of many, in a loop."""
    kind = kind_of(dtype)
    cases = list(dict.fromkeys(cast(writer, number, dtype) for number in numbers))
    if len(cases) < _LEAST or writer.sides:
        made = [
            writer.made(f"{kind}({function}({operand(writer, n, dtype)}))", [n], dtype)
            for n in cases
        ]
    else:
        buffer, step = writer.copied(cases, dtype)
        out = writer.allocate((len(cases),), (1,), dtype)
        loop = f"for (long k = 0; k < {len(cases)}; k++) y[k] = {kind}({function}(x0[k]));"
        call = writer.shared.call(out, [(f"const {kind}*", buffer.place)], loop)
        done = writer.step([], [call], [step])
        made = [writer.read(f"{out.place}[{k}]", dtype, done) for k in range(len(cases))]
    known = dict(zip(cases, made, strict=True))
    return [known[cast(writer, number, dtype)] for number in numbers]
