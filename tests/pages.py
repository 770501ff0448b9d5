"""The examples and commands of README.md, CONTRIBUTING.md and docs/."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# Its examples are run by test_extend.py, which also checks what they do.
EXTEND = "docs/extend.md"
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{x.name}" for x in ROOT.glob("docs/*.md"))]
TO_RUN = [page for page in PAGES if page not in (EXTEND, "CONTRIBUTING.md")]


class Block(NamedTuple):
    """An example: its language ("sh" or "python") and its lines."""

    language: str
    code: str

    @property
    def runs(self) -> bool:
        """Whether a test runs it: unless its first line says what it needs that is not here."""
        return not self.code.startswith("# Needs ")


class Command(NamedTuple):
    """A command such as `python tools/verify.py RUN`: the program's file, and its arguments."""

    program: str
    arguments: list[str]


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    """The shell and Python examples of a page, in order."""
    found = re.findall(r"^```(sh|python)\n(.*?)^```$", read(page), re.M | re.S)
    return [Block(*block) for block in found]


def commands(page: str) -> list[Command]:
    """All commands in a page that run Python, in its shell examples and between backquotes."""
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)
    inline = re.findall(r"`([^`\n]*\bpython [^`\n]+)`", text)
    shell = [block.code for block in blocks(page) if block.language == "sh"]
    found = map(_command, itertools.chain.from_iterable(map(_lines, [*shell, *inline])))
    return [command for command in found if command is not None]


def _lines(code: str) -> Iterator[list[str]]:
    """The words of each line of a shell example; lines that belong together are joined."""
    line = ""
    for part in code.splitlines():
        line += part
        if line.endswith("\\"):
            line = line[:-1] + " "
            continue
        try:
            yield shlex.split(line, comments=True)
        except ValueError:  # a quotation that a later line closes
            line += "\n"
        else:
            line = ""


def _command(words: list[str]) -> Command | None:
    at = [number for number, word in enumerate(words) if word.rpartition("/")[2] == "python"]
    if not at:
        return None
    program, *arguments = words[at[0] + 1 :]
    if program == "-m":
        module, *arguments = arguments
        program = module.replace(".", "/") + ".py"
        if not (ROOT / program).exists() and (ROOT / module.replace(".", "/")).exists():
            program = module.replace(".", "/") + "/__main__.py"
    return Command(program, arguments) if program.endswith(".py") else None
