"""Settings of the site: ``make docs`` builds it, without the network, into build/site."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
sys.path[:0] = [str(FOLDER), str(ROOT)]

from inventories import reachable  # noqa: E402

import lightning_estdgm  # noqa: E402

project = "lightning_estdgm"
author = "the authors of lightning_estdgm"
version = release = lightning_estdgm.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
]
exclude_patterns = ["_extra", "readme.md"]  # parts of the README are included

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # as GitHub makes them
myst_links_external_new_tab = False
suppress_warnings = [
    "myst.header",  # tables of results start at the level of the page that they are part of
]

# Notebooks are committed without outputs, and a test runs each. NOTEBOOKS=force runs them for the site as well.
nb_execution_mode = os.environ.get("NOTEBOOKS", "off")
nb_execution_timeout = 300
nb_execution_raise_on_error = True

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "inherited-members": False}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
viewcode_follow_imported_members = True

intersphinx_mapping = reachable(
    {
        "python": "https://docs.python.org/3",
        "torch": "https://docs.pytorch.org/docs/stable",
        "lightning": "https://lightning.ai/docs/pytorch/stable",
    },
    cache=ROOT / "build" / "inventories",
)

html_theme = "furo"
html_title = "lightning_estdgm"
html_static_path = ["static"]
html_favicon = "static/favicon.svg"
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # the browser's own: no script, no font, no request
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#a34a06", "color-brand-content": "#a34a06"},
    "dark_css_variables": {"color-brand-primary": "#f0a468", "color-brand-content": "#f0a468"},
}


def link_pages(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Let a docstring that names a page of docs/ lead there."""
    lines[:] = [re.sub(r"\bdocs/([\w/-]+)\.md", r":doc:`/\1`", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Take part in the reading of docstrings."""
    app.connect("autodoc-process-docstring", link_pages)
