"""The directive ``other-names``: whatever is public and has no place on the page yet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import pyro_hamflow


def entries(page: str) -> list[str]:
    """What autodoc is to be told of public names that a page does not hold."""
    held = set(re.findall(r"(?m)^\.\. auto\w+:: (\w+)$", page))
    others = [name for name in pyro_hamflow.__all__ if name not in held]
    kinds = [isinstance(getattr(pyro_hamflow, name), type) for name in others]
    return [
        f".. auto{'class' if kind else 'function'}:: {name}"
        for name, kind in zip(others, kinds, strict=True)
    ]


class OtherNames(SphinxDirective):
    """Documents what is public and not on the page, so that no name is missing."""

    def run(self) -> list[nodes.Node]:
        page = Path(self.env.doc2path(self.env.docname)).read_text()
        lines = StringList(entries(page), source="other-names")
        holder = nodes.container()
        self.state.nested_parse(lines, self.content_offset, holder)
        return holder.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("other-names", OtherNames)
    return {"parallel_read_safe": True}
