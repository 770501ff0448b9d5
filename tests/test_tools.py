"""The data tools as programs: they train tokenizers, and prepare and inspect stores."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest

from retnet_jax.config import DataConfig
from retnet_jax.data import build_store, open_store
from retnet_jax.data.tokenizers import load_tokenizer, train_bpe

ROOT = Path(__file__).parent.parent


def run(tool, *arguments, check=True):
    done = programs.run(f"tools/{tool}.py", *arguments)
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


def test_training_a_tokenizer_preparing_and_inspecting_a_store(corpora, tmp_path):
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
    assert "batch of step 0: 16 windows of 32 tokens, contiguous" in said
    assert "=== row 1: " in said
    assert "says return self" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    done = run("inspect_data", check=False)
    assert (done.returncode, "give either --store=DIRECTORY" in done.stderr) == (2, True)


def test_train_tokenizer_reports_skipped_documents_and_unusable_outputs(corpora, tmp_path):
    config = ["--config=configs/quickstart.py", "--vocab_size=260"]
    config.append(f"--corpus=jsonl:{corpora}/one.jsonl")
    said = run("train_tokenizer", *config, f"--output={tmp_path}/new").stdout
    skipped = f"1 invalid JSON; the first: {corpora}/one.jsonl:81: invalid JSON"
    assert f"skipped documents: 1 ({skipped}" in said
    (tmp_path / "file").write_text("mine")
    done = run("train_tokenizer", *config, f"--output={tmp_path}/file", check=False)
    assert (done.returncode, f"--output={tmp_path}/file cannot be written to" in done.stderr) == (
        2,
        True,
    )
    assert (tmp_path / "file").read_text() == "mine"
    (corpora / "bad.jsonl").write_text("{broken\n")
    config[-1] = f"--corpus=jsonl:{corpora}/bad.jsonl"
    done = run("train_tokenizer", *config, f"--output={tmp_path}/none", check=False)
    assert "no documents to train a tokenizer on; 1 skipped: 1 invalid JSON" in done.stderr


def test_names_that_are_not_utf8_are_shown_escaped(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / os.fsdecode(b"\xff%d.txt" % number)).write_text(f"text {number}")
    (corpus / os.fsdecode(b"\xffempty.txt")).touch()
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "t{n}", "id": "\\ud800{n}"}}\n' for n in range(20))
        + '{"id": "\\ud800"}'
    )
    for source, path in (("text", f"{corpus}/*"), ("jsonl", f"{tmp_path}/a.jsonl")):
        options = ["--config=configs/quickstart.py", "--config.data.tokenizer=byte"]
        options += [f"--config.data.source={source}", f"--config.data.path={path}"]
        options += [f"--config.data.store={tmp_path}/{source}", "--config.data.held_out=0.2"]
        said = run("prepare_data", *options).stdout
        assert ("empty: 1" if source == "text" else "no field 'text'") in said or "1 empty" in said
        said += run("inspect_data", f"--store={tmp_path}/{source}", "--documents=9").stdout
        said.encode()  # a terminal can show it
        assert ("--- \\udcff" if source == "text" else "--- a.jsonl:\\ud800") in said


@pytest.mark.slow
def test_a_document_of_200_megabytes(tmp_path):
    """It fits into 4 GB of address space; one byte more than the limit is counted and named."""
    lines = [{"text": f"short {number}"} for number in range(40)]
    lines[20:20] = [{"text": ("some words " * 20_000_000)[: 200_000_000 + more]} for more in (0, 1)]
    with (tmp_path / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    train_bpe(["some words short 1 2 3 4 5 6 7 8 9 0"] * 3, 270).save(tmp_path)
    arguments = ["--config=configs/quickstart.py", "--processes=1", "--config.data.source=jsonl"]
    arguments += [
        f"--config.data.path={tmp_path}/corpus.jsonl",
        f"--config.data.store={tmp_path}/s",
    ]
    arguments += [f"--config.data.tokenizer={tmp_path}", "--config.data.held_out=0.2"]
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); "
    limit += "os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", limit, sys.executable, "tools/prepare_data.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    manifest = open_store(tmp_path / "s").manifest
    assert sum(counts["documents"] for counts in manifest["splits"].values()) == 41
    assert sum(counts["bytes"] for counts in manifest["splits"].values()) > 200_000_000
    assert manifest["skipped"]["reasons"] == {"too long": 1}
    assert manifest["skipped"]["first"] == [
        f"{tmp_path}/corpus.jsonl:22: too long: 200,000,001 bytes"
    ]


@pytest.mark.slow
def test_a_preparation_killed_repeatedly_gives_the_same_store(tmp_path):
    """kill -9 at random moments, with two worker processes."""
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
    # The manifests differ only in the commands of the builds.
    manifests = [
        json.loads((tmp_path / x / "manifest.json").read_text()) for x in ("whole", "killed")
    ]
    for manifest in manifests:
        manifest["options"].pop("data.held_out")
        manifest.pop("command")
        manifest.pop("digest")
    assert manifests[0] == manifests[1]
