"""Comparison of training runs by what they cost, from the files that they left to one page.

`read_run` reads a run, `compare` compares runs, `write` writes the page as HTML, Markdown or JSON.
``estdgm report`` does all three.
"""

from lightning_estdgm.tools.report.comparison import Comparison, compare
from lightning_estdgm.tools.report.document import Document, document
from lightning_estdgm.tools.report.finished_run import FinishedRun, energy_label
from lightning_estdgm.tools.report.json_format import write_json
from lightning_estdgm.tools.report.render import FORMATS, html, markdown, write
from lightning_estdgm.tools.report.run_folder import RunError, read_run

__all__ = [
    "FORMATS",
    "Comparison",
    "Document",
    "FinishedRun",
    "RunError",
    "compare",
    "document",
    "energy_label",
    "html",
    "markdown",
    "read_run",
    "write",
    "write_json",
]
