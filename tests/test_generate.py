"""Generation equals full forward passes, samplers follow their distributions; generate.py."""

import functools
import inspect
import operator
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from flax import nnx
from tolerances import assert_close

from retnet_jax import generate as generated
from retnet_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from retnet_jax.data.tokenizers import ByteTokenizer
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.generation.decode import Stream, decode, prefill, row_keys
from retnet_jax.generation.sampling import Sampler, Samplers
from retnet_jax.model import RetNet, Transformer, for_decoding
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.parallel.sharding import with_shardings
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.workdir import record_start

CONFIG = ModelConfig(vocab_size=264, d_model=32, n_layers=2, n_heads=2)
KINDS = (RetNet, Transformer)
WARM = Sampler(temperature=1.0)


@functools.cache
def build(kind):
    @jax.jit
    def made():
        model = kind(CONFIG, rngs=nnx.Rngs(2))
        # Larger logits, so that tokens vary and the most likely one wins by more than rounding.
        model.embedding = nnx.Param(25 * model.embedding[...])
        return model

    return made()


def generate(*args, **kwargs):
    """The tokens of each row."""
    return [row.tokens for row in generated(*args, **kwargs)]


def stream(*args, **kwargs):
    """The tokens of each piece of the stream."""
    return (new.tokens for new in Stream(*args, **kwargs))


def random_prompt(length):
    return np.random.default_rng(length).integers(CONFIG.vocab_size, size=length).tolist()


# Most tests continue these three prompts, 16 tokens at once, so that they share compiled programs.
PROMPTS = [random_prompt(length) for length in (5, 1, 40)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_argmax_of_the_parallel_form(kind):
    model = build(kind)
    rows = generate(model, PROMPTS, max_tokens=256)
    # The model is causal, so one pass over the whole text gives the logits after each prefix.
    whole = np.zeros((3, 296), np.int32)
    for row, tokens in enumerate(map(operator.add, PROMPTS, rows)):
        whole[row, : len(tokens)] = tokens
    likeliest = jax.jit(lambda model, tokens: model(tokens, form="parallel")[0].argmax(-1))
    expected = np.asarray(likeliest(model, whole))
    for row, prompt in enumerate(PROMPTS):
        assert rows[row] == expected[row, len(prompt) - 1 :][:256].tolist()
        assert len(set(rows[row])) > 8


def test_sampled_tokens_do_not_depend_on_other_rows():
    first, second, third = PROMPTS
    rows = generate(build(RetNet), [first, second, third], 20, WARM)
    others = generate(build(RetNet), [first, third, third], 20, WARM)
    assert [a == b for a, b in zip(rows, others, strict=True)] == [True, False, True]


def test_equal_prompts_in_a_batch_get_different_samples():
    rows = generate(build(RetNet), PROMPTS[:1] * 3, 20, WARM)
    assert len(set(map(tuple, rows))) == 3


def test_the_seed_determines_the_samples():
    texts = [generate(build(RetNet), PROMPTS, 20, WARM, seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1]
    assert all(a != b for a, b in zip(texts[0], texts[2], strict=True))


def test_tokens_at_once_changes_no_token():
    pieces = list(stream(build(RetNet), PROMPTS, 20, WARM, tokens_at_once=7))
    assert [piece.shape for piece in pieces] == [(3, 7), (3, 7), (3, 6)]
    assert np.concatenate(pieces, axis=1).tolist() == generate(build(RetNet), PROMPTS, 20, WARM)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_a_prompt_in_pieces_equals_reading_it_whole(kind):
    model, prompts = build(kind), [random_prompt(length) for length in (1100, 520, 3)]
    progress = prefill(model, prompts, room=1)
    whole = np.zeros((3, 1100), np.int32)
    for row, prompt in enumerate(prompts):
        whole[row, : len(prompt)] = prompt
    logits, state = jax.jit(lambda model, tokens: model(tokens))(model, whole)
    assert_close(progress.logits, jnp.stack([logits[0, 1099], logits[1, 519], logits[2, 2]]))
    assert progress.state.position.tolist() == [1100, 520, 3]
    if kind is RetNet:
        assert_close(progress.state.layers[:, 0], state.layers[:, 0])


def test_top_k_of_1_is_greedy():
    drawn = generate(build(RetNet), PROMPTS, 20, Sampler(temperature=3.0, top_k=1))
    assert drawn == generate(build(RetNet), PROMPTS, 20)


PROBABILITIES = [0.02, 0.4, 0.08, 0.3, 0.2]
DISTRIBUTIONS = {
    "the model's own": (Sampler(temperature=1.0), PROBABILITIES),
    "colder": (Sampler(temperature=0.5), [p**2 for p in PROBABILITIES]),
    "warmer": (Sampler(temperature=2.0), [p**0.5 for p in PROBABILITIES]),
    "top_k": (Sampler(temperature=1.0, top_k=2), [0, 0.4, 0, 0.3, 0]),
    "top_k of all": (Sampler(temperature=1.0, top_k=9), PROBABILITIES),
    "top_p": (Sampler(temperature=1.0, top_p=0.75), [0, 0.4, 0, 0.3, 0.2]),
    "top_p of one": (Sampler(temperature=1.0, top_p=1e-6), [0, 1, 0, 0, 0]),
    "top_p of all": (Sampler(temperature=1.0, top_p=1.0), PROBABILITIES),
    # At temperature 1/2 the squares 0.16, 0.09, 0.04 are 55, 31 and 14 percent of their sum.
    "all three": (Sampler(temperature=0.5, top_k=3, top_p=0.8), [0, 0.16, 0, 0.09, 0]),
}


@pytest.mark.parametrize(("sampler", "expected"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_samplers_follow_their_distribution(sampler, expected):
    draws = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.array(PROBABILITIES)), (draws, len(PROBABILITIES)))
    tokens = jax.jit(Samplers.sample)(Samplers.of(sampler, draws), row_keys(0, draws), logits)
    share = np.bincount(tokens, minlength=len(PROBABILITIES)) / draws
    expected = np.array(expected) / sum(expected)
    # Five standard deviations: 0 for tokens that are never sampled.
    assert (abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.0, top_k=1)])
