"""Tables in pages: markdown, and filling what stands between ``<!-- table NAME -->`` and ``<!-- end -->``."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Sections = Mapping[str, Callable[[], str]]


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table without the last line break."""
    names = list(head)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(page: Path, sections: Sections) -> str:
    """The page's text with every table made anew.

    Raises:
        ValueError: a table has no place in the page, or several.
    """
    text = page.read_text()
    for name, make in sections.items():
        marked = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = marked.subn(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"{page}: {found} places for table {name}")
    return text
