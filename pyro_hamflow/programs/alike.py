"""Which operations of a graph are alike, as the steps of a loop are that Python wrote out.

Operations that do the same to tensors of the same kinds, at the same depth of the graph, do not
depend on each other. Rows of one tensor for all of them, they are one operation. Others that come
in many steps are taken apart differently: pieces of one tensor are looked up at once, what is added
up one after the other is one sum, and many tensors that are joined are joined as rows.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

_aten = torch.ops.aten
_FEW = 4  # alike operations, from which on they are joined
_MANY = 16  # tensors that are added up or joined, from which on that is one step
_LARGE = 2**20  # numbers in all that are added up, beyond which rows of them take memory
_ADD = {torch.add, _aten.add.Tensor}
_SUBTRACT = {torch.sub, _aten.sub.Tensor}
_SUM = {_aten.sum.default}
_SAME = {torch.reshape, _aten.reshape.default, _aten.expand.default}
_SELECT = {torch.select, _aten.select.int}
_SLICE = {_aten.slice.Tensor}
_SPLIT = {torch.split_with_sizes, _aten.split_with_sizes.default}
_CAT = {torch.cat, _aten.cat.default}
_STACK = {torch.stack, _aten.stack.default}
_SELECTED, _SLICED = _aten.select_backward.default, _aten.slice_backward.default


class Slot(NamedTuple):
    """A tensor that a node makes: its result, or one of its results."""

    node: Node
    part: int | None = None


class Place(NamedTuple):
    """Where a tensor lies in another.

    Attributes:
        dim: Along which dimension.
        start: From where.
        length: How long it is there.
        keeps: Whether it has the dimension, or is one element of it.
    """

    dim: int
    start: int
    length: int
    keeps: bool


class Piece(NamedTuple):
    """A tensor that lies in another, or that is put there."""

    source: Slot
    place: Place

    @property
    def alike(self) -> tuple[Slot, Place]:
        """What is the same of pieces that are looked up together."""
        return self.source, self.place._replace(start=0)


@dataclass
class Step:
    """Operations that are performed together.

    Attributes:
        kind: ``"call"``, ``"one"``, ``"piece"``, ``"sum"`` or ``"join"``.
        members: Their nodes.
        pieces: Where each lies, of pieces; where each of ``slots`` goes, of sums.
        slots: What is added up or joined.
        signs: Whether each of them is added, or subtracted.
    """

    kind: str
    members: list[Node] = field(default_factory=list)
    pieces: list[Piece | None] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    signs: list[int] = field(default_factory=list)


def shape_of(node: Node) -> torch.Size:
    """The shape of a node's result."""
    shape: torch.Size = node.meta["kind"][0]
    return shape


