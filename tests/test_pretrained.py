"""Checkpoints of other implementations in eval.py, generate.py and train.py."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from flax import nnx
from pretrained_tokenizers import llama

from retnet_jax import RetNet, generate, interop, load_pretrained
from retnet_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from retnet_jax.data import BatchStream, load_tokenizer, open_store
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.perplexity import window_nll
from retnet_jax.evaluation.statistics import perplexity_report
from retnet_jax.interop import presets
from retnet_jax.pretrained import read_pretrained
from retnet_jax.programs.evaluate import print_evaluation
from retnet_jax.training.loop import train
from retnet_jax.training.step import loss_sum

ROOT = Path(__file__).parent.parent


def sizes(**options):
    return {"vocab_size": 330, "d_model": 16, "n_layers": 2, "n_heads": 2, "ffn_dim": 24} | options


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An untrained model in fla's format with a tokenizer, as downloaded from the hub."""
    directory = tmp_path_factory.mktemp("hub") / "retnet"
    model = jax.jit(lambda: RetNet(presets.fla(**sizes()), rngs=nnx.Rngs(3)))()
    interop.fla.save(model, directory)
    llama(directory)
    return directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        text = f"def return self {number}: naïve state " * (number + 1)
        (directory / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return directory


def test_evaluation_of_a_foreign_checkpoint(directory, corpus, tmp_path, capsys):
    print_evaluation(
        directory,
        protocols=("window",),
        data=str(corpus / "*.txt"),
        output=tmp_path / "result.json",
    )
    assert "RetNet of" in capsys.readouterr().out
    record = json.loads((tmp_path / "result.json").read_text())
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    tokenizer = load_tokenizer(directory)
    documents = [np.array([1, *ids]) for ids in tokenizer.encode_batch(texts)]
    nll = window_nll(interop.load(directory), documents, window_length=2048, batch_size=4)
    expected = perplexity_report(nll, texts).bits_per_byte
    assert record["protocols"]["window"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert (record["step"], record["plan"]["window_length"]) == (None, 2048)


def test_generation_from_a_foreign_checkpoint(directory):
    tokenizer = load_tokenizer(directory)
    prompt = tokenizer.encode("def state")
    ((ids, _),) = generate(
        load_pretrained(directory, dtype="bfloat16"),
        [[1, *prompt]],
        max_tokens=30,
        end_id=2,
        vocab_size=tokenizer.vocab_size,
    )
    arguments = ["--prompt=def state", "--max_tokens=30", "--dtype=bfloat16"]
    done = programs.run("generate.py", f"--checkpoint={directory}", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def state")
    assert len(done.stdout) > len("def state\n")
    assert done.stdout == tokenizer.decode(prompt + ids) + "\n"


def run_config(begin, corpus, store, **data):
    """A run that begins from a checkpoint with another model and another tokenizer."""
    return Config(
        init_from=str(begin),
        data=DataConfig(
            source="text",
            path=str(corpus / "*.txt"),
            store=str(store),
            held_out=0.2,
            sequence_length=16,
            **data,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(
            steps=8, batch_size=8, log_every=1, eval_every=100, eval_batches=1, checkpoint_every=4
        ),
    )


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.compiles(90, reason="Orbax, and models loaded and placed leaf by leaf")
def test_continued_training_of_a_foreign_checkpoint(directory, corpus, tmp_path):
    begin = tmp_path / "begin"
    shutil.copytree(directory, begin)
    config = run_config(begin, corpus, tmp_path / "store")
    config.model.chunk_size = 8
    assert train(config, tmp_path / "run").status == "finished"
    # The first loss is that of the foreign model on the first batch.
    store = open_store(tmp_path / "store")
    stream = BatchStream([store.train], [1.0], sequence_length=16, batch_size=8, bos_id=1, seed=0)
    _, sums = jax.jit(loss_sum)(interop.load(begin), stream[0])
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(float(sums.loss / sums.weight), rel=1e-5)
    assert len(found) == 8
    assert found[-1] < found[0] - 0.5
    # The run is resumed without the foreign checkpoint.
    shutil.rmtree(begin)
    shutil.rmtree(tmp_path / "run/checkpoints/8")
    assert train(config, tmp_path / "run").status == "finished"
    assert losses(tmp_path / "run") == found
    recorded, tokenizer = read_pretrained(str(tmp_path / "run"))
    assert recorded.model == load_pretrained(tmp_path / "run").config
    assert (recorded.model.vocab_size, recorded.model.chunk_size) == (330, 8)
    assert (tokenizer.bos_id, tokenizer.end_id) == (1, 2)
    # The run can be converted back to the foreign format.
    interop.convert(tmp_path / "run", tmp_path / "back", "fla")
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)
    for ours, theirs in zip(
        jax.tree.leaves(interop.load(tmp_path / "back")),
        jax.tree.leaves(load_pretrained(tmp_path / "run")),
        strict=True,
    ):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    # A run can also begin from another run, with its tokenizer.
    again = run_config(tmp_path / "run", corpus, tmp_path / "store")
    assert train(again, tmp_path / "again").status == "finished"
    assert losses(tmp_path / "again")[0] < found[0] - 0.5


@pytest.mark.slow
@pytest.mark.compiles(150, reason="a whole run, saved from eight devices")
def test_continued_training_makes_a_tokenizer_if_there_is_none(corpus, tmp_path):
    config = presets.paper(**sizes(post_norm=True, deepnorm=True, ffn_norm=None))
    interop.torchscale.save(RetNet(config, rngs=nnx.Rngs(0)), tmp_path / "begin")
    with pytest.raises(ConfigError, match=r"has no tokenizer.json or tokenizer.model: copy"):
        read_pretrained(tmp_path / "begin")
    run = run_config(tmp_path / "begin", corpus, tmp_path / "store", tokenizer="byte")
    assert train(run, tmp_path / "run").status == "finished"
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.5
    assert load_tokenizer(tmp_path / "run").vocab_size == 257


def test_unusable_checkpoints_are_refused(directory, tmp_path):
    interop.fla.save(RetNet(presets.fla(**sizes(vocab_size=200)), rngs=nnx.Rngs(0)), tmp_path / "x")
    llama(tmp_path / "x")
    with pytest.raises(
        ConfigError, match=r"model.vocab_size=200 is less than the 2\d\d tokens of the tokenizer in"
    ):
        read_pretrained(tmp_path / "x")
    (tmp_path / "x/tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json is not a tokenizer"):
        read_pretrained(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"nowhere/config.json does not exist"):
        load_pretrained(tmp_path / "nowhere")
    config = run_config(tmp_path / "nowhere", tmp_path, tmp_path / "store")
    with pytest.raises(ConfigError, match=r"nowhere/config.json does not exist"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
