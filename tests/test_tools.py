"""The data tools as programs: a tokenizer, stores in its tokens, and a look at them."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retnet_jax.config import DataConfig
from retnet_jax.data import build_store, load_tokenizer, open_store

ROOT = Path(__file__).parent.parent


def run(tool, *arguments, check=True):
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpora")
    for name in ("one", "two"):
        lines = [
            json.dumps({"text": f"{name} {n} says return self " * (1 + n % 9)}) for n in range(80)
        ]
        (directory / f"{name}.jsonl").write_text("\n".join([*lines, "{broken"]))
    return directory


def test_from_text_to_a_look_at_a_batch(corpora, tmp_path):
    config = ["--config=configs/quickstart.py", "--config.data.source=jsonl"]
    config += ["--config.model.vocab_size=300", "--config.data.held_out=0.1"]
    paths = [f"--corpus=jsonl:{corpora}/{name}.jsonl" for name in ("one", "two")]
    config += [f"--config.data.path={corpora}/one.jsonl"]
    output = tmp_path / "tokenizer"
    said = run("train_tokenizer", *config, *paths, f"--output={output}").stdout
    assert said.startswith(f"{output}: 300 tokens, ")
    assert load_tokenizer(output).vocab_size == 300
    again = run("train_tokenizer", *config, f"--output={output}", check=False)
    assert (again.returncode, "has a tokenizer.json already" in again.stderr) == (2, True)

    store = tmp_path / "store"
    config += [f"--config.data.tokenizer={output}", f"--config.data.store={store}"]
    said = run("prepare_data", *config).stdout
    manifest = open_store(store).manifest
    counts = manifest["splits"]["train"]
    assert f"{counts['documents']:,}" in said
    assert "0 duplicates, 1 skipped\n  1 invalid JSON\n" in said
    assert run("prepare_data", *config).stdout == said  # the second time it is opened

    plot = tmp_path / "lengths.png"
    options = [f"--plot={plot}", "--documents=1", "--rows=2", "--config.data.sequence_length=32"]
    said = run("inspect_data", *config, *options, "--config.data.windows=contiguous").stdout
    assert f"{counts['tokens']:,}" in said
    assert "batch of step 0: 8 windows of 32 tokens, contiguous" in said
    assert "=== row 1: " in said
    assert "says return self" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    done = run("inspect_data", check=False)
    assert (done.returncode, "give either --store=DIRECTORY" in done.stderr) == (2, True)


@pytest.mark.slow
def test_preparation_killed_again_and_again(tmp_path):
    """kill -9 at random moments, with two processes at work."""
    for number in range(4):
        with (tmp_path / f"{number}.jsonl").open("w") as file:
            for line in range(70_000):
                file.write(json.dumps({"text": f"{number} {line} " + "some words " * 90}) + "\n")
    config = DataConfig(
        source="jsonl", path=f"{tmp_path}/*.jsonl", tokenizer="byte", store=f"{tmp_path}/whole"
    )
    build_store(config, 257, processes=1)
    arguments = ["--config=configs/quickstart.py", "--processes=2"]
    for name, value in {
        "source": "jsonl",
        "path": f"{tmp_path}/*.jsonl",
        "tokenizer": "byte",
        "store": f"{tmp_path}/killed",
    }.items():
        arguments.append(f"--config.data.{name}={value}")
    command = [sys.executable, "tools/prepare_data.py", *arguments]
    moments, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=moments.uniform(5, 12) + kills) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            time.sleep(1)
    assert kills > 0
    whole, killed = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }
        for name in ("whole", "killed")
    )
    assert whole == killed
    # The manifests differ in nothing but what the model's size puts into the options.
    manifests = [
        json.loads((tmp_path / x / "manifest.json").read_text()) for x in ("whole", "killed")
    ]
    for manifest in manifests:
        manifest["options"].pop("data.held_out")
    assert manifests[0] == manifests[1]
