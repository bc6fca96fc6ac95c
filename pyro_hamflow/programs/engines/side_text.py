"""A function in C++ of several chains' positions, side by side, and one of the data."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_hamflow.programs.engines.sides import Sides
from pyro_hamflow.programs.engines.statements import Statements


def text_of_sides(
    writer: Statements, sides: Sides, name: str, results: Sequence[Sequence[int]]
) -> str:
    """A namespace with ``prepare`` and ``call``: of data, and of positions.

    Arguments:
        writer: The statements.
        sides: Which of their numbers are vectors.
        name: The namespace's.
        results: The potential's number, and those of its gradient.
    """
    wanted = writer.written(results, "r{r}[{k}] = Numbers{{}} + {name};")
    of_vectors = [step for step in wanted if _is_of_vectors(writer, sides, step)]
    of_data = [step for step in wanted if not _is_of_vectors(writer, sides, step)]
    read = {number for step in of_vectors for number in writer.steps[step].needs}
    kept = sorted(n for n in read - sides.vectors if not writer.numbers[n].is_constant)
    for number in kept:
        of_data.append(writer.step([number], [f"c.v{number} = v{number};"]))
    prepared = writer.chunk_text(of_data)
    writer.places = {number: f"c.v{number}" for number in kept}
    return "\n".join(
        [
            f"namespace {name} {{",
            *("struct Data {", *(f"{writer.kind(n)} v{n};" for n in kept), "};"),
            *("static void prepare(void* const* a, Data& c) {", *prepared, "}"),
            "static void call(const Data& c, const Numbers* z, Numbers* r0, Numbers* r1) {",
            *(*writer.chunk_text(of_vectors), "}", "}"),
        ]
    )


def _is_of_vectors(writer: Statements, sides: Sides, step: int) -> bool:
    """Whether a statement works out a vector, or writes a result."""
    made = writer.steps[step].makes
    return made is None or made in sides.vectors
