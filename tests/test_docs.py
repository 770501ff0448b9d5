"""What the docs name exists: files, functions, options, parameters and targets of make."""

import ast
import functools
import itertools
import re
from pathlib import Path

import jax
import pages
import programs
import pytest
from flax import nnx
from test_floors import FLOORS

from retnet_jax.config.as_json import OLD_NAMES, options
from retnet_jax.configs.quickstart import get_config
from retnet_jax.data import token_store
from retnet_jax.generation import saved_state
from retnet_jax.model import build_model
from retnet_jax.runs import checkpoint_files
from retnet_jax.trees import named_leaves

ROOT = Path(__file__).parent.parent
# Pages whose names in backquotes are checked, and how many of them at least must be ours.
NAMING = {
    "docs/tour.md": 20,
    "docs/glossary.md": 20,
    "CONTRIBUTING.md": 20,
    "README.md": 20,
    "docs/architecture.md": 20,
    "docs/training.md": 10,
    "docs/many_devices.md": 10,
    "docs/generation.md": 5,
}
WITH_LINKS = [*pages.PAGES, "CHANGELOG.md"]
DATA_FILES = (".json", ".jsonl", ".npy", "checkpoints/")  # of stores and runs
INSIDE = ("retnet_jax/ops", "retnet_jax/ops/retention")  # tables name directories in these
LIBRARIES = ("jax.", "pytest.")


def text_of(page):
    """A page without its examples."""
    return re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)


def code_in(page):
    """What stands between backquotes."""
    return sorted(set(re.findall(r"`([^`\n]+)`", text_of(page))))


def names_of_package():
    """All names such as "windows.packed_starts" and "Split.read"."""
    found = set()
    for path in (ROOT / "retnet_jax").rglob("*.py"):
        module = path.parent.name if path.stem == "__init__" else path.stem
        for node in ast.parse(path.read_text()).body:
            for prefix in (module, f"{path.parent.name}.{module}"):
                found |= {f"{prefix}.{name}" for name in names_in(node)}
            if isinstance(node, ast.ClassDef):
                members = itertools.chain.from_iterable(map(names_in, node.body))
                found |= {f"{node.name}.{member}" for member in members}
    return found


def names_in(node):
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


DOTTED = names_of_package()
PARAMETERS = {
    name: list(x.shape)
    for name, x in named_leaves(
        jax.eval_shape(lambda: build_model(get_config().model, rngs=nnx.Rngs(0)))
    ).items()
}
WORDS = {
    word
    for path in (ROOT / "retnet_jax").rglob("*.py")
    for word in re.findall(r"\w+", path.read_text())
}


def exists(name):
    """Whether a name in backquotes is that of something; None for what is no name."""
    if name.endswith(DATA_FILES) or name.startswith(LIBRARIES) or name in PARAMETERS:
        return True
    if re.fullmatch(r"\w+\.py", name):
        return bool([*ROOT.glob(name), *(ROOT / "retnet_jax").rglob(name)])
    if re.fullmatch(r"[\w./-]+\.(md|toml|txt|yml)|[\w.-]+/[\w./-]*", name):
        return any((ROOT / place / name).exists() for place in ("", *INSIDE))
    if re.fullmatch(r"[\w]+(\.\w+)+", name):
        return name in DOTTED or name in options()
    if re.fullmatch(r"\w+", name):
        return name in WORDS
    return None


@pytest.mark.parametrize("page", NAMING)
def test_what_is_named_exists(page):
    answers = {name: exists(name) for name in code_in(page)}
    assert sum(x is True for x in answers.values()) >= NAMING[page]
    assert [name for name, there in answers.items() if there is False] == []


def test_names_that_are_gone_are_found():
    gone = ["windows.packed_ends", "Split.write", "train.most_skipped", "gone.py", "tools/gone.py"]
    assert [name for name in gone if exists(name) is not False] == []


@pytest.mark.parametrize("page", WITH_LINKS)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text_of(page))
    missing = [
        (link, heading)
        for link, heading in links
        if not (target := (ROOT / page).parent / link if link else ROOT / page).exists()
        or (heading and heading not in anchors(target.read_text()))
    ]
    assert missing == []


