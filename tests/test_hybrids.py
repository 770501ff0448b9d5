"""Attention in layers of a RetNet, windows and grouped keys: equalities with other computations."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tolerances import assert_close, relative_difference

from retnet_jax import interop
from retnet_jax.config import ModelConfig
from retnet_jax.config.attention import AttentionLayers
from retnet_jax.data.tokenizers.byte_level import ByteTokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.perplexity import stateful_nll
from retnet_jax.evaluation.prefix_trie import Request
from retnet_jax.evaluation.scoring import score
from retnet_jax.generation import generate, saved_state
from retnet_jax.generation.decode import decode, prefill, row_keys
from retnet_jax.generation.saved_state import load_reading, save_reading
from retnet_jax.generation.texts import Writer
from retnet_jax.interop import presets
from retnet_jax.interop.parameter_source import ModelSource
from retnet_jax.model import build_model, for_decoding
from retnet_jax.model.attention import Attention
from retnet_jax.model.kv_cache import KVCache, WindowCache
from retnet_jax.ops.attention import attend_in_window, attend_to_all, without_padding
from retnet_jax.trees import leaf_name

RECORDED = Path(__file__).parent / "fixtures" / "fla_options"
WINDOWED = AttentionLayers(layers=(1, 3), n_heads=4, n_kv_heads=2, window=5)
SIZES = {"vocab_size": 31, "d_model": 16, "n_heads": 2, "chunk_size": 8}
CONFIGS = {
    "grouped": ModelConfig(mixer="attention", n_layers=2, n_kv_heads=1, **SIZES),
    "window": ModelConfig(mixer="attention", n_layers=2, window=5, **SIZES),
    "convolved": ModelConfig(
        mixer="attention",
        n_layers=2,
        short_conv=3,
        n_kv_heads=1,
        window=5,
        qk_norm=True,
        **SIZES,
    ),
    "hybrid": ModelConfig(n_layers=4, attention_layers=(WINDOWED,), **SIZES),
    "both": ModelConfig(
        n_layers=3,
        attention_layers=(
            AttentionLayers(layers=(2,), n_heads=2, rope_base=500.0, bias=True),
            AttentionLayers(layers=(1,), n_heads=4, n_kv_heads=1, window=7),
        ),
        **SIZES,
    ),
    "options": ModelConfig(
        n_layers=4,
        attention_layers=(WINDOWED,),
        short_conv=3,
        n_kv_heads=1,
        feature_map="relu",
        output_gate=False,
        qk_norm=True,
        **SIZES,
    ),
}
SLOW = pytest.mark.slow
MIXED = ("both", "options", "convolved")
T = 40
BYTES = ByteTokenizer()
# Padding on both sides, inside of a document and between two; documents longer than the windows.
SEGMENTS = np.array(
    [[0] * 2 + [1] * 3 + [0] + [1] * 4 + [2] * 18 + [0] * 2 + [2] * 2 + [3] * 6 + [0] * 2, [1] * T]
)


def built(config):
    @jax.jit
    def made():
        model = build_model(config, rngs=nnx.Rngs(0))
        # Larger parameters; otherwise attention is close to a mean.
        return jax.tree.map(lambda x: 2 * x if x.ndim > 2 else x, model)

    return made()


@pytest.fixture(scope="module")
def models():
    return {name: built(config) for name, config in CONFIGS.items()}


def tokens(rows=2, length=T):
    return np.random.default_rng(0).integers(0, 31, (rows, length)).astype("i4")


@jax.jit
def read(model, tokens, state=None, segment_ids=None):
    return model(tokens, state, segment_ids)


def in_parts(model, lengths, segment_ids=None):
    state, logits, start = model.init_state(2, T), [], 0
    for length in lengths:
        here = np.s_[:, start : start + length]
        ids = None if segment_ids is None else segment_ids[here]
        y, state = read(model, tokens()[here], state, ids)
        logits.append(y)
        start += length
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("case", ["hybrid", "hybrid_bias"])
def test_recorded_hybrids_of_fla(case):
    io = load_file(RECORDED / case / "io.safetensors")
    model = interop.load(RECORDED / case)
    logits, state = read(model, io["tokens_T37"])
    assert np.abs(logits - io["logits_f64_T37"]).max() <= 1e-4
    period = model.config.layer_period
    layer = lambda i: jax.tree.map(lambda x: x[i // period], state.layers.places[i % period])  # noqa: E731
    assert_close(layer(0), io["layer0_recurrent_state_f32_T37"])
    compared = [int(name[5]) for name in io if name.endswith("attn_state_k_f32_T37")]
    assert compared == ([1] if case == "hybrid" else [1, 2])
    for i in compared:
        for name, ours in zip("kv", layer(i)[:2], strict=True):
            theirs = io[f"layer{i}_attn_state_{name}_f32_T37"]  # oldest first
            slots = np.arange(37 - theirs.shape[1], 37) % ours.shape[-1]
            ours = np.moveaxis(np.asarray(ours)[..., slots], -1, 1).reshape(theirs.shape)
            assert_close(ours, theirs)
    decoding = for_decoding(model)
    _, state = read(decoding, io["tokens_T37"][:, :20], decoding.init_state(2, 37))
    for n in range(20, 37):
        step, state = read(decoding, io["tokens_T37"][:, n : n + 1], state)
        assert np.abs(step[:, 0] - io["logits_f64_T37"][:, n]).max() <= 1e-4
    with jax.enable_x64(True):
        wide, _ = read(interop.load(RECORDED / case, dtype="float64"), io["tokens_T37"])
        assert relative_difference(wide, io["logits_f64_T37"]) <= 1e-9


@pytest.mark.parametrize("case", ["hybrid", "hybrid_bias"])
def test_a_hybrid_is_written_as_fla_wrote_it(case, tmp_path):
    interop.fla.save(interop.load(RECORDED / case), tmp_path / "fla")
    theirs, ours = (
        json.loads((path / "config.json").read_text())
        for path in (RECORDED / case, tmp_path / "fla")
    )
    assert ours["attn"] == (theirs["attn"] if case == "hybrid_bias" else [theirs["attn"]])
    theirs, ours = (
        load_file(path / "model.safetensors") for path in (RECORDED / case, tmp_path / "fla")
    )
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    interop.convert(tmp_path / "fla", tmp_path / "own", "own", fold_head_norm=True)
    again = interop.load(tmp_path / "own")
    expected, _ = read(interop.load(RECORDED / case), tokens())
    assert_close(read(again, tokens())[0], expected)
    with pytest.raises(ConfigError, match="torchscale has no attention layers"):
        interop.torchscale.save(again, tmp_path / "torchscale")


def test_a_hybrid_of_four_layers_equals_a_loop_over_tokens():
    config = presets.fla(
        dtype="float64", n_layers=4, attention_layers=(WINDOWED,), **SIZES, ffn_dim=24
    )
    with jax.enable_x64(True):
        model = built(config)
        found, _ = read(model, tokens())
    layout = interop.fla.LAYOUT
    source = ModelSource(model)
    weights = {
        tensor.name: np.concatenate([np.asarray(piece, np.float64) for piece in tensor.pieces])
        for tensor in layout.tensors(source, None)
    }
    assert_close(
        found, reference.fla(weights, layout.write_config(source.description), tokens()), "float64"
    )


def test_queries_and_keys_are_normed_before_the_rotation():
    """`qk_norm` of a Transformer, against numpy, with scales that are not 1."""
    config = ModelConfig(mixer="attention", n_layers=1, n_kv_heads=1, qk_norm=True, **SIZES)
    rng = np.random.default_rng(0)
    x, scales = rng.normal(size=(1, 9, 16)).astype("f4"), rng.normal(size=(2, 8)).astype("f4")

    @jax.jit
    def run(x, scales):
        mixer = Attention(config, rngs=nnx.Rngs(0), value_scale=1.0, out_scale=1.0)
        mixer.q_norm.scale, mixer.k_norm.scale = map(nnx.Param, scales)
        return mixer, mixer(x, None, mixer.prepare(config, None, (1, 9), None)[0], "parallel")[0]

    mixer, found = run(x, scales)

    q, k, v = (x[0] @ np.float64(getattr(mixer, name).kernel[...]) for name in "qkv")
    q, k, v = (y.reshape(9, -1, 8) for y in (q, k, v))  # two heads share one of k and v
    q, k = (
        y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale
        for y, scale in zip((q, k), scales, strict=True)
    )
    angle = np.arange(9)[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    turn = np.exp(1j * angle)[:, None]  # [t 1 k/2]
    q, k = ((y[..., :4] + 1j * y[..., 4:]) * turn for y in (q, k))
    scores = np.einsum("thk,sgk->hts", q, k.conj()).real * 8**-0.5
    weights = np.exp(scores) * np.tri(9)
    y = np.einsum("hts,sgv->thv", weights / weights.sum(-1, keepdims=True), v).reshape(9, -1)
    assert_close(found[0], y @ np.float64(mixer.out.kernel[...]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_reading_in_parts_equals_reading_at_once(name, models):
    """Parts longer than the window, and single tokens for longer than two windows."""
    for model in (models[name], for_decoding(models[name])):
        expected, _ = read(models[name], tokens())
        assert_close(in_parts(model, [11, *[1] * 17, 12]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", *MIXED])
def test_documents_and_padding_have_no_effect_on_others(name, models):
    model = models[name]
    packed = np.asarray(read(model, tokens(), None, SEGMENTS)[0])
    for document in (1, 2, 3):
        here = SEGMENTS[0] == document
        length, alone = here.sum(), np.zeros((2, T), "i4")
        alone[0, :length], alone[1] = tokens()[0, here], tokens()[1]
        expected = np.asarray(read(model, alone)[0])
        assert_close(packed[0, here], expected[0, :length])
    assert_close(packed[1], expected[1])
    real = SEGMENTS != 0
    parts = in_parts(for_decoding(model), [17, *[1] * 3, 20], SEGMENTS)
    assert_close(parts[real], packed[real])


@pytest.mark.parametrize("name", [pytest.param("window", marks=pytest.mark.slow), "hybrid"])
def test_rows_of_different_lengths_continue_in_one_batch(name, models):
    model = models[name]
    expected = np.asarray(read(model, tokens())[0])
    _, three = read(model, tokens()[:, :3], model.init_state(2, T))
    _, thirteen = read(model, tokens()[:, :13], model.init_state(2, T))
    mixed = three.put(jnp.array([1]), thirteen.take(jnp.array([1])))
    following = np.stack([tokens()[0, 3:15], tokens()[1, 13:25]])
    logits, _ = read(model, following, mixed)
    assert_close(logits, np.stack([expected[0, 3:15], expected[1, 13:25]]))


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_of_a_window_are_the_masked_scores(packed):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, T, heads, 8)).astype("f4") for heads in (4, 2, 2))
    document = np.where(SEGMENTS == 0, -1, SEGMENTS) if packed else np.zeros((2, T), int)
    # The number of a token in its document, which padding does not change.
    number = np.stack([[(row[:i] == row[i]).sum() for i in range(T)] for row in document])
    near = number[:, :, None] - number[:, None, :] < 5
    mask = near & (document[:, :, None] == document[:, None, :]) & np.tri(T, dtype=bool)

    def both(attend):
        def function(q, k, v):
            return jnp.where((document >= 0)[..., None, None], attend(q, k, v), 0)

        y, pullback = jax.vjp(function, q, k, v)
        return y, pullback(jnp.sin(jnp.arange(y.size)).reshape(y.shape))

    def chunks(q, k, v):
        run = partial(attend_in_window, window=5, smallest_chunk=7)
        ids = jnp.asarray(document)
        return without_padding(run, q, k, v, ids) if packed else run(q, k, v)

    expected = jax.jit(
        lambda: both(lambda q, k, v: attend_to_all(q, k, v, jnp.asarray(mask[:, None])))
    )()
    assert_close(jax.jit(lambda: both(chunks))(), expected)


def test_a_windows_memory_is_proportional_to_the_row():
    model = jax.eval_shape(lambda: build_model(CONFIGS["window"], rngs=nnx.Rngs(0)))

    def largest(length):
        ids = np.ones((1, length), "i4")
        text = jax.jit(lambda *x: x[0].hidden(*x[1:])[0]).lower(model, ids, None, ids).as_text()
        sizes = re.findall(r"tensor<([\dx]+)xf32>", text)
        return max(np.prod([int(n) for n in size.split("x")]) for size in sizes)

    assert largest(8192) == 2 * largest(4096)


def test_states_of_other_models_are_refused(models):
    states = {name: model.init_state(2, T) for name, model in models.items()}
    wider = dataclasses.replace(WINDOWED, window=9)
    wider = dataclasses.replace(CONFIGS["hybrid"], attention_layers=(wider,))
    states["wider"] = built(wider).init_state(2, T)
    for name, other, message in [
        ("hybrid", "options", "state is of a model with short_conv=3; this model has .*None"),
        ("window", "convolved", "state is of a model with short_conv=3; this model has .*None"),
        ("hybrid", "both", "state is of a hybrid with other attention layers"),
        ("both", "hybrid", "state is of a hybrid with other attention layers"),
        ("hybrid", "wider", r"state\.layers\.places\[1\]\.keys is \[.* 9\], of a model with other"),
        ("hybrid", "window", "state is a WindowCache; this model's is a HybridState"),
        ("grouped", "window", "state is a WindowCache; this model's is a KVCache"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(models[name], tokens(), states[other])
    with pytest.raises(ValueError, match="of the trained model, but this is a model for decoding"):
        read(for_decoding(models["hybrid"]), tokens(), states["hybrid"])
    with pytest.raises(ValueError, match="state has 2 rows for a batch of 1"):
        read(models["hybrid"], tokens()[:1], states["hybrid"])


def test_the_state_has_the_same_size_after_any_number_of_tokens(models):
    for name in ("window", "hybrid"):
        model = for_decoding(models[name])
        sizes = lambda state: [x.shape for x in jax.tree.leaves(state)]  # noqa: E731
        first = model.init_state(1, 1)
        assert sizes(first) == sizes(model.init_state(1, 10**6).with_room(10**6))
        after = prefill(model, [[1] * 700], 10).state
        assert sizes(first) == sizes(after)
        assert after.position.tolist() == [700]
    assert isinstance(models["grouped"].init_state(1, 1), KVCache)
    assert isinstance(models["window"].init_state(1, 1), WindowCache)


def test_the_program_does_not_grow_with_the_depth():
    def lines(n_layers):
        entry = dataclasses.replace(WINDOWED, layers=tuple(range(1, n_layers, 2)))
        config = dataclasses.replace(
            CONFIGS["hybrid"], n_layers=n_layers, attention_layers=(entry,)
        )
        model = jax.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
        assert config.layer_period == 2
        return read.lower(model, tokens()).as_text().count("\n")

    assert lines(8) == lines(32)


@pytest.mark.parametrize("name", ["grouped", "both"])
def test_decoding_copies_no_cache(name, models):
    model = for_decoding(models[name])
    progress = prefill(model, [[1, 2, 3]], 300)
    slots = progress.state.visible.shape[1]
    compiled = decode.lower(model, progress, row_keys(0, 1), length=8).compile().as_text()
    assert re.search(rf"dynamic-update-slice\S* = f32\[1,\d+,8,{slots}\]", compiled) or re.search(
        rf"= f32\[1,\d+,8,{slots}\]\S* dynamic-update-slice", compiled
    )
    assert not re.findall(rf"%copy\S* = f32\[[\d,]*8,{slots}\]", compiled)
    assert not re.findall(rf"= f32\[[\d,]*8,{slots}\]\S* (?:copy|transpose)\(", compiled)


@pytest.mark.parametrize("name", [pytest.param("both", marks=SLOW), "window"])
def test_generation_equals_recomputing_the_whole_text(name, models):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8]]
    found = generate(models[name], prompts, 12)
    for prompt, each in zip(prompts, found, strict=True):
        text = np.zeros((2, T), "i4")
        text[0, : len(prompt) + 12] = prompt + each.tokens
        logits, _ = read(models[name], text)
        chosen = logits[0, len(prompt) - 1 : len(prompt) + 11].argmax(-1)
        assert chosen.tolist() == each.tokens


@pytest.mark.slow
def test_int8_weights_and_a_bfloat16_state(models):
    model = models["hybrid"]

    def nearest(path, x):
        if not leaf_name(path).endswith(("kernel", "head")):
            return x
        part = np.abs(x).max(-2 if x.ndim == 3 else -1, keepdims=True) / 127
        return jnp.asarray(np.round(x / part) * part)

    rounded = jax.tree_util.tree_map_with_path(nearest, model)
    expected, _ = read(rounded, tokens())
    decoding = for_decoding(model, "int8")
    assert_close(read(decoding, tokens(), decoding.init_state(2, T))[0], expected)
    decoding = for_decoding(model, state_dtype="bfloat16")
    kinds = [str(x.dtype) for x in jax.tree.leaves(decoding.init_state(2, T).layers)]
    assert kinds == ["bfloat16", "float32", "float32"] * 2
    found, (expected, _) = in_parts(decoding, [11, *[1] * 17, 12]), read(model, tokens())
    assert_close(found[:, :11], expected[:, :11])
    error = np.abs(found - expected)
    assert 0 < error.mean() < 2e-2 * np.abs(expected).mean()


@pytest.mark.slow
@pytest.mark.compiles(80, reason="a hybrid's state has many shapes, each copied by itself")
def test_a_saved_state_is_continued(tmp_path):
    config = dataclasses.replace(CONFIGS["both"], vocab_size=BYTES.vocab_size)
    model, path = for_decoding(built(config)), tmp_path / "text.state"

    def finished(*arguments, **options):
        writer = Writer(*arguments, **options, tokens_at_once=1)
        list(writer)
        return writer

    whole = finished(model, BYTES, ["a text"], 12).continuations[0]
    first = finished(model, BYTES, ["a text"], 5)
    save_reading(path, first.reading, model, BYTES)
    after = load_reading(path, model, BYTES)
    rest = finished(model, BYTES, [""], 7, after=after).continuations[0]
    assert first.continuations[0].tokens + rest.tokens == whole.tokens


def test_a_cache_saved_in_format_3_is_continued(tmp_path):
    config = dataclasses.replace(CONFIGS["grouped"], vocab_size=BYTES.vocab_size)
    model, path = for_decoding(built(config)), tmp_path / "text.state"
    writer = Writer(model, BYTES, ["a text"], 0)
    save_reading(path, writer.reading, model, BYTES)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shapes = json.loads(metadata["shapes"])
    for name, array in arrays.items():
        if name.endswith(("keys", "values")):  # [b h k s], written as [b s h k]
            x = np.moveaxis(array.view("f4").reshape(shapes[name]), -1, -3)
            shapes[name], arrays[name] = x.shape, np.frombuffer(x.tobytes(), np.uint8)
    metadata |= {"format": "retnet-jax state 3", "shapes": json.dumps(shapes)}
    metadata["sha256"] = saved_state._digest(metadata, arrays)
    save_file(arrays, path, metadata)
    again = load_reading(path, model, BYTES).progress.state
    expected = writer.reading.progress.state
    jax.tree.map(np.testing.assert_array_equal, again, expected)


@pytest.mark.parametrize("name", ["hybrid", pytest.param("both", marks=pytest.mark.slow)])
def test_scores_with_shared_prefixes_are_those_of_each_request(name, models):
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 31, 20).tolist()
    requests = [Request([0, *prompt], [5, *rng.integers(1, 31, n).tolist()]) for n in (3, 9, 1, 4)]
    found = score(models[name], requests, batch_size=2)
    for request, each in zip(requests, found, strict=True):
        text = np.zeros((2, T), "i4")
        whole = [*request.context, *request.continuation]
        text[0, : len(whole)] = whole
        log_p = jax.nn.log_softmax(read(models[name], text)[0][0])
        places = np.arange(len(request.context), len(whole))
        expected = sum(log_p[place - 1, whole[place]] for place in places)
        assert_close(np.array([each.log_likelihood]), np.array([expected]))


def test_stateful_perplexity_equals_reading_at_once(models):
    for name in ("window", "both"):
        document = tokens()[0]
        found = stateful_nll(models[name], [document, document[:9]], batch_size=2, piece_length=8)
        log_p = jax.nn.log_softmax(read(models[name], tokens())[0][0])
        expected = -np.asarray(log_p)[np.arange(T - 1), document[1:]]
        assert_close(found[0], expected)
        assert_close(found[1], expected[:8])
