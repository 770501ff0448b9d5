"""Models to give away: exported with a card, and uploaded to a small hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
import yaml
from foreign_checkpoints import leaves
from safetensors.numpy import load_file
from small_hub import LARGE, hub_in_use
from training_runs import small_config

from retnet_jax import load_pretrained
from retnet_jax.config import ModelConfig
from retnet_jax.config.as_json import read_config, to_json
from retnet_jax.data import build_store
from retnet_jax.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from retnet_jax.data.tokenizers.pretrained import HuggingFaceTokenizer
from retnet_jax.interop import presets
from retnet_jax.interop.transformers_files import write_transformers_files
from retnet_jax.model.parameters import abstract_model
from retnet_jax.programs.export import export
from retnet_jax.runs.checkpoint import Checkpoints

pytest.importorskip("huggingface_hub", reason="pip install -e '.[hub]'")
constants = pytest.importorskip("huggingface_hub.constants")

ROOT = Path(__file__).parent.parent
FLA = ROOT / ".venv/fla"  # torch, transformers and flash-linear-attention; made by `make test-all`
NAME = "some-owner/retnet-small"
TEXT = "Licensed under the Apache Licence, «Version 2.0»\n"


def write_run(directory, model, tokenizer=None, **records):
    """A run that was not trained: random parameters, and the records of a run."""
    (directory / "text").mkdir(parents=True)
    config = replace(small_config(directory / "text"), model=model)
    if tokenizer is not None:
        config = replace(config, data=replace(config.data, tokenizer=str(directory / "tokenizer")))
        (directory / "tokenizer").mkdir()
        tokenizer.save(directory / "tokenizer")
    store = build_store(config.data, model.vocab_size, processes=1)
    workdir = directory / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(config))
    store.tokenizer.save(workdir)
    random = np.random.default_rng(0)

    def parameter(leaf):
        return jax.numpy.asarray(random.normal(0.1, 0.3, leaf.shape), leaf.dtype)

    parameters = jax.tree.map(parameter, abstract_model(model))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(8, {"model": parameters}, {})
    checkpoints.close()
    for name, lines in records.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (workdir / f"{name}.jsonl").write_text(text)
    return workdir


def evaluation(step, loss):
    values = {"loss": loss, "perplexity": 2 * loss, "bits_per_byte": loss / 2}
    of_store = {f"held_out_{kind}/store": value for kind, value in values.items()}
    return {"step": step, "evaluator": "held-out loss", "held_out_loss": loss, **of_store}


@pytest.fixture(scope="module")
def fla_run(tmp_path_factory):
    """A run whose model fla can express."""
    model = presets.fla(vocab_size=257, d_model=64, n_layers=2, n_heads=4)
    return write_run(
        tmp_path_factory.mktemp("fla"),
        model,
        metrics=[evaluation(4, 5.0), evaluation(8, 4.5), evaluation(10, 4.25)],
        starts=[{"step": 0, "devices": 8, "device": "TPU v9"}] * 2,
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_in_use(tmp_path, monkeypatch) as hub:
        hub.token = "secret"
        yield hub


# The client passes files to its HTTP library in a way that this library will not take for ever.
uploading = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def run(*arguments):
    return programs.run("tools/export.py", *arguments)


def refused(*arguments):
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    return done.stderr.partition(": ")[2].strip()


def test_an_export_is_complete(fla_run, tmp_path):
    target = tmp_path / "out/small"
    done = run(fla_run, target, "--license=apache-2.0")
    assert done.stdout == f"{target}: written as fla; its model card is README.md\n", done.stderr
    assert sorted(path.name for path in target.iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "training_config.json"),
    ]
    for ours, theirs in zip(
        leaves(load_pretrained(target)), leaves(load_pretrained(fla_run)), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes()
    tokenizer = load_tokenizer(target)
    assert tokenizer.encode(TEXT) == ByteTokenizer().encode(TEXT)
    assert (tokenizer.bos_id, tokenizer.end_id) == (256, 256)
    assert read_config(target / "training_config.json") == read_config(fla_run / "config.json")
    generation = json.loads((target / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 256}
    assert json.loads((target / "config.json").read_text())["bos_token_id"] == 256


def test_the_card_has_the_records_of_the_run(fla_run, tmp_path):
    export(fla_run, tmp_path / "small", "fla", license="apache-2.0")
    _, header, body = (tmp_path / "small/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["retnet", "retnet-jax", "flash-linear-attention"],
    }
    parameters = read_config(fla_run / "config.json").model.parameter_count()
    manifest = json.loads((fla_run.parent / "text/store/manifest.json").read_text())
    train, held_out = manifest["splits"]["train"], manifest["splits"]["held_out"]
    for expected in (
        f"of {parameters:,} parameters",
        "AutoModelForCausalLM.from_pretrained(name)",
        f"| text: {fla_run.parent}/text/*.txt | 100.0% | {train['documents']:,} | "
        f"{train['tokens']:,} | {held_out['tokens']:,} |",
        "Tokenizer: `byte`, 257 ids.",
        "| steps | 8 of 10 |",
        "| tokens read | 1,024: 8 windows of 16 in each step |",
        "| devices | 8 x TPU v9 |",
        "| store | 4.5000 | 9.0000 | 2.2500 |\n\nAfter 8 steps",
        "at most the first 16 windows of 16 tokens",
        f"it has read {1024 / parameters:.2g} tokens for each parameter",
    ):
        assert expected in body, expected


def test_the_card_names_the_data_sets_of_prepare_corpus(fla_run, tmp_path):
    text, copy = tmp_path / "text", shutil.copytree(fla_run, tmp_path / "run")
    commit = {"commit": "78de5f18", "license": "odc-by", "shards": 1, "files": {}}
    records = {
        "c4": json.dumps({"origin": {"data set": "allenai/c4:en:train"}, **commit}),
        "mine": json.dumps({"origin": "mine"}),  # of another program
        "none": None,
    }
    for name, record in records.items():
        (text / name).mkdir(parents=True)
        lines = [json.dumps({"text": f"{TEXT} {i} in {name}"}) + "\n" for i in range(20)]
        (text / name / "0.jsonl").write_text("".join(lines))
        if record is not None:
            (text / name / "corpus.json").write_text(record)
    config = read_config(copy / "config.json")
    for part, header, corpus in (
        (
            "c4",
            ["allenai/c4"],
            "allenai/c4:en:train on the Hugging Face hub, commit 78de5f18, lice",
        ),
        ("mine", None, "jsonl: "),
        ("none", None, "jsonl: "),
        ("*", ["allenai/c4"], "allenai/c4:en:train on the Hugging Face hub, commit 78de5f18, lice"),
    ):
        data = replace(config.data, source="jsonl", path=f"{text}/{part}/*.jsonl")
        data = replace(data, store=str(tmp_path / f"store_{len(part)}_{part.strip('*')}"))
        build_store(data, config.model.vocab_size, processes=1)
        (copy / "config.json").write_text(to_json(replace(config, data=data)))
        exported = tmp_path / f"exported_{part.strip('*')}"
        export(copy, exported, "own")
        _, found, body = (exported / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(found).get("datasets") == header
        assert f"\n| {corpus}" in body
        assert ("jsonl: " in body) == (part != "c4")


def test_the_card_of_a_run_without_records(fla_run, tmp_path):
    copy = shutil.copytree(fla_run, tmp_path / "run")
    for name in ("metrics", "starts"):
        (copy / f"{name}.jsonl").unlink()
    config = read_config(copy / "config.json")
    data = replace(
        config.data, mixture={"a/pile": 3.0, "b/c4": 1.0}, languages=("en",), store="data/gone"
    )
    (copy / "config.json").write_text(to_json(replace(config, data=data)))
    export(copy, tmp_path / "small", "own")
    card = (tmp_path / "small/README.md").read_text()
    assert "| not recorded | 75.0% | not recorded | not recorded | not recorded |" in card
    assert "The run has recorded no evaluation up to this step." in card
    assert "| devices" not in card
    assert 'tags: ["retnet", "retnet-jax"]\n---' in card
    assert 'load_pretrained("small")' in card
    data = replace(data, mixture={}, source="hf", path="roneneldan/TinyStories:train")
    (copy / "config.json").write_text(to_json(replace(config, data=data)))
    export(copy, tmp_path / "other", "own", name="me/other")
    card = (tmp_path / "other/README.md").read_text()
    assert 'datasets: ["roneneldan/TinyStories"]\n' in card
    assert "| hf: roneneldan/TinyStories:train | 100.0% | not recorded" in card
    assert "Filters: `languages=('en',)`." in card
    assert card.count('"me/other"') == 1


@pytest.mark.parametrize("kind", ["byte", "bpe", "pretrained"])
def test_tokenizers_for_transformers(kind, tmp_path):
    """The ids are the same, and the library puts BOS in front of a text."""
    tokenizer = ByteTokenizer() if kind == "byte" else train_bpe([TEXT, "the car", "the cat"], 270)
    if kind == "pretrained":
        tokenizer = HuggingFaceTokenizer(tokenizer.files["tokenizer.json"].decode(), 0, (0, 5))
    assert write_transformers_files(tokenizer, tmp_path)
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (TEXT, " the cat\x00", "", "日本"):
        ids = tokenizer.encode(text)
        assert found.encode(text).ids == [tokenizer.bos_id, *ids]
        assert found.decode(ids) == text
        assert load_tokenizer(tmp_path).encode(text) == ids
    assert load_tokenizer(tmp_path).end_ids == tokenizer.end_ids


@uploading
def test_an_export_is_uploaded(fla_run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    done = run(fla_run, "small", f"--push={NAME}", "--license=mit")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{hub.url}/{NAME}: uploaded\n")
    (uploaded,) = hub.repositories[NAME].values()
    assert uploaded == {path.name: path.read_bytes() for path in Path("small").iterdir()}
    assert len(uploaded["model.safetensors"]) >= LARGE
    assert sum(line.startswith("PUT ") for line in hub.asked) == 1
    for ours, theirs in zip(
        leaves(load_pretrained(NAME)), leaves(load_pretrained(fla_run)), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes()
    assert f'name = "{NAME}"' in uploaded["README.md"].decode()

    hub.repositories[NAME]["main"] |= {"model-1-of-2.safetensors": b"old", "notes.txt": b"kept"}
    done = run(fla_run, "again", f"--push={NAME}", "--layout=own")
    assert done.returncode == 0, done.stderr
    files = hub.repositories[NAME]["main"]
    assert files["config.json"] == Path("again/config.json").read_bytes()
    assert files["notes.txt"] == b"kept"
    assert "model-1-of-2.safetensors" not in files


def test_uploads_that_are_refused_before_anything_is_written(fla_run, hub, monkeypatch):
    for name in ("retnet", "a/b/c", "a--b/c", "some-owner/r e t", "some-owner/x.git"):
        message = refused(fla_run, "small", f"--push={name}")
        assert message.startswith(f"'{name}' is not a name for a model on the Hugging Face hub: ")
    assert refused(fla_run, "small", f"--push={NAME}").startswith(
        f"uploading {NAME} needs a login: log in with `hf auth login`, or set HF_TOKEN, with a "
    )
    assert refused(fla_run, "small", "--private").startswith("--private is for --push=OWNER/NAME")
    assert hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert refused(fla_run, "small", f"--push={NAME}") == (
        f"{hub.url} does not accept the token: log in with `hf auth login`, or set HF_TOKEN, with "
        "a valid token"
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refused(fla_run, "small", f"--push={NAME}").endswith("pip install 'retnet-jax[hub]'")
    assert not Path("small").exists()


@uploading
def test_uploads_that_fail_after_the_export(fla_run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    message = refused(fla_run, "one", "--push=other-owner/small")
    assert "other-owner/small cannot be written to with this token (403): give a name whose" in (
        message
    )
    assert message.endswith("one is complete; to upload it later: hf upload other-owner/small one")
    assert load_pretrained(Path("one")) is not None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(fla_run, "two", f"--push={NAME}") == (
        f"{hub.url}/{NAME} cannot be uploaded while HF_HUB_OFFLINE is set: unset it"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.refuse("/commit/main", 500)
    message = refused(fla_run, "two", f"--push={NAME}")
    assert f"{hub.url}/{NAME} cannot be uploaded (the hub answered 500: " in message
    assert message.endswith(
        f"try again later\ntwo is complete; to upload it later: hf upload {NAME} two"
    )


@uploading
def test_private_models_are_never_uploaded_to_public_ones(fla_run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.repositories[NAME] = {"main": {}}
    message = refused(fla_run, "one", f"--push={NAME}", "--private")
    assert f"{hub.url}/{NAME} exists and is public, so nothing was uploaded\none is" in message
    assert message.endswith(f"private in its settings, and then: hf upload {NAME} one")
    assert hub.repositories[NAME] == {"main": {}}
    hub.refuse("/commit/main", 500)
    message = refused(fla_run, "failed", f"--push={NAME}-2", "--private")
    assert message.endswith(f"to upload it later: hf upload {NAME}-2 failed --private")
    done = run(fla_run, "two", f"--push={NAME}-2", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.private == {f"{NAME}-2"}


def test_exports_that_are_refused(fla_run, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, "DIRECTORY", tmp_path)
    assert refused("runs/nothing", "out") == (
        "runs/nothing is no directory: give the --workdir of a training run"
    )
    assert refused(fla_run).startswith("give the directory of a training run and a new directory")
    assert "has no checkpoints/, so it is not a training run" in refused(
        ROOT / "tests/fixtures/fla/default", "out"
    )
    assert refused(fla_run, "gs://bucket/out") == (
        "gs://bucket/out is a URL, but this file or directory must be on a local disk: give a path "
        "there, and copy it"
    )
    copy = Path(shutil.copytree(fla_run, "run"))
    (copy / "tokenizer.json").unlink()
    assert "run has none of tokenizer.json, tokenizer.model, " in refused(copy, "out")
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    shutil.copy(fla_run / "tokenizer.json", copy)
    assert refused(copy, "out") == f"{Path.cwd()}/run/checkpoints holds no complete checkpoint"
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/file").touch()
    assert refused(fla_run, "out") == "out exists and is not empty; name a new directory"
    assert [path.name for path in Path("out").iterdir()] == ["file"]


def test_options_that_fla_lacks_are_named(tmp_path):
    workdir = write_run(tmp_path, ModelConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2))
    message = refused(workdir, tmp_path / "out")
    assert message.startswith("fla cannot express this model with the same outputs:\n")
    assert "\n  model.row_normalizer is True, fla has False: it divides by a root that " in message
    assert message.endswith("presets.py has the options of models that fla can express")
    assert not (tmp_path / "out").exists()
    done = run(workdir, tmp_path / "out", "--layout=own")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json"),
        "training_config.json",
    }
    assert load_pretrained(tmp_path / "out").config == load_pretrained(workdir).config


@pytest.mark.slow
@pytest.mark.skipif(not FLA.exists(), reason="needs .venv/fla, which `make .venv/fla` installs")
@pytest.mark.parametrize("kind", ["byte", "options"])
def test_transformers_and_fla_compute_the_same_logits(kind, fla_run, tmp_path):
    """fla from PyPI, with its own reference code in place of its kernels, which need a GPU."""
    workdir = fla_run
    if kind == "options":
        model = read_config(fla_run / "config.json").model
        model = replace(model, vocab_size=300, feature_map="relu", n_kv_heads=2)
        texts = [path.read_text() for path in (fla_run.parent / "text").glob("*.txt")]
        workdir = write_run(tmp_path / "source", model, train_bpe(texts, 300))
    export(workdir, tmp_path / "small", "fla")
    texts = [TEXT, "The licence applies. " * 20, "a"]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/fla_from_pypi.py", tmp_path / "small", *texts],
        env=os.environ | {"PYTHONPATH": str(FLA), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    model, tokenizer = load_pretrained(tmp_path / "small"), load_tokenizer(workdir)
    for number, text in enumerate(texts):
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        np.testing.assert_array_equal(found[f"tokens_{number}"], ids)
        logits = jax.jit(lambda model, ids: model(ids)[0])(model, np.array([ids]))
        np.testing.assert_allclose(logits[0], found[f"logits_{number}"], rtol=0, atol=1e-4)
        greedy = [int(logits[0, -1].argmax())]
        assert found[f"generated_{number}"][len(ids)] == greedy[0]
