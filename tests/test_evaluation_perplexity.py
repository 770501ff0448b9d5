"""Perplexity equals plain loops over documents; eval.py from a workdir to tables and JSON."""

import dataclasses
import gzip
import hashlib
import json
import lzma
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from flax import nnx
from tolerances import assert_close

from retnet_jax import RetNet, Transformer
from retnet_jax.config import Config, DataConfig, ModelConfig
from retnet_jax.data import build_store, open_store
from retnet_jax.data.tokenizers import ByteTokenizer, train_bpe
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.compressors import compressed_bits_per_byte
from retnet_jax.evaluation.perplexity import last_tokens_nll, stateful_nll, window_nll, windows
from retnet_jax.evaluation.plan import PROTOCOLS
from retnet_jax.evaluation.statistics import (
    Difference,
    perplexity_report,
    position_buckets,
    ratio_standard_error,
)
from retnet_jax.programs.evaluate import print_evaluation
from retnet_jax.runs.checkpoint import CheckpointError, Checkpoints
from retnet_jax.runs.workdir import record_start

ROOT = Path(__file__).parent.parent
VOCABULARY = 23
LENGTHS = (1, 40, 7, 16, 33, 2, 17)  # tokens after BOS
SHAPE = ModelConfig(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2, chunk_size=8)


def documents_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [np.array([0, *rng.integers(1, VOCABULARY, n)], np.uint16) for n in lengths]


DOCUMENTS = documents_of(LENGTHS)


@pytest.fixture(scope="module", params=[RetNet, Transformer])
def model(request):
    model = request.param(SHAPE, rngs=nnx.Rngs(0))
    # Larger parameters; otherwise the predictions of an untrained model are close to uniform.
    model.embedding = nnx.Param(model.embedding[...] * 50)
    model.head = nnx.Param(model.head[...] * 50)
    return model


@jax.jit
def parallel_logits(model, tokens):
    return model(tokens, form="parallel")[0]


def by_definition(model, tokens):
    """-log p of each token after the first, in one parallel pass and float64."""
    # Padding after a token does not change its logits; one length needs one compilation.
    padded = np.pad(tokens.astype(np.int32), (0, 1 + max(LENGTHS) - len(tokens)))
    logits = np.asarray(parallel_logits(model, padded[None])[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.fixture(scope="module")
def whole(model):
    return [by_definition(model, document) for document in DOCUMENTS]


def assert_tokens(found, expected):
    """Compares -log p of every token of every document."""
    assert [len(x) for x in found] == [len(x) for x in expected]
    assert_close(np.concatenate(found), np.concatenate(expected))


def rolling(model, document, length, stride):
    """The windows of lm-evaluation-harness (`get_rolling_token_windows`), one after the other."""
    text, found = document[1:], []
    first = min(length, len(text))
    found.extend(by_definition(model, document[: first + 1]))
    while len(found) < len(text):
        scored = min(len(text) - len(found), stride)
        end = len(found) + scored
        inputs = document[end - length : end + 1]  # and the last target
        found.extend(by_definition(model, inputs)[-scored:])
    return np.array(found)


@pytest.mark.parametrize(("length", "stride"), [(6, None), (16, None), (16, 5), (6, 1)])
def test_window_nll_equals_a_loop_over_windows(model, length, stride):
    expected = [rolling(model, document, length, stride or length) for document in DOCUMENTS]
    found = window_nll(model, DOCUMENTS, window_length=length, stride=stride, batch_size=4)
    assert_tokens(found, expected)


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (4, 1), (7, 3), (100, 10)])
def test_windows_score_every_token_once_with_full_context(length, stride):
    for tokens in range(1, 40):
        found = windows(tokens, length, stride)
        scored = [t for w in found for t in range(w.stop - w.scored, w.stop)]
        assert scored == list(range(tokens))
        assert all(w.stop - w.start == min(length, tokens) for w in found)


def test_a_stride_longer_than_the_window_is_refused(model):
    with pytest.raises(ConfigError, match=r"stride=7 is not in 1 \.\.\. 6"):
        window_nll(model, DOCUMENTS, window_length=6, stride=7, batch_size=4)