def test_of_equal_logits_the_lowest_id_is_chosen(sampler):
    logits = jnp.array([[0.0, 3.0, 1.0, 3.0, 3.0]] * 50)
    assert Samplers.of(sampler, 50).sample(row_keys(0, 50), logits).tolist() == [1] * 50


def test_a_row_stops_at_its_end_id_and_others_continue():
    model = build(RetNet)
    first, second, third = generate(model, PROMPTS, 40)
    end = next(token for token in first[10:] if token not in second + third)
    length = first.index(end)
    assert generate(model, PROMPTS, 40, end_id=end) == [first[:length], second, third]
    filled = np.concatenate(list(stream(model, PROMPTS, 40, end_id=end)), axis=1)
    assert filled[0].tolist() == first[:length] + [end] * (40 - length)
    # The stream ends with the piece in which the last row ends.
    pieces = list(stream(model, PROMPTS[:1] * 3, 1000, end_id=end))
    assert len(pieces) == length // 16 + 1
    # An end id in a prompt does not end the row.
    assert generate(model, [[end], [end], [*PROMPTS[0], end]], 40, end_id=end)[0]


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=5.0, top_p=0.99)])
def test_ids_beyond_the_tokenizer_are_never_generated(sampler):
    rows = generate(build(RetNet), PROMPTS, 40, sampler, vocab_size=11)
    assert max(map(max, rows)) < 11
    assert max(map(max, generate(build(RetNet), PROMPTS, 40, WARM))) >= 11


def test_the_state_of_a_retnet_keeps_its_size():
    model, keys = build(RetNet), row_keys(0, 3)
    progress = prefill(model, PROMPTS, room=1024)
    sizes = jax.tree.map(jnp.shape, progress)
    for _ in range(64):
        new, progress = decode(model, progress, keys, 16, Samplers.of(WARM, 3))
    assert jax.tree.map(jnp.shape, progress) == sizes
    assert progress.state.position.tolist() == [1029, 1025, 1064]
    assert len(np.unique(new.tokens)) > 8


