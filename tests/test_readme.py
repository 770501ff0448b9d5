"""The README's Python runs as it stands, and its links and files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.compiles(200, reason="what a reader would type, outside of jit")
def test_python_blocks_run():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    # What its comments promise.
    assert names["logits"].shape == (2, 1, 512)
    assert len(names["texts"]) == 2


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()


def test_the_file_map_is_true():
    table = README.split("## Files")[1]
    named = re.findall(r"^\| `([\w./]+)`", table, re.M)
    assert {"train.py", "retnet_jax/ops/retention/", "benchmarks/"} <= set(named)
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_equation_table_names_what_there_is():

    table = README.split("## From the paper's equations to functions")[1].split("##")[0]
    named = re.findall(r"`([\w.]+)` in \[`[\w./]+`\]\(([\w./]+)\)", table)
    assert len(named) >= 8
    for function, path in named:
        source = (ROOT / path).read_text()
        assert re.search(rf"^\s*(def|class) {function.split('.')[-1]}\b", source, re.M), function
