"""What Inductor writes around its kernels, as C++.

That is a function in Python that makes buffers, calls kernels and operations on them, and returns
some of them. Each of its statements is of one of a few forms; buffers get fixed places in scratch
memory. Inductor may change these forms from version to version: whatever is not known here is
declined by its name.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_hamflow.programs.engines.buffers import (
    KINDS,
    Buffer,
    NotSupported,
    UsesScratch,
    kind_of,
    loops,
)
from pyro_hamflow.programs.engines.operators import write_operation
from pyro_hamflow.programs.engines.vectors import kernel_text

_TYPES = {str(dtype): dtype for dtype in KINDS}
_SPECIAL = re.compile(r"\bcalc_(?!digamma\b)\w+|\bzeta<|\btrigamma\b")


class Function(UsesScratch):
    """A function in C++ that does what a program of Inductor's does.

    Arguments:
        source: Inductor's program.
        examples: Arguments of the shapes it will be called with.

    Attributes:
        scratch: How many bytes its buffers take.
        needs_torch_headers: Whether its kernels call special functions of torch's.

    Raises:
        NotSupported: If the program has a statement of a form that is not known.
    """

    def __init__(self, source: ast.Module, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self._examples = examples
        self._known: dict[str, Any] = {}
        self._kernels = _kernels(source)
        self._lines: list[str] = []
        self._results: list[Buffer] = []
        for statement in _body(source):
            try:
                self._take(statement)
            except (KeyError, TypeError, ValueError) as error:  # an argument of an unknown form
                raise NotSupported(ast.unparse(statement).splitlines()[0]) from error
        self.needs_torch_headers = any(map(_SPECIAL.search, self._kernels.values()))

    def text(self, name: str) -> str:
        """A namespace with the function ``call`` and its kernels.

        It takes an array of pointers to its arguments, scratch memory, and an array of pointers to
        where its results go.
        """
        kernels = [kernel_text(kernel, text) for kernel, text in self._kernels.items()]
        body = "\n".join(f"  {line}" for line in self._with_results())
        head = "static void call(void* const* a, char* w, void* const* r) {"
        return "\n".join([f"namespace {name} {{", *kernels, head, body, "}", "}"])

    def _with_results(self) -> list[str]:
        """The statements, and what brings results to where the caller wants them.

        A buffer that is a result as it stands lies there from the start.
        """
        there: dict[str, str] = {}
        copied = []
        for i, result in enumerate(self._results):
            if result.place not in there and self._is_all_of_its_buffer(result):
                there[result.place] = f"(({result.kind}*)r[{i}])"
            else:
                copied.append(_copied(i, result))
        lines = [*self._lines, *copied]
        for place, wanted in there.items():
            lines = [line.replace(place, wanted) for line in lines]
        return lines

    def _is_all_of_its_buffer(self, result: Buffer) -> bool:
        """Whether a result is a buffer of this function, number by number as the caller's."""
        same = result.dtype == self._examples[0].dtype and result.empty().is_contiguous()
        return same and self.sizes.get(result.place) == math.prod(result.shape)

    def emit(self, line: str) -> None:
        self._lines.append(line)

    def _take(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Delete() | ast.Assert() | ast.Pass():
                return
            case ast.Return(value=ast.Tuple(elts=parts)):
                self._results = [self._buffer(part) for part in parts]
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id="args")):
                self._take_arguments([ast.unparse(name) for name in names])
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._known[name] = self._value(value)
            case ast.Expr(value=ast.Call() as call):
                self._call(call)
            case _:
                raise NotSupported(ast.unparse(statement).splitlines()[0])

    def _take_arguments(self, names: list[str]) -> None:
        if len(names) != len(self._examples):
            raise NotSupported("a program that leaves arguments out")
        for i, (name, example) in enumerate(zip(names, self._examples, strict=True)):
            place, shape = f"(({kind_of(example.dtype)}*)a[{i}])", tuple(example.shape)
            self._known[name] = Buffer(example.dtype, place, shape, example.stride())

    def _value(self, value: ast.expr) -> Any:
        if isinstance(value, ast.Call) and ast.unparse(value.func).startswith("torch.ops."):
            return self._operation(value)
        if isinstance(value, ast.Subscript):
            return self._known[ast.unparse(value.value)][ast.literal_eval(value.slice)]
        return self._buffer(value)

    def _operation(self, call: ast.Call) -> Any:
        args = [self._argument(argument) for argument in call.args]
        keywords = {str(part.arg): self._argument(part.value) for part in call.keywords}
        return write_operation(self, ast.unparse(call.func), args, keywords)

    def _argument(self, value: ast.expr) -> Any:
        """An argument of an operation: a buffer, or a plain value."""
        if isinstance(value, ast.Name | ast.Call):
            return self._buffer(value)
        text = ast.unparse(value)
        return _TYPES[text] if text in _TYPES else ast.literal_eval(value)

    def _buffer(self, value: ast.expr) -> Buffer:
        if isinstance(value, ast.Name) and isinstance(self._known.get(value.id), Buffer):
            return self._known[value.id]
        if isinstance(value, ast.Call):
            name, args = ast.unparse(value.func), value.args
            if name == "reinterpret_tensor":
                whole = self._buffer(args[0])
                shape, strides, offset = map(ast.literal_eval, args[1:])
                place = f"({whole.place} + {offset})" if offset else whole.place
                return Buffer(whole.dtype, place, shape, strides)
            if name in ("empty_strided_cpu", "empty_strided"):
                shape, strides = map(ast.literal_eval, args[:2])
                return self.allocate(shape, strides, _TYPES[ast.unparse(args[2])])
        raise NotSupported(ast.unparse(value))

    def _call(self, call: ast.Call) -> None:
        name = ast.unparse(call.func)
        if name in self._kernels:
            places = ", ".join(self._buffer(argument).place for argument in call.args)
            self.emit(f"{name}({places});")
        elif name != "args.clear":
            raise NotSupported(name)


def _copied(number: int, buffer: Buffer) -> str:
    """Writes a result where the caller wants it, without gaps, as its numbers are.

    A model may have data of another type than its parameters, and then a density of that.
    """
    head, indices = loops(buffer.shape)
    at = "0"
    for index, size in zip(indices, buffer.shape, strict=True):
        at = f"({at} * {size} + {index})"
    return f"{head}((Real*)r[{number}])[{at}] = Real(*{buffer.at(indices)});"


def _kernels(source: ast.Module) -> dict[str, str]:
    """The texts of all kernels by their names."""
    return {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value.args[1])
        for node in source.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).startswith("async_compile.cpp")
    }


def _body(source: ast.Module) -> list[ast.stmt]:
    for node in ast.walk(source):
        if isinstance(node, ast.FunctionDef) and node.name == "call":
            return node.body
    raise NotSupported("a program without a function")