def test_a_short_window_loses_context(model, whole):
    """A window as long as the documents equals the stateful protocol; a shorter one does not."""
    long = window_nll(model, DOCUMENTS, window_length=40, batch_size=4)
    short = window_nll(model, DOCUMENTS, window_length=6, batch_size=4)
    assert_tokens(long, whole)
    assert np.abs(np.concatenate(short) - np.concatenate(whole)).max() > 1e-2


@pytest.mark.parametrize("piece_length", [5, 16])
def test_stateful_nll_equals_one_pass_for_any_piece_length(model, whole, piece_length):
    nll = stateful_nll(model, DOCUMENTS, batch_size=4, piece_length=piece_length)
    assert_tokens(nll, whole)


def test_long_documents_give_the_same_for_any_piece_length(model):
    """Pieces of 512 tokens hold a whole document."""
    documents = documents_of((300, 290), seed=1)
    nll = {n: stateful_nll(model, documents, batch_size=2, piece_length=n) for n in (32, 64, 256)}
    whole = stateful_nll(model, documents, batch_size=2, piece_length=512)
    for found in nll.values():
        assert_tokens(found, whole)
        for losses, expected in zip(found, whole, strict=True):
            assert abs(losses.sum(dtype=float) - expected.sum(dtype=float)) < 1e-4


def test_other_documents_in_a_batch_change_nothing(model, whole):
    together = stateful_nll(model, DOCUMENTS, batch_size=7)
    single = stateful_nll(model, [DOCUMENTS[1]], batch_size=7)  # in one piece
    assert_tokens(together, whole)
    assert_tokens(single, whole[1:2])


def test_the_same_last_tokens_after_contexts_of_several_lengths(model):
    long = [document for document in DOCUMENTS if len(document) > 16]
    found = last_tokens_nll(model, DOCUMENTS, [8, 16], scored=4, batch_size=2)
    for length, nll in found.items():
        parts = [document[16 - length : 17] for document in long]
        assert_close(nll, np.array([by_definition(model, part)[-4:].sum() for part in parts]))
    with pytest.raises(ConfigError, match=r"no document has 41 tokens, .* the longest has 40"):
        last_tokens_nll(model, DOCUMENTS, [41], scored=4, batch_size=2)
    with pytest.raises(ConfigError, match="a context of 3 tokens is shorter than the 4"):
        last_tokens_nll(model, DOCUMENTS, [3, 8], scored=4, batch_size=2)


def test_position_buckets_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    nll = [rng.exponential(size=n).astype(np.float32) for n in (3, 9, 40)]
    buckets = position_buckets(nll, shortest=4)
    assert [(x.first, x.last) for x in buckets] == [(0, 3), (4, 7), (8, 15), (16, 31), (32, 63)]
    assert [x.documents for x in buckets] == [3, 2, 2, 1, 1]
    assert [x.tokens for x in buckets] == [11, 8, 9, 16, 8]
    total = sum(x.nll_per_token * x.tokens for x in buckets)
    assert total == pytest.approx(sum(x.sum() for x in nll), rel=1e-6)
    assert buckets[2].nll_per_token == pytest.approx((nll[1][8] + nll[2][8:16].sum()) / 9)
    assert buckets[2].perplexity == pytest.approx(math.exp(buckets[2].nll_per_token))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_uniform_model_scores_every_token_once(model, protocol):
    uniform = nnx.clone(model)
    uniform.head = nnx.Param(jnp.zeros_like(model.head[...]))
    scored = []
    given = {"batch_size": 4, "progress": scored.append}
    if protocol == "stateful":
        nll = stateful_nll(uniform, DOCUMENTS, **given)
        assert sum(scored) == sum(LENGTHS)
    else:
        stride = 6 if protocol == "window" else 2
        nll = window_nll(uniform, DOCUMENTS, window_length=6, stride=stride, **given)
        assert sum(scored) == sum(w.stop - w.start for n in LENGTHS for w in windows(n, 6, stride))
    assert tuple(map(len, nll)) == LENGTHS
    assert_close(np.concatenate(nll), np.full(sum(LENGTHS), math.log(VOCABULARY)))
    # Two bytes per token: log2(VOCABULARY) / 2 bits per byte in every document.
    found = perplexity_report(nll, ["é" * n for n in LENGTHS])
    assert found.token_perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(VOCABULARY) / 2, rel=1e-5)
    assert found.standard_error == pytest.approx(0, abs=1e-6)


