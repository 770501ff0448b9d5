"""Generation of texts: log-probabilities, samplers per row, stop strings, saved states."""

import dataclasses
import functools
import io
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tolerances import assert_close

from retnet_jax import ModelConfig, RetNet, Transformer, for_decoding, generate
from retnet_jax.config import Config, DataConfig
from retnet_jax.data.tokenizers import ByteTokenizer, TextStream, train_bpe
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.generation.decode import decode, prefill
from retnet_jax.generation.requests import read_requests
from retnet_jax.generation.sampling import Sampler
from retnet_jax.generation.saved_state import load_reading, save_reading
from retnet_jax.generation.texts import Writer, _Row
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.workdir import record_start

# When run alone; after other tests many programs are compiled already.
pytestmark = pytest.mark.compiles(80, reason="samplers and progress are prepared outside of jit")

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(vocab_size=264, d_model=32, n_layers=2, n_heads=2)
KINDS = (RetNet, Transformer)
BYTES = ByteTokenizer()
PROMPTS = ["x", "once upon a time", "Grüße"]
WARM = Sampler(temperature=1.0)


@functools.cache
def build(kind, dtype="float32"):
    @jax.jit
    def made():
        model = kind(dataclasses.replace(CONFIG, dtype=dtype), rngs=nnx.Rngs(2))
        model.embedding = nnx.Param(25 * model.embedding[...])
        return model

    return for_decoding(made())


@jax.jit
def logits_of(model, tokens):
    return model(tokens, form="parallel")[0]


def written(*args, **kwargs):
    writer = Writer(*args, **kwargs)
    additions = list(writer)
    for row, found in enumerate(writer.continuations):
        assert "".join(new[row] for new in additions) == found.text
    return writer


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.7, top_k=20, top_p=0.9)])
def test_log_probabilities_are_those_of_the_model(sampler):
    model = jax.jit(lambda: RetNet(CONFIG, rngs=nnx.Rngs(2)))()
    prompts = [[256, 3, 5], [256]]
    found = generate(model, prompts, 20, sampler, vocab_size=257)
    for prompt, row in zip(prompts, found, strict=True):
        logits = logits_of(model, np.array([prompt + row.tokens]))
        log_p = jax.nn.log_softmax(np.asarray(logits)[0, len(prompt) - 1 : -1, :257])
        expected = np.asarray(log_p)[np.arange(20), row.tokens]
        assert_close(np.array(row.log_probabilities), expected)


def test_each_row_has_its_own_sampler():
    """A row gets the same tokens as in a batch where all rows have its sampler."""
    samplers = [Sampler(), Sampler(1.0), Sampler(2.0, top_k=7), Sampler(0.5, top_p=0.8)]
    prompts = [[256, 1], [256, 2], [256, 3], [256, 4]]
    together = generate(build(RetNet), prompts, 16, samplers, seed=5)
    for row, sampler in enumerate(samplers):
        same = generate(build(RetNet), prompts, 16, sampler, seed=5)
        assert together[row].tokens == same[row].tokens
    with pytest.raises(ConfigError, match="2 samplers for 4 prompts"):
        generate(build(RetNet), prompts, 16, samplers[:2])


def test_a_stop_string_spread_over_tokens_ends_a_text_and_is_not_part_of_it():
    whole = written(build(RetNet), BYTES, PROMPTS, 80, WARM, seed=1)
    text = whole.continuations[1].text
    # Three characters, each at least one token, not at the beginning.
    stop = text[20:23]
    assert len(stop.encode()) >= 3
    place = text.index(stop)
    cut = written(build(RetNet), BYTES, PROMPTS, 80, WARM, seed=1, stop=[stop, "no such text"])
    one = cut.continuations[1]
    assert (one.text, one.ended_by) == (text[:place], "stop")
    assert len(one.tokens) == len(one.log_probabilities)
    assert stop in BYTES.decode(one.tokens)
    for row in (0, 2):
        if stop not in whole.continuations[row].text:
            assert cut.continuations[row] == whole.continuations[row]


def shown(text, stop, size=1):
    """The text that a row returns for every `size` bytes, and its whole continuation."""
    row, ids = _Row(TextStream(BYTES, before=[256]), stop), list(text.encode())
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    parts = [row.add(piece, [0.0] * len(piece), BYTES.end_ids) for piece in pieces]
    return [*parts, row.rest()], row.continuation


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("ab\n\ncd", ["\n\n"], "ab"),
        ("ab\ncd", ["\n\n"], "ab\ncd"),
        ("ab\n", ["\n\n"], "ab\n"),
        ("aaab", ["aab"], "a"),
        ("xx END", ["ND", "END"], "xx "),
        ("xx END", ["END", "N"], "xx E"),  # complete first, in whatever parts text comes
        ("größer", ["ß"], "grö"),
        ("nothing", [], "nothing"),
        ("stop", ["stop"], ""),
    ],
)
def test_text_before_a_stop_string(text, stop, expected, size):
    parts, found = shown(text, stop, size)
    assert "".join(parts) == found.text == expected
    assert found.ended_by == ("length" if text == expected else "stop")
    if size == 1 and text == "ab\n\ncd":
        assert parts[:3] == ["a", "b", ""]  # the newline is held back


