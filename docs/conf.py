"""How the site is built: ``make docs``. Nothing is fetched from anywhere."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]

from pyro_hamflow import __version__  # noqa: E402  # found by the line above

project = "pyro_hamflow"
author = copyright = "the pyro_hamflow developers"
release = version = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "public_names",
]
exclude_patterns = ["_build", "looks"]
nb_execution_mode = "off"  # `make gallery` executes the notebooks
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_custom_sections = ["Invariant"]
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "pyro_hamflow"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
