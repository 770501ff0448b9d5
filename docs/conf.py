"""The pages of docs/, the notebooks and a reference of the package as a site: `make docs`."""

import dataclasses
import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

project = "retnet-jax"
author = "the authors of retnet-jax"
version = release = importlib.metadata.version("retnet-jax")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "retnet-jax"
html_show_sphinx = html_show_copyright = False
default_role = "code"  # `x` in docstrings, as in Markdown
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # `make test-notebooks` executes them; the files have their outputs
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
copybutton_exclude = ".linenos, .gp, .go"


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", link_to_copies)
    # Before napoleon reads the sections.
    app.connect("autodoc-process-docstring", plain_text_to_rst, priority=100)
    app.connect("autodoc-process-docstring", list_options, priority=200)
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True}


COPIES = DOCS / "elsewhere"  # ignored by git
PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/results/accelerator_h100.md",
    "benchmarks/results/accelerator_h200.md",
    "notebooks/pretrained_model/README.md",
)
_LINK = re.compile(r"\[([^\]]+)\]\(([\w./-]+)(#[\w-]+)?\)")


def copy_pages(_) -> None:
    """Makes pages of what is beside docs/: notebooks, some Markdown, and linked modules."""
    shutil.rmtree(COPIES, ignore_errors=True)
    for path in [*ROOT.glob("notebooks/*.ipynb"), *(ROOT / name for name in PAGES)]:
        copy = COPIES / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    linked = {
        match[2].removeprefix("../")
        for page in DOCS.glob("*.md")
        for match in _LINK.finditer(page.read_text())
        if match[2].endswith(".py")
    }
    for module in linked:
        page = COPIES / f"{module}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        source = os.path.relpath(ROOT / module, page.parent)
        page.write_text(
            f"---\norphan: true\n---\n# `{module}`\n\n"
            f"```{{literalinclude}} {source}\n:language: python\n```\n"
        )


def link_to_copies(_, page: str, source: list[str]) -> None:
    """Makes links out of docs/ lead to the copies, and those in the copies to the pages."""

    def link(match: re.Match) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        if page.startswith("elsewhere/"):
            inside = path.startswith("docs/")
            return f"[{text}](/{path.removeprefix('docs/')}{anchor})" if inside else text
        if not path.startswith("../"):
            return match[0]
        path = path.removeprefix("../")
        if path in PAGES or path.endswith(".ipynb"):
            return f"[{text}](/elsewhere/{path}{anchor})"
        if path.endswith(".py"):
            return f"[{text}](/elsewhere/{path}.md)"
        return text if (ROOT / path).is_dir() else match[0]

    if not page.startswith("elsewhere/notebooks/"):
        source[0] = _LINK.sub(link, source[0])


def plain_text_to_rst(_, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings here are plain text; what reStructuredText would take for markup is escaped."""
    code = False
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if code and line and not indented:
            code = False
        following = next((x for x in lines[i + 1 :] if x), "")
        ends_paragraph = i + 1 < len(lines) and not lines[i + 1]
        if not code:
            lines[i] = _escaped(line)
        if line.endswith(":") and ends_paragraph and _indent(following) >= _indent(line) + 4:
            lines[i] += ":"
            code = True


def list_options(_, what, name, obj, options, lines: list[str]) -> None:
    """Adds the options of a section of the config, with their help, to its docstring."""
    if what == "class" and dataclasses.is_dataclass(obj):
        helps = {
            x.name: x.metadata["help"] for x in dataclasses.fields(obj) if "help" in x.metadata
        }
        if helps:
            lines += ["", "Args:", *(f"  {name}: {_escaped(text)}" for name, text in helps.items())]


def shorten(_, what, name, obj, options, signature, returns):
    """Names arrays as the source does; a config's options are listed below it."""
    if dataclasses.is_dataclass(obj):
        return "", returns
    shown = [x and x.replace("jaxlib._jax.Array", "Array") for x in (signature, returns)]
    return tuple(shown)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _escaped(line: str) -> str:
    """The line with special characters escaped, except those between backticks."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
