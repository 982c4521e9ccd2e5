"""Measure the sentences of README.md and docs/: at most 16 words in the median, 28 at the 90th percentile.

Tables, code blocks, headings and images don't count. A code span, a link and a number count as they are read: a code
span is one word, a link is its text. `make lint` runs this, so that pages stay readable while they grow.
"""

import re
import sys
from pathlib import Path
from statistics import median, quantiles

MOST_MEDIAN_WORDS = 16
MOST_P90_WORDS = 28
ROOT = Path(__file__).resolve().parent.parent
_NOT_PROSE = re.compile(r"^(#|\||!\[|<)")
_LIST_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")


def sentences(markdown: str) -> list[str]:
    """Return the sentences of a page's paragraphs and list items."""
    markdown = re.sub(r"```.*?```|<!--.*?-->", "\n\n", markdown, flags=re.DOTALL)
    paragraphs: list[list[str]] = [[]]
    for line in markdown.splitlines():
        if not line.strip() or _NOT_PROSE.match(line):
            paragraphs.append([])
        elif _LIST_ITEM.match(line):
            paragraphs.append([_LIST_ITEM.sub("", line)])
        else:
            paragraphs[-1].append(line.strip())
    found = []
    for lines in paragraphs:
        text = re.sub(r"`[^`]*`", "code", " ".join(lines))
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("**", "")
        found += [part for part in re.split(r"(?<=[.!?:])\s+(?=[A-Z`(\d]|code)", text) if part.strip()]
    return found


def count_words(sentence: str) -> int:
    """Return the number of words; a dash or a sign that stands alone isn't one."""
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def measure(pages: list[Path]) -> tuple[float, float, int]:
    """Return the median and the 90th percentile of the words per sentence, and the number of sentences."""
    counts = [count_words(sentence) for page in pages for sentence in sentences(page.read_text(encoding="utf-8"))]
    return median(counts), quantiles(counts, n=10)[-1], len(counts)


def main() -> int:
    """Print a line per page and one of all. Return 1 where README or docs/ are over the limit."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    too_long = False
    for name, group in [*((page.relative_to(ROOT), [page]) for page in pages), ("all", pages)]:
        middle, p90, count = measure(group)
        over = middle > MOST_MEDIAN_WORDS or p90 > MOST_P90_WORDS
        too_long |= over
        print(f"{name!s:28} {count:4} sentences: median {middle:g} words, 90th percentile {p90:g}{'  TOO LONG' * over}")
    return int(too_long)


if __name__ == "__main__":
    sys.exit(main())
