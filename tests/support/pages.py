"""The pages that people read (README, CONTRIBUTING, docs/), as tests see them: blocks, commands, code in the text.

A block of code says what it is after its fence: `python` and `pycon` are run, `shell` holds commands, `text` and `csv`
are to be looked at. A comment before the fence says that a block needs more than a test has:

    <!-- needs a cluster -->
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS_A_CLUSTER = "<!-- needs a cluster -->"

_FENCE = re.compile(
    rf"(?P<mark>{re.escape(NEEDS_A_CLUSTER)}\n\s*)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page; `line` is that of its first line of code."""

    language: str
    text: str
    line: int
    needs_cluster: bool


@dataclass(frozen=True)
class Page:
    """A page: `text` is all of it, `prose` what stands outside the blocks."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def blocks(self) -> list[Block]:
        return [
            Block(
                match["language"].strip(),
                textwrap.dedent(match["text"]),
                self.text.count("\n", 0, match.start("text")) + 1,
                match["mark"] is not None,
            )
            for match in _FENCE.finditer(self.text)
        ]

    @property
    def prose(self) -> str:
        return _FENCE.sub("", self.text)

    @property
    def code_in_text(self) -> list[str]:
        """What stands in single backticks."""
        return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", self.prose)

    @property
    def links(self) -> list[str]:
        """The targets of links and images that are files, without the part after the #."""
        targets = re.findall(r"\]\(([^)\s]+)\)", self.prose)
        return [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]

    def commands(self, *, needs_cluster: bool | None = None) -> list[list[str]]:
        """The commands of the shell blocks, as words, without comments, variables set before them, and `&&`."""
        lines = [
            line
            for block in self.blocks
            if block.language == "shell" and needs_cluster in (None, block.needs_cluster)
            for line in block.text.replace("\\\n", " ").splitlines()
        ]
        commands: list[list[str]] = []
        for line in lines:
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                while command and re.match(r"\w+=", command[0]):
                    command = command[1:]
                if command:
                    commands.append(command)
        return commands


def read_pages() -> list[Page]:
    return [Page(path, path.read_text(encoding="utf-8")) for path in PAGES]
