"""Continuous batching: an answer depends on its request only; prefixes; files that are resumed."""

import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import CONFIG, workdir
from tolerances import assert_close

from retnet_jax import generate, generate_requests
from retnet_jax.config.attention import AttentionLayers
from retnet_jax.data.tokenizers import ByteTokenizer
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.generation import answers
from retnet_jax.generation.continuous import Answer, ContinuousBatch, Job, TokenRequest
from retnet_jax.generation.prompt_trie import PIECE, PromptTrie
from retnet_jax.generation.requests import Request
from retnet_jax.generation.sampling import Sampler
from retnet_jax.generation.texts import Continuation, Writer, answer_requests
from retnet_jax.model import build_model, for_decoding
from retnet_jax.ops.attention import attend_to_cache, attend_to_used_slots
from retnet_jax.ops.rounding import round_at_random

__all__ = ["workdir"]  # fixture

BYTES = ByteTokenizer()
ROWS = 3
LIMITED = AttentionLayers(layers=(1,), n_heads=2, window=20)
CONFIGS = {
    "retnet": CONFIG,
    "transformer": dataclasses.replace(CONFIG, mixer="attention"),
    "window": dataclasses.replace(CONFIG, mixer="attention", window=50, n_kv_heads=1),
    "hybrid": dataclasses.replace(
        CONFIG, n_layers=3, attention_layers=(LIMITED, AttentionLayers(layers=(2,), n_heads=2))
    ),
    "convolutions": dataclasses.replace(CONFIG, short_conv=3),
    "int8": CONFIG,
}
KINDS = ["retnet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(CONFIGS)[1:])]


@functools.cache
def build(kind):
    @jax.jit
    def made():
        model = build_model(CONFIGS[kind], rngs=nnx.Rngs(2))
        # Larger logits, so that the most likely token wins by more than rounding.
        model.embedding = nnx.Param(25 * model.embedding[...])
        return model

    options = {"weights": "int8", "state_dtype": "bfloat16"} if kind == "int8" else {}
    return for_decoding(made(), **options)


def prompt(length, seed=0):
    return np.random.default_rng([length, seed]).integers(256, size=length).tolist()


SHARED = prompt(2 * PIECE + 9)
SAMPLERS = [Sampler(), Sampler(1.0), Sampler(2.0, top_k=7), Sampler(0.5, top_p=0.8)]
# Prompts of less than a piece, of exactly one, of several; some share two pieces or all.
PROMPTS = [
    prompt(5),
    [*SHARED, *prompt(30)],
    prompt(PIECE),
    [*SHARED, *prompt(3)],
    prompt(1),
    [*SHARED, *prompt(3)],
    prompt(3 * PIECE + 1),
    prompt(40),
]
REQUESTS = [
    TokenRequest(ids, length, SAMPLERS[i % 4], number=i)
    for i, (ids, length) in enumerate(zip(PROMPTS, (20, 1, 33, 9, 50, 17, 3, 24), strict=True))
]


def answered(kind, requests, **options):
    """The answer to each request, by its number."""
    found = list(
        generate_requests(
            build(kind), iter(requests), rows=ROWS, seed=5, end_id=7, max_length=640, **options
        )
    )
    by_number = {answer.number: answer for answer in found}
    assert len(found) == len(by_number) == len(requests)
    return by_number


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_does_not_depend_on_other_requests_or_their_order(kind):
    """Bit for bit: also the log-probabilities are equal."""
    together = answered(kind, REQUESTS)
    assert len({tuple(answer.tokens) for answer in together.values()}) == len(REQUESTS)
    order = np.random.default_rng(1).permutation(len(REQUESTS))
    assert answered(kind, [REQUESTS[i] for i in order]) == together
    for some in ([0], [3], [6], [1, 5], [2, 7]):
        alone = answered(kind, [REQUESTS[i] for i in some])
        assert alone == {i: together[i] for i in some}
    others = [
        REQUESTS[1],
        *(TokenRequest(prompt(70, seed=i), 6, SAMPLERS[i % 4], 100 + i) for i in range(9)),
        REQUESTS[4],
    ]
    found = answered(kind, others)
    assert [found[i] for i in (1, 4)] == [together[i] for i in (1, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_equal_those_of_a_batch_at_once(kind):
    requests = [request._replace(sampler=Sampler(), max_tokens=20) for request in REQUESTS]
    found = answered(kind, requests)
    expected = generate(build(kind), PROMPTS, 20, end_id=7)
    for number, row in enumerate(expected):
        # A bfloat16 state is rounded after each piece, and pieces differ.
        if kind == "int8":
            assert found[number].tokens[:1] == row.tokens[:1]
            continue
        assert found[number].tokens == row.tokens
        assert found[number].ended_by == ("length" if len(row.tokens) == 20 else "end")
        assert_close(np.array(found[number].log_probabilities), np.array(row.log_probabilities))


def test_samples_are_those_of_a_batch_with_the_same_numbers():
    found = answered("retnet", REQUESTS)
    samplers = [request.sampler for request in REQUESTS]
    expected = generate(build("retnet"), PROMPTS, 50, samplers, seed=5, end_id=7)
    for request, row in zip(REQUESTS, expected, strict=True):
        answer, count = found[request.number], request.max_tokens
        assert answer.tokens == row.tokens[:count]
        assert_close(np.array(answer.log_probabilities), np.array(row.log_probabilities[:count]))


class Known(Job):
    """A job of which only the prompt matters."""

    def __init__(self, number, ids):
        super().__init__(number, ids, 1, Sampler(), "a job")

    def add(self, tokens, log_probabilities):
        self.done = True


def test_a_shared_prefix_is_read_once():
    batch = ContinuousBatch(build("retnet"), rows=ROWS, end_id=7)
    asked = [[*SHARED[: 2 * PIECE], *prompt(1, seed=i)] for i in range(12)]
    assert len(list(batch.run(Known(i, ids) for i, ids in enumerate(asked)))) == 12
    different = len({ids[-1] for ids in asked})
    assert batch.tokens_read == 2 * PIECE + different
    # Later requests find it, too.
    assert len(list(batch.run([Known(0, [*SHARED[: 2 * PIECE], 256])]))) == 1
    assert batch.tokens_read == 2 * PIECE + different + 1


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4 * PIECE)), max_size=30), st.data())
def test_the_rows_of_a_pool_have_the_prefixes_they_should(prompts, data):
    """The state of a row is simulated by the tokens that were read to make it."""
    rows = data.draw(st.integers(1, 6))
    trie, pool, finished = PromptTrie(rows), {0: ()}, 0
    waiting = [Known(i, [family] * length) for i, (family, length) in enumerate(prompts)]
    for order, job in enumerate(waiting):
        job.order = order
    in_trie = 0
    while waiting or in_trie:
        while waiting and in_trie < rows:
            trie.add(waiting.pop(0))
            in_trie += 1
        nodes = trie.next_nodes(data.draw(st.integers(1, 3)))
        before = dict(pool)
        for node in nodes:
            source, target = trie.read(node)
            assert 0 < target <= rows
            pool[target] = before[source] + tuple(np.frombuffer(node.tokens, np.int32))
        assert nodes or trie.ready
        while trie.ready and (data.draw(st.booleans()) or not nodes):
            job, node = trie.ready[0]
            assert pool[node.row] == tuple(job.ids)
            trie.release()
            in_trie, finished = in_trie - 1, finished + 1
    assert finished == len(prompts)


