"""Options: every invalid one raises with its name; derived sizes equal those of the real tree."""

import importlib
import json

import jax
import pytest
from flax import nnx

from retnet_jax import Config, ModelConfig
from retnet_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from retnet_jax.config.as_json import config_differences, config_from_json, to_json
from retnet_jax.errors import ConfigError
from retnet_jax.interop import presets
from retnet_jax.model import build_model

PAPER = {"200m": 0.201e9, "1p3b": 1.208e9, "2p7b": 2.517e9, "6p7b": 6.442e9}


@pytest.mark.parametrize("size", PAPER)
def test_paper_sizes_and_their_twins(size):
    module = importlib.import_module(f"retnet_jax.configs.retnet_{size}")
    retnet, twin = (module.get_config(name) for name in ("retnet", "transformer"))
    for config in (retnet, twin):
        config.check()
        shape = jax.eval_shape(lambda c=config: build_model(c.model, rngs=nnx.Rngs(0)))
        count = sum(leaf.size for leaf in jax.tree.leaves(shape))
        assert count == config.model.parameter_count()
        embeddings = 2 * config.model.vocab_size * config.model.d_model
        assert count - embeddings == pytest.approx(PAPER[size], rel=0.01)
    assert (retnet.model.mixer, twin.model.mixer) == ("retention", "attention")
    assert retnet.model.q_width // retnet.model.n_heads == 256
    assert retnet.model.v_width // retnet.model.n_heads == 512


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_recipe(size):
    """arXiv 2307.08621, section 3.1 and Table 7."""
    module = importlib.import_module(f"retnet_jax.configs.retnet_{size}")
    tested = {
        "retnet": {"init": ("scaled", "deepnet"), "head_norm_epsilon": (0.01, None)},
        "transformer": {"init": ("zero_outputs", "deepnet"), "qk_norm": (True, False)},
    }
    for argument, usual in (("paper", "retnet"), ("paper_transformer", "transformer")):
        config = module.get_config(argument)
        config.check()
        changed = config_differences(module.get_config(usual), config)
        assert changed == {
            **{f"model.{name}": values for name, values in tested[usual].items()},
            "model.dropout": (0.0, 0.1),
            "train.spike_deviations": (10.0, 0.0),
        }
        model, optimizer = config.model, config.optimizer
        assert (model.decay, model.decay_range) == ("log_spaced", (1 / 32, 1 / 512))
        assert (model.norm, model.ffn, model.post_norm) == ("layer", "gelu", False)
        assert not model.deepnorm
        assert (optimizer.name, optimizer.beta1, optimizer.beta2) == ("adamw", 0.9, 0.98)
        assert (optimizer.weight_decay, optimizer.clip_norm) == (0.05, 2.0)
        assert (optimizer.schedule, optimizer.warmup_steps) == ("linear", 375)
        assert optimizer.learning_rate == (3e-4 if size in ("2p7b", "6p7b") else 6e-4)
        tokens = config.train.batch_size * config.data.sequence_length
        if size != "200m":
            assert (config.train.steps, tokens) == (25_000, 2**22)
    with pytest.raises(ConfigError, match=r"'papers' is not one of 'retnet', .*'paper_tr"):
        module.get_config("papers")


@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_the_trees_and_the_twins(ffn, norm, tied):
    config = ModelConfig(
        vocab_size=96,
        d_model=32,
        n_layers=3,
        ffn=ffn,
        norm=norm,
        tie_embeddings=tied,
        value_dim=48,
        ffn_dim=56,
    )
    for one in (config, config.transformer_twin()):
        tree = jax.eval_shape(lambda one=one: build_model(one, rngs=nnx.Rngs(0)))
        assert sum(x.size for x in jax.tree.leaves(tree)) == one.parameter_count()
    ratio = config.transformer_twin().parameter_count() / config.parameter_count()
    assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "config",
    [
        presets.paper(vocab_size=96, d_model=32, n_layers=3, embedding_norm=True),
        presets.torchscale(vocab_size=96, d_model=32, n_layers=3, post_norm=True, deepnorm=True),
        presets.fla(vocab_size=96, d_model=32, n_layers=3, key_dim=16),
        presets.syncdoth(
            vocab_size=96, d_model=32, n_layers=3, ffn="relu", ffn_bias=True, ffn_norm="rms"
        ),
    ],
)
def test_parameter_count_of_the_presets_and_their_twins(config):
    for one in (config, config.transformer_twin()):
        tree = jax.eval_shape(lambda one=one: build_model(one, rngs=nnx.Rngs(0)))
        assert sum(x.size for x in jax.tree.leaves(tree)) == one.parameter_count()