@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 2}], ids=["1 device", "8 devices"])
def test_a_model_on_a_mesh_generates_the_same_and_is_compiled_once(axes):
    mesh = make_mesh(MeshConfig(**axes)) if axes else make_mesh(MeshConfig(), jax.devices()[:1])
    shardings = jax.tree.map(lambda x: x.sharding, with_shardings(build(RetNet), mesh))
    pieces = stream(jax.device_put(build(RetNet), shardings), PROMPTS, 40)
    tokens = [next(pieces)]
    compiled = decode._cache_size()
    tokens.extend(pieces)
    assert decode._cache_size() == compiled
    assert np.concatenate(tokens, axis=1).tolist() == generate(build(RetNet), PROMPTS, 40)


BAD_SAMPLERS = [
    ({"temperature": -0.5}, "temperature=-0.5 is not >= 0"),
    ({"temperature": float("nan")}, "temperature=nan is not >= 0"),
    ({"temperature": 1.0, "top_k": 0}, "top_k=0 leaves no token"),
    ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
    ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1.5 is not in \(0, 1\]"),
    ({"top_k": 5}, "top_k=5 has no effect at temperature=0.*set the temperature"),
    ({"top_p": 0.9}, "top_p=0.9 has no effect at temperature=0.*set the temperature"),
]


@pytest.mark.parametrize(("values", "message"), BAD_SAMPLERS)
def test_invalid_samplers_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(**values)


