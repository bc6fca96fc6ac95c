"""Formulas as MathML, which browsers draw themselves: no script, no font and no network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

# What the converter does not know, in words that it does.
_SAID_OTHERWISE = {"\\Bigl": "", "\\Bigr": "", "\\lVert": "\\|", "\\rVert": "\\|"}


def mathml(tex: str, *, block: bool) -> str:
    """A formula of TeX as MathML."""
    for word, other in _SAID_OTHERWISE.items():
        tex = tex.replace(word, other)
    return tex2mathml(tex, as_block=block)


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """Writes a formula in a line."""
    self.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_displayed(self: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a formula of its own."""
    self.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the renderer."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displayed, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