def test_report_counts_words_bytes_and_tokens():
    texts = ["naïve café\n\n  日本 語", "x"]
    nll = [np.full(9, 30 / 9), np.full(3, 4.0)]
    found = perplexity_report(nll, texts)
    assert (found.documents, found.tokens, found.words, found.bytes) == (2, 12, 5, 27)
    assert found.nll == pytest.approx(42)
    assert found.bits_per_byte == pytest.approx(42 / math.log(2) / 27)
    assert found.token_perplexity == pytest.approx(math.exp(42 / 12))
    assert found.word_perplexity == pytest.approx(math.exp(42 / 5))
    assert found.byte_perplexity == pytest.approx(math.exp(42 / 27))
    bits = np.array([30, 12]) / math.log(2)
    expected = ratio_standard_error(bits, np.array([26, 1]))
    assert found.standard_error == pytest.approx(expected)
    each = bits / [26, 1]
    assert found.mean_bits_per_byte == pytest.approx(each.mean())
    assert found.mean_standard_error == pytest.approx(each.std(ddof=1) / math.sqrt(2))


def test_word_perplexity_overflows_to_infinity():
    found = perplexity_report([np.full(9, 800 / 9)], ["字" * 300])
    assert found.word_perplexity == math.inf
    assert math.isnan(found.standard_error)


def test_standard_error_follows_the_formula():
    x, y = [3.0, 5.0, 10.0], [1.0, 4.0, 5.0]
    ratio = 18 / 10
    squares = (3 - ratio) ** 2 + (5 - 4 * ratio) ** 2 + (10 - 5 * ratio) ** 2
    expected = math.sqrt(3 / 2 * squares) / 10
    assert ratio_standard_error(np.array(x), np.array(y)) == pytest.approx(expected, rel=1e-12)


def test_standard_error_is_the_deviation_over_samples():
    """2000 corpora of 100 documents each, with about 2 bits per byte."""
    rng = np.random.default_rng(0)
    y = rng.integers(10, 1000, (2000, 100)).astype(float)
    x = y * rng.normal(2, 0.5, y.shape)
    errors = [ratio_standard_error(*pair) for pair in zip(x, y, strict=True)]
    assert np.mean(errors) == pytest.approx(np.std(x.sum(1) / y.sum(1)), rel=0.05)