def test_requests_without_tokens_are_answered_at_once():
    requests = [TokenRequest(prompt(3), 4 * (i % 10 == 9), number=i) for i in range(40)]
    found = answered("retnet", requests)
    assert [len(found[i].tokens) for i in range(40)] == [4 * (i % 10 == 9) for i in range(40)]


def test_requests_are_read_as_they_are_needed():
    taken = []

    def source():
        for i in itertools.count():
            taken.append(i)
            yield TokenRequest(prompt(3, seed=i), 4)

    found = generate_requests(build("retnet"), source(), rows=ROWS, seed=5, end_id=7)
    for count in range(1, 40):
        assert isinstance(next(found), Answer)
        assert len(taken) <= count + 4 * ROWS
    found.close()


def test_a_bad_request_is_an_error_after_the_answers_before_it():
    good = REQUESTS[:5]
    together = answered("retnet", good)

    def broken():
        yield from good
        raise OSError("the disk is gone")

    bad = (
        (TokenRequest([], 3), ConfigError, "request 5: the prompt is empty"),
        (TokenRequest([3, 264], 3), ConfigError, "request 5: the prompt has the token id 264"),
        (TokenRequest([3], -1), ConfigError, "request 5: max_tokens=-1 is less than 0"),
        (None, OSError, "the disk is gone"),
    )
    for request, kind, message in bad:
        requests = broken() if request is None else [*good, request, *good]
        found, options = [], {"rows": ROWS, "seed": 5, "end_id": 7}
        with pytest.raises(kind, match=message):
            found.extend(generate_requests(build("retnet"), requests, **options))
        assert {answer.number: answer for answer in found} == together


