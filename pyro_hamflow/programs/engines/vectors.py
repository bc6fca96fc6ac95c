"""Inductor's kernels as g++ makes vectors of them: loops over numbers, rewritten line by line."""

from __future__ import annotations

import re

_ACCUMULATOR = re.compile(r"\btmp_acc\w+")
_SCATTER = re.compile(r"^.*(atomic_add|\w*out_ptr\d+\[.*\b(tmp|place).*\] \+?= )")
_LOOP = re.compile(r"^\s*for\(int64_t (\w+)=static_cast<int64_t>\(0L\); \w+<\D+64_t>\((\d+)L\);")
_ADDED = re.compile(r"^(\s*)(\w*out_ptr\d+)\[(.*\btmp.*)\] \+= (\w+);$")
_MOST_SCATTERED = 4096  # numbers in a row that are kept apart: on the stack
_MOST_PICKED = 2**15  # numbers of a loop, likewise
_DEFINED = re.compile(r"^\s*auto (\w+) = (.*);$")
_READ = re.compile(r"^(\w+)\[(.*)\]$")
_FLAGS = re.compile(r"\bbool\* (\w+)")
_STORED = re.compile(r"^\s*(\w+)\[.*\] \+?= ")
_BRANCHES = re.compile(r"^\s*(for\(|if|else|atomic_add)|.*\[&\]")
_SUM = re.compile(r"^\s*(tmp_acc\d+) = \1 \+ ")


def kernel_text(name: str, text: str) -> str:
    """A kernel as a function of our file, with sums that g++ may make vectors of."""
    lines = [
        line
        for line in text.splitlines()
        # Torch's headers; and the report of divisions of integers by zero.
        if not line.startswith("#include") and "inductor_cpu_" not in line
    ]
    lines = _with_picks_apart(_with_scatters_apart(lines))
    lines = _with_vector_sums(_without_promises(lines))
    body = "\n".join(lines)
    return re.sub(r'extern "C"\s+void\s+\w+\(', f"static inline void {name}(", body)


def _with_scatters_apart(lines: list[str]) -> list[str]:
    """Moves additions at indices of data into loops of their own, so that the rest may be vectors.

    As in the gradient of a likelihood whose terms pick an effect each.
    """
    for start in reversed(range(len(lines))):
        found = _LOOP.match(lines[start])
        loop = _block(lines, start + 1)
        added = [match for line in loop if (match := _ADDED.match(line))]
        plain = sum(map(bool, map(_SCATTER.match, loop))) == len(added)
        inner = any(line.lstrip().startswith(("for(", "if", "else")) for line in loop)
        if not found or not added or not plain or inner or int(found[2]) > _MOST_SCATTERED:
            continue
        rest = [line for line in loop if not _ADDED.match(line)]
        keep, before, after = [], [], []
        for i, (_, out, index, value) in enumerate(match.groups() for match in added):
            keep.append(f"place{i}[{found[1]}] = {index}; share{i}[{found[1]}] = {value};")
            before.append(f"std::decay_t<decltype(*{out})> share{i}[{found[2]}];")
            before.append(f"int64_t place{i}[{found[2]}];")
            after.append(
                f"for (long i = 0; i < {found[2]}; i++) {out}[place{i}[i]] += share{i}[i];"
            )
        last = max(i for i, line in enumerate(rest) if line.strip() != "}") + 1
        whole = [lines[start], *rest[:last], *keep, *rest[last:]]
        above = start - 1 if start and "#pragma" in lines[start - 1] else start
        head = ["{", *before, *lines[above:start], *whole, *after, "}"]
        lines = [*lines[:above], *head, *lines[start + 1 + len(loop) :]]
    return lines


