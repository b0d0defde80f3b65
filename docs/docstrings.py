"""How the site shows raypar's docstrings: a paragraph of `name:  what it is` lines becomes a list of names.

    data:      replicas of the model; each trains on its share         - **`data`**: replicas of the model; each
               of every global batch.                           ─▶        trains on its share of every global batch.

Lines below a name that begin with a dash become a list in its item. Everything else is Markdown already: an indented
drawing is a block of code.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

NAMES = re.compile(r"^(?P<names>\w+(?:, \w+)*): +(?P<text>\S.*)$")


def as_markdown(docstring: str) -> str:
    """The paragraphs of a docstring, those that explain names as lists."""
    return "\n\n".join(_as_list(paragraph) for paragraph in re.split(r"\n[ \t]*\n", docstring))


def _as_list(paragraph: str) -> str:
    lines = paragraph.splitlines()
    if not lines or NAMES.match(lines[0]) is None or paragraph.startswith("http"):
        return paragraph
    items: list[str] = []
    for line in lines:
        match = NAMES.match(line)
        if match is not None:
            names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
            items.append(f"- **{names}**: {match['text']}")
        elif line.startswith(" "):
            text = line.strip()
            items[-1] += f"\n    {text}" if text.startswith("- ") else f" {text}"
        else:
            return paragraph  # a sentence that begins with a word and a colon
    return textwrap.dedent("\n".join(items))


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package before it is rendered."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
