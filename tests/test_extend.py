"""The examples of docs/extend.md run unchanged, and do what the page says."""

import importlib
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from retnet_jax import generate, load_pretrained, train
from retnet_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from retnet_jax.config.as_json import read_config
from retnet_jax.data import BatchStream, build_store, number_of_windows, open_store
from retnet_jax.data.batches import LossWeights
from retnet_jax.errors import ConfigError
from retnet_jax.model import RetNet, Transformer, build_model
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.training.optim import make_optimizer
from retnet_jax.training.step import abstract_state, loss_sum
from retnet_jax.trees import named_leaves

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text()
EXAMPLES = dict(re.findall(r'```python\n("""(\w+)\.py: .*?)```', PAGE, re.S))
EXAMPLES = {name: code for code, name in EXAMPLES.items()}

pytestmark = pytest.mark.compiles(400, reason="whole runs, one for each example")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The directory of the examples and their runs, which is the working directory."""
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


@pytest.mark.slow
def test_documents_of_an_own_source_come_back_from_the_store(directory, ran):
    assert list(losses(ran("sums"))) == [1, 2, 3, 4, 5, 6]
    store = open_store("sums")
    texts = {
        split.name(i): store.tokenizer.decode(split.document(i)[1:].tolist())
        for split in (store.train, store.held_out)
        for i in range(len(split))
    }
    assert texts == {f"{a}+{b}": f"{a}+{b}\n{a + b}" for a in range(40) for b in range(60)}


def test_a_token_has_the_same_weight_in_every_window(directory, ran):
    ran("sums")
    split = open_store("sums").held_out
    whole = np.concatenate(
        [np.cumsum(split.document(i) == ord("\n")) > 0 for i in range(len(split))]
    )
    weights = LossWeights("answers:answers_only")
    for start in range(0, split.token_count, 3):
        for stop in range(start + 1, min(start + 12, split.token_count) + 1):
            np.testing.assert_array_equal(weights(split, start, stop), whole[start:stop])
    stream = BatchStream(
        [split],
        [1.0],
        sequence_length=10,
        batch_size=1,
        bos_id=256,
        seed=0,
        loss_weights="answers:answers_only",
    )
    windows = [stream[i] for i in range(number_of_windows(split, 10))]
    assert sum(x.weights.sum() for x in windows) == whole.sum() < split.token_count
    for tokens, targets, _, counts, _ in windows:
        # The answer and the end of the document have weight; before the answer is a line break.
        counted = bytes(x for x in targets[counts > 0].tolist() if x != 256)
        assert re.fullmatch(rb"\d*", counted)
        assert (counts[tokens == ord("\n")] == 1).all()


@pytest.mark.slow
def test_a_prompt_has_no_gradient_and_the_held_out_loss_no_part_of_it(directory, ran):
    """The targets of the prompts make no difference to gradients or losses."""
    records = ran("answers")
    model = load_pretrained("runs/answers")
    config = read_config(directory / "runs" / "answers" / "config.json")
    store = open_store("sums_for_answers")
    settings = {"sequence_length": 32, "batch_size": 8, "bos_id": 256, "seed": 0}
    batch = BatchStream([store.train], [1.0], loss_weights=config.data.loss_weights, **settings)[0]
    gradient = jax.jit(jax.grad(loss_sum, has_aux=True))
    other = batch._replace(targets=np.where(batch.weights > 0, batch.targets, 7))
    assert (other.targets != batch.targets).any()
    for one, two in zip(
        *(jax.tree.leaves(gradient(model, x)) for x in (batch, other)), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    # The run started from the model of the other run; its first loss is that of the answers.
    begun = load_pretrained("runs/begin")
    _, sums = jax.jit(loss_sum)(begun, batch)
    assert losses(records)[1] == pytest.approx(float(sums.loss / sums.weight), rel=1e-5)
    held_out = BatchStream(
        [store.held_out], [1.0], loss_weights=config.data.loss_weights, **settings
    )
    count = number_of_windows(store.held_out, 32)
    batches = [held_out[i] for i in range(2)]
    assert count >= 8  # rows beyond these in the second batch have no weight
    first = np.arange(16).reshape(2, 8, 1) < count
    found = [
        jax.jit(loss_sum)(model, x._replace(weights=np.where(rows, x.weights, 0).astype("f4")))[1]
        for x, rows in zip(batches, first, strict=True)
    ]
    mean = sum(float(x.loss) for x in found) / sum(float(x.weight) for x in found)
    last = [x["held_out_loss"] for x in records if "held_out_loss" in x][-1]
    assert last == pytest.approx(mean, rel=1e-5)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_part(directory, ran):
    for name, changed in (
        ("answers", "data.loss_weights: 'answers:answers_only' -> ''"),
        ("averages", "model.mixer: 'averages:Averages' -> 'retention'"),
        ("lion", "optimizer.name: 'lion:lion' -> 'adamw'"),
    ):
        ran(name)
        config = read_config(directory / "runs" / name / "config.json")
        builtin = Config()
        config.data.loss_weights = ""
        config.model.mixer = builtin.model.mixer
        config.optimizer.name = builtin.optimizer.name
        with pytest.raises(ConfigError, match=re.escape(changed)):
            train(config, directory / "runs" / name)


@pytest.mark.slow
def test_a_model_with_an_own_mixer_learns_and_is_loaded(directory, ran):
    found = losses(ran("averages"))
    assert found[6] < found[1]
    model = load_pretrained("runs/averages")
    store = open_store("sums")
    settings = {"sequence_length": 32, "batch_size": 8, "bos_id": 256, "seed": 0}
    batch = BatchStream([store.train], [1.0], **settings)[0]
    _, sums = jax.jit(loss_sum)(model, batch)
    assert float(sums.loss / sums.weight) < found[1]


def test_an_own_mixer_reads_in_parts_and_generates(directory):
    config = ModelConfig(
        mixer="averages:Averages", vocab_size=264, d_model=32, n_layers=2, n_heads=2
    )
    model = jax.jit(lambda: build_model(config, rngs=nnx.Rngs(0)))()
    assert model.config.parameter_count() == sum(x.size for x in jax.tree.leaves(model))
    tokens = np.random.default_rng(0).integers(0, 257, (2, 12)).astype("i4")
    call = jax.jit(lambda model, *arguments: model(*arguments))
    whole, _ = call(model, tokens)
    first, state = call(model, tokens[:, :5])
    rest, state = call(model, tokens[:, 5:], state)
    np.testing.assert_allclose(np.concatenate([first, rest], 1), whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(state.position, [12, 12])
    # Two documents in a row, each with padding before it, give the results of each by itself.
    row = np.concatenate([[0], tokens[0, :5], [0], tokens[1, :5]])[None].astype("i4")
    ids = np.array([[0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]], "i4")
    packed, _ = call(model, row, None, ids)
    np.testing.assert_allclose(packed[0, 1:6], first[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[0, 7:], first[1], rtol=1e-4, atol=1e-4)
    texts = generate(model, [tokens[0].tolist(), tokens[1, :5].tolist()], max_tokens=3)
    assert texts[0].tokens[0] == int(whole[0, -1].argmax())
    assert texts[1].tokens[0] == int(first[1, -1].argmax())


def test_own_parts_are_split_over_a_mesh(directory):
    """By the names of their parameters; those with other names are whole on every device."""
    config = Config(
        model=ModelConfig(mixer="averages:Averages", vocab_size=264, d_model=32, n_heads=2),
        optimizer=OptimizerConfig(name="lion:lion"),
    )
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    state = abstract_state(config, mesh)
    found = {name: leaf.sharding.spec for name, leaf in named_leaves(state).items()}
    assert found["model/layers/mixer/v/kernel"] == P(None, "fsdp", "tensor")
    assert found["model/layers/mixer/out/kernel"] == P(None, ("tensor", "fsdp"), None)
    assert found["model/layers/mixer/rate"] == P()
    moments = {name: spec for name, spec in found.items() if "/mu/" in name}
    assert len(moments) == len(jax.tree.leaves(state.model))
    for name, spec in moments.items():
        assert spec == found["model/" + name.split("/mu/")[1]]


@pytest.mark.slow  # a mesh of four axes takes long to compile
def test_an_own_mixer_computes_the_same_on_every_mesh(directory, ran):
    expected = losses(ran("averages"))
    config = read_config(directory / "runs" / "averages" / "config.json")
    train(replace(config, mesh=MeshConfig(data=1, fsdp=2, tensor=2, seq=2)), "runs/mesh")
    found = losses(metrics(directory / "runs" / "mesh"))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


@pytest.mark.slow
def test_a_run_with_an_own_optimiser_resumes_to_the_bit(directory, ran):
    expected = ran("lion")
    config = read_config(directory / "runs" / "lion" / "config.json")

    def stop(record):
        if record["step"] == 4 and "loss" in record:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, "runs/cut", on_log=stop)
    result = train(config, "runs/cut")
    assert (result.status, [x["step"] for x in result.metrics if "loss" in x]) == (
        "finished",
        [4, 5, 6],
    )
    assert losses(metrics(directory / "runs" / "cut")) == losses(expected)
    moments = named_leaves(abstract_state(config, make_mesh(config.mesh)).optimizer)
    assert {"/mu/" in name for name in moments} == {True, False}  # the other is a counter
    assert not any("/nu/" in name for name in moments)


@pytest.mark.slow
def test_what_an_evaluator_returns_is_logged(directory, ran):
    found = {x["step"]: x["held_out_accuracy"] for x in ran("accuracy") if "held_out_accuracy" in x}
    assert list(found) == [2, 4, 6]
    config = read_config(directory / "runs" / "accuracy" / "config.json")
    store, model = open_store(config.data.store), load_pretrained("runs/accuracy")
    batch = BatchStream(
        [store.held_out], [1.0], sequence_length=32, batch_size=8, bos_id=256, seed=0
    )[0]
    logits, _ = jax.jit(lambda model, x: model(x.tokens, segment_ids=x.segment_ids))(model, batch)
    right = np.asarray(logits).argmax(-1) == batch.targets
    assert found[6] == pytest.approx(right[batch.weights > 0].mean(), abs=1e-6)


# --- Errors ---------------------------------------------------------------------------------------

WRONG = """
from retnet_jax.model.attention import Attention
from retnet_jax.model.mixer import Mixer
from retnet_jax.model.multi_scale_retention import MultiScaleRetention
from retnet_jax.data.sources import Document

