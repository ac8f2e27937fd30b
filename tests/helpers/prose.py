"""How long the paragraphs and sentences of the documentation are: ``python -m helpers.prose`` in tests/ tells.

Counted are paragraphs, list items and quotations of README.md and docs/, without code blocks, tables, headings,
formulas on lines of their own, and comments. A word is what holds a letter or a digit; inline code is one word.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST_PARAGRAPH = 80
MEAN_SENTENCE = 25.0

_BLOCKS = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2[`~]* *$|^\$\$.*?\$\$|<!--.*?-->", flags=re.DOTALL | re.MULTILINE)
_SKIPPED = re.compile(r"^\s*(\||#|:::|</?\w+|\[[^\]]+\]:|!\[[^\]]*\]\([^)]*\)\s*$)|^\s*-{3,}\s*$")
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
_ENDS = re.compile(r"(?<=[.!?])[\"')*_\]]*\s+(?=[\"'(\[*_`]*[A-Z0-9`$])")
_SHORT = re.compile(r"\b(e\.g|i\.e|vs|cf|Fig|al|etc|approx)\.")


@dataclass(frozen=True)
class Page:
    """Lengths in words of what a page says.

    Attributes:
        path: path of the page in the repository.
        longest: words of the longest paragraph.
        paragraph: how that paragraph begins.
        mean_sentence: mean number of words in a sentence; 0 where there are none.

    """

    path: str
    longest: int
    paragraph: str
    mean_sentence: float

    @property
    def faults(self) -> list[str]:
        """What is too long, and how much is allowed."""
        found = []
        if self.longest > LONGEST_PARAGRAPH:
            found.append(
                f"{self.path}: a paragraph of {self.longest} words, at most {LONGEST_PARAGRAPH}: {self.paragraph!r}"
            )
        if self.mean_sentence > MEAN_SENTENCE:
            found.append(
                f"{self.path}: {self.mean_sentence:.1f} words a sentence on average, at most {MEAN_SENTENCE:g}"
            )
        return found


def words(text: str) -> int:
    """Number of words."""
    return sum(1 for word in text.split() if re.search(r"\w", word))


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items, each as one line without markup."""
    found: list[list[str]] = [[]]
    for line in _BLOCKS.sub("\n", text).splitlines():
        quoted = re.sub(r"^\s*> ?", "", line)
        if not quoted.strip() or _SKIPPED.match(quoted):
            found.append([])
            continue
        if _ITEM.match(quoted):
            found.append([])
        found[-1].append(_ITEM.sub("", quoted).strip())
    return [_plain(" ".join(lines)) for lines in found if lines]


def _plain(text: str) -> str:
    text = re.sub(r"`+[^`]+`+", "Code", text)
    text = re.sub(r"\$[^$]+\$", "Formula", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"</?\w+[^>]*>|\*\*", "", text)


def sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph."""
    return [part for part in _ENDS.split(_SHORT.sub(r"\1", paragraph)) if words(part)]


def measure(path: Path) -> Page:
    """Measure one page."""
    found = paragraphs(path.read_text(encoding="utf-8"))
    longest = max(found, key=words, default="")
    lengths = [words(sentence) for paragraph in found for sentence in sentences(paragraph)]
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    return Page(str(path.relative_to(ROOT)), words(longest), " ".join(longest.split()[:8]), mean)


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Print the lengths of every page, and end with status 1 where one is too long."""
    measured = [measure(path) for path in pages()]
    for page in measured:
        print(f"{page.longest:4d} words in the longest paragraph, {page.mean_sentence:4.1f} in a sentence  {page.path}")
    faults = [fault for page in measured for fault in page.faults]
    sys.exit("\n".join(faults) or None)


if __name__ == "__main__":
    main()
