"""Files of commit 88e272d still load: a workdir, its store, an export and a saved state.

The files are in fixtures/88e272d; its README says how they were made.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from retnet_jax.config import MeshConfig
from retnet_jax.config.as_json import OLD_NAMES, flatten, read_config
from retnet_jax.data import load_tokenizer, open_store
from retnet_jax.generation.saved_state import load_reading
from retnet_jax.generation.texts import Writer
from retnet_jax.model import for_decoding
from retnet_jax.pretrained import load_pretrained
from retnet_jax.training.loop import train

OLD = Path(__file__).parent / "fixtures" / "88e272d"


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A copy of the workdir, which was written at step 4, and of the directory it was run from."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_old_names_of_options_are_read(here):
    config = read_config(here / "run" / "config.json")
    assert config.data.skip_batches == (1,)
    assert config.train.max_skipped == 4
    assert config.train.spike_deviations == 8.0
    written = json.loads((here / "run" / "config.json").read_text())
    assert not set(OLD_NAMES) & set(flatten(config))
    assert all(old.split(".")[1] in written[old.split(".")[0]] for old in OLD_NAMES)


@pytest.mark.compiles(60, reason="a whole run, resumed on another mesh")
def test_a_workdir_resumes_with_the_losses_it_would_have_had(here):
    """From the checkpoint of step 4; later steps have the losses that were logged then."""
    expected = logged(here / "run")
    config = read_config(here / "run" / "config.json")
    on_these = dataclasses.replace(config, mesh=MeshConfig(data=4, tensor=2))
    result = train(on_these, here / "run")
    assert (result.status, result.step) == ("finished", 8)
    found = logged(here / "run")
    assert [x["step"] for x in found] == [x["step"] for x in expected]
    for old, new in zip(expected, found, strict=True):
        for name in {"loss", "gradient_norm", "learning_rate", "held_out_loss"} & set(old):
            assert new[name] == pytest.approx(old[name], rel=1e-5), (old["step"], name)
    # The clock continues from the seconds of the first four steps.
    seconds = [x["training_seconds"] for x in found if "training_seconds" in x]
    before = max(x.get("training_seconds", 0.0) for x in expected if x["step"] <= 4)
    assert seconds[4] > seconds[3] == before


def test_a_store_opens_with_its_tokenizer(here):
    store = open_store(here / "store")
    assert (len(store.train), store.train.token_count) == (25, 5136)
    text = store.tokenizer.decode(store.held_out.document(0).tolist())
    assert text.startswith('"Legal Entity" shall mean')


def test_an_export_loads_and_a_saved_state_continues(here):
    model = for_decoding(load_pretrained(here / "own"))
    tokenizer = load_tokenizer(here / "own")
    reading = load_reading(here / "reading.state", model, tokenizer)
    writer = Writer(model, tokenizer, [" reproduce"], max_tokens=12, after=reading)
    for _ in writer:
        pass
    (found,) = writer.continuations
    expected = json.loads((here / "answer.json").read_text())
    assert (found.text, found.tokens) == (expected["text"], expected["tokens"])
    np.testing.assert_allclose(
        found.log_probabilities, expected["log_probabilities"], rtol=0, atol=1e-4
    )
    assert sum(x.size for x in jax.tree.leaves(load_pretrained(here / "own"))) == 11_424