def test_compressors_are_those_of_the_standard_library():
    text = ("the same words, " * 50).encode()
    assert compressed_bits_per_byte(text) == {
        "gzip -9": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


TINY = ModelConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run as train.py writes it, with an untrained model."""
    directory = tmp_path_factory.mktemp("run")
    for i in range(20):
        (directory / f"{i}.txt").write_text(f"document {i}: {'naïve ' * i}\n", encoding="utf-8")
    config = Config(
        model=TINY,
        data=DataConfig(
            source="text",
            path=str(directory / "*.txt"),
            tokenizer="byte",
            store=str(directory / "store"),
            held_out=0.4,
            sequence_length=32,
        ),
    )
    build_store(config.data, config.model.vocab_size)
    record_start(directory / "run", config, None, ByteTokenizer())
    model = RetNet(TINY, rngs=nnx.Rngs(0))
    checkpoints = Checkpoints(directory / "run" / "checkpoints", keep=1)
    checkpoints.save(3, {"model": model}, {"next_batch": 3})
    checkpoints.close()
    return directory / "run"


def run_eval(directory, **options):
    print_evaluation(directory, **{"protocols": PROTOCOLS} | options)


def test_table_and_json_of_a_run(workdir, tmp_path, capsys):
    output = tmp_path / "new" / "result.json"
    run_eval(workdir, window_length=1000, compressors=True, output=output)
    table = capsys.readouterr().out
    record, markdown = json.loads(output.read_text()), output.with_suffix(".md").read_text()

    names = open_store(workdir.parent / "store").held_out.names
    texts = [(workdir.parent / name).read_text(encoding="utf-8") for name in names]
    documents = [np.array([ByteTokenizer.bos_id, *text.encode()]) for text in texts]
    nll = stateful_nll(RetNet(TINY, rngs=nnx.Rngs(0)), documents, batch_size=4)
    expected = dataclasses.asdict(perplexity_report(nll, texts))
    for protocol in PROTOCOLS:  # all the same, because no document is longer than the window
        found = record["protocols"][protocol]
        assert found.pop("sources") == {}
        assert found.pop("apart") is None
        assert found == pytest.approx(expected, rel=1e-5)
        assert f"{found['bits_per_byte']:.4f}" in table
    assert record["compressors"] == compressed_bits_per_byte("".join(texts).encode())
    assert (record["step"], record["plan"]["window_length"]) == (3, 1000)
    assert len(record["checkpoint_sha256"]) == len(record["data"]["sha256"]) == 64
    positions = sum(x["tokens"] for x in record["positions"])
    assert positions == record["protocols"]["stateful"]["tokens"] == sum(map(len, nll))
    assert f"| window of 1000 | {expected['bits_per_byte']:.4f} |" in markdown
    assert record["checkpoint"] == str(workdir)
    assert record["model"]["dtype"] == "float32"
    assert record["tokenizer"] == ByteTokenizer().fingerprint
    assert [x["store"] for x in record["data"]["stores"]] == [str(workdir.parent / "store")]

    before = output.read_text()
    with pytest.raises(ConfigError, match=r"result\.json exists already: name another file"):
        run_eval(workdir, output=output)
    assert output.read_text() == before


@pytest.fixture
def with_apart(workdir, tmp_path):
    """Makes a copy of the run with another `data.apart`."""

    def make(pattern):
        run = shutil.copytree(workdir, tmp_path / "with_apart", dirs_exist_ok=True)
        config = json.loads((run / "config.json").read_text())
        config["data"]["apart"] = pattern
        (run / "config.json").write_text(json.dumps(config))
        return run

    return make


def test_documents_reported_apart(workdir, with_apart, tmp_path, capsys):
    names = open_store(workdir.parent / "store").held_out.names
    apart, *others = names
    pattern = f"^{re.escape(apart)}$"
    options = {"protocols": ["stateful"], "compressors": True}
    run_eval(with_apart(pattern), **options, output=tmp_path / "apart.json")
    table = capsys.readouterr().out
    record = json.loads((tmp_path / "apart.json").read_text())
    for part, documents in ((record["data"]["apart"], [apart]), (record["data"], others)):
        text = "".join((workdir.parent / name).read_text(encoding="utf-8") for name in documents)
        assert part["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert f"1 of {len(names)} apart" in table
    found = record["protocols"]["stateful"]
    assert (found["apart"]["documents"], found["documents"]) == (1, len(others))
    assert f"{found['apart']['bits_per_byte']:.4f}" in table
    sizes = (f"{record[part]['xz -9']:.4f}" for part in ("compressors", "compressors_apart"))
    assert re.search("xz -9 +{} +{}".format(*sizes), table)

    with pytest.raises(ConfigError, match="matches the names of all held-out documents"):
        run_eval(with_apart("txt$"))
    run_eval(with_apart("nothing has this name"), protocols=["stateful"])
    assert "(data.apart='nothing has this name' matches none)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.apart='\(' is no regular expression: missing"):
        DataConfig(apart="(").check()


def test_text_files_and_json_lines_give_the_same(workdir, tmp_path, capsys):
    """Unreadable files are counted and named."""
    texts = ["first text", "zweiter, schöner"]
    lines = [json.dumps({"text": text}) for text in texts]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("schön".encode("latin-1"))
    (tmp_path / "texts.jsonl").write_text("\n".join([*lines, '{"body": "x"}']))
    records = []
    for name, glob in (("text", "*.txt"), ("jsonl", "*.jsonl")):
        output = tmp_path / f"{name}.json"
        run_eval(workdir, data=str(tmp_path / glob), protocols=["stateful"], output=output)
        records.append(json.loads(output.read_text()))
    assert records[0]["protocols"] == records[1]["protocols"]
    assert records[0]["protocols"]["stateful"]["bytes"] == len("".join(texts).encode())
    said = capsys.readouterr().err
    assert "skipped 2:" in said
    assert "empty.txt: empty" in said
    assert "latin1.txt: invalid UTF-8: 'utf-8' codec" in said
    assert "texts.jsonl:3: no field 'text': among 'body'" in said
    assert records[0]["data"]["skipped"]["count"] == 2


def test_one_document_has_no_standard_error(workdir, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("字" * 300, encoding="utf-8")
    output = tmp_path / "one.json"
    run_eval(workdir, data=str(tmp_path / "one.txt"), protocols=["window"], output=output)
    record = json.loads(output.read_text())
    assert record["plan"]["window_length"] == 32  # data.sequence_length
    found = record["protocols"]["window"]
    assert found["standard_error"] is None
    assert found["word_perplexity"] is None  # 900 bytes in one word
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / math.log(2) / 900)
    assert "inf" in capsys.readouterr().out


def test_data_without_documents_is_refused(workdir, tmp_path):
    with pytest.raises(ConfigError, match=r"--data: .*nothing\*.txt' matches no file"):
        run_eval(workdir, data=str(tmp_path / "nothing*.txt"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match=r"no documents; 1 skipped: .*empty\.txt: empty"):
        run_eval(workdir, data=str(tmp_path / "*.txt"))


def test_directories_without_model_store_or_checkpoint_are_refused(workdir, tmp_path):
    with pytest.raises(ConfigError, match=r"has no weights|is no directory"):
        run_eval(tmp_path)

    data = DataConfig(tokenizer="byte", store="no/such/store")
    record_start(tmp_path / "untrained", Config(model=TINY, data=data), None, ByteTokenizer())
    with pytest.raises(ConfigError, match=r"data\.store='no/such/store' .* does not exist"):
        run_eval(tmp_path / "untrained")
    with pytest.raises(CheckpointError, match="there is no checkpoint to load"):
        run_eval(tmp_path / "untrained", data=str(workdir.parent / "*.txt"))


def test_a_store_with_another_tokenizer_is_refused(workdir, tmp_path):
    data = DataConfig(tokenizer="bpe", store=str(workdir.parent / "store"))
    config = Config(model=ModelConfig(vocab_size=259), data=data)
    record_start(tmp_path / "bpe", config, None, train_bpe(["abcabd" * 9], 259))
    with pytest.raises(ConfigError, match=r"another tokenizer .* give text with --data"):
        run_eval(tmp_path / "bpe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=a", "--checkpoint=b"], "--checkpoint=b: give only one of them"),
        (
            ["--checkpoint=b"],
            "b is read as a checkpoint without documents of its own, so it needs --data",
        ),
        (["hf://a/b"], "hf://a/b is read as a checkpoint without documents of its own"),
    ],
)
def test_command_lines_without_model_or_data_are_refused(arguments, message):
    found = programs.run("eval.py", *arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            [0, 4, VOCABULARY],
            "document 1 has the token id 23, but the model knows ids from 0 to 22",
        ),
        ([0, -1], "document 1 has the token id -1"),
        ([0.0, 4.0], r"document 1 has .*0.0.* \(float64\); token ids are integers"),
        ([], "document 1 is empty; it must begin with BOS"),
        (7, "document 1 is '7', no list of token ids"),
    ],
)
def test_documents_without_valid_token_ids_are_refused(model, document, message):
    documents = [DOCUMENTS[1], document]
    with pytest.raises(ConfigError, match=message):
        stateful_nll(model, documents, batch_size=2)
    with pytest.raises(ConfigError, match=message):
        window_nll(model, documents, window_length=8, batch_size=2)


def test_a_model_with_nan_raises_instead_of_a_perplexity(model):
    broken = jax.tree.map(lambda x: x, model)
    broken.embedding = nnx.Param(broken.embedding[...].at[5].set(np.nan))
    documents = [np.array([0, 1, 2]), np.array([0, 1, 5, 6])]
    message = (
        r"not finite in 1 of 2 documents \(first: token \d of document 1\): "
        "16 of the 368 numbers of its parameter embedding are NaN"
    )
    with pytest.raises(CheckpointError, match=message):
        stateful_nll(broken, documents, batch_size=2)


def test_z_of_a_difference_without_standard_error_is_infinite():
    assert Difference(-0.5, 0.0).z == -math.inf
    assert Difference(0.5, 0.0).z == math.inf
    assert Difference(0.0, 0.0).z == 0
    assert Difference(-1.0, 0.5).z == -2
