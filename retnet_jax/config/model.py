"""The options of a model, their checks, and the sizes that follow from them.

It does not postpone annotations, as `run.py`. The file is long because each option stands beside
its checks and the sizes that follow.
"""

import dataclasses
from dataclasses import dataclass

from retnet_jax.config.attention import AttentionLayers, check_attention_layers, layer_kinds
from retnet_jax.config.fields import (
    check_at_least,
    check_choice,
    check_positive,
    check_rate,
    check_values,
    nearest_multiples,
    option,
)
from retnet_jax.config.sizes import parameter_count, training_flops_per_token, twin_ffn_width
from retnet_jax.errors import ConfigError

ARCHITECTURES = ("retnet", "transformer")
MIXERS = ("retention", "attention")
DECAYS = ("log_spaced", "powers_of_two", "none")
FEED_FORWARDS = ("relu", "gelu", "swish", "reglu", "geglu", "swiglu")
NORMS = ("layer", "rms")
ROTATIONS = ("rope", "torchscale", "none")
INITS = ("scaled", "zero_outputs", "torchscale", "deepnet")
SCORE_CLAMPS = ("absolute", "signed")
DTYPES = ("float32", "bfloat16", "float64")
# Functions of `ops/feature_map.py`, by the names of transformers' activations.
FEATURE_MAPS = (
    *("linear", "relu", "relu2", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "swish"),
    *("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"),
    *("gelu_python_tanh", "gelu_10", "quick_gelu", "mish", "hardswish", "laplace"),
    *("sqrtsoftplus", "prelu", "xielu"),
)
# Option of a mixer -> the mixers that have it; the others are given its default.
MIXER_OPTIONS = {
    "short_conv": ("retention", "attention"),
    "n_kv_heads": ("retention", "attention"),
    "qk_norm": ("retention", "attention"),
    "init": ("retention", "attention"),
    "window": ("attention",),
    "feature_map": ("retention",),
    "head_norm": ("retention",),
    "head_norm_epsilon": ("retention",),
    "output_gate": ("retention",),
    "attention_layers": ("retention",),
}
REMATS = ("none", "full", "dots")
# Activations of a layer that `model.remat` can name.
ACTIVATIONS = (
    *("mixer_input", "q", "k", "v", "gate", "retention", "out"),
    *("ffn_input", "up", "linear"),
)