BAD_INPUT = [
    ({"prompts": []}, "there are no prompts"),
    ({"prompts": [[1], []]}, r"prompts\[1\] is empty.*bos_id"),
    ({"prompts": [[3, 264, 4]]}, r"prompts\[0\] has the token id 264, .* ids from 0 to 263"),
    ({"prompts": [[3], [-1]]}, r"prompts\[1\] has the token id -1"),
    ({"max_tokens": 0}, "max_tokens=0 is less than 1"),
    ({"vocab_size": 265}, "vocab_size=265 does not fit a model with 264 token ids.*tokenizer"),
    ({"vocab_size": 0}, "vocab_size=0 does not fit"),
    ({"prompts": [3, 4]}, r"prompts\[0\] is '3', no list of token ids"),
    ({"prompts": [[3, 4.0]]}, r"prompts\[0\] has .*3.0.* \(float64\); token ids are integers"),
    ({"prompts": ["text"]}, r"prompts\[0\] is 'text', no list of token ids"),
    ({"prompts": [[2**40]]}, r"prompts\[0\] has the token id 1099511627776"),
    ({"max_tokens": 5.0}, "max_tokens=5.0 is not an integer"),
    ({"end_id": 264}, "end_id=264 can never be generated: ids are 0 to 263"),
    ({"end_id": -1}, "end_id=-1 can never be generated"),
    ({"end_id": 260, "vocab_size": 257}, "end_id=260 can never be generated: ids are 0 to 256"),
    ({"end_id": (3, 300)}, "end_id=300 can never be generated"),
    ({"seed": 2**32}, "seed=4294967296 is not between 0 and 4294967295"),  # jax would take 0
    ({"seed": -1}, "seed=-1 is not between"),
    ({"seed": 0.5}, "seed=0.5 is not an integer"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_invalid_input_of_generate_is_refused(arguments, message):
    unchecked = inspect.unwrap(generated)  # without the type checks of the tests
    with pytest.raises(ValueError, match=message):
        unchecked(build(RetNet), **{"prompts": [[1]], "max_tokens": 5} | arguments)


@pytest.fixture
def workdir(tmp_path):
    """A training run whose model has more token ids than its tokenizer."""
    config = Config(model=CONFIG, data=DataConfig(tokenizer="byte"))
    record_start(tmp_path, config, None, ByteTokenizer())
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(0, {"model": build(RetNet)}, {"next_batch": 0})
    checkpoints.close()
    return tmp_path


def test_the_program_prints_what_generate_returns(workdir):
    tokenizer, prompts = ByteTokenizer(), ["Grüße, ", "x = ", "你"]
    ids = [[tokenizer.bos_id, *row] for row in tokenizer.encode_batch(prompts)]
    new = generate(
        build(RetNet), ids, 40, Sampler(0.5, top_p=0.9), seed=2, end_id=256, vocab_size=257
    )
    texts = [text + tokenizer.decode(row) for text, row in zip(prompts, new, strict=True)]
    options = ("--max_tokens=40", "--temperature=0.5", "--top_p=0.9", "--seed=2")
    command = [sys.executable, programs.ROOT / "generate.py", f"--workdir={workdir}"]
    one = subprocess.run([*command, f"--prompt={prompts[0]}", *options], capture_output=True)
    assert one.stdout.decode() == texts[0] + "\n", one.stderr.decode()
    three = programs.run(
        "generate.py", f"--checkpoint={workdir}", *(f"--prompt={x}" for x in prompts), *options
    )
    headed = (f"--- {i} of 3 ---\n{text}\n" for i, text in enumerate(texts, start=1))
    assert three.stdout == "".join(headed), three.stderr


def test_the_program_reports_invalid_arguments(workdir):
    config = workdir / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 264', '"vocab_size": 200'))
    for arguments, message in (
        (("--prompt=a", "--workdir=x", "--checkpoint=y"), "give only one of them"),
        (("--prompt=", f"--workdir={workdir}"), "--prompt='' is empty"),
        (("--prompt=a", f"--workdir={workdir}"), "257 ids"),
    ):
        done = programs.run("generate.py", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_numpy_integers_are_accepted():
    prompts = [np.array(prompt, np.uint16) for prompt in PROMPTS]
    unchecked = inspect.unwrap(generated)
    found = unchecked(build(RetNet), prompts, np.int64(16), end_id=np.int32(263))
    assert found == generated(build(RetNet), PROMPTS, 16, end_id=263)


def test_any_of_several_ids_ends_a_row():
    whole = generate(build(RetNet), PROMPTS, 16, WARM, seed=3)
    ends = (whole[0][9], whole[1][4])
    found = generate(build(RetNet), PROMPTS, 16, WARM, seed=3, end_id=ends)
    pieces = list(stream(build(RetNet), PROMPTS, 16, WARM, seed=3, end_id=ends, tokens_at_once=16))
    for row, tokens in enumerate(whole):
        length = min([tokens.index(end) for end in ends if end in tokens], default=16)
        assert found[row] == tokens[:length]
        rest = pieces[0][row, length:].tolist()
        assert rest == [*tokens[length : length + 1], *[ends[0]] * (15 - length)]


@pytest.mark.parametrize("temperature", [1e-37, 1e-300])
def test_tiny_temperatures_are_greedy(temperature):
    logits = np.array([[100.0, 99.0, 101.0, 100.99999]], np.float32)
    draw = jax.jit(lambda samplers, logits: samplers.sample(row_keys(0, 1), logits))
    samplers = [
        Sampler(temperature),
        Sampler(temperature, top_k=3),
        Sampler(temperature, top_p=0.5),
    ]
    for sampler in samplers:
        assert draw(Samplers.of(sampler, 1), logits).tolist() == [2]


def test_progress_of_other_rows_or_too_far_is_refused():
    model = for_decoding(build(RetNet))
    progress = prefill(model, [[3], [4]], 4)
    with pytest.raises(ConfigError, match=r"progress is of 2 texts .* there are 3 prompts"):
        prefill(model, [[3], [4], [5]], 4, progress)
    late = progress.state._replace(position=np.array([7, 2**31 - 3], np.int32))
    with pytest.raises(
        ConfigError, match=r"has 2147483645 tokens, and 5 more would exceed the last"
    ):
        prefill(model, [[3], [4]], 4, progress._replace(state=late))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_nan_raises_instead_of_generating(kind):
    model = jax.tree.map(lambda x: x, build(kind))
    model.embedding = nnx.Param(model.embedding[...].at[7, 3].set(jnp.nan))
    reason = "1 of the 8448 numbers of its parameter embedding are NaN or infinite"
    for prompts in ([[5, 7, 9]], [[7], [3], [5, 7]]):
        with pytest.raises(CheckpointError, match=reason):
            generate(model, prompts, 16)
        with pytest.raises(
            CheckpointError, match=r"not finite for \d of \d prompts \(first: prompt 0\)"
        ):
            list(stream(model, prompts, 16))
