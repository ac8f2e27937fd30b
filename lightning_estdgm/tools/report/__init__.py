"""Comparison of training runs by what they cost, from the files that they left to one page.

`read_run` reads a run, `compare` compares runs, `write` writes the page as HTML, Markdown or JSON.
``estdgm report`` does all three.
"""

from lightning_estdgm.tools.report._comparison import compare
from lightning_estdgm.tools.report._render import html, markdown, write
from lightning_estdgm.tools.report._run_folder import RunError, read_run

__all__ = ["RunError", "compare", "html", "markdown", "read_run", "write"]
