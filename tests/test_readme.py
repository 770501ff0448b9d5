"""The README's Python runs as it stands, and its links and files exist."""

import re
from pathlib import Path

import pytest
from test_floors import FLOORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.compiles(400, reason="they stand as a reader types them, most lines outside of jit")
def test_python_blocks_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    # What its comments promise.
    assert names["logits"].shape == (2, 1, 512)
    assert len(names["texts"]) == 2
    assert (names["result"].status, names["result"].step) == ("finished", 10)
    assert [x["step"] for x in names["result"].metrics if "final_norm" in x] == [5, 10]
    assert 1 < names["bits_per_byte"] < 16


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()


def test_the_file_map_is_true():
    table = README.split("## Files")[1]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("|")]
    named = [name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)]
    for name in named:
        assert (ROOT / name).exists(), name
    # All of the package, in the order of its floors.
    package = [name for name in named if name.startswith("retnet_jax/")]
    parts = [Path(name).stem for name in package]
    assert set(parts) == set(FLOORS)
    assert [FLOORS[part] for part in parts] == sorted(FLOORS[part] for part in parts)


def test_the_equation_table_names_what_there_is():

    table = README.split("## From the paper's equations to functions")[1].split("##")[0]
    named = re.findall(r"`([\w.]+)` in \[`[\w./]+`\]\(([\w./]+)\)", table)
    assert len(named) >= 8
    for function, path in named:
        source = (ROOT / path).read_text()
        assert re.search(rf"^\s*(def|class) {function.split('.')[-1]}\b", source, re.M), function
