"""The options of a run: data, optimizer, training, mesh and profile, and `Config`, which has all.

This module does not postpone annotations: ml_collections reads the types of fields from them to
parse overrides.
"""

import dataclasses
import re
import warnings
from dataclasses import dataclass, field

from retnet_jax.config.fields import (
    check_at_least,
    check_at_most,
    check_choice,
    check_positive,
    check_value,
    check_values,
    nearest_multiples,
    option,
)
from retnet_jax.config.model import ModelConfig
from retnet_jax.errors import ConfigError
from retnet_jax.own_objects import is_own

SOURCES = ("stdlib", "text", "jsonl", "parquet", "tfds", "hf")
TOKENIZERS = ("byte", "bpe")
HELD_OUT_BY = ("auto", "document", "tail")
WINDOWS = ("packed", "contiguous")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
MOMENT_DTYPES = ("float32", "bfloat16")
_INT32_MOST = 2**31 - 1


@dataclass(kw_only=True)
class DataConfig:
    """Documents, their tokens, and the windows of tokens to train on."""

    source: str = option(
        "stdlib",
        "Kind of corpus: 'stdlib' (Python's own library); files of 'text' (one document in each), "
        "'jsonl' (one on each line, also compressed) or 'parquet' (one in each row); a data set of "
        "'tfds' or 'hf'; or your own source, 'module:class'",
        in_store=True,
    )
    path: str = option(
        "",
        "Files: paths, globs (also with **) and URLs, separated by commas. Data set: 'name:split', "
        "for hf also 'name:config:split' and 'name@commit:split'",
        in_store=True,
    )
    text_field: str = option(
        "text",
        "Field of a record that holds its text; 'a.b' is field b inside field a",
        in_store=True,
    )
    id_field: str = option(
        "id",
        "Field that names a document; a document without it is named by its number",
        in_store=True,
    )
    min_bytes: int = option(0, "Skip documents with fewer bytes of UTF-8", in_store=True)
    max_document_bytes: int = option(
        200_000_000, "Skip documents with more bytes of UTF-8", in_store=True
    )
    extensions: tuple[str, ...] = option(
        (), "Keep only documents with one of these file extensions; empty: all", in_store=True
    )
    extension_field: str = option(
        "ext", "Field of a record that holds the file extension", in_store=True
    )
    languages: tuple[str, ...] = option(
        (), "Keep only documents in one of these languages; empty: all", in_store=True
    )
    language_field: str = option("lang", "Field of a record that holds the language", in_store=True)
    licenses: tuple[str, ...] = option(
        (), "Keep only documents under one of these licences; empty: all", in_store=True
    )
    license_field: str = option(
        "license", "Field of a record that holds the licence", in_store=True
    )
    deduplicate: bool = option(
        True, "Keep only the first of several documents with the same text", in_store=True
    )
    strict: bool = option(
        False, "Stop at the first document that cannot be used, instead of skipping it"
    )
    tokenizer: str = option(
        "bpe",
        "'byte'; 'bpe', a byte-level BPE trained on the training documents; or a directory, or a "
        "name on the Hugging Face hub, with a tokenizer.json, or vocab.json and merges.txt "
        "(Hugging Face), tokenizer.model (SentencePiece) or cl100k_base.tiktoken",
        in_store=True,
    )
    store: str = option("data/stdlib", "Directory of the token store; built if it does not exist")
    held_out: float = option(
        0.02,
        "Share of the documents, or of each document, that is held out from training",
        in_store=True,
    )
    held_out_by: str = option(
        "auto",
        "'document': hold out whole documents, chosen by a hash of their names; 'tail': hold out "
        "the end of each document; 'auto': 'tail' if there are too few documents for 'document'",
        in_store=True,
    )
    apart: str = option(
        "",
        "Regular expression of names of documents: evaluation reports the held-out ones that it "
        "matches apart from the others, for example generated files; empty: none",
        changeable=True,
    )
    mixture: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Several stores to train on, each with its share of the windows, such as "
            "data/pile:0.6,data/c4:0.4; empty: only `store`",
        },
    )
    sequence_length: int = option(2048, "Tokens in a window")
    windows: str = option(
        "packed",
        "'packed': windows start at the first token of a document where possible, in random order; "
        "'contiguous': each row of the batch continues where its previous window ended",
    )
    loss_weights: str = option(
        "",
        "Your own function, 'module:function', that gives the weight of each token of a document "
        "in the loss; empty: every weight is 1",
    )
    skip_batches: tuple[int, ...] = option(
        (), "Numbers of batches to skip; the first batch is 0", changeable=True
    )

    def check(self) -> None:
        """Raises `ConfigError` for an invalid value."""
        check_values("data", self)
        check_choice("data.source", self.source, SOURCES, own=True)
        if self.loss_weights:
            check_choice("data.loss_weights", self.loss_weights, ("",), own=True)
        if not self.tokenizer:
            raise ConfigError(
                f"data.tokenizer is empty: one of {', '.join(map(repr, TOKENIZERS))}, or a "
                "directory with a tokenizer"
            )
        check_at_least("data.sequence_length", self.sequence_length, 1)
        if self.source in SOURCES and self.source != "stdlib" and not self.path:
            raise ConfigError(
                f"data.path is empty, but data.source={self.source!r} needs it: "
                "give a glob such as 'corpus/**/*.txt', or a data set such as 'c4/en:train'"
            )
        check_at_least("data.min_bytes", self.min_bytes, 0)
        check_at_least("data.max_document_bytes", self.max_document_bytes, 1)
        check_choice("data.held_out_by", self.held_out_by, HELD_OUT_BY)
        check_choice("data.windows", self.windows, WINDOWS)
        for number in self.skip_batches:
            check_at_least("data.skip_batches", number, 0)
        for store, weight in self.mixture.items():
            check_positive(f"data.mixture[{store!r}]", weight)
        if not self.store:
            raise ConfigError("data.store is empty: give a directory for the token store")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # such as "Possible nested set"
                re.compile(self.apart)
        except (re.error, FutureWarning) as error:
            raise ConfigError(
                f"data.apart={self.apart!r} is no regular expression: {error}"
            ) from None
        if not 0 < self.held_out < 1:
            raise ConfigError(f"data.held_out={self.held_out} is not between 0 and 1, such as 0.02")


