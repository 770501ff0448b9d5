"""`evaluate` gives the record of eval.py, for a directory or for a model in memory."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from test_evaluation_perplexity import TINY, workdir
from test_evaluation_tasks import ROWS

from retnet_jax import RetNet, evaluate
from retnet_jax.config import MeshConfig
from retnet_jax.data.tokenizers import ByteTokenizer, train_bpe
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.perplexity import stateful_nll
from retnet_jax.evaluation.plan import Plan, make_plan
from retnet_jax.evaluation.run import evaluation_mesh
from retnet_jax.evaluation.statistics import perplexity_report
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.parallel.sharding import with_shardings
from retnet_jax.pretrained import load_pretrained
from retnet_jax.programs.evaluate import print_evaluation

__all__ = ["workdir"]  # fixture

BYTES = ByteTokenizer()
TEXTS = ["first text", "zweiter, schöner", "a third, which is the longest of the three"]


@pytest.mark.slow
def test_evaluate_returns_the_record_that_the_program_writes(workdir, tmp_path, capsys):
    output = tmp_path / "result.json"
    options = {"parts": ("paper", "recall"), "task_data": str(ROWS), "tasks": ["copa"]}
    options |= {"shots": [0, 0], "distances": (16,), "trials": 4, "compressors": True}
    print_evaluation(workdir, output=output, **options)
    capsys.readouterr()
    for directory in (workdir, str(workdir)):  # twice in one process
        record = evaluate(directory, **options)
        assert json.loads(json.dumps(record)) == json.loads(output.read_text())
    assert capsys.readouterr().out == ""
    assert record["plan"]["parts"] == ("perplexity", "tasks", "recall")
    assert record["plan"]["shots"] == (0,)
    # Defaults: the training length, and half of it.
    assert (record["plan"]["window_length"], record["plan"]["stride"]) == (32, 16)
    assert list(record["protocols"]) == ["window", "stateful"]
    assert (record["step"], record["checkpoint"]) == (3, str(workdir))


def test_the_checkpoint_is_hashed_only_for_a_written_record(workdir, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "retnet_jax.evaluation.run.checkpoint_sha256", lambda *of: hashed.append(of) or "digest"
    )
    print_evaluation(workdir, protocols=("window",))
    assert hashed == []
    print_evaluation(workdir, protocols=("window",), output=tmp_path / "result.json")
    assert hashed == [(workdir, 3)]
    assert json.loads((tmp_path / "result.json").read_text())["checkpoint_sha256"] == "digest"


def test_texts_are_a_glob_or_strings(workdir, tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    files = evaluate(workdir, str(tmp_path / "*.txt"))
    strings = evaluate(workdir, TEXTS)
    assert strings["protocols"] == files["protocols"]
    assert strings["data"] == {"documents": 3, "sha256": files["data"]["sha256"]}
    assert strings["protocols"]["window"]["bytes"] == len("".join(TEXTS).encode())


@pytest.mark.parametrize("axes", [None, {"data": 4, "fsdp": 2}])
def test_a_model_in_memory_is_evaluated_on_its_devices(axes):
    model = RetNet(TINY, rngs=nnx.Rngs(0))
    documents = [np.array([BYTES.bos_id, *text.encode()]) for text in TEXTS]
    nll = stateful_nll(model, documents, batch_size=4)
    if axes:
        placed = with_shardings(model, make_mesh(MeshConfig(**axes)))
        model = jax.device_put(model, jax.tree.map(lambda x: x.sharding, placed))
    record = evaluate(model, TEXTS, tokenizer=BYTES, protocols=["stateful"])
    found = record["protocols"]["stateful"]
    expected = perplexity_report(nll, TEXTS)
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
    assert (found["tokens"], found["documents"]) == (sum(map(len, nll)), 3)
    assert record["devices"] == (8 if axes else 1)
    assert record["checkpoint"] is record["checkpoint_sha256"] is record["step"] is None
    assert record["tokenizer"] == BYTES.fingerprint


def test_a_model_in_memory_gives_the_results_of_its_directory(workdir):
    model = load_pretrained(workdir, evaluation_mesh(4, fsdp=False))
    found = evaluate(model, TEXTS, tokenizer=BYTES, window_length=32)
    expected = evaluate(workdir, TEXTS)
    assert found["protocols"] == expected["protocols"]
    assert found["positions"] == expected["positions"]


def test_invalid_input_of_evaluate_is_refused(workdir):
    model = RetNet(TINY, rngs=nnx.Rngs(0))
    bpe = train_bpe(["abcabd" * 9], 259)
    for options, message in (
        ({}, "a model in memory needs its tokenizer"),
        (
            {"tokenizer": bpe},
            "less than the 259 tokens of the tokenizer: documents can have 2 that",
        ),
        ({"tokenizer": BYTES}, "only a training run has held-out documents"),
        ({"tokenizer": BYTES, "texts": []}, "texts is empty"),
        ({"tokenizer": BYTES, "texts": ["a", ""]}, r"texts\[1\] is empty"),
        ({"tokenizer": BYTES, "texts": ["a", "\ud800"]}, r"texts\[1\] cannot be written as UTF-8"),
        (
            {"tokenizer": BYTES, "texts": ["a"], "dtype": "bfloat16"},
            "a model in memory is not changed",
        ),
        ({"tokenizer": BYTES, "texts": ["a"], "parts": ["tasks"]}, "texts have no effect with"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(model, **options)
    with pytest.raises(ConfigError, match="has its own tokenizer"):
        evaluate(workdir, tokenizer=BYTES)
    with pytest.raises(ConfigError, match=r"has no weights|is no directory"):
        evaluate(Path("no/such/run"))


def test_a_plan_fills_in_defaults():
    plan = make_plan(33, parts=["paper"])
    assert (plan.parts, plan.shots) == (("perplexity", "tasks"), (0, 4))
    assert (plan.window_length, plan.stride) == (33, 17)
    assert make_plan(33, window_length=8) == Plan(window_length=8, stride=4)
    assert make_plan(33, window_length=8, stride=3, shots=(1,), parts=["tasks"]).stride == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["all"]}, "parts: 'all' is not one of perplexity, tasks, recall"),
        ({"protocols": []}, "protocols is empty; give at least one of window"),
        ({"tasks": ["mmlu"]}, "tasks: 'mmlu' is not one of hellaswag"),
        ({"variant": "dirty"}, "variant: 'dirty' is not one of lm_eval, clean"),
        ({"window_length": 0}, "window_length=0: must be >= 1"),
        ({"context_lengths": (128, 100)}, r"context_lengths=\(128, 100\): must be >= 128"),
        ({"protocols": ["sliding"], "stride": 9, "window_length": 8}, r"stride=9 is not in 1"),
    ],
)
def test_invalid_plans_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(32, **options)
