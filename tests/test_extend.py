"""The examples of docs/extend.md run as they stand, and do what the page says of them."""

import importlib
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from retnet_jax import generate, load_pretrained, train
from retnet_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from retnet_jax.data import BatchStream, build_store, open_store
from retnet_jax.data.sources import Document
from retnet_jax.errors import ConfigError
from retnet_jax.model import build_model
from retnet_jax.model.attention import Attention
from retnet_jax.model.mixer import Mixer
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.trees import named_leaves
from retnet_jax.training.optim import make_optimizer
from retnet_jax.training.step import abstract_state, loss_sum

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text()
EXAMPLES = dict(re.findall(r'```python\n("""(\w+)\.py: .*?)```', PAGE, re.S))
EXAMPLES = {name: code for code, name in EXAMPLES.items()}

pytestmark = pytest.mark.compiles(400, reason="whole runs, one for each example")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the examples are, and runs of those that have run; it is Python's working directory."""
    directory = tmp_path_factory.mktemp("extend")
    for name, code in EXAMPLES.items():
        (directory / f"{name}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.syspath_prepend(directory)
        yield directory
        for name in EXAMPLES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def ran(directory):
    """Runs an example as a program, once; its metrics.jsonl."""
    done = set()

    def run(name, run=None):
        if name not in done:
            runpy.run_path(str(directory / f"{name}.py"), run_name="__main__")
            done.add(name)
        return metrics(directory / "runs" / (run or name))

    return run


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(records):
    return {x["step"]: x["loss"] for x in records if "loss" in x}


def test_every_example_is_tested():
    assert list(EXAMPLES) == ["sums", "answers", "averages", "lion", "accuracy"]
    assert PAGE.count("```python") == len(EXAMPLES)


def test_documents_of_an_own_source_come_back_from_the_store(directory, ran):
    assert list(losses(ran("sums"))) == [1, 2, 3, 4, 5, 6]
    store = open_store("sums")
    texts = {
        split.name(i): store.tokenizer.decode(split.document(i)[1:].tolist())
        for split in (store.train, store.held_out)
        for i in range(len(split))
    }
    assert texts == {f"{a}+{b}": f"{a}+{b}\n{a + b}" for a in range(40) for b in range(60)}


@pytest.mark.parametrize("policy", ["packed", "contiguous"])
def test_a_token_has_the_same_weight_in_every_window(directory, ran, policy):
    ran("sums")
    split = open_store("sums").held_out
    settings = {"sequence_length": 5, "batch_size": 2, "bos_id": 256, "seed": 0, "policy": policy}
    stream = BatchStream([split], [1.0], loss_weights="answers:answers_only", **settings)
    plain = BatchStream([split], [1.0], **settings)
    expected = {}  # by what stands before a token in its document, of which the first 3 tell all
    for index in range(len(split)):
        document = split.document(index).tolist()
        for place in range(len(document)):
            before = document[: place + 1]
            expected[tuple(before[-5:]), document[place]] = float(ord("\n") in before)
    cut = 0
    for step in range(40):
        batch, without = stream[step], plain[step]
        np.testing.assert_array_equal(batch.tokens, without.tokens)
        assert (batch.weights <= without.weights).all()
        for row in range(2):
            text = batch.tokens[row].tolist()
            begin = text.index(256) if 256 in text else len(text)
            # In the part of a document that began before: the answer ends it.
            if 0 < begin < 5 and batch.segment_ids[row, 0]:
                cut += 1
                assert batch.weights[row, begin - 1] == 1
            for place in range(begin, 5):
                if batch.segment_ids[row, place]:
                    before = text[: place + 1]
                    newest = len(before) - before[::-1].index(256) - 1
                    assert batch.weights[row, place] == (ord("\n") in before[newest:])
    assert cut > 5