def test_training_flops_count_the_compiled_products():
    """One unrolled layer, so that XLA sees every product once; head and mixer included."""
    config = ModelConfig(vocab_size=512, d_model=64, n_layers=1, n_heads=2, mixer="attention")
    model = build_model(config, rngs=nnx.Rngs(0))
    tokens = jax.numpy.zeros((2, 64), int)

    def loss(model):
        return (model(tokens)[0] ** 2).sum()

    compiled = jax.jit(jax.grad(loss)).lower(model).compile()
    measured = compiled.cost_analysis()["flops"] / tokens.size
    # XLA computes the upper half of the scores too, and counts elementwise work.
    formula = config.training_flops_per_token(64)
    assert formula < measured < 1.25 * formula


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (ModelConfig(d_model=100, n_heads=3), r"d_model=100 .*n_heads=3; 99 or 102 would do"),
        (ModelConfig(key_dim=30, n_heads=4), "key_dim=30 is not divisible"),
        (ModelConfig(key_dim=12, n_heads=4), "must be even"),
        (ModelConfig(mixer="attention", value_dim=1024), "attention needs keys and values of one"),
        (ModelConfig(mixer="retentoin"), "mixer='retentoin' is not one of 'retention'"),
        (ModelConfig(dtype="float16"), "dtype='float16' is not one of"),
        (ModelConfig(ffn="geglue"), "ffn='geglue' is not one of 'relu', 'gelu'"),
        (ModelConfig(rotation="xpos"), "rotation='xpos' is not one of 'rope', "),
        (ModelConfig(ffn_norm="group"), "ffn_norm='group' is not one of"),
        (ModelConfig(score_clamp="yes"), "score_clamp='yes' is not one of"),
        (ModelConfig(head_norm_scale=True), "head_norm_scale=True is for model.norm='rms'"),
        (ModelConfig(decay_range=(0.5, 1.0)), "decay_range=.*between 0 and 1"),
        (ModelConfig(n_layers=0), "n_layers=0 is less than 1"),
        (DataConfig(source="text"), "data.path is empty"),
        (DataConfig(tokenizer=""), "data.tokenizer is empty"),
        (DataConfig(held_out=0.0), "held_out=0.0 is not between"),
        (OptimizerConfig(schedule="step"), "schedule='step'"),
        (OptimizerConfig(clip_norm=0.0), "clip_norm=0.0 is not greater"),
        (TrainConfig(batch_size=6, micro_batches=4), "4 or 8 would do"),
        (TrainConfig(log_every=0), "log_every=0 is less than 1"),
        (OptimizerConfig(weight_decay=NAN), "optimizer.weight_decay=nan is not a finite number"),
        (OptimizerConfig(learning_rate=INF), "optimizer.learning_rate=inf is not a finite number"),
        (OptimizerConfig(clip_norm=INF), "optimizer.clip_norm=inf is not"),
        (OptimizerConfig(beta1=NAN), "optimizer.beta1=nan is not"),
        (ModelConfig(norm_epsilon=INF), "model.norm_epsilon=inf is not"),
        (ModelConfig(decay_range=(0.5, NAN)), r"model.decay_range\[1\]=nan is not"),
        (DataConfig(mixture={"a": 1.0, "b": INF}), r"data.mixture\['b'\]=inf is not"),
        (DataConfig(held_out=NAN), "data.held_out=nan is not"),
        (TrainConfig(z_loss=NAN), "train.z_loss=nan is not"),
        (TrainConfig(spike_deviations=INF), "train.spike_deviations=inf is not"),
        (TrainConfig(checkpoint_minutes=NAN), "train.checkpoint_minutes=nan is not"),
        (MeshConfig(data=-1, fsdp=-1), "only one axis may be -1"),
        (MeshConfig(tensor=0), "mesh.tensor=0 is less than 1"),
    ],
)
def test_bad_values_are_named(section, message):
    with pytest.raises(ConfigError, match=message):
        section.check()


def test_warm_up_must_be_shorter_than_the_run():
    config = Config(train=TrainConfig(steps=100), optimizer=OptimizerConfig(warmup_steps=100))
    with pytest.raises(ConfigError, match=r"warmup_steps=100 leaves nothing of train.steps=100"):
        config.check()


def test_json_reads_back_the_same():
    config = Config(model=ModelConfig(key_dim=48, decay_range=(0.25, 0.125)))
    assert config_from_json(to_json(config)) == config
    assert config_differences(config, config_from_json(to_json(config))) == {}


def test_differences_name_the_fields():
    old, new = Config(), Config(model=ModelConfig(d_model=64), train=TrainConfig(seed=3))
    assert config_differences(old, new) == {"model.d_model": (512, 64), "train.seed": (0, 3)}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "d_modl"), 3, "d_modl: no such field; did you mean d_model"),
        (("model", "d_model"), "3", "model.d_model='3' is not of type int"),
        (("model", "tie_embeddings"), 1, "tie_embeddings=1 is not of type bool"),
        (("model", "key_dim"), 1.5, "key_dim=1.5 is not of type int | None"),
        (("train",), 7, "train. is 7, not an object"),
    ],
)
def test_json_with_wrong_fields_is_refused(path, value, message):
    values = json.loads(to_json(Config()))
    target = values
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        config_from_json(json.dumps(values), origin="config.json")