@dataclass(kw_only=True)
class OptimizerConfig:
    """Optimiser, learning-rate schedule and gradient clipping."""

    name: str = option(
        "adamw",
        "'adamw'; 'muon', with muon for the matrices of the layers and Adam for the rest; or your "
        "own optimiser, 'module:function'",
    )
    learning_rate: float = option(6e-4, "Peak learning rate")
    muon_learning_rate: float = option(
        0.02, "With muon: peak learning rate of the matrices of the layers"
    )
    beta1: float = option(0.9, "Decay rate of Adam's first moment")
    beta2: float = option(0.98, "Decay rate of Adam's second moment")
    epsilon: float = option(1e-8, "Added to the square root of Adam's second moment")
    weight_decay: float = option(0.05, "Weight decay of matrices; norms and biases have none")
    clip_norm: float = option(2.0, "Largest global norm of the gradient; larger ones are clipped")
    schedule: str = option(
        "linear",
        "Learning rate after warm-up: 'constant'; 'linear' or 'cosine', falling to 0; 'wsd', "
        "constant and then falling to 0",
    )
    warmup_steps: int = option(375, "Steps in which the learning rate rises linearly from 0")
    moment_dtype: str = option(
        "float32", "Dtype in which the moments are stored: 'float32' or 'bfloat16'"
    )
    decay_share: float = option(
        0.5, "With wsd: share of all steps, at the end, in which the learning rate falls to 0"
    )

    def check(self) -> None:
        """Raises `ConfigError` for an invalid value."""
        check_values("optimizer", self)
        check_choice("optimizer.name", self.name, OPTIMIZERS, own=True)
        if is_own(self.name) and self.moment_dtype != "float32":
            raise ConfigError(
                f"optimizer.moment_dtype={self.moment_dtype!r} is for "
                f"{' and '.join(map(repr, OPTIMIZERS))}; {self.name!r} chooses its own dtypes"
            )
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        check_choice("optimizer.moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        for name in ("learning_rate", "muon_learning_rate", "epsilon", "clip_norm"):
            check_positive(f"optimizer.{name}", getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} is not in [0, 1)")
            if getattr(self, name) >= 1 - 2**-25:
                raise ConfigError(
                    f"optimizer.{name}={getattr(self, name)} is 1 in float32, and Adam "
                    f"divides by 1 - {name}"
                )
        check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        check_at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"optimizer.decay_share={self.decay_share} is not in (0, 1]")
        decaying = "muon_learning_rate" if self.name == "muon" else "learning_rate"
        if getattr(self, decaying) * self.weight_decay > 1:
            raise ConfigError(
                f"optimizer.weight_decay={self.weight_decay} times optimizer.{decaying}="
                f"{getattr(self, decaying)} is more than 1, so each step would flip the signs of "
                "the matrices; lower one of them"
            )


