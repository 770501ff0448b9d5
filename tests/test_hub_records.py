"""What runs, evaluations and stores record of a model or a tokenizer on the Hugging Face hub."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hub_model import CONFIG, MODEL, WEIGHTS, files
from pretrained_tokenizers import llama
from safetensors.numpy import load, save
from small_hub import commit_of, hub_in_use

from retnet_jax.config import Config, DataConfig
from retnet_jax.data import load_tokenizer
from retnet_jax.data.store_options import pretrained_tokenizer, stored_options
from retnet_jax.data.stores import open_or_build
from retnet_jax.errors import CheckpointError
from retnet_jax.evaluation.record import model_record
from retnet_jax.evaluation.results import Results
from retnet_jax.evaluation.run import _names, subject
from retnet_jax.pretrained import read_pretrained, with_initial_model

pytest.importorskip("huggingface_hub", reason="pip install -e '.[hub]'")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, used by this process, in an empty working directory."""
    with hub_in_use(tmp_path, monkeypatch) as hub:
        hub.repositories[MODEL] = {"main": files()}
        yield hub


@pytest.fixture
def with_tokenizer(hub, tmp_path):
    """The model on the hub has a tokenizer, and a vocabulary that fits it."""
    llama(tmp_path)
    found = {path.name: path.read_bytes() for path in tmp_path.glob("tokenizer*.json")}
    found["config.json"] = json.dumps(json.loads(CONFIG) | {"vocab_size": 330}).encode()
    tensors = load(WEIGHTS)
    for name in ("lm_head.weight", "model.embeddings.weight"):
        tensors[name] = np.resize(tensors[name], (330, 32))
    hub.repositories[MODEL]["main"] = files(**found, **{"model.safetensors": save(tensors)})
    return load_tokenizer(tmp_path)


def test_a_run_records_the_commit_and_is_resumed_from_it(hub, with_tokenizer):
    commit = commit_of(hub.repositories[MODEL]["main"])
    begun = with_initial_model(Config(init_from=MODEL))
    assert begun.init_from == f"hf://{MODEL}@{commit}"
    assert begun.model.vocab_size == 330
    assert begun.data.tokenizer == begun.init_from
    tokenizer = pretrained_tokenizer(begun.data)
    assert tokenizer.fingerprint == with_tokenizer.fingerprint

    hub.repositories[MODEL]["main"] = files()  # a newer commit
    del hub.asked[:]
    assert with_initial_model(Config(init_from=MODEL), begun) == begun
    assert with_initial_model(Config(init_from=begun.init_from), begun) == begun
    assert hub.asked == []
    other = with_initial_model(Config(init_from=f"hf://{MODEL}@main"), begun)
    assert other.init_from == f"hf://{MODEL}@{commit_of(files())}"


def test_a_run_records_the_commit_of_its_tokenizer(hub, with_tokenizer):
    given = Config(data=DataConfig(tokenizer=MODEL))
    begun = with_initial_model(given)
    assert begun.data.tokenizer == f"hf://{MODEL}@{commit_of(hub.repositories[MODEL]['main'])}"
    hub.repositories[MODEL]["main"] = files(**{"tokenizer.json": b"{}"})  # a newer commit
    del hub.asked[:]
    assert with_initial_model(given, begun) == begun
    assert with_initial_model(begun, begun) == begun
    assert with_initial_model(given, given) == given  # a run of an earlier version
    assert hub.asked == []
    assert pretrained_tokenizer(begun.data).fingerprint == with_tokenizer.fingerprint
    assert with_initial_model(given) != begun
    hub.refuse("GET /api/models", 503)
    gone = Config(data=DataConfig(tokenizer="some-owner/gone"))
    assert with_initial_model(gone) == gone  # the store may have it
    for tokenizer in ("byte", "data/tokenizer/"):
        config = Config(data=DataConfig(tokenizer=tokenizer))
        assert with_initial_model(config) == config


def test_an_evaluation_records_the_name_and_the_commit(hub, with_tokenizer):
    commit = commit_of(hub.repositories[MODEL]["main"])
    config, tokenizer = read_pretrained(MODEL)
    of = subject(MODEL)
    assert (of.config, of.tokenizer.fingerprint) == (config, with_tokenizer.fingerprint)
    record = model_record(of.source, None, None, config.model, tokenizer, Results(None))
    assert record["checkpoint"] == f"hf://{MODEL}@{commit}"
    assert _names([of, replace(of, source=of.source.parent)]) == [MODEL, "snapshots"]
    assert _names([of, of]) == [f"hf://{MODEL}@{commit}"] * 2


def test_a_store_of_a_tokenizer_on_the_hub(hub, with_tokenizer):
    data = DataConfig(source="text", path="*.txt", tokenizer=MODEL)
    assert pretrained_tokenizer(data).fingerprint == with_tokenizer.fingerprint
    expected = f"pretrained {with_tokenizer.fingerprint[:16]}"
    assert stored_options(data, 330)["data.tokenizer"] == expected
    assert "model.safetensors" not in hub.downloads()


def test_a_store_has_the_tokenizer_of_a_hub_that_cannot_be_reached(hub, with_tokenizer, tmp_path):
    Path("a.txt").write_text("Some words.\n" * 100)
    data = DataConfig(
        source="text", path="a.txt", tokenizer=MODEL, store="store", held_out_by="tail"
    )
    built = open_or_build(data, 330)
    (tmp_path / "cache").rename(tmp_path / "gone")
    hub.refuse("GET /api/models", 503)
    assert open_or_build(data, 330).fingerprint == built.fingerprint
    other = replace(data, store="other")
    hub.refuse("GET /api/models", 503)
    with pytest.raises(CheckpointError, match="cannot be downloaded, because the hub answered 503"):
        open_or_build(other, 330)
