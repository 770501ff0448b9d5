"""The notebooks as they are saved. `tests/run_notebooks.py` executes them."""

import ast
import json
import re
from pathlib import Path

import pytest

import retnet_jax
from retnet_jax import interop
from retnet_jax.config.as_json import read_config

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes
LARGEST_MODEL = 2_000_000  # bytes of the files in its directory
# On a machine. Others, such as /usr/bin/env, may stand in Python that the model writes.
PATH = re.compile(r"/(home|root|tmp|work|Users)/\w|[A-Z]:\\Users|\.venv|site-packages")
TEXT = ("text/plain", "text/markdown", "text/html")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def text_of(output):
    """What an output shows as text; pictures are left out."""
    data = output.get("data", {})
    return "".join("".join(part) for part in [output.get("text", ""), *map(data.get, TEXT)] if part)


def names_used(path):
    """The names of `retnet_jax` that a notebook imports or reads as attributes."""
    for cell in code_cells(path):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if "retnet_jax." in alias.name)
            if isinstance(node, ast.ImportFrom) and node.module.startswith("retnet_jax"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "retnet_jax":
                yield f"retnet_jax.{node.attr}"


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["pretrained", "results", "retention", "train"]


@every_notebook
def test_all_cells_were_executed_in_order_without_errors(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(output["output_type"] == "stream" for output in outputs)
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", text_of(output)


@every_notebook
def test_outputs_name_no_path_and_no_object_of_the_machine(path):
    for cell in code_cells(path):
        for output in cell["outputs"]:
            assert not PATH.search(text_of(output)), text_of(output)
            assert not re.search(r"<.* at 0x\w+>", text_of(output)), text_of(output)


@every_notebook
def test_small_and_without_metadata_of_the_machine(path):
    assert path.stat().st_size < LARGEST
    notebook = json.loads(path.read_text())
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in notebook["cells"])


@every_notebook
def test_only_names_of_the_package_itself_are_used(path):
    names = set(names_used(path))
    assert names
    assert names <= {f"retnet_jax.{name}" for name in retnet_jax.__all__}


@every_notebook
def test_links_lead_to_files(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            for link in re.findall(r"\]\(([\w./]+)\)", text) + re.findall(r"`(\w+/[\w./]+)`", text):
                assert (path.parent / link).exists() or (path.parent.parent / link).exists(), link


def test_the_model_beside_them_is_small_and_says_what_it_is():
    directory = NOTEBOOKS[0].parent / "pretrained_model"
    assert sum(path.stat().st_size for path in directory.iterdir()) < LARGEST_MODEL
    card = (directory / "README.md").read_text()
    config = read_config(directory / "training_config.json")
    assert config.data.source == "stdlib"
    assert f"{config.model.parameter_count():,} parameters" in card
    for heading in ("How it was made", "Held-out results", "What it is not good for"):
        assert f"\n## {heading}\n" in card
    found = interop.open_source(directory)
    assert found.layout is interop.fla.LAYOUT
    assert found.description.model.parameter_count() == config.model.parameter_count()