def test_arguments_out_of_range_are_refused():
    for options, message in (
        ({"rows": 0}, "rows=0 is less than 1"),
        ({"seed": -1}, "seed=-1 is not between"),
        ({"end_id": 264}, "end_id=264 can never be generated"),
    ):
        with pytest.raises(ConfigError, match=message):
            next(generate_requests(build("retnet"), REQUESTS, **options))


def test_a_request_too_long_for_a_transformers_cache_is_named():
    found = generate_requests(
        build("transformer"), [TokenRequest(prompt(90), 11)], rows=1, max_length=100
    )
    with pytest.raises(ConfigError, match=r"request 0: a prompt of 90 .* need max_length=101"):
        next(found)


def test_a_model_with_nan_raises():
    model = jax.tree.map(lambda x: x, build("retnet"))
    model.embedding = nnx.Param(model.embedding[...].at[7, 3].set(jnp.nan))
    with pytest.raises(CheckpointError, match="not finite after request 0: 1 of the 8448"):
        list(generate_requests(model, [TokenRequest([5, 7, 9], 4)], rows=ROWS, end_id=7))


def test_rounding_does_not_depend_on_the_row():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 5)).astype(np.float32)
    rounded = np.asarray(
        jax.jit(round_at_random)(np.tile(x, (4, 1, 1, 1)), np.array([1, 2, 1, 3]))
    ).astype(np.float32)
    assert (rounded[0] == rounded[2]).all()
    assert (rounded[0] != rounded[1]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "slots", "heads"), [(1, 300, 6), (1, 300, 2), (5, 700, 6)])
def test_attention_to_used_slots_is_attention_to_all(tokens, slots, heads, dtype):
    rng = np.random.default_rng(0)
    q, k, v, cached_k, cached_v = (
        rng.normal(size=shape).astype(jnp.dtype(dtype))
        for shape in (
            (4, tokens, heads, 8),
            *((4, tokens, 2, 8) for _ in "kv"),
            *((4, 2, 8, slots) for _ in "kv"),
        )
    )
    used = np.array([0, slots, 128, 129], np.int32)
    seen = rng.random((4, 1, tokens, slots)) < 0.7
    seen &= np.arange(slots) < used[:, None, None, None]
    seen_new = np.tile(np.tri(tokens, dtype=bool), (4, 1, 1, 1))
    inputs = (q, k, v, cached_k, cached_v, seen, seen_new)

    @jax.jit
    def attended(*inputs):
        return attend_to_cache(*inputs[:5], seen=inputs[5], seen_new=inputs[6])

    @jax.jit
    def by_rows(*inputs):
        more = dict(zip(("seen", "seen_new", "used"), inputs[5:], strict=True))
        return attend_to_used_slots(*inputs[:5], **more)

    found = by_rows(*inputs, used)
    assert_close(found, attended(*inputs), dtype)
    # Bit for bit the same with other rows beside it.
    order = np.array([2, 0, 0, 1])
    again = by_rows(*(x[order] for x in inputs), used[order])
    assert (np.asarray(again) == np.asarray(found)[order]).all()


TEXTS = ["x", "once upon a time", "Grüße", "a long text " * 12]


@pytest.mark.slow
@pytest.mark.compiles(80, reason="the state that is read before is converted outside of jit")
@pytest.mark.parametrize("kind", CONFIGS)
def test_texts_continue_a_text_read_before(kind):
    model, whole = build(kind), [text + question for text in TEXTS[3:] for question in TEXTS[:3]]
    read = Writer(model, BYTES, TEXTS[3:], 0)
    list(read)
    requests = [
        Request(text, Sampler(), stop=["e", "\n"], number=i) for i, text in enumerate(TEXTS[:3])
    ]
    found = {
        request.number: text
        for request, text in answer_requests(
            model, BYTES, requests, rows=2, max_length=512, after=read.reading
        )
    }
    expected = Writer(model, BYTES, whole, 256, stop=["e", "\n"])
    list(expected)
    for number, text in enumerate(expected.continuations):
        assert found[number].ended_by == text.ended_by
        if kind == "int8":  # its state was rounded at other tokens
            continue
        assert found[number].text == text.text
        assert found[number].tokens == text.tokens


def answer_file(path, options=(("seed", 0),)):
    said = []
    return answers.AnswerFile(path, dict(options), said.append), said


