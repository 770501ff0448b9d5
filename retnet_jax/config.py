"""Every option of the project, once: its type, default, one line of help, and its checks.

A file in `configs/` fills a `Config`; the command line overrides single options
(`--config.train.steps=100`); a workdir records the result as `config.json` (`config_json.py`).
Sizes that follow from others (`q_width`, `ffn_width`, parameter and FLOP counts) are derived here
and nowhere else.

This module imports no jax, so that a config can be read anywhere. It does not postpone annotations
either: ml_collections reads the types of fields from them to parse overrides.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from retnet_jax.errors import ConfigError

ARCHITECTURES = ("retnet", "transformer")
MIXERS = ("retention", "attention")
DECAYS = ("log_spaced", "powers_of_two")
FEED_FORWARDS = ("relu", "gelu", "swish", "reglu", "geglu", "swiglu")
NORMS = ("layer", "rms")
ROTATIONS = ("rope", "torchscale")
SCORE_CLAMPS = ("absolute", "signed")
DTYPES = ("float32", "bfloat16", "float64")
SOURCES = ("stdlib", "text", "jsonl", "parquet", "tfds", "hf")
TOKENIZERS = ("byte", "bpe")
WINDOWS = ("packed", "contiguous")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
REMATS = ("none", "full", "dots")
# The activations of a layer that `model.remat` can name.
ACTIVATIONS = (
    "mixer_input",
    "q",
    "k",
    "v",
    "gate",
    "retention",
    "out",
    "ffn_input",
    "up",
    "linear",
)
MOMENT_DTYPES = ("float32", "bfloat16")

# What numbers become on the device.
_FLOAT32_MOST = (2 - 2**-23) * 2.0**127
_FLOAT32_LEAST = 2.0**-126  # of those that are computed with: smaller ones are flushed to 0
_INT32_MOST = 2**31 - 1


def option(
    default: Any,
    text: str,
    *,
    changeable: bool = False,
    in_store: bool = False,
    computation: bool = False,
) -> Any:
    """A field of a config.

    Args:
      default: its value where nothing else is said.
      text: one line of help.
      changeable: a run may be resumed with another value.
      in_store: the contents of a token store depend on it.
      computation: it says how a model is computed, not which function: a run that begins with a
        trained model (`init_from`) has its own.
    """
    marks = {"changeable": changeable, "in_store": in_store, "computation": computation}
    return field(default=default, metadata={"help": text} | marks)


# Not frozen, because command-line overrides set fields one by one. A model keeps a copy of its own,
# and hashes it as part of its tree structure.
@dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
    """The shape of one language model, RetNet or Transformer."""

    mixer: str = option("retention", "'retention' (RetNet) or 'attention' (Transformer)")
    vocab_size: int = option(32_000, "Number of token ids")
    d_model: int = option(512, "Width of the residual stream")
    n_layers: int = option(6, "Number of layers")
    n_heads: int = option(4, "Number of heads")
    key_dim: int | None = option(None, "Width of q and k over all heads; None: d_model")
    value_dim: int | None = option(
        None, "Width of v over all heads; None: 2 d_model, for attention d_model"
    )
    ffn: str = option(
        "gelu",
        "'relu', 'gelu', 'swish': act(x W1) W2; 'reglu', 'geglu', 'swiglu': (act(x W1) * x W3) W2",
    )
    ffn_dim: int | None = option(
        None, "Inner width of the feed-forward layer; None: 2 d_model, for attention 4 d_model"
    )
    norm: str = option("layer", "'layer' (scale and bias) or 'rms' (scale)")
    norm_epsilon: float = option(1e-6, "Added to the variance or mean square in every norm")
    decay: str = option(
        "log_spaced", "Gamma of each head: 'log_spaced', or 'powers_of_two' (Eq. 8)"
    )
    decay_range: tuple[float, float] = option(
        (1 / 32, 1 / 512), "For log_spaced: 1 - gamma of the first and of the last head"
    )
    row_normalizer: bool = option(
        True, "Divide retention by the root of the sum of its decays; False only for fla"
    )
    tie_embeddings: bool = option(False, "One matrix for the embedding and the output head")
    dtype: str = option(
        "float32",
        "Dtype of activations; parameters, decay, state and loss stay float32 (float64: all of it)",
        computation=True,
    )
    remat: str = option(
        "none",
        "What the backward pass recomputes: 'none', 'full', 'dots' (all but matrix products), or "
        "all but the named activations, as 'q,k,v,up'; 'offload:q,k,v' stores those on the host",
        changeable=True,
        computation=True,
    )
    chunk_size: int | None = option(
        None,
        "Tokens in a chunk of the chunkwise form; None: fastest for platform and length",
        changeable=True,
        computation=True,
    )

    # Only for checkpoints of other implementations (see `interop/presets.py`).
    rotation: str = option(
        "rope",
        "'rope': pairs (i, i + k/2), angles 10000^(-2i/k), q scaled by k^-1/2; 'torchscale': pairs "
        "(2i, 2i + 1), angles 10000^(-i/(k/2 - 1)), k scaled and with it the state",
    )
    embedding_scale: bool = option(False, "Embeddings times sqrt(d_model); torchscale, syncdoth")
    embedding_norm: bool = option(False, "A norm of the embeddings; torchscale, syncdoth")
    mixer_bias: bool = option(False, "Biases in q, k, v, gate and out; torchscale of 2023")
    ffn_bias: bool = option(False, "Biases in the feed-forward layer; torchscale of 2023, syncdoth")
    ffn_norm: str | None = option(
        None, "A norm before W2 (sub-LayerNorm), 'layer' or 'rms'; torchscale of 2023, syncdoth"
    )
    head_norm_scale: bool = option(False, "A learned scale in the head norm, all heads' one; fla")
    post_norm: bool = option(
        False, "Norms after the residual sums and none at the end; torchscale, syncdoth"
    )
    deepnorm: bool = option(
        False, "Residual times (2 n_layers)^(1/4) (arXiv 2203.00555); torchscale, syncdoth"
    )
    score_clamp: str | None = option(
        None,
        "torchscale's clamp of the scores' row sums, 'absolute' or 'signed' (that of 2023); only "
        "the parallel form has it",
    )

    @property
    def q_width(self) -> int:
        """Width of q and k over all heads."""
        return self.d_model if self.key_dim is None else self.key_dim

    @property
    def v_width(self) -> int:
        """Width of v over all heads."""
        if self.value_dim is not None:
            return self.value_dim
        return 2 * self.d_model if self.mixer == "retention" else self.d_model

    @property
    def ffn_width(self) -> int:
        """Inner width of the feed-forward layer."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        return 2 * self.d_model if self.mixer == "retention" else 4 * self.d_model

    @property
    def ffn_gated(self) -> bool:
        """Whether the feed-forward layer multiplies its inner activations by x W3."""
        return self.ffn.endswith("glu")

    @property
    def kept_activations(self) -> tuple[str, ...]:
        """The activations that `remat` names."""
        return tuple(self.remat.removeprefix("offload:").split(","))

    @property
    def state_dtype(self) -> str:
        """Dtype of decay, state, norm statistics and logits."""
        return "float64" if self.dtype == "float64" else "float32"

    def check(self) -> None:
        """Raises `ConfigError` for a value that is no choice, or sizes that do not fit together."""
        _check_values("model", self)
        _check_choice("model.mixer", self.mixer, MIXERS)
        _check_choice("model.ffn", self.ffn, FEED_FORWARDS)
        _check_choice("model.norm", self.norm, NORMS)
        _check_choice("model.rotation", self.rotation, ROTATIONS)
        _check_choice("model.decay", self.decay, DECAYS)
        _check_choice("model.dtype", self.dtype, DTYPES)
        if self.ffn_norm is not None:
            _check_choice("model.ffn_norm", self.ffn_norm, NORMS)
        if self.score_clamp is not None:
            _check_choice("model.score_clamp", self.score_clamp, SCORE_CLAMPS)
        if self.remat not in REMATS and not set(self.kept_activations) <= set(ACTIVATIONS):
            raise ConfigError(
                f"model.remat={self.remat!r} is not one of {', '.join(map(repr, REMATS))}, and "
                f"names of activations are {','.join(ACTIVATIONS)}, behind offload: or not"
            )
        if self.head_norm_scale and self.norm != "rms":
            raise ConfigError(
                f"model.head_norm_scale=True is for model.norm='rms', not {self.norm!r}"
            )
        for name in ("vocab_size", "d_model", "n_layers", "n_heads"):
            _check_at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("key_dim", "value_dim", "ffn_dim", "chunk_size"):
            if getattr(self, name) is not None:
                _check_at_least(f"model.{name}", getattr(self, name), 1)
        _check_positive("model.norm_epsilon", self.norm_epsilon)
        for name, width in (("key_dim", self.q_width), ("value_dim", self.v_width)):
            shown = f"model.{name}={width}"
            if getattr(self, name) is None:
                shown = f"model.d_model={self.d_model} (so {name} is {width})"
            if width % self.n_heads:
                raise ConfigError(
                    f"{shown} is not divisible by model.n_heads={self.n_heads}; "
                    f"{_nearest_multiples(width, self.n_heads)} would do"
                )
        if self.mixer == "attention" and self.q_width != self.v_width:
            raise ConfigError(
                f"attention needs keys and values of one width, but key_dim is {self.q_width} and "
                f"value_dim {self.v_width}; leave both out, or use transformer_twin()"
            )
        if (self.q_width // self.n_heads) % 2:
            raise ConfigError(
                f"the key width of a head is {self.q_width}/{self.n_heads} = "
                f"{self.q_width // self.n_heads}; it must be even, because pairs are rotated"
            )
        if len(self.decay_range) != 2 or not all(0 < x < 1 for x in self.decay_range):
            raise ConfigError(
                f"model.decay_range={self.decay_range}: two numbers between 0 and 1 are needed, "
                "1 - gamma of the first and of the last head, such as (1/32, 1/512)"
            )

    def built_as(self, architecture: str, n_heads: int | None = None) -> "ModelConfig":
        """This RetNet for "retnet", its `transformer_twin` for "transformer"."""
        _check_choice("the argument after --config=FILE:", architecture, ARCHITECTURES)
        return self if architecture == "retnet" else self.transformer_twin(n_heads)

    def transformer_twin(self, n_heads: int | None = None) -> "ModelConfig":
        """The Transformer with (to rounding) as many parameters as this RetNet.

        Attention has 4 d^2 parameters where retention has 2 d^2 + 3 d value_dim, so its
        feed-forward layer is as much wider: 4 d for 2 d at the paper's sizes (its section 3.1).
        """
        matrices = 3 if self.ffn_gated else 2
        surplus = self._mixer_parameters() - 4 * self.d_model**2
        return dataclasses.replace(
            self,
            mixer="attention",
            n_heads=n_heads or self.n_heads,
            key_dim=None,
            value_dim=None,
            ffn_dim=self.ffn_width + round(surplus / (matrices * self.d_model)),
        )

    def parameter_count(self) -> int:
        """Number of trainable parameters, embedding and output head included."""
        heads = 1 if self.tie_embeddings else 2
        layer = self._mixer_parameters() + self._ffn_parameters() + self._layer_vectors()
        norms = self.embedding_norm + (not self.post_norm)
        return (
            heads * self.vocab_size * self.d_model
            + self.n_layers * layer
            + norms * _norm_parameters(self.norm, self.d_model)
        )

    def training_flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs of one token's forward and backward pass, recomputation not counted.

        6 for each weight of a matrix product (the embedding look-up is none), and for the mixer
        what the algorithm itself needs: causal attention multiplies with half the positions of the
        sequence on average; retention reads and writes a k by v state for each head.
        """
        layers = self.n_layers * (self._mixer_parameters() + self._ffn_parameters())
        if self.mixer == "attention":
            core = 2 * (self.q_width + self.v_width) * (sequence_length + 1) / 2
        else:
            core = 4 * self.q_width * self.v_width / self.n_heads
        return 6 * (layers + self.vocab_size * self.d_model) + 3 * self.n_layers * core

    def _mixer_parameters(self) -> int:
        """Of the matrices."""
        if self.mixer == "attention":
            return 2 * self.d_model * (self.q_width + self.v_width)
        return self.d_model * (2 * self.q_width + 3 * self.v_width)

    def _ffn_parameters(self) -> int:
        """Of the matrices."""
        return self.d_model * self.ffn_width * (3 if self.ffn_gated else 2)

    def _layer_vectors(self) -> int:
        """Scales and biases of one layer."""
        count = 2 * _norm_parameters(self.norm, self.d_model)
        retains = self.mixer == "retention"
        if self.mixer_bias:
            count += 2 * self.q_width + (2 if retains else 1) * self.v_width + self.d_model
        if self.head_norm_scale and retains:
            count += self.v_width // self.n_heads
        if self.ffn_bias:
            count += (2 if self.ffn_gated else 1) * self.ffn_width + self.d_model
        if self.ffn_norm is not None:
            count += _norm_parameters(self.ffn_norm, self.ffn_width)
        return count


def _norm_parameters(norm: str, width: int) -> int:
    return width * (2 if norm == "layer" else 1)


@dataclass(kw_only=True)
class DataConfig:
    """Documents, how they become tokens, and how tokens become windows."""

    source: str = option(
        "stdlib",
        "'stdlib' (Python's own library), 'text' (a document a file), 'jsonl' (a document a line, "
        "also .gz and .zst), 'parquet' (a document a row), or a data set of 'tfds' or 'hf'",
        in_store=True,
    )
    path: str = option(
        "",
        "Files: globs, ** and URLs included, separated by commas; a data set: 'name:split', for hf "
        "also 'name:config:split'",
        in_store=True,
    )
    text_field: str = option(
        "text", "Field of a record with its text; 'a.b' is field b inside field a", in_store=True
    )
    id_field: str = option(
        "id", "Field that names a document; without it its number does", in_store=True
    )
    min_bytes: int = option(0, "Leave out shorter documents", in_store=True)
    max_document_bytes: int = option(200_000_000, "Leave out longer documents", in_store=True)
    extensions: tuple[str, ...] = option(
        (), "Keep only documents with one of these file extensions; empty: all", in_store=True
    )
    extension_field: str = option("ext", "Field with the extension", in_store=True)
    languages: tuple[str, ...] = option(
        (), "Keep only documents in one of these languages; empty: all", in_store=True
    )
    language_field: str = option("lang", "Field with the language", in_store=True)
    licenses: tuple[str, ...] = option(
        (), "Keep only documents under one of these licences; empty: all", in_store=True
    )
    license_field: str = option("license", "Field with the licence", in_store=True)
    deduplicate: bool = option(
        True, "Keep the first of documents with the same text", in_store=True
    )
    strict: bool = option(
        False, "Stop at the first document that cannot be used instead of counting it"
    )
    tokenizer: str = option(
        "bpe",
        "'byte'; 'bpe': byte-level, trained on the training documents; or a directory with a "
        "tokenizer.json (Hugging Face) or tokenizer.model (SentencePiece)",
        in_store=True,
    )
    store: str = option("data/stdlib", "Directory of the token store; built if it does not exist")
    held_out: float = option(
        0.02,
        "Share of documents kept from training, chosen by a hash of their names",
        in_store=True,
    )
    mixture: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Stores to train on and the share of windows from each, such as "
            "{'data/pile': 0.6, 'data/c4': 0.4}; empty: `store`",
        },
    )
    sequence_length: int = option(2048, "Tokens in a window")
    windows: str = option(
        "packed",
        "'packed': windows begin at documents where they can, in random order; 'contiguous': each "
        "row of the batch continues where its last window ended",
    )
    skip_batches: tuple[int, ...] = option((), "Numbers of batches to skip", changeable=True)

    def check(self) -> None:
        """Raises `ConfigError` for a value that is no choice or out of range."""
        _check_values("data", self)
        _check_choice("data.source", self.source, SOURCES)
        if not self.tokenizer:
            raise ConfigError(
                f"data.tokenizer is empty: one of {', '.join(map(repr, TOKENIZERS))}, or a "
                "directory with a tokenizer"
            )
        _check_at_least("data.sequence_length", self.sequence_length, 1)
        if self.source != "stdlib" and not self.path:
            raise ConfigError(
                f"data.path is empty, but data.source={self.source!r} reads what it names: "
                "give a glob such as 'corpus/**/*.txt', or a data set such as 'c4/en:train'"
            )
        _check_at_least("data.min_bytes", self.min_bytes, 0)
        _check_at_least("data.max_document_bytes", self.max_document_bytes, 1)
        _check_choice("data.windows", self.windows, WINDOWS)
        for number in self.skip_batches:
            _check_at_least("data.skip_batches", number, 0)
        for store, weight in self.mixture.items():
            _check_positive(f"data.mixture[{store!r}]", weight)
        if not self.store:
            raise ConfigError("data.store is empty: name the directory for the token store")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"data.held_out={self.held_out} is not between 0 and 1, such as 0.02")


@dataclass(kw_only=True)
class OptimizerConfig:
    """Optimiser, schedule and clipping."""

    name: str = option(
        "adamw", "'adamw', or 'muon': muon for the matrices of layers and Adam for the rest"
    )
    learning_rate: float = option(6e-4, "Peak learning rate")
    muon_learning_rate: float = option(0.02, "Peak learning rate of the matrices under muon")
    beta1: float = option(0.9, "Decay of Adam's first moment")
    beta2: float = option(0.98, "Decay of Adam's second moment")
    epsilon: float = option(1e-8, "Added to the root of Adam's second moment")
    weight_decay: float = option(0.05, "Weight decay of matrices; norms and biases have none")
    clip_norm: float = option(2.0, "Largest global norm of the gradient")
    schedule: str = option(
        "linear", "Learning rate after warm-up: 'constant', 'linear', 'cosine' or 'wsd'"
    )
    warmup_steps: int = option(375, "Steps in which the learning rate rises from 0")
    moment_dtype: str = option("float32", "Dtype the moments are stored in; or 'bfloat16'")
    decay_share: float = option(
        0.5, "For wsd: share of all steps at the end in which the rate falls to 0"
    )

    def check(self) -> None:
        """Raises `ConfigError` for a value that is no choice or out of range."""
        _check_values("optimizer", self)
        _check_choice("optimizer.name", self.name, OPTIMIZERS)
        _check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        _check_choice("optimizer.moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        for name in ("learning_rate", "muon_learning_rate", "epsilon", "clip_norm"):
            _check_positive(f"optimizer.{name}", getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} is not in [0, 1)")
            if getattr(self, name) >= 1 - 2**-25:  # half the step below 1
                raise ConfigError(
                    f"optimizer.{name}={getattr(self, name)} is 1 in float32, and Adam "
                    f"divides by 1 - {name}"
                )
        _check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        _check_at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"optimizer.decay_share={self.decay_share} is not in (0, 1]")
        decaying = "muon_learning_rate" if self.name == "muon" else "learning_rate"
        if getattr(self, decaying) * self.weight_decay > 1:
            raise ConfigError(
                f"optimizer.weight_decay={self.weight_decay} times optimizer.{decaying}="
                f"{getattr(self, decaying)} is more than 1: each step would turn the signs of the "
                "matrices around; lower one of them"
            )


@dataclass(kw_only=True)
class TrainConfig:
    """Length of a run, batch, and how often it reports and saves."""

    steps: int = option(25_000, "Steps of the run")
    batch_size: int = option(32, "Windows in a step, over all devices and micro-batches")
    micro_batches: int = option(
        1, "Parts in which a step's batch is run, with gradients summed", changeable=True
    )
    carry_state: bool = option(
        False, "Carry a row's state into its next window: RetNets, contiguous windows"
    )
    z_loss: float = option(
        0.0, "Coefficient of the squared log normaliser (arXiv 2204.02311), such as 1e-4"
    )
    spike_deviations: float = option(
        10.0,
        "Skip a step whose loss or gradient norm exceeds its running mean by this many standard "
        "deviations; 0: only one that is not finite",
        changeable=True,
    )
    max_skipped: int = option(5, "Stop after this many consecutive skipped steps", changeable=True)
    seed: int = option(0, "Seed of the parameters and of the order of the windows")
    log_every: int = option(10, "Steps between lines of metrics.jsonl", changeable=True)
    eval_every: int = option(1000, "Steps between evaluations on held-out windows", changeable=True)
    eval_batches: int = option(16, "Batches in such an evaluation", changeable=True)
    checkpoint_every: int = option(1000, "Steps between checkpoints", changeable=True)
    checkpoint_minutes: float = option(
        0.0,
        "Also save when this many minutes have passed since the last; 0: never",
        changeable=True,
    )
    keep_checkpoints: int = option(3, "Number of newest checkpoints to keep", changeable=True)
    keep_every: int = option(
        0, "Keep checkpoints of steps divisible by this for ever; 0: none", changeable=True
    )
    wandb: str = option(
        "", "Project of Weights & Biases that gets the metrics too; empty: none", changeable=True
    )

    def check(self) -> None:
        """Raises `ConfigError` for a count that is too small or a batch that does not split."""
        _check_values("train", self)
        for name in ("seed", "z_loss", "spike_deviations", "checkpoint_minutes", "keep_every"):
            _check_at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("steps", "batch_size", "micro_batches", "max_skipped", "log_every"):
            _check_at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints"):
            _check_at_least(f"train.{name}", getattr(self, name), 1)
        # Steps are counted in int32, and of longer seeds jax would take the lower bits.
        for name in ("steps", "seed"):
            _check_at_most(f"train.{name}", getattr(self, name), _INT32_MOST)
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"train.batch_size={self.batch_size} is not divisible by "
                f"train.micro_batches={self.micro_batches}; "
                f"{_nearest_multiples(self.batch_size, self.micro_batches)} would do"
            )


@dataclass(kw_only=True)
class MeshConfig:
    """Number of devices on each mesh axis. One axis may be -1: it takes all remaining devices."""

    data: int = option(-1, "Splits the batch, copies the parameters", changeable=True)
    fsdp: int = option(1, "Splits the batch and the parameters", changeable=True)
    seq: int = option(
        1,
        "Splits positions of each row: a RetNet passes states on, a Transformer gathers k and v",
        changeable=True,
    )
    tensor: int = option(1, "Splits heads, feed-forward width and vocabulary", changeable=True)

    def check(self) -> None:
        """Raises `ConfigError` for an axis of no devices or more than one -1."""
        _check_values("mesh", self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size != -1:
                _check_at_least(f"mesh.{name}", size, 1)
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ConfigError(
                f"mesh={sizes}: only one axis may be -1, which takes all remaining devices"
            )


@dataclass(kw_only=True)
class ProfileConfig:
    """A trace of some steps, for XProf or Perfetto, in `workdir/profile`."""

    start: int = option(10, "First step of the trace", changeable=True)
    steps: int = option(0, "Number of steps in the trace; 0: no trace", changeable=True)

    def check(self) -> None:
        """Raises `ConfigError` for a negative number."""
        _check_values("profile", self)
        _check_at_least("profile.start", self.start, 1)
        _check_at_least("profile.steps", self.steps, 0)


@dataclass(kw_only=True)
class Config:
    """One experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    init_from: str = option(
        "",
        "Directory of a trained model, own or foreign, to begin with: model (but for dtype, remat "
        "and chunk_size) and tokenizer are that directory's",
    )

    def check(self) -> None:
        """Raises `ConfigError` naming the field, its value and what would do."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            _check_value(each.name, value, each.type)
            if dataclasses.is_dataclass(each.type):
                value.check()
        if self.train.carry_state and self.data.windows != "contiguous":
            raise ConfigError(
                f"train.carry_state=True needs data.windows='contiguous', not {self.data.windows!r}"
            )
        if self.train.carry_state and self.model.mixer != "retention":
            raise ConfigError(
                "train.carry_state=True needs a RetNet: a Transformer's cache grows with every step"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves nothing of "
                f"train.steps={self.train.steps}; make it smaller"
            )


def _check_values(section: str, values: Any) -> None:
    """Raises `ConfigError` for an option that is not of its type, or no finite number.

    So no later check, and nothing that computes, meets a nan, an infinite number or a text.
    """
    for each in dataclasses.fields(values):
        _check_value(f"{section}.{each.name}", getattr(values, each.name), each.type)


def _check_value(name: str, value: Any, kind: Any) -> None:
    parts = typing.get_args(kind)
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{name} is an integer of {value.bit_length()} bits, more than 63")
    elif typing.get_origin(kind) is tuple and isinstance(value, tuple):
        for place, part in enumerate(value):
            _check_value(f"{name}[{place}]", part, parts[0])
    elif typing.get_origin(kind) is dict and isinstance(value, dict):
        for key, part in value.items():
            _check_value(f"a name in {name}", key, parts[0])
            _check_value(f"{name}[{key!r}]", part, parts[1])
    elif not any(_is_of_type(value, each) for each in _alternatives(kind)):
        shown = kind.__name__ if isinstance(kind, type) else kind
        raise ConfigError(f"{name}={value!r} is not of type {shown}, but of {type(value).__name__}")
    elif isinstance(value, float) and not abs(value) <= _FLOAT32_MOST:
        raise ConfigError(f"{name}={value} is not a finite number in float32")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)


def _is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; integers are numbers, but True is not 1."""
    if typing.get_origin(kind) is not None:  # a tuple or dict, which the value is not
        return False
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def _check_at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} is less than {least}")


def _check_at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ConfigError(f"{name}={value} is more than {most}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name}={value} is not greater than 0")
    if value < _FLOAT32_LEAST:
        raise ConfigError(f"{name}={value} is 0 in float32, whose least number is 1.2e-38")


def _nearest_multiples(value: int, factor: int) -> str:
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else f"{factor}"
