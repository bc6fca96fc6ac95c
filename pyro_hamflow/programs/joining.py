"""Graphs of loops that Python wrote out, with operations that are alike performed together.

A loop of a hundred steps is a graph of thousands of operations on a few numbers each, which take
time to batch, to compile and to run. As one operation for all steps they are a few dozen. What has
to be done one after the other, stays so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from pyro_hamflow.programs.agreement import same_but_for_order
from pyro_hamflow.programs.alike import Likeness, Piece, Place, Slot, Step, inputs_of, shape_of
from pyro_hamflow.programs.graph_recorder import is_random, kind_of
from pyro_hamflow.programs.pure_recorder import PureRecorder
from pyro_hamflow.programs.rules import PURE

_FEW = 200  # operations, from which on it is worth looking
_MOST_LAYERS = 3  # of parts at one place, beyond which these are added up first
_SHARE = 0.6  # of the operations: where more are left, the graph stays as it is


def joined(graph: GraphModule, *examples: Tensor, live: bool = False) -> GraphModule:
    """The same program with alike operations performed together; itself where few are alike.

    Sums may be made in another order.

    Arguments:
        graph: A captured program, of pure operations.
        examples: Arguments of the shapes it will be called with.
        live: Whether gradients of the results shall stay those of the graph's, which is live.
    """
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    if len(calls) < _FEW or any(is_random(node.target) for node in calls):
        return graph
    likeness = Likeness(graph.graph)
    if len(likeness.steps) > _SHARE * len(calls):
        return graph
    recorder = PureRecorder(PURE, live=live)

    def run(*inputs: Tensor) -> Any:
        return _Performer(graph, likeness).run(*inputs)

    try:
        with torch.no_grad():
            recorder.record(torch.func.functionalize(run), *examples)
            made = recorder.module()
            results = [tree_leaves(program(*examples)) for program in (made, graph)]
    except Exception:  # whatever torch raises for an operation that it cannot batch
        return graph
    if len(made.graph.nodes) > _SHARE * len(graph.graph.nodes) or not same_but_for_order(*results):
        return graph
    made.meta.update(graph.meta)
    return made


class _Performer:
    """Performs a graph's operations once, those that are alike together.

    Arguments:
        graph: The graph.
        likeness: What is alike in it.
    """

    def __init__(self, graph: GraphModule, likeness: Likeness) -> None:
        self.graph, self.likeness = graph, likeness
        self._known: dict[Slot, Any] = {}
        self._rows: dict[Slot, tuple[int, int]] = {}  # the step and the row that a tensor is
        self._stacked: dict[tuple[int, int | None], Tensor] = {}
        self._gathered: dict[tuple[Slot, ...], Tensor] = {}

    def run(self, *inputs: Tensor) -> Any:
        """The graph's results."""
        nodes = self.graph.graph
        for node, value in zip(nodes.find_nodes(op="placeholder"), inputs, strict=True):
            self._known[Slot(node)] = value
        for node in nodes.find_nodes(op="get_attr"):
            self._known[Slot(node)] = self.graph.get_buffer(str(node.target))
        for number, step in enumerate(self.likeness.steps):
            getattr(self, f"_perform_{step.kind}")(number, step)
        return map_arg(nodes.output_node().args[0], lambda n: self._value(self.likeness.slot(n)))

    # --- the kinds of steps ---------------------------------------------------------------------

    def _perform_one(self, _: int, step: Step) -> None:
        (node,) = step.members
        parts = [self._value(slot) for slot in self.likeness.slots(node)]
        self._keep(node, self.likeness.perform(node, parts))

    def _perform_call(self, number: int, step: Step) -> None:
        """One operation for all members, a row for each."""
        columns = list(zip(*map(self.likeness.slots, step.members), strict=True))
        moving = [len(set(column)) > 1 for column in columns]
        order = self._order(next((c for c, m in zip(columns, moving, strict=True) if m), ()))
        members = [step.members[i] for i in order] if order else step.members
        parts = [
            self._gather([column[i] for i in order] if order else column)
            if moves
            else self._value(column[0])
            for column, moves in zip(columns, moving, strict=True)
        ]

        def one(*parts: Tensor) -> Any:
            return self.likeness.perform(step.members[0], parts)

        if any(moving):
            result = torch.func.vmap(one, in_dims=tuple(0 if m else None for m in moving))(*parts)
        else:
            alone = one(*parts)
            result = torch.utils._pytree.tree_map(
                lambda part: part.expand(len(members), *part.shape), alone
            )
        self._keep_rows(number, members, result)

    def _perform_piece(self, number: int, step: Step) -> None:
        """Pieces of one tensor, looked up at once."""
        pieces = cast(list[Piece], step.pieces)
        order = sorted(range(len(pieces)), key=lambda i: pieces[i].place.start)
        starts, first = [pieces[i].place.start for i in order], pieces[0]
        source, length, count = self._value(first.source), first.place.length, len(pieces)
        if starts == list(range(starts[0], starts[0] + count * length, length)):
            found = source.narrow(first.place.dim, starts[0], count * length)
        else:
            places = torch.tensor(starts, device=source.device)[:, None]
            places = places + torch.arange(length, device=source.device)
            found = source.index_select(first.place.dim, places.reshape(-1))
        if first.place.keeps:
            found = found.unflatten(first.place.dim, (count, length))
        self._keep_rows(number, [step.members[i] for i in order], found.movedim(first.place.dim, 0))

    def _perform_sum(self, _: int, step: Step) -> None:
        """What is added up one after the other; parts among zeros lie beside each other."""
        (node,) = step.members
        added = list(zip(step.slots, step.pieces, step.signs, strict=True))
        total: Any = 0
        for sign in {sign: None for *_, sign in added}:
            plain = [slot for slot, piece, s in added if piece is None and s == sign]
            for slots in self._by_step(plain):
                part = self._gather(slots).sum(0) if len(slots) > 1 else self._value(*slots)
                total = total + part if sign > 0 else total - part
            placed: dict[Place, list[Slot]] = {}
            for slot, piece, s in added:
                if piece is not None and s == sign:
                    placed.setdefault(piece.place, []).append(slot)
            for layer in _layers(placed):
                part = self._laid_out(layer, shape_of(node))
                total = total + part if sign > 0 else total - part
        self._keep(node, total)

    def _laid_out(self, layer: list[tuple[Place, list[Slot]]], shape: torch.Size) -> Tensor:
        """Sums of tensors at their places among zeros."""
        dim, _, length, keeps = layer[0][0]
        if all(len(slots) == 1 for _, slots in layer):
            rows = self._gather([slot for _, (slot,) in layer])
        else:
            rows = torch.stack([self._gather(slots).sum(0) for _, slots in layer])
        rows = rows.movedim(dim + 1, 1).flatten(0, 1) if keeps else rows
        if len(rows) < shape[dim]:
            places = torch.full((shape[dim],), len(rows), device=rows.device)
            for number, (place, _) in enumerate(layer):
                among = torch.arange(length, device=rows.device)
                places[place.start : place.start + length] = number * length + among
            rows = torch.cat([rows, torch.zeros_like(rows[:1])]).index_select(0, places)
        return rows.movedim(0, dim)

    def _perform_join(self, _: int, step: Step) -> None:
        """Many tensors side by side, or as rows."""
        (node,) = step.members
        stacks = "stack" in str(node.target)
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim = cast(int, dim) % len(shape_of(node))
        runs: list[list[Slot]] = []
        shapes: list[torch.Size] = []
        for part, slot in zip(inputs_of(node), step.slots, strict=True):
            if not runs or shape_of(part) != shapes[-1]:
                runs.append([])
                shapes.append(shape_of(part))
            runs[-1].append(slot)
        parts = []
        for slots in runs:
            rows = self._gather(slots).movedim(0, dim)
            parts.append(rows if stacks else rows.flatten(dim, dim + 1))
        self._keep(node, torch.cat(parts, dim) if len(parts) > 1 else parts[0])

    # --- tensors and rows -----------------------------------------------------------------------

    def _keep(self, node: Node, result: Any) -> None:
        self._known[Slot(node)] = _of_kind(result, node)
        if isinstance(result, tuple | list):
            for part, tensor in enumerate(result):
                self._known[Slot(node, part)] = tensor

    def _keep_rows(self, number: int, members: Sequence[Node], result: Any) -> None:
        several = isinstance(result, tuple | list)
        for part, tensor in enumerate(result) if several else [(None, result)]:
            self._stacked[number, part] = tensor
            for row, node in enumerate(members):
                self._rows[Slot(node, part)] = number, row
        if not several:
            _of_kind(result[0], members[0])

    def _value(self, slot: Slot) -> Any:
        if slot not in self._known:
            number, row = self._rows[slot]
            self._known[slot] = self._stacked[number, slot.part].select(0, row)
        return self._known[slot]

    def _order(self, slots: Sequence[Slot]) -> list[int] | None:
        """An order in which tensors come as rows of what was made before, if they are rows."""
        if not slots or any(slot not in self._rows for slot in slots):
            return None
        return sorted(range(len(slots)), key=lambda i: (self._rows[slots[i]], i))

    def _by_step(self, slots: list[Slot]) -> list[list[Slot]]:
        """Tensors that were made by one step together, in its order; all others one by one."""
        found: dict[Any, list[Slot]] = {}
        for slot in slots:
            key = (self._rows[slot][0], slot.part) if slot in self._rows else "others"
            found.setdefault(key, []).append(slot)
        return [sorted(part, key=lambda s: self._rows.get(s, (0, 0))) for part in found.values()]

    def _gather(self, slots: Sequence[Slot]) -> Tensor:
        """Tensors as rows of one."""
        key = tuple(slots)
        if key not in self._gathered:
            self._gathered[key] = self._rows_of(key)
        return self._gathered[key]

    def _rows_of(self, slots: tuple[Slot, ...]) -> Tensor:
        if len(set(slots)) == 1:
            value: Tensor = self._value(slots[0])
            return value.expand(len(slots), *value.shape)
        parts, places, length = list[Tensor](), dict[Slot, int](), 0
        for group in self._by_step(list(dict.fromkeys(slots))):
            if group[0] in self._rows:
                whole = self._stacked[self._rows[group[0]][0], group[0].part]
                numbers = [self._rows[slot][1] for slot in group]
                parts.append(_taken(whole, numbers))
            else:
                parts.append(torch.stack([self._value(slot) for slot in group]))
            places.update({slot: length + i for i, slot in enumerate(group)})
            length += len(group)
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return _taken(whole, [places[slot] for slot in slots])