def anchors(text):
    """The headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_links_to_every_page():
    text = pages.read("README.md")
    of_the_site = ("docs/index.md", "docs/api.md")
    others = [page for page in pages.PAGES[1:] if page not in of_the_site]
    assert [page for page in others if f"({page})" not in text] == []


def test_the_site_has_every_page():
    names = re.findall(r"^([\w/]+)$", pages.read("docs/index.md"), re.M)
    for page in pages.PAGES:
        if page.startswith("docs/") and page != "docs/index.md":
            assert page.removeprefix("docs/").removesuffix(".md") in names, page


@pytest.mark.parametrize("page", pages.PAGES)
def test_options_of_commands_exist(page):
    missing = [
        (command.program, option)
        for command in pages.commands(page)
        if command.program in PROGRAMS or command.program.startswith("benchmarks/")
        for option in re.findall(r"^--([\w.]+)", "\n".join(command.arguments), re.M)
        if option not in options_of(command.program)
    ]
    assert missing == []


PROGRAMS = [
    "train.py",
    "eval.py",
    "generate.py",
    *(f"tools/{x.name}" for x in ROOT.glob("tools/*.py")),
]


@functools.cache
def options_of(program):
    """The names of a program's options, those of a config as "config.train.steps"."""
    if program.startswith("benchmarks/"):  # some import what is not installed
        return set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / program).read_text()))
    text = programs.run(program, "--help").stdout
    of_config = {f"config.{name}" for name in options()} if "--config=" in text else set()
    return {"help", *re.findall(r"^  --(\w+)", text, re.M)} | of_config


@pytest.mark.parametrize("page", pages.PAGES)
def test_commands_run_programs_that_exist(page):
    found = [command.program for command in pages.commands(page)]
    libraries = ("pytest.py", "venv.py")
    assert [x for x in found if x not in libraries and not (ROOT / x).exists()] == []


def test_the_file_map_is_true():
    table = pages.read("docs/architecture.md").split("## Files")[1].split("\n## ")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("|")]
    named = [name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)]
    for name in named:
        assert (ROOT / name).exists(), name
    # All of the package, in the order of its floors.
    package = [name for name in named if name.startswith("retnet_jax/")]
    parts = [Path(name).stem for name in package]
    assert set(parts) == set(FLOORS)
    assert [FLOORS[part] for part in parts] == sorted(FLOORS[part] for part in parts)


def test_the_tour_has_the_shapes_of_all_parameters():
    found = {}
    for names, shape in re.findall(r"^\| (`.+) \| \[([\d ]+)\] \|$", text_of("docs/tour.md"), re.M):
        for name in re.findall(r"`([^`]+)`", names):
            found[name] = [int(size) for size in shape.split()]
    assert found == PARAMETERS
    count = f"{get_config().model.parameter_count():,} numbers"
    assert count in text_of("docs/tour.md")


def test_the_glossary_is_in_order():
    rows = [line.split("|")[1].strip() for line in text_of("docs/glossary.md").splitlines()[7:]]
    assert len(rows) > 50
    assert rows == sorted(rows, key=str.lower)
    assert len(rows) == len(set(rows))


def test_the_table_of_floors_is_that_of_the_code():
    section = text_of("CONTRIBUTING.md").split("## Floors")[1].split("\n## ")[0]
    table = {
        name: int(floor)
        for floor, names in re.findall(r"^\| (\d) \| (.+) \|$", section, re.M)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert table == FLOORS


def test_formats_are_those_of_the_code():
    section = (ROOT / "CHANGELOG.md").read_text().split("## Formats")[1]
    written = dict(re.findall(r"^\| ([\w ]+) \| \*\*(\d+)\*\* \|", section, re.M))
    assert written == {
        "checkpoint": str(checkpoint_files.FORMAT),
        "token store": str(token_store.FORMAT),
        "saved decoding state": saved_state._FORMAT.split()[-1],
    }
    for old, new in OLD_NAMES.items():
        assert f"`{old}` is `{new}`" in section


def test_continuous_integration_runs_what_every_change_must_pass():
    targets = re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    (jobs,) = re.findall(r"targets: \[(.+)\]\n", workflow)
    assert len(targets) == 9
    assert re.findall(r"[\w-]+", jobs) == targets