class NoMixer: pass
class SubMultiScaleRetention(MultiScaleRetention): pass
class SubAttention(Attention): pass
class Stateless(Mixer):
    def __init__(self, config, *, rngs, value_scale, out_scale): pass
    def __call__(self, x, state, context, form): return x, None
class OnlyReads:
    read = print
class Twice:
    read = print
    pieces = staticmethod(lambda path: ["a", "a"])
class Strings:
    pieces = staticmethod(lambda path: ["a"])
    read = staticmethod(lambda piece: ["text"])
class Short:
    pieces = staticmethod(lambda path: ["a"])
    read = staticmethod(lambda piece: [Document(f"{i}", "x" * (i + 1)) for i in range(30)])
def optimizer(config, rate): return rate
def too_few(tokens): return tokens[1:]
def negative(tokens): return -1.0 * tokens
def nothing(tokens): return 0 * tokens
"""


@pytest.fixture(scope="module")
def wrong(directory):
    (directory / "wrong.py").write_text(WRONG)
    yield importlib.import_module("wrong")
    del sys.modules["wrong"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ModelConfig(mixer="nowhere:Thing"),
            "mixer='nowhere:Thing' is not found: No module.*PYTHONPATH",
        ),
        (ModelConfig(mixer="wrong:Thing"), "has no attribute 'Thing'"),
        (ModelConfig(mixer="__main__:Thing"), "in a module of its own"),
        (ModelConfig(mixer="wrong:NoMixer"), "no subclass of retnet_jax.model.mixer.Mixer"),
        (
            ModelConfig(mixer="wrong"),
            "mixer='wrong' is not one of .* or a 'module:object' of your own",
        ),
        (
            OptimizerConfig(name="wrong:optimizer"),
            "returned .* not an optax.GradientTransformation",
        ),
        (
            OptimizerConfig(name="lion:lion", moment_dtype="bfloat16"),
            "moment_dtype='bfloat16' is for",
        ),
        (DataConfig(loss_weights="answers"), "loss_weights='answers' is not one of"),
        (DataConfig(source="wrong:OnlyReads"), r"not have both pieces\(path\) and read\(piece\)"),
        (DataConfig(source="wrong:Twice"), r"2 pieces, 1 of them different, such as \['a'\]"),
        (DataConfig(source="wrong:Strings"), "a str, not a retnet_jax.data.sources.Document"),
        (
            DataConfig(source="wrong:Short", strict=True, max_document_bytes=9),
            "a:9: too long: 10 b",
        ),
    ],
)
def test_what_is_wrong_is_named(wrong, tmp_path, config, message):
    def use():
        config.check()
        if isinstance(config, ModelConfig):
            build_model(config, rngs=nnx.Rngs(0))
        elif isinstance(config, OptimizerConfig):
            make_optimizer(config, steps=1000)
        else:
            build_store(replace(config, store=str(tmp_path / "store")), vocab_size=300)

    with pytest.raises(ConfigError, match=message):
        use()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", r"for the \d+ tokens of '.*' it returned float32\[\d+\]"),
        ("negative", "a finite number of at least 0 for each"),
        ("nothing", "is 0 for every token of the first .* nothing would be trained"),
    ],
)
def test_wrong_weights_are_refused_at_the_start(ran, wrong, name, message):
    ran("sums")
    with pytest.raises(ConfigError, match=message):
        BatchStream(
            [open_store("sums").held_out],
            [1.0],
            sequence_length=8,
            batch_size=1,
            bos_id=256,
            seed=0,
            loss_weights=f"wrong:{name}",
        )


def test_a_mixer_without_a_state_reads_only_whole_rows(wrong):
    config = ModelConfig(mixer="wrong:Stateless", vocab_size=9, d_model=8, n_layers=1, n_heads=1)
    model = jax.jit(lambda: build_model(config, rngs=nnx.Rngs(0)))()
    read = jax.jit(lambda model, *arguments: model(*arguments))
    _, state = read(model, np.ones((1, 4), "i4"))
    for use in (
        lambda: read(model, np.ones((1, 1), "i4"), state),
        lambda: generate(model, [[1]], 1),
    ):
        with pytest.raises(ConfigError, match=r"keeps no state.* cannot generate"):
            use()


@pytest.mark.parametrize("built_in", [RetNet, Transformer])
def test_a_subclass_of_a_built_in_mixer_is_one(wrong, built_in):
    shape = {"vocab_size": 9, "d_model": 8, "n_layers": 1, "n_heads": 2}
    shape |= {"value_dim": 8, "ffn_dim": 16}
    name = f"wrong:Sub{built_in.mixer_type.__name__}"
    tokens = np.arange(8, dtype="i4").reshape(2, 4)

    @jax.jit
    def read(tokens):
        own = build_model(ModelConfig(mixer=name, **shape), rngs=nnx.Rngs(0))
        theirs = built_in(ModelConfig(**shape), rngs=nnx.Rngs(0))
        return [model(tokens, model(tokens)[1].with_room(4))[0] for model in (own, theirs)]

    np.testing.assert_array_equal(*read(tokens))