# Not frozen, because command-line overrides set single fields. A model keeps its own copy, and the
# copy's hash is part of the hash of the model's tree structure.
@dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
    """Architecture of a language model, RetNet or Transformer."""

    # The model.
    mixer: str = option(
        "retention",
        "Mixes the positions of a sequence: 'retention' (RetNet), 'attention' (Transformer), or "
        "your own `Mixer`, 'module:class'",
    )
    vocab_size: int = option(32_000, "Number of token ids")
    d_model: int = option(512, "Width of the residual stream")
    n_layers: int = option(6, "Number of layers")
    n_heads: int = option(4, "Number of heads in each layer")
    key_dim: int | None = option(
        None, "Width of queries and keys, summed over the heads; None: d_model"
    )
    value_dim: int | None = option(
        None,
        "Width of values, summed over the heads; None: 2 d_model for retention, otherwise d_model",
    )
    window: int | None = option(
        None,
        "Attention: number of tokens that a query sees, itself included; None: all",
    )
    attention_layers: tuple[AttentionLayers, ...] = option(
        (),
        "Layers of a RetNet whose mixer is attention, with their settings, such as "
        "1,5:n_heads=8,n_kv_heads=2,window=128; other settings follow a semicolon",
    )
    ffn: str = option(
        "gelu",
        "Feed-forward layer: 'relu', 'gelu' or 'swish' for act(x W1) W2; 'reglu', 'geglu' or "
        "'swiglu' for (act(x W1) * x W3) W2",
    )
    ffn_dim: int | None = option(
        None,
        "Inner width of the feed-forward layer; None: 2 d_model for retention, otherwise 4 d_model",
    )
    norm: str = option("layer", "Norms: 'layer' (with scale and bias) or 'rms' (with scale)")
    norm_epsilon: float = option(1e-6, "Added to the variance or mean square in every norm")
    decay: str = option(
        "log_spaced",
        "Decay gamma of each head: 'log_spaced' over decay_range; 'powers_of_two' (Eq. 8 of the "
        "paper); 'none': gamma is 1",
    )
    decay_range: tuple[float, float] = option(
        (1 / 32, 1 / 512),
        "With log_spaced: 1 - gamma of the first and of the last head; the same number twice: one "
        "gamma for all heads",
    )
    row_normalizer: bool = option(
        True,
        "Divide retention by the square root of the sum of its decays; False only for checkpoints "
        "of fla",
    )
    short_conv: int | None = option(
        None,
        "Width of a causal convolution of each channel of q, k and v, with SiLU: the number of "
        "tokens it sees, 2 or more; None: there is none",
    )
    n_kv_heads: int | None = option(
        None,
        "Heads of keys and values, each shared by n_heads / n_kv_heads heads in a row; None: "
        "n_heads",
    )
    qk_norm: bool = option(
        False,
        "RMS norm of the queries and keys of each head before the rotation, with a learned scale "
        "for each, shared by the heads; not in the layers of attention_layers",
    )
    feature_map: str | None = option(
        None,
        "Elementwise function of q and k, such as 'relu' or 'gelu'; 'prelu' and 'xielu' have "
        "learned parameters; None: there is none",
    )
    head_norm: bool = option(
        True,
        "Norm of each head's outputs of retention; False: only the row normaliser scales them",
    )
    head_norm_epsilon: float | None = option(
        None,
        "Added to the variance or mean square in the norm of the heads, which can divide by almost "
        "0 at the first tokens of a document; None: norm_epsilon",
    )
    output_gate: bool = option(
        True, "Multiply the outputs of retention, after their norm, by swish(x W_gate)"
    )
    init: str = option(
        "scaled",
        "Initial parameters: 'scaled' (normal, smaller in output projections; with deepnorm as "
        "its paper scales them); 'zero_outputs', the same with output projections of 0; "
        "'torchscale' (its gains); 'deepnet' (arXiv 2203.00555, without its residual scale)",
    )
    tie_embeddings: bool = option(False, "Use the embedding matrix as output head too")
    dropout: float = option(
        0.0,
        "In training, probability of setting a number to 0 after the embedding and in what each "
        "mixer and each feed-forward layer adds to the residual stream",
        changeable=True,
        computation=True,
    )
    activation_dropout: float = option(
        0.0,
        "In training, probability of setting a number to 0 inside the feed-forward layer, after "
        "its activation and gate",
        changeable=True,
        computation=True,
    )
    dtype: str = option(
        "float32",
        "Dtype of activations: 'float32', 'bfloat16' (parameters, decay, state and loss stay "
        "float32) or 'float64' (everything is float64)",
        computation=True,
    )
    remat: str = option(
        "none",
        "Activations that the backward pass recomputes: 'none'; 'full', all; 'dots', all but "
        "matrix products; a list such as 'q,k,v,up', all but those; 'offload:q,k,v', all but "
        "those, which are stored on the host",
        changeable=True,
        computation=True,
    )
    scan_layers: bool = option(
        True,
        "Run the layers as a loop, which compiles in the same time for any number. False: write "
        "them out, which is faster to run, by 9 % for 1.3B on an H200, takes longer to compile "
        "(minutes on a TPU) and more memory. Up to 4 are always written out",
        changeable=True,
        computation=True,
    )
    chunk_size: int | None = option(
        None,
        "Tokens in a chunk of chunkwise retention; None: the fastest for platform and length",
        changeable=True,
        computation=True,
    )

    # Only for checkpoints of other implementations (`interop/presets.py`).
    rotation: str = option(
        "rope",
        "Rotation of queries and keys of width k. 'rope': pairs (i, i + k/2), angles "
        "10000^(-2i/k), queries scaled by k^-1/2; 'torchscale': pairs (2i, 2i + 1), angles "
        "10000^(-i/(k/2 - 1)), keys scaled, and so the state; 'none': no rotation, queries scaled",
        foreign=True,
    )
    embedding_scale: bool = option(
        False, "Multiply embeddings by sqrt(d_model); torchscale, syncdoth", foreign=True
    )
    embedding_norm: bool = option(
        False, "Norm after the embedding; torchscale, syncdoth", foreign=True
    )
    mixer_bias: bool = option(
        False, "Biases in q, k, v, gate and out; torchscale of 2023", foreign=True
    )
    ffn_bias: bool = option(
        False, "Biases in the feed-forward layer; torchscale of 2023, syncdoth", foreign=True
    )
    ffn_norm: str | None = option(
        None,
        "Norm before W2 (sub-LayerNorm): 'layer', 'rms' or None; torchscale of 2023, syncdoth",
        foreign=True,
    )
    head_norm_scale: bool = option(
        False, "Learned scale in the norm of the heads, shared by all heads; fla", foreign=True
    )
    post_norm: bool = option(
        False,
        "Norms after the residual sums, and no norm at the end; torchscale, syncdoth",
        foreign=True,
    )
    deepnorm: bool = option(
        False,
        "Multiply the residual by (2 n_layers)^(1/4) (arXiv 2203.00555); torchscale, syncdoth",
        foreign=True,
    )
    score_clamp: str | None = option(
        None,
        "torchscale's clamp of the row sums of scores: 'absolute', 'signed' (its version of 2023) "
        "or None; only for the parallel form",
        foreign=True,
    )

    @property
    def q_width(self) -> int:
        """Width of queries and keys, summed over the heads."""
        return self.d_model if self.key_dim is None else self.key_dim

    @property
    def v_width(self) -> int:
        """Width of values, summed over the heads."""
        if self.value_dim is not None:
            return self.value_dim
        return 2 * self.d_model if self.mixer == "retention" else self.d_model

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def k_channels(self) -> int:
        """Outputs of the projection of keys: their width, summed over their own heads."""
        return self.q_width // self.n_heads * self.kv_heads

    @property
    def v_channels(self) -> int:
        """Outputs of the projection of values: their width, summed over their own heads."""
        return self.v_width // self.n_heads * self.kv_heads

    @property
    def epsilon_of_heads(self) -> float:
        """The epsilon in the norm of the heads."""
        return self.norm_epsilon if self.head_norm_epsilon is None else self.head_norm_epsilon

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
    def has_dropout(self) -> bool:
        """Whether a training step drops anything."""
        return self.dropout > 0 or self.activation_dropout > 0

    @property
    def layer_kinds(self) -> tuple[int | None, ...]:
        """The entry of `attention_layers` that each layer is in; None: it has the model's mixer."""
        return layer_kinds(self.attention_layers, self.n_layers)

    @property
    def layer_period(self) -> int:
        """The smallest divisor p of n_layers for which layers i and i + p are of one kind."""
        kinds, n = self.layer_kinds, self.n_layers
        periods = (p for p in range(1, n + 1) if n % p == 0 and kinds == kinds[:p] * (n // p))
        return next(periods)

    @property
    def kept_activations(self) -> tuple[str, ...]:
        """The activations that `remat` keeps by name."""
        return tuple(self.remat.removeprefix("offload:").split(","))

    @property
    def accumulation_dtype(self) -> str:
        """Dtype of decays, norm statistics and logits, and of sums inside of operations."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def state_dtype(self) -> str:
        """Dtype in which the state is stored (`for_decoding` can choose another)."""
        return self.accumulation_dtype

    def check(self) -> None:
        """Raises `ConfigError` for an invalid value, or sizes that do not fit together."""
        check_values("model", self)
        self._check_choices()
        self._check_sizes()
        self._check_attention()

    def _check_choices(self) -> None:
        check_choice("model.mixer", self.mixer, MIXERS, own=True)
        check_choice("model.ffn", self.ffn, FEED_FORWARDS)
        check_choice("model.norm", self.norm, NORMS)
        check_choice("model.rotation", self.rotation, ROTATIONS)
        check_choice("model.decay", self.decay, DECAYS)
        check_choice("model.init", self.init, INITS)
        check_choice("model.dtype", self.dtype, DTYPES)
        if self.ffn_norm is not None:
            check_choice("model.ffn_norm", self.ffn_norm, NORMS)
        if self.score_clamp is not None:
            check_choice("model.score_clamp", self.score_clamp, SCORE_CLAMPS)
        if self.feature_map is not None:
            check_choice("model.feature_map", self.feature_map, FEATURE_MAPS)
        for name, mixers in MIXER_OPTIONS.items():
            value, default = getattr(self, name), _DEFAULTS[name]
            if self.mixer not in mixers and value != default:
                raise ConfigError(
                    f"model.{name}={value!r} is for model.mixer={' or '.join(map(repr, mixers))}, "
                    f"not {self.mixer!r}: leave it out, or set it to {default!r}"
                )
        if self.remat not in REMATS and not set(self.kept_activations) <= set(ACTIVATIONS):
            raise ConfigError(
                f"model.remat={self.remat!r} is not one of {', '.join(map(repr, REMATS))}, nor a "
                f"list of some of the activations {','.join(ACTIVATIONS)}, with or without "
                "'offload:' before it"
            )
        for name in ("head_norm_scale", "head_norm_epsilon"):
            if getattr(self, name) != _DEFAULTS[name] and not self.head_norm:
                raise ConfigError(
                    f"model.{name}={getattr(self, name)!r} needs the norm that "
                    "model.head_norm=False leaves out; set one of them to its default"
                )
        if self.head_norm_scale and self.norm != "rms":
            raise ConfigError(
                f"model.head_norm_scale=True is for model.norm='rms', not {self.norm!r}"
            )

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads"):
            check_at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("key_dim", "value_dim", "ffn_dim", "chunk_size"):
            if getattr(self, name) is not None:
                check_at_least(f"model.{name}", getattr(self, name), 1)
        if self.short_conv is not None:
            check_at_least("model.short_conv", self.short_conv, 2)
        check_at_least("model.n_kv_heads", self.kv_heads, 1)
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"model.n_kv_heads={self.n_kv_heads} does not divide model.n_heads={self.n_heads}"
            )
        check_positive("model.norm_epsilon", self.norm_epsilon)
        check_positive("model.head_norm_epsilon", self.epsilon_of_heads)
        check_rate("model.dropout", self.dropout)
        check_rate("model.activation_dropout", self.activation_dropout)
        for name, width in (("key_dim", self.q_width), ("value_dim", self.v_width)):
            shown = f"model.{name}={width}"
            if getattr(self, name) is None:
                shown = f"model.d_model={self.d_model} (so {name} is {width})"
            if width % self.n_heads:
                raise ConfigError(
                    f"{shown} is not divisible by model.n_heads={self.n_heads}; "
                    f"{nearest_multiples(width, self.n_heads)} would do"
                )
        if self.mixer == "attention" and self.q_width != self.v_width:
            raise ConfigError(
                f"attention needs keys and values of one width, but key_dim is {self.q_width} and "
                f"value_dim is {self.v_width}; leave both out, or use transformer_twin()"
            )
        if self.rotation != "none" and (self.q_width // self.n_heads) % 2:
            raise ConfigError(
                f"the key width of a head is {self.q_width}/{self.n_heads} = "
                f"{self.q_width // self.n_heads}; it must be even, because pairs of numbers are "
                "rotated"
            )
        if len(self.decay_range) != 2 or not all(0 < x < 1 for x in self.decay_range):
            raise ConfigError(
                f"model.decay_range={self.decay_range}: two numbers between 0 and 1 are needed, "
                "1 - gamma of the first and of the last head, such as (1/32, 1/512)"
            )

    def _check_attention(self) -> None:
        if self.window is not None:
            check_at_least("model.window", self.window, 1)
        check_attention_layers(self.attention_layers, self.d_model, self.n_layers)
        if self.qk_norm and None not in self.layer_kinds:
            raise ConfigError(
                "model.qk_norm=True is for layers with retention, but all layers are in "
                "model.attention_layers, which have no such norm; set it to False"
            )

    def built_as(self, architecture: str, n_heads: int | None = None) -> "ModelConfig":
        """This config for "retnet", its `transformer_twin` for "transformer"."""
        check_choice("the argument after --config=FILE:", architecture, ARCHITECTURES)
        return self if architecture == "retnet" else self.transformer_twin(n_heads)

    def transformer_twin(self, n_heads: int | None = None) -> "ModelConfig":
        """The Transformer with the same number of parameters as this RetNet, up to rounding.

        Attention has 4 d^2 parameters where retention has 2 d^2 + 3 d value_dim. The feed-forward
        layer is wider by the difference: 4 d instead of 2 d at the paper's sizes (section 3.1).
        Options that attention does not have are left out; `qk_norm` and `init` are kept.
        """
        dropped = {
            name: _DEFAULTS[name]
            for name, mixers in MIXER_OPTIONS.items()
            if "attention" not in mixers
        }
        return dataclasses.replace(
            self,
            **dropped,
            mixer="attention",
            n_heads=n_heads or self.n_heads,
            key_dim=None,
            value_dim=None,
            short_conv=None,
            n_kv_heads=None,
            ffn_dim=twin_ffn_width(self),
        )

    def parameter_count(self) -> int:
        """Number of trainable parameters, embedding and output head included."""
        return parameter_count(self)

    def training_flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs of one token's forward and backward pass, without recomputation.

        6 for each weight of a matrix product (the embedding look-up is not one) or convolution, and
        the FLOPs of the mixer's algorithm: causal attention multiplies with half the positions of
        the sequence on average; retention reads and writes a k by v state for each head; the user's
        own mixer counts its own (`Mixer.flops_per_token`).
        """
        return training_flops_per_token(self, sequence_length)


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
