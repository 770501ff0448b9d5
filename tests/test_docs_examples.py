"""The examples of README.md and docs/ run as a reader types them, in order within a page.

`make test-docs` runs them, and `-k training` those of one page. Each page has a copy of the
repository in which the quickstart has 40 steps instead of 1,500, and holds out a fifth of the usual
documents. Beside it is what the pages suppose to be there: texts, trained runs, and a checkpoint of
fla. A Python example is a process of its own.

A block whose first line is a comment "# Needs ..." is not run. test_docs.py checks that the options
of all commands exist, also of those.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pages import ROOT, TO_RUN, blocks

pytestmark = pytest.mark.slow

COPIED = [
    "retnet_jax",
    "configs",
    "tools",
    "benchmarks",
    "docs",
    "README.md",
    "train.py",
    "eval.py",
    "generate.py",
]
SHORTER = {  # in the config of the quickstart
    "steps=1500,": "steps=40,",
    "held_out=0.12": "held_out=0.004",
}
# What the comments of Python examples promise, by the page and the number of the example.
PROMISES = {
    ("README.md", 0): """
assert logits.shape == (2, 1, 512)
assert [len(text.tokens) for text in texts] == [20, 20]
assert any(x.any() for x in jax.tree.leaves(gradients))
""",
    ("docs/quickstart.md", 0): """
assert logits.shape == (2, 1, 512)
assert len(texts) == 2
""",
    ("docs/quickstart.md", 1): """
assert (result.status, result.step) == ("finished", 10)
assert [x["step"] for x in result.metrics if "final_norm" in x] == [5, 10]
assert 1 < bits_per_byte < 16
""",
}
FLA_CHECKPOINT = """
import shutil
from flax import nnx
from retnet_jax import RetNet, interop
from retnet_jax.interop import presets
config = presets.fla(vocab_size=4096, d_model=64, n_layers=2, n_heads=2)
interop.fla.save(RetNet(config, rngs=nnx.Rngs(0)), "DIR")
shutil.copy("runs/mine/tokenizer.json", "DIR")
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The directory that is copied for each page."""
    stage = tmp_path_factory.mktemp("docs") / "stage"
    stage.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, stage / name)
    config = stage / "retnet_jax" / "configs" / "quickstart.py"
    text = config.read_text()
    for old, new in SHORTER.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    config.write_text(text)
    write_texts(stage)
    shutil.copytree(ROOT / "tests" / "tasks", stage / "TASKS")
    mine = "python train.py --config.data.source=text --config.data.path='corpus/**/*.txt' "
    for command in (
        mine + "--config.data.store=data/mine --workdir=runs/mine",
        mine + "--config.data.store=data/mine --workdir=runs/twin --config=quickstart:transformer",
        "python tools/prepare_data.py --config=configs/quickstart.py",
    ):
        run(["bash", "-c", command], stage)
    run([sys.executable, "-c", FLA_CHECKPOINT], stage)
    return stage


def write_texts(stage):
    """Modules of the standard library of middle length. 77.txt is held out, by its name."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"), key=lambda x: x.stat().st_size)
    texts = [path.read_text(encoding="utf-8") for path in sources[-140:-30]]
    for directory, part in (("corpus", texts[:100]), ("other", texts[:2])):
        (stage / directory).mkdir()
        for number, text in enumerate(part):
            (stage / directory / f"{number}.txt").write_text(text)
    (stage / "shakespeare.txt").write_text("\n\n".join(texts[100:]))
    (stage / "book.txt").write_text(texts[0])
    requests = ({"prompt": "def main(", "id": number, "max_tokens": 5} for number in range(20))
    (stage / "requests.jsonl").write_text("".join(json.dumps(x) + "\n" for x in requests))


def run(command, directory):
    """Runs a command with `python` on the path; raises with its output if it fails."""
    bin = directory / ".bin"
    if not bin.exists():
        bin.mkdir()
        (bin / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (bin / "python").chmod(0o755)
    # A reader has one device.
    environment = {x: os.environ[x] for x in os.environ if x != "JAX_NUM_CPU_DEVICES"}
    environment["PYTHONPATH"] = str(directory)
    environment["PATH"] = f"{bin}:{environment['PATH']}"
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"status {done.returncode} of\n{command[-1]}\n{done.stdout[-4000:]}")


def run_page(page, directory):
    python = 0
    for block in blocks(page):
        promise = ""
        if block.language == "python":
            promise = PROMISES.get((page, python), "")
            python += 1
        if block.runs and block.language == "python":
            run([sys.executable, "-c", block.code + promise], directory)
        elif block.runs:
            run(["bash", "-euo", "pipefail", "-c", block.code], directory)


@pytest.fixture(scope="module")
def pages_run(stage, request):
    """For each page a future, which raises what went wrong; two pages run at once."""
    tests = [x for x in request.session.items if x.path == request.path and hasattr(x, "callspec")]
    selected = [test.callspec.params["page"] for test in tests]

    def copy_and_run(page):
        directory = stage.parent / Path(page).stem
        shutil.copytree(stage, directory, ignore=shutil.ignore_patterns(".bin"))
        run_page(page, directory)

    with ThreadPoolExecutor(2) as pool:
        yield {page: pool.submit(copy_and_run, page) for page in selected}


@pytest.mark.parametrize("page", TO_RUN)
def test_the_examples_of_a_page_run(page, pages_run):
    pages_run[page].result()


def test_what_an_example_promises_is_checked():
    examples = {
        (page, number)
        for page in TO_RUN
        for number, _ in enumerate(x for x in blocks(page) if x.language == "python")
    }
    assert set(PROMISES) <= examples
