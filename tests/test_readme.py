"""The README is short, and its table of equations is true."""

import re

from pages import ROOT, read

README = read("README.md")


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_equation_table_names_what_there_is():
    table = README.split("## From the paper's equations to functions")[1].split("##")[0]
    named = re.findall(r"`([\w.]+)` in \[`[\w./]+`\]\(([\w./]+)\)", table)
    assert len(named) >= 8
    for function, path in named:
        source = (ROOT / path).read_text()
        assert re.search(rf"^\s*(def|class) {function.split('.')[-1]}\b", source, re.M), function