def test_the_end_id_is_not_part_of_the_text():
    row = _Row(TextStream(BYTES, before=[256]), ["\n\n"])
    assert row.add([97, 10, 256, 98], [0.0] * 4, (256,)) + row.rest() == "a\n"
    assert row.continuation.ended_by == "end"
    assert row.continuation.tokens == [97, 10]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_a_text_in_parts_equals_reading_it_whole(kind):
    rng = np.random.default_rng(0)
    whole = [rng.integers(0, 256, n).tolist() for n in (700, 40, 3)]
    cut = [600, 40, 1]  # the second has nothing left to read
    first = prefill(build(kind), [row[:n] for row, n in zip(whole, cut, strict=True)], room=4)
    rest = [row[n:] for row, n in zip(whole, cut, strict=True)]
    found = prefill(build(kind), rest, 4, first)
    expected = prefill(build(kind), whole, room=4)
    assert_close(found.logits, expected.logits)
    assert found.state.position.tolist() == [700, 40, 3]
    # The first progress can be continued again.
    assert_close(prefill(build(kind), rest, 4, first).logits, expected.logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", [Sampler(), WARM])
def test_continuing_a_saved_state_equals_generating_at_once(kind, sampler, tmp_path):
    model, path = build(kind), tmp_path / "new" / "text.state"
    whole = written(model, BYTES, ["Grüße, "], 40, sampler, seed=3).continuations[0]
    first = written(model, BYTES, ["Grüße, "], 13, sampler, seed=3, tokens_at_once=1)
    save_reading(path, first.reading, model, BYTES)
    after = load_reading(path, model, BYTES)
    writer = Writer(model, BYTES, [""], 27, sampler, seed=3, after=after)
    pieces = iter(writer)
    next(pieces)
    compiled = decode._cache_size()
    list(pieces)
    assert decode._cache_size() == compiled
    rest = writer.continuations[0]
    assert first.continuations[0].tokens + rest.tokens == whole.tokens
    assert first.continuations[0].text + rest.text == whole.text
    log_p = first.continuations[0].log_probabilities + rest.log_probabilities
    assert_close(np.array(log_p), np.array(whole.log_probabilities))


def test_a_saved_state_is_the_same_in_models_that_store_keys_last_or_first(tmp_path):
    files = {}
    for keys_last in (False, True):
        model = jax.tree.map(lambda x: x, build(RetNet))  # which others use too
        model.keys_last = keys_last
        reading = written(model, BYTES, ["Grüße, "], 0).reading
        save_reading(tmp_path / str(keys_last), reading, model, BYTES)
        files[keys_last] = load_file(tmp_path / str(keys_last))
        for path in tmp_path.iterdir():  # those that the other has saved too
            after = load_reading(path, model, BYTES)
            assert_close(after.progress, reading.progress)
    assert files[False].keys() == files[True].keys()
    for name, x in files[False].items():
        assert (x == files[True][name]).all(), name


def test_a_saved_cache_is_the_same_in_models_that_store_it_in_float32_or_bfloat16(tmp_path):
    """A CPU stores bfloat16 keys and values in float32; an accelerator does not."""
    readings = {}
    for dtype in ("float32", "bfloat16"):
        model = jax.tree.map(lambda x: x, build(Transformer, "bfloat16"))  # which is kept
        assert model.cache_dtype == "float32"
        model.cache_dtype = dtype
        reading = written(model, BYTES, ["Grüße, "], 0).reading
        assert {x.dtype.name for x in jax.tree.leaves(reading.progress.state.layers)} == {dtype}
        save_reading(tmp_path / dtype, reading, model, BYTES)
        readings[dtype] = model, reading
    files = [load_file(tmp_path / dtype) for dtype in readings]
    assert files[0].keys() == files[1].keys()
    for name, x in files[0].items():
        assert (x == files[1][name]).all(), name
    for model, reading in readings.values():
        for path in tmp_path.iterdir():  # those that the other has saved too
            after = load_reading(path, model, BYTES)
            for found, expected in zip(
                *(jax.tree.leaves(x.progress) for x in (after, reading)), strict=True
            ):
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_several_prompts_continue_one_text(kind):
    model, text, questions = build(kind), "a long text " * 9, ["Who?", "Why not?", ""]
    read = written(model, BYTES, [text], 0)
    assert read.continuations[0].text == ""
    answers = written(model, BYTES, questions, 20, after=read.reading)
    expected = written(model, BYTES, [text + question for question in questions], 20)
    assert answers.continuations[0].tokens == expected.continuations[0].tokens
    assert [x.text for x in answers.continuations] == [x.text for x in expected.continuations]


def test_an_ended_text_needs_a_prompt():
    reading = written(build(RetNet), BYTES, ["x"], 3, tokens_at_once=1).reading
    ended = reading.progress._replace(ended=np.array([True]))
    reading = type(reading)(ended, reading.last_ids)
    with pytest.raises(ConfigError, match="prompt 1 is empty, but the text before it has ended"):
        Writer(build(RetNet), BYTES, ["next", ""], 3, after=reading)
    assert written(build(RetNet), BYTES, ["next"], 3, after=reading).continuations[0].tokens


def test_a_state_with_nan_is_not_saved(tmp_path):
    model = jax.tree.map(lambda x: x, build(RetNet))
    model.embedding = nnx.Param(model.embedding[...].at[ord("x")].set(np.nan))
    reading = Writer(model, BYTES, ["x"], 0).reading
    with pytest.raises(CheckpointError, match=r"is not written: .* not finite; 32 of the 8448"):
        save_reading(tmp_path / "text.state", reading, model, BYTES)
    assert not list(tmp_path.iterdir())


def test_unusable_saved_states_are_refused(tmp_path):
    model, path = build(RetNet), tmp_path / "text.state"
    reading = written(model, BYTES, ["x"], 3, tokens_at_once=1).reading
    save_reading(str(path), reading, model, BYTES)
    intact = path.read_bytes()
    load_reading(str(path), model, BYTES)
    with pytest.raises(CheckpointError, match="exists already"):
        save_reading(path, written(model, BYTES, ["x"], 3).reading, model, BYTES)

    other = nnx.clone(model)
    other.embedding = nnx.Param(2 * model.embedding[...])
    half = for_decoding(RetNet(CONFIG, rngs=nnx.Rngs(2)), state_dtype="bfloat16")
    smaller_state = nnx.clone(model)
    smaller_state.state_dtype = "bfloat16"
    bpe = train_bpe(["abcabd" * 9], 259)
    for refused, message in (
        (lambda: load_reading(path, other, BYTES), "saved with another model"),
        (lambda: load_reading(path, half, BYTES), "saved with another model"),
        (lambda: load_reading(path, smaller_state, BYTES), r"0 is float32 \[.* here bfloat16 \["),
        (lambda: load_reading(path, model, bpe), "saved with another tokenizer"),
        (lambda: load_reading(tmp_path / "none", model, BYTES), "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            refused()

    for damaged in (intact[:-100], b"", b"text", intact[:-1] + bytes([intact[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"text\.state .*damaged"):
            load_reading(path, model, BYTES)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = Config(model=CONFIG, data=DataConfig(tokenizer="byte"))
    record_start(directory, config, None, BYTES)
    checkpoints = Checkpoints(directory / "checkpoints", keep=1)
    model = RetNet(CONFIG, rngs=nnx.Rngs(2))
    model.embedding = nnx.Param(25 * model.embedding[...])
    checkpoints.save(0, {"model": model}, {"next_batch": 0})
    checkpoints.close()
    return directory


def run(*arguments, status=0):
    done = programs.run("generate.py", *arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


def test_requests_have_their_own_samplers(tmp_path):
    path = tmp_path / "requests.jsonl"
    first = '{"prompt": "a", "top_k": 5, "id": 7, "seed": null}'
    second = '{"prompt": "é", "temperature": 0, "top_p": null, "max_tokens": 9}'
    path.write_text(f"{first}\n\n{second}\n", encoding="utf-8")
    defaults = {"temperature": 0.5, "top_k": None, "top_p": 0.9}
    sampler, others = Sampler(0.5, top_k=5, top_p=0.9), {"id": 7, "seed": None}
    assert list(read_requests(path, defaults, max_tokens=20, stop=["x"])) == [
        ("a", sampler, others, 20, ["x"], 0, f"{path}, line 1"),
        ("é", Sampler(0), {}, 9, ["x"], 1, f"{path}, line 3"),
    ]
    path.write_text('{"prompt": ""}')
    assert next(read_requests(path, defaults, may_be_empty=True)).prompt == ""
    for line, message in (
        ('{"prompt": ""}', r"line 1: prompt='' is empty"),
        ("[1]", "line 1: not a JSON object with a prompt"),
        ('{"prompt": "a", "top_k": 0}', "line 1: top_k=0 leaves no token"),
        ('{"prompt": "a", "Temprature": 1}', "Temprature=1 does not fit; did you mean temperature"),
        (
            '{"prompt": "a", "max_new_tokens": 9}',
            "max_new_tokens=9 cannot be set .*: use --max_tokens",
        ),
        (
            '{"prompt": "a", "stop": ["x"]}',
            r"stop=\['x'\] cannot be set for each request",
        ),
        ('{"prompt": "a", "repetition_penalty": 1.2}', "repetition_penalty=1.2 is not supported"),
        ('{"prompt": "a", "text": "b"}', "text='b' would be overwritten by the answer"),
        ('{"prompt": "a", "max_tokens": -1}', "line 1: max_tokens=-1 is less than 0"),
        ('{"prompt": "a", "max_tokens": null}', "line 1: max_tokens=None does not fit"),
        (b'{"prompt": "\xff"}', "line 1: not valid UTF-8"),
        ("", "is empty; each line must be like"),
    ):
        path.write_bytes(line if isinstance(line, bytes) else line.encode())
        with pytest.raises(ConfigError, match=message):
            list(read_requests(path, defaults))


def test_the_program_saves_and_continues_a_state(workdir, tmp_path):
    state, lines = tmp_path / "x.state", tmp_path / "requests.jsonl"
    output, rest = tmp_path / "answers.jsonl", tmp_path / "rest.jsonl"
    run(f"--workdir={workdir}", "--prompt=once", "--max-tokens=9", f"--save-state={state}")
    run(f"--workdir={workdir}", "--max-tokens=21", f"--load-state={state}", f"--output={rest}")
    other = '{"prompt": "a", "temperature": 0.9, "top_k": 5, "id": "\\ud83d", "answer": [1]}'
    lines.write_text('{"prompt": "once"}\n\n' + other + "\n")
    many = (f"--workdir={workdir}", f"--requests={lines}", "--max_tokens=30", "--rows=2")
    assert run(*many, f"--output={output}") == ""
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    once, other = sorted(answers, key=lambda answer: answer["request_number"])
    assert (once["prompt"], other["prompt"]) == ("once", "a")
    assert (other["id"], other["answer"]) == ("\ud83d", [1])
    printed = {
        f"--- request {x['request_number']} ---\n{x['prompt']}{x['text']}\n" for x in answers
    }
    assert run(*many) in map("".join, itertools.permutations(printed))
    assert len(other["log_probabilities"]) == len(other["tokens"]) == 30
    assert json.loads(rest.read_text())["tokens"] == once["tokens"][9:]


@pytest.mark.slow
def test_a_prompt_from_a_file_or_standard_input(workdir, tmp_path, monkeypatch):
    book, part = tmp_path / "book", f"--workdir={workdir}"
    text = "a long text, größer\n" * 9_000  # more than an argument may have
    for contents, expected in (
        (text.encode(), text[:-1]),
        (b"\xef\xbb\xbfonce\r\n", "once"),
        (b"once\n\n", "once\n"),
    ):
        book.write_bytes(contents)
        assert run(part, f"--prompt_file={book}", "--max_tokens=0") == expected + "\n"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(contents)))
        assert run(part, "--prompt-file=-", "--max_tokens=0") == expected + "\n"
    several = run(part, f"--prompt_file={book}", "--prompt=x", "--max_tokens=3")
    assert several.startswith("--- 1 of 2 ---\nx")
    for contents, message in (
        (b"\n", f"--prompt_file={book} is empty"),
        (
            b"a\xff",
            f"--prompt_file={book} is not valid UTF-8: 'utf-8' codec can't",
        ),
    ):
        book.write_bytes(contents)
        assert message in run(part, f"--prompt_file={book}", status=2)
    assert "cannot be read: No such file" in run(part, "--prompt_file=none", status=2)


def test_the_program_refuses_invalid_arguments(workdir, tmp_path):
    state, requests = tmp_path / "bad.state", tmp_path / "requests.jsonl"
    state.write_bytes(b"x" * 100)
    null = tmp_path / "null.jsonl"
    null.write_text('{"prompt": "a", "temperature": null}\n')
    requests.write_text('{"prompt": "a"}\n{"prompt": "b", "top_q": 1}\n')
    for arguments, message in (
        (("--prompt=a", f"--load_state={state}"), "bad.state is not a saved state, or is damaged"),
        (("--prompt=a", "--prompt=b", "--save_state=x"), "takes a single prompt; there are 2"),
        ((f"--requests={requests}",), "requests.jsonl, line 2: top_q=1 does not fit"),
        ((f"--requests={null}",), "null.jsonl, line 1: temperature=None does not fit"),
        (("--prompt=a", "--stop="), "a stop string is empty"),
        ((), "no prompts: give --prompt, or --prompt_file for a long text"),
        (("--prompt=a", f"--requests={requests}"), "give either --requests, or --prompt"),
    ):
        assert message in run(f"--workdir={workdir}", *arguments, status=2)