def _with_picks_apart(lines: list[str]) -> list[str]:
    """Moves what g++ reads one by one into loops of its own, so that the rest may be vectors.

    As where each term of a likelihood reads the parameters of its own group.
    """
    names = {found[1]: found[2] for line in lines if (found := _DEFINED.match(line))}
    flags = {match[1] for line in lines if (match := _FLAGS.search(line))}
    number = "double" if any("double*" in line for line in lines) else "float"
    for start in reversed(range(len(lines))):
        found = _LOOP.match(lines[start])
        if not found or int(found[2]) > _MOST_SCATTERED:
            continue
        loop = _block(lines, start + 1)
        if any(map(_BRANCHES.match, loop)):
            continue
        defined = [(match[1], match[2]) for line in loop if (match := _DEFINED.match(line))]
        picked = [
            (name, read)
            for name, text in defined
            if (read := _READ.match(text)) and _is_picked(read[1], read[2], found[1], flags)
        ]
        needed = _needed(defined, [read[2] for _, read in picked])
        sources = [read[1] for _, read in picked] + re.findall(
            r"(\w+)\[", " ".join(needed.values())
        )
        stored = {names.get(match[1], match[1]) for line in loop if (match := _STORED.match(line))}
        written = stored & {names.get(name, name) for name in sources}
        twice = len(dict(defined)) < len(defined)  # in blocks of their own
        if written or twice or not 0 < len(picked) * int(found[2]) <= _MOST_PICKED:
            continue
        room, own, kept = [], [f"auto {name} = {text};" for name, text in needed.items()], loop
        for i, (name, read) in enumerate(picked):
            is_flag, place = read[1] in flags, f"picked{i}[{found[1]}]"
            kind = number if is_flag else f"std::decay_t<decltype(*{read[1]})>"
            room.append(f"{kind} picked{i}[{found[2]}];")
            own.append(f"{place} = {read[0]};")
            again = f"auto {name} = {place}{' != 0' * is_flag};"
            kept = [re.sub(rf"auto {name} = .*;", again, line) for line in kept]
        above = start - 1 if start and "#pragma" in lines[start - 1] else start
        before = ["{", *room, lines[start], "{", *own, "}"]
        after = [*lines[above : start + 1], *kept, "}"]
        lines = [*lines[:above], *before, *after, *lines[start + 1 + len(loop) :]]
    return lines


def _is_picked(source: str, index: str, variable: str, flags: set[str]) -> bool:
    """Whether what lies at an index is no vector for g++.

    That is what lies at data's places; or so many numbers apart, for which it has code if they are
    three or two, four and their like; or a truth value that is the same in all turns of the loop.
    """
    apart = re.search(rf"\b(\d+)L\*{variable}\b", index)
    steps = int(apart[1]) if apart else 1
    if source in flags and not re.search(rf"\b{variable}\b", index):
        return True
    return "tmp" in index or not (steps == 3 or steps & (steps - 1) == 0)


def _needed(defined: list[tuple[str, str]], texts: list[str]) -> dict[str, str]:
    """The definitions that some texts need, in their order."""
    known, open_ends = dict(defined), list(texts)
    wanted: set[str] = set()
    while open_ends:
        for name in re.findall(r"\btmp\d+\b", open_ends.pop()):
            if name in known and name not in wanted:
                wanted.add(name)
                open_ends.append(known[name])
    return {name: text for name, text in defined if name in wanted}


def _without_promises(lines: list[str]) -> list[str]:
    """Takes it back that turns of a loop are independent, where they write to indices of data."""
    return [
        line
        for number, line in enumerate(lines)
        if "#pragma GCC ivdep" not in line or not _scatters(_block(lines, number + 2))
    ]


def _scatters(loop: list[str]) -> bool:
    return any(map(_SCATTER.match, loop))


def _with_vector_sums(lines: list[str]) -> list[str]:
    """Lets sums be added in any order: in innermost loops that do nothing but that in turn."""
    marked = list(lines)
    for start, line in enumerate(lines):
        if not line.lstrip().startswith("for("):
            continue
        loop = _block(lines, start + 1)
        if _scatters(loop) or any(inner.lstrip().startswith("for(") for inner in loop):
            continue
        uses = [name for inner in loop for name in _ACCUMULATOR.findall(inner)]
        sums = {found.group(1) for inner in loop if (found := _SUM.match(inner))}
        if sums and sums == set(uses) and len(uses) == 2 * len(sums):
            marked[start] = f"#pragma omp simd reduction(+ : {', '.join(sorted(sums))})\n{line}"
    return marked


def _block(lines: list[str], start: int) -> list[str]:
    """The lines from an opening brace to the one that closes it."""
    depth = 0
    for end in range(start, len(lines)):
        depth += lines[end].count("{") - lines[end].count("}")
        if depth == 0:
            return lines[start : end + 1]
    return lines[start:]