@dataclass(kw_only=True)
class TrainConfig:
    """Length of a run, its batches, and how often it logs, evaluates and saves."""

    steps: int = option(25_000, "Number of steps")
    batch_size: int = option(32, "Windows in a step, over all devices and micro-batches")
    micro_batches: int = option(
        1,
        "Number of parts of a batch that run one after another, with their gradients summed; more "
        "need less memory",
        changeable=True,
    )
    carry_state: bool = option(
        False,
        "Begin each window with the state that the row's previous window ended with; only for "
        "RetNets and contiguous windows",
    )
    z_loss: float = option(
        0.0,
        "Coefficient of the z-loss, the squared log normaliser of the softmax (arXiv 2204.02311), "
        "such as 1e-4; 0: none",
    )
    spike_deviations: float = option(
        10.0,
        "Skip a step whose loss or gradient norm exceeds its running mean by this many standard "
        "deviations; 0: skip only steps that are not finite",
        changeable=True,
    )
    max_skipped: int = option(5, "Stop after this many consecutive skipped steps", changeable=True)
    seed: int = option(0, "Seed of the initial parameters and of the order of the windows")
    log_every: int = option(10, "Steps between records in metrics.jsonl", changeable=True)
    eval_every: int = option(1000, "Steps between evaluations on held-out windows", changeable=True)
    eval_batches: int = option(
        16, "Largest number of batches of each store in an evaluation", changeable=True
    )
    checkpoint_every: int = option(1000, "Steps between checkpoints", changeable=True)
    checkpoint_minutes: float = option(
        0.0,
        "Also save a checkpoint when the last one is this many minutes old; 0: never",
        changeable=True,
    )
    keep_checkpoints: int = option(3, "Number of newest checkpoints to keep", changeable=True)
    keep_every: int = option(
        0, "Also keep the checkpoints of steps divisible by this; 0: none", changeable=True
    )
    wandb: str = option(
        "", "Weights & Biases project that also gets the metrics; empty: none", changeable=True
    )

    def check(self) -> None:
        """Raises `ConfigError` for a count that is too small or a batch that does not split."""
        check_values("train", self)
        for name in ("seed", "z_loss", "spike_deviations", "checkpoint_minutes", "keep_every"):
            check_at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("steps", "batch_size", "micro_batches", "max_skipped", "log_every"):
            check_at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints"):
            check_at_least(f"train.{name}", getattr(self, name), 1)
        # Steps are counted in int32; jax would use only the lower 32 bits of a longer seed.
        for name in ("steps", "seed"):
            check_at_most(f"train.{name}", getattr(self, name), _INT32_MOST)
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"train.batch_size={self.batch_size} is not divisible by "
                f"train.micro_batches={self.micro_batches}; "
                f"{nearest_multiples(self.batch_size, self.micro_batches)} would do"
            )


@dataclass(kw_only=True)
class MeshConfig:
    """Number of devices on each mesh axis. One axis may be -1: it takes all remaining devices."""

    data: int = option(-1, "Devices that split the batch and copy the parameters", changeable=True)
    fsdp: int = option(1, "Devices that split the batch and the parameters", changeable=True)
    seq: int = option(
        1,
        "Devices that split the positions of each row; a RetNet passes its state from one to the "
        "next, a Transformer gathers keys and values",
        changeable=True,
    )
    tensor: int = option(
        1, "Devices that split heads, feed-forward width and vocabulary", changeable=True
    )

    def check(self) -> None:
        """Raises `ConfigError` for an axis without devices, or more than one -1."""
        check_values("mesh", self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size != -1:
                check_at_least(f"mesh.{name}", size, 1)
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ConfigError(
                f"mesh={sizes}: only one axis may be -1, which takes all remaining devices"
            )


@dataclass(kw_only=True)
class ProfileConfig:
    """A trace of some steps, for XProf or Perfetto, in `workdir/profile`."""

    start: int = option(10, "First step to trace", changeable=True)
    steps: int = option(0, "Number of steps to trace; 0: none", changeable=True)

    def check(self) -> None:
        """Raises `ConfigError` for a negative number."""
        check_values("profile", self)
        check_at_least("profile.start", self.start, 1)
        check_at_least("profile.steps", self.steps, 0)


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
        "Trained model to start from: a directory, of this project or another, or a name on the "
        "Hugging Face hub. It determines the tokenizer and all model options but dtype, remat, "
        "scan_layers, chunk_size, dropout and activation_dropout",
    )

    def check(self) -> None:
        """Raises `ConfigError` that names the option, its value, and what would be valid."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            check_value(each.name, value, each.type)
            if dataclasses.is_dataclass(each.type):
                value.check()
        if self.train.carry_state and self.data.windows != "contiguous":
            raise ConfigError(
                f"train.carry_state=True needs data.windows='contiguous', not {self.data.windows!r}"
            )
        if self.train.carry_state and _unlimited(self.model):
            raise ConfigError(
                "train.carry_state=True needs a RetNet, or attention with a window: the cache of "
                f"{_unlimited(self.model)} grows with every step"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves nothing of "
                f"train.steps={self.train.steps} after the warm-up; lower it"
            )


def _unlimited(model: ModelConfig) -> str:
    """What in a model has a cache of unlimited size; empty: nothing."""
    if model.mixer == "attention" and model.window is None:
        return "a Transformer"
    if is_own(model.mixer):
        return f"model.mixer={model.mixer!r}"
    entries = [i for i, x in enumerate(model.attention_layers) if x.window is None]
    return f"model.attention_layers[{entries[0]}]" if entries else ""