def test_an_answer_file_is_resumed(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    asked = [Request(f"prompt {i}", Sampler(), {"id": i}, number=i) for i in range(6)]
    file, _ = answer_file(path)
    for number in (4, 0):
        file.append(asked[number], Continuation("text", [1], [-0.5]))
    with pytest.raises(ConfigError, match="is being written by another process"):
        answer_file(path)
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[0][:40])  # a line that the kill cut off
    file, said = answer_file(path)
    assert said[0].endswith("the last line was cut off and is deleted")
    assert [request.number for request in file.unanswered(iter(asked))] == [1, 2, 3, 5]
    file.append(asked[1], Continuation())
    file.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["request_number"] for line in lines] == [4, 0, 1]
    assert json.loads(lines[0]) == {
        "request_number": 4,
        "id": 4,
        "prompt": "prompt 4",
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "max_tokens": 256,
        "text": "text",
        "tokens": [1],
        "log_probabilities": [-0.5],
        "ended_by": "length",
    }

    changed = [asked[0], asked[1]._replace(prompt="other", name="f, line 2")]
    for requests, message in (
        (changed, "f, line 2 is not the request that .* answers as request_number 1"),
        (asked[:2], "answers request_number 4, but there are 2 requests"),
    ):
        file, _ = answer_file(path)
        with pytest.raises(ConfigError, match=message):
            list(file.unanswered(iter(requests)))
        file.close()
    with pytest.raises(ConfigError, match=r"other options \(seed=0, here 1\): give the same"):
        answer_file(path, [("seed", 1)])
    for line, message in (
        (lines[0], "line 4 answers request_number 4 a second time"),
        ("[]", "line 4 is not an answer: delete the line"),
    ):
        path.write_text("\n".join([*lines, line]) + "\n")
        with pytest.raises(ConfigError, match=message):
            answer_file(path)
    (tmp_path / "new" / "answers.jsonl.options.json").unlink()
    with pytest.raises(ConfigError, match="exists already, and cannot be continued without"):
        answer_file(path)


@pytest.mark.slow
def test_a_killed_run_resumes_with_what_is_missing(workdir, tmp_path):
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    lines = [json.dumps({"prompt": f"{i} " * (i % 9 + 1), "id": f"r{i}"}) for i in range(300)]
    requests.write_text("\n".join(lines))
    options = [f"--workdir={workdir}", f"--requests={requests}", "--max_tokens=40", "--rows=4"]
    options += ["--temperature=1", "--compilation_cache=off"]
    command = [sys.executable, programs.ROOT / "generate.py", *options, f"--output={output}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (output.exists() and output.read_bytes().count(b"\n") > 20):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = output.read_text()
    assert 20 < first.count("\n") < 300
    done = programs.run("generate.py", *options, f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "requests are answered already" in done.stderr
    assert output.read_text().startswith(first[: first.rindex("\n") + 1])
    other = tmp_path / "other.jsonl"
    assert programs.run("generate.py", *options, f"--output={other}").returncode == 0
    assert sorted(output.read_text().splitlines()) == sorted(other.read_text().splitlines())
    assert [json.loads(x)["id"] for x in sorted(other.read_text().splitlines(), key=number_of)] == [
        f"r{i}" for i in range(300)
    ]
    refused = programs.run("generate.py", *options, "--seed=1", f"--output={output}")
    assert refused.returncode == 2
    assert "was written with other options (seed=0, here 1)" in refused.stderr


def number_of(line):
    return json.loads(line)["request_number"]


@pytest.mark.slow
def test_a_bad_line_ends_the_program_after_the_answers_before_it(workdir, tmp_path):
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    good = [json.dumps({"prompt": f"{i}"}) for i in range(7)]
    requests.write_text("\n".join([*good, '{"prompt": "a", "top_q": 1}', *good]))
    options = (f"--workdir={workdir}", f"--requests={requests}", "--max_tokens=9", "--rows=2")
    done = programs.run("generate.py", *options, f"--output={output}")
    assert done.returncode == 2
    assert f"{requests}, line 8: top_q=1 does not fit" in done.stderr
    assert sorted(map(number_of, output.read_text().splitlines())) == list(range(7))
    requests.write_text("\n".join([*good, '{"prompt": "a", "top_k": null}', *good]))
    assert programs.run("generate.py", *options, f"--output={output}").returncode == 0
    assert sorted(map(number_of, output.read_text().splitlines())) == list(range(15))