def _layers(placed: dict[Place, list[Slot]]) -> Iterable[list[tuple[Place, list[Slot]]]]:
    """What is added up at places among zeros: layers of few where many meet, and of one each."""
    layers: dict[Any, list[tuple[Place, list[Slot]]]] = {}
    ends: dict[Any, list[int]] = {}
    for place, slots in sorted(placed.items(), key=lambda pair: pair[0].start):
        kind = place._replace(start=0)
        parts = [[slot] for slot in slots] if len(slots) <= _MOST_LAYERS else [slots]
        for part in parts:
            key = kind, len(part) > 1
            known = ends.setdefault(key, [])
            level = next((i for i, end in enumerate(known) if end <= place.start), len(known))
            known[level : level + 1] = [place.start + place.length]
            layers.setdefault((key, level), []).append((place, part))
    return layers.values()


def _taken(rows: Tensor, numbers: list[int]) -> Tensor:
    """Some rows of a tensor."""
    first, count = numbers[0], len(numbers)
    if numbers == list(range(first, first + count)):
        return rows if count == len(rows) else rows.narrow(0, first, count)
    return rows.index_select(0, torch.tensor(numbers, device=rows.device))


def _of_kind(result: Any, node: Node) -> Any:
    """A result, if it is of the kind that a node says."""
    if isinstance(result, Tensor) and node.meta.get("kind", kind_of(result)) != kind_of(result):
        raise RuntimeError(f"{node} is of another kind")
    return result