def inputs_of(node: Node) -> list[Node]:
    """A node's arguments, one after the other as they are written."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


class Likeness:
    """What is alike in a graph of pure operations.

    Attributes:
        steps: Of which the graph consists, in an order in which they can be performed.
    """

    def __init__(self, graph: Graph) -> None:
        self._same: dict[Node, Slot] = {}
        self._pieces: dict[Node, Piece] = {}
        self._looked_up: set[Node] = set()  # pieces that are many of one tensor
        self._summed: dict[Node, list[tuple[Node, int]]] = {}
        self._hidden: set[Node] = set()  # what a sum takes apart
        calls = [node for node in graph.nodes if node.op == "call_function"]
        self._find_pieces(calls)
        self._find_sums(calls)
        self._depth: dict[Node, int] = defaultdict(int)
        groups: dict[Any, Step] = {}
        for node in calls:
            if node not in self._hidden and node not in self._same:
                self._place(node, groups)
        self.steps = sorted(_of_some(groups.values()), key=lambda s: self._depth[s.members[0]])

    def slot(self, node: Node) -> Slot:
        """Where a node's tensor comes from."""
        return self._same.get(node) or Slot(node)

    def _find_pieces(self, calls: list[Node]) -> None:
        for node in calls:
            args: tuple[Any, ...] = node.args
            if not args or not isinstance(args[0], Node):
                continue
            source = args[0]
            if node.target is operator.getitem and source.target in _SPLIT:
                whole, sizes, *dim = cast(tuple[Any, ...], source.args)
                number = args[1]
                along = (dim[0] if dim else 0) % len(shape_of(node))
                start = sum(sizes[:number])
                self._pieces[node] = Piece(
                    self.slot(whole), Place(along, start, sizes[number], True)
                )
            elif node.target is operator.getitem:
                self._same[node] = Slot(source, args[1])
            elif "kind" not in source.meta or "kind" not in node.meta:
                continue
            elif node.target in _SELECT and len(args) == 3:
                along = args[1] % len(shape_of(source))
                start = args[2] % shape_of(source)[along]
                self._pieces[node] = Piece(self.slot(source), Place(along, start, 1, False))
            elif node.target in _SLICE and len(args) == 4:
                along = args[1] % len(shape_of(source))
                bounds = range(shape_of(source)[along])[args[2] : args[3]]
                piece = Piece(self.slot(source), Place(along, bounds.start, len(bounds), True))
                self._pieces[node] = piece
            elif (node.target in _SAME and shape_of(node) == shape_of(source)) or (
                node.target in _SUM and shape_of(source) == () and not node.kwargs
            ):
                self._same[node] = self.slot(source)
        alike: dict[Any, list[Node]] = defaultdict(list)
        for node, piece in self._pieces.items():
            alike[piece.alike].append(node)
        self._looked_up.update(n for nodes in alike.values() if len(nodes) >= _MANY for n in nodes)
        self._hidden.update(node for node in calls if node.target in _SPLIT)

    def _find_sums(self, calls: list[Node]) -> None:
        """Finds what is added up, from the last addition on."""
        for last in reversed(calls):
            if not _adds(last) or last in self._hidden:
                continue
            leaves, waiting = list[tuple[Node, int]](), [(last, 1)]
            inner = list[Node]()
            while waiting:
                node, sign = waiting.pop()
                if node is last or (_adds(node) and len(node.users) == 1):
                    inner.append(node)
                    first, second = cast(tuple[Node, Node], node.args)
                    turn = -1 if node.target in _SUBTRACT else 1
                    waiting += [(first, sign), (second, sign * turn)]
                else:
                    leaves.append((node, sign))
            numbers = len(leaves) * shape_of(last).numel()
            placed = [node for node, _ in leaves if _places(node) is not None]
            if len(leaves) < _MANY or (numbers > _LARGE and len(placed) < len(leaves)):
                continue
            self._summed[last] = leaves
            self._hidden.update(node for node in inner if node is not last)
            self._hidden.update(placed)

    def _place(self, node: Node, groups: dict[Any, Step]) -> None:
        """Puts a node to those that are alike."""
        key: Any
        if node in self._summed:
            leaves = self._summed[node]
            pieces = [_places(leaf) for leaf, _ in leaves]
            step = Step("sum", [node], list(pieces))
            step.slots = [
                self.slot(leaf) if piece is None else self.slot(piece.source.node)
                for (leaf, _), piece in zip(leaves, pieces, strict=True)
            ]
            step.signs = [sign for _, sign in leaves]
            key, sources = node, [slot.node for slot in step.slots]
        elif node in self._looked_up:
            piece = self._pieces[node]
            step, sources = Step("piece"), [piece.source.node]
            key = piece.alike
        elif node.target in _CAT | _STACK and len(inputs_of(node)) >= _MANY:
            step = Step("join", [node], slots=[self.slot(part) for part in inputs_of(node)])
            key, sources = node, [slot.node for slot in step.slots]
        else:
            step, sources = Step("call"), [slot.node for slot in self.slots(node)]
            key = self._key(node)
        depth = self._depth[node] = 1 + max((self._depth[s] for s in sources), default=0)
        step = groups.setdefault((depth, key), step)
        if node not in step.members:
            step.members.append(node)
        if step.kind == "piece":
            step.pieces.append(self._pieces[node])

    def _key(self, node: Node) -> Any:
        """What is the same of nodes that do the same."""
        kinds = [part.meta.get("kind") for part in inputs_of(node)]
        piece = self._pieces.get(node)
        if piece is not None:
            kind = node.meta.get("kind"), shape_of(self._whole(node))
            return (piece.place, *kind) if piece.source.part is None else node
        if None in kinds:
            return node
        written = repr(map_arg((node.args, node.kwargs), lambda _: "tensor"))
        return node.target, written, tuple(kinds)

    @staticmethod
    def _whole(node: Node) -> Node:
        """What a piece is taken from."""
        source = inputs_of(node)[0]
        return inputs_of(source)[0] if source.target in _SPLIT else source

    def slots(self, node: Node) -> list[Slot]:
        """Where a node's arguments come from."""
        if node in self._pieces:
            return [self._pieces[node].source]
        return [self.slot(part) for part in inputs_of(node)]

    def perform(self, node: Node, parts: Iterable[Any]) -> Any:
        """Performs a node's operation on other arguments."""
        waiting = iter(parts)
        if node in self._pieces:
            dim, start, length, keeps = self._pieces[node].place
            source = next(waiting)
            return source.narrow(dim, start, length) if keeps else source.select(dim, start)
        args, kwargs = map_arg((node.args, node.kwargs), lambda _: next(waiting))
        return cast(Any, node.target)(*args, **kwargs)


def _of_some(steps: Iterable[Step]) -> Iterable[Step]:
    """Steps of few calls taken apart."""
    for step in steps:
        if step.kind == "call" and len(step.members) < _FEW:
            yield from (Step("one", [node]) for node in step.members)
        else:
            yield step


def _adds(node: Node) -> bool:
    """Whether a node adds or subtracts two tensors of its own kind."""
    if node.target not in _ADD | _SUBTRACT or len(node.args) != 2 or node.kwargs:
        return False
    return all(
        isinstance(part, Node) and part.meta.get("kind", 0) == node.meta.get("kind")
        for part in node.args
    )


def _places(node: Node) -> Piece | None:
    """Where a node puts a tensor among zeros, if that is what it does, for one sum alone."""
    args: tuple[Any, ...] = node.args
    if len(node.users) != 1 or "kind" not in node.meta:
        return None
    if node.target is _SELECTED:
        source, shape, dim, start = args
        return Piece(Slot(source), Place(dim % len(shape), start % shape[dim], 1, False))
    if node.target is _SLICED and args[-1] == 1:
        source, shape, dim, start, end, _ = args
        bounds = range(shape[dim])[start:end]
        return Piece(Slot(source), Place(dim % len(shape), bounds.start, len(bounds), True))
    return None
