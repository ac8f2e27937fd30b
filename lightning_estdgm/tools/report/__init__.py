"""What training runs cost against each other: from the files that they left to one page.

`read_run` reads a run, `compare` compares runs, `write` writes the page as HTML, Markdown or JSON.
``estdgm report`` does all three.
"""

from lightning_estdgm.tools.report.compare import Comparison, compare, spread
from lightning_estdgm.tools.report.document import Document, document
from lightning_estdgm.tools.report.render import FORMATS, html, markdown, write, write_json
from lightning_estdgm.tools.report.runs import Run, RunError, energy_label, read_run

__all__ = [
    "FORMATS",
    "Comparison",
    "Document",
    "Run",
    "RunError",
    "compare",
    "document",
    "energy_label",
    "html",
    "markdown",
    "read_run",
    "spread",
    "write",
    "write_json",
]
