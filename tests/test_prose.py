"""The documentation is easy to read: short paragraphs, short sentences, a README of one screen and a half."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.prose import ROOT, Page, measure, pages, paragraphs, sentences, words


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_paragraphs_and_sentences_are_short(path: Path) -> None:
    assert measure(path).faults == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_what_is_too_long_is_named() -> None:
    long = Page("page.md", longest=81, paragraph="It is said", mean_sentence=25.1)
    assert long.faults == [
        "page.md: a paragraph of 81 words, at most 80: 'It is said'",
        "page.md: 25.1 words a sentence on average, at most 25",
    ]
    assert Page("page.md", longest=80, paragraph="It is said", mean_sentence=25.0).faults == []


def test_only_prose_is_counted() -> None:
    text = """\
# A heading is no paragraph

Three short words. And [a link](https://example.org/a/long/path) of `inline code = 1`!

| a | table |
|---|---|

- one item
  that goes on
- another, after e.g. this

> a quotation

```python
# no prose
```

<!-- no prose either -->
$$
x = 1
$$
"""
    found = paragraphs(text)
    assert found == [
        "Three short words. And a link of Code!",
        "one item that goes on",
        "another, after e.g. this",
        "a quotation",
    ]
    assert [words(sentence) for sentence in sentences(found[0])] == [3, 5]
    assert len(sentences(found[2])) == 1
