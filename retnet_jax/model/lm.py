"""RetNet and Transformer: one language model, two mixers, or one of your own.

    model = RetNet(config, rngs=nnx.Rngs(0))
    logits, state = model(tokens)                # i32[b t] -> f32[b t w]
    logits, state = model(next_tokens, state)    # continues where it stopped

Modules are plain pytrees: `jax.jit`, `jax.grad` and `jax.eval_shape` take them as they are. The
layers are one Block with stacked parameters [n ...], run by `jax.lax.scan`, or written out with
`scan_layers=False`; those of a hybrid are a list of Blocks (`hybrid.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retnet_jax.config import ModelConfig
from retnet_jax.errors import ConfigError
from retnet_jax.model.attention import Attention
from retnet_jax.model.hybrid import HybridMixers, HybridState, PeriodStates, layer_mixer
from retnet_jax.model.initial import redraw, scales, table_deviations
from retnet_jax.model.kv_cache import KVCache, WindowCache, is_stacked, short_conv_of
from retnet_jax.model.layers import NORMS, FeedForward, normal
from retnet_jax.model.mixer import Mixer, RetentionState
from retnet_jax.model.multi_scale_retention import MultiScaleRetention
from retnet_jax.model.places import Branches
from retnet_jax.model.remat import remat_policy
from retnet_jax.ops.dropout import LayerKeys, dropout, place_keys
from retnet_jax.ops.embedding import look_up
from retnet_jax.ops.storage_hints import width_innermost
from retnet_jax.own_objects import is_own, own_object
from retnet_jax.parallel.sharding import constrain
from retnet_jax.shapes import Activations, Array, Float, Int, RandomKeys

State = RetentionState | KVCache | WindowCache | HybridState


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) (arXiv 2307.08621, Eq. 9).

    With `post_norm`: norm(x + mixer(x)), then norm(x + ffn(x)). With `deepnorm` the first x of each
    sum is multiplied by (2 n)^(1/4) (arXiv 2203.00555). What is added to x goes through
    `config.dropout`. `initial.py` has the initial parameters.
    """

    def __init__(self, mixer: Callable[..., Mixer], config: ModelConfig, *, rngs: nnx.Rngs):
        norm = NORMS[config.norm]
        self.mixer_norm = norm(config.d_model, config.norm_epsilon)
        self.mixer = mixer(config, rngs=rngs, **scales(config))
        self.ffn_norm = norm(config.d_model, config.norm_epsilon)
        self.ffn = FeedForward(config, rngs=rngs, **scales(config))
        redraw(self.mixer, self.ffn, config, rngs)
        self.post_norm = config.post_norm
        self.dropout = config.dropout
        self.residual_scale = (2 * config.n_layers) ** 0.25 if config.deepnorm else 1.0

    def __call__(self, x: Activations, state, context, form: str, keys: LayerKeys):
        def mixed(y: Activations) -> tuple[Activations, Any]:
            y, after = self.mixer(y, state, context, form)
            y = checkpoint_name(y, "out")
            return dropout(y, keys.mixer, self.dropout, "btd"), after

        def fed_forward(y: Activations) -> Activations:
            return dropout(self.ffn(y, keys.inner), keys.ffn, self.dropout, "btd")

        if self.post_norm:
            y, state = mixed(x)
            x = self.mixer_norm(self.residual_scale * x + y)
            return self.ffn_norm(self.residual_scale * x + fed_forward(x)), state
        y, state = mixed(checkpoint_name(self.mixer_norm(x), "mixer_input"))
        x = self.residual_scale * x + y
        y = checkpoint_name(self.ffn_norm(x), "ffn_input")
        return self.residual_scale * x + fed_forward(y), state


class LanguageModel(nnx.Module):
    """The base of RetNet and Transformer: everything except the mixer.

    Gradients are for reverse mode (`jax.grad`, `jax.vjp`): several functions in the model have
    custom gradients, for which jax refuses forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`).
    `nnx.tabulate` cannot show a model whose layers run in a scan, and leaves the classes in a
    broken state; `retnet_jax.model.parameters.parameter_shapes` lists the parameters.
    """

    stacked_state: ClassVar[bool] = True  # the layers of a state are stacked, not a tuple
    mixer: str
    mixer_type: Any  # a Mixer; of a hybrid `HybridMixers`
    layers: Any  # a Block, stacked; of a hybrid a list of them

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draws the parameters.

        Args:
          config: Config of the model; `config.mixer` is set to that of this class.
          rngs: Source of the random parameters, such as `nnx.Rngs(0)`.

        Raises:
          ConfigError: for sizes that do not fit together, and for float64 if jax does not allow it.
        """
        config = dataclasses.replace(config, mixer=self.mixer)
        config.check()
        if config.dtype == "float64" and not _wide_numbers():
            raise ConfigError(
                "model.dtype='float64' needs 64-bit numbers in jax: build and call the model "
                "inside `with jax.enable_x64(True):`"
            )
        self.config = config
        table = (config.vocab_size, config.d_model)
        of_embedding, of_head = table_deviations(config)
        self.embedding = nnx.Param(normal(rngs, table, of_embedding))
        if config.embedding_norm:
            self.embedding_norm = NORMS[config.norm](config.d_model, config.norm_epsilon)
        keys = jax.random.split(rngs.params(), config.n_layers)
        if config.attention_layers:
            self.mixer_type = HybridMixers
            p = config.layer_period
            self.layers = nnx.List(
                _stacked(layer_mixer(config, place), config, keys[place::p]) for place in range(p)
            )
        else:
            self.layers = _stacked(self.mixer_type, config, keys)
        if not config.post_norm:
            self.final_norm = NORMS[config.norm](config.d_model, config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = nnx.Param(normal(rngs, table, of_head))

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        state: State | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        form: str = "chunkwise",
        dropout_keys: RandomKeys | None = None,
    ) -> tuple[Float[Array, "b t w"], State]:
        """Logits of the token after each position, and the state after the last.

        Args:
          tokens: Token ids, int32. Their values are not checked, since that would wait for the
            device: an id out of range is treated as the nearest valid id.
          state: State from an earlier call or from `init_state`; None: nothing was read before.
          segment_ids: Documents and padding as in `retention`; None: each row is one document.
          form: Form of retention: "parallel", "chunkwise" or "recurrent".
          dropout_keys: Random key of each row, such as those of `ops.dropout.row_keys`, for the
            dropout of the config; None: nothing is dropped, as outside of training.

        Raises:
          ValueError: for tokens that are not integers, a state of another model or batch, and
            dropout keys that are not one typed key for each row.
        """
        hidden, state = self.hidden(tokens, state, segment_ids, form, dropout_keys)
        return self.logits(hidden), state

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        state: State | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        form: str = "chunkwise",
        dropout_keys: RandomKeys | None = None,
    ) -> tuple[Float[Array, "b t d"], State]:
        """Like a call, without the output head: the normed activations that it is applied to."""
        _check_input(tokens, segment_ids, dropout_keys)
        if state is not None:
            check_state(self, state, len(tokens))
        context, layers = self.mixer_type.prepare(self.config, state, tokens.shape, segment_ids)
        x, layers = self._hidden(tokens, context, layers, form, dropout_keys)
        return x, context.state(layers)

    def _hidden(
        self, tokens, context, layers, form: str, dropout_keys: RandomKeys | None
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The normed activations, and what each layer gives for the state after the tokens."""
        config = self.config
        embedding_keys, keys = place_keys(dropout_keys, config.n_layers)
        x = dropout(self._embed(tokens), embedding_keys, config.dropout, "btd")
        x, layers = self._run_layers(x, layers, context, form, keys)
        if not config.post_norm:
            x = self.final_norm(x)
        return x, layers

    def _run_layers(self, x: Activations, states, context, form: str, keys: LayerKeys):
        """The activations after all layers, and the state of each layer after the tokens."""
        config = self.config

        def layer(x, of_layer):
            block, layer_state, layer_keys = of_layer
            x, layer_state = block(x, layer_state, context, form, layer_keys)
            return width_innermost(constrain(x, "btd")), layer_state

        if config.remat != "none":
            layer = jax.checkpoint(layer, prevent_cse=False, policy=remat_policy(config))
        if config.attention_layers:
            return self._run_periods(x, states, context, form, keys)
        return jax.lax.scan(
            layer, x, (self.layers, states, keys), unroll=self._unroll(config.n_layers)
        )

    def _run_periods(self, x: Activations, states, context, form: str, keys: LayerKeys):
        """As `_run_layers`, for a hybrid."""
        config = self.config

        def layer(place, x, block, layer_state, layer_keys):
            x, layer_state = block(x, layer_state, context.of(place), form, layer_keys)
            return width_innermost(constrain(x, "btd")), layer_state

        if config.remat != "none":
            layer = jax.checkpoint(
                layer, prevent_cse=False, policy=remat_policy(config), static_argnums=0
            )

        def period(x, of_period):
            blocks, before, keys = of_period
            after = []
            for place, block in enumerate(blocks):
                layer_state = None if before is None else before[place]
                x, layer_state = layer(place, x, block, layer_state, keys.of(place))
                after.append(layer_state)
            return x, tuple(after)

        repeats = config.n_layers // config.layer_period
        blocks, before = tuple(self.layers), None if states is None else states.places
        each = blocks, before, keys.periods(repeats)
        x, after = jax.lax.scan(period, x, each, unroll=self._unroll(repeats))
        return x, PeriodStates(after)

    def _unroll(self, repeats: int) -> int:
        """The number of repeats in one iteration of the loop over the layers.

        A loop zeroes and fills a stack for each array that the backward pass needs, and copies it
        out again; a few layers are faster without (a 4-layer step on 2 cores: 201 ms for 227).
        """
        config = self.config
        return 1 if config.scan_layers and config.n_layers > 4 else repeats

    def _embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        config = self.config
        x = self._embedding_rows(tokens)
        if config.embedding_scale:
            x = x * config.d_model**0.5
        return constrain(self.embedding_norm(x) if config.embedding_norm else x, "btd")

    def _embedding_rows(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return look_up(self.embedding[...], tokens, self.config.dtype)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t w"]:
        """The output head: float32 logits of the normed activations."""
        return jnp.einsum(
            "btd,wd->btw",
            hidden,
            self.head_matrix().astype(hidden.dtype),
            preferred_element_type=np.promote_types(np.float32, hidden.dtype),
        )

    def head_matrix(self) -> Float[Array, "w d"]:
        """The output head's matrix: the embedding, if the two are tied."""
        return self.embedding[...] if self.config.tie_embeddings else self.head[...]

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """The sharding of the norms: a copy on every device that has parameters."""
        first = self.layers[0] if self.config.attention_layers else self.layers
        return first.mixer_norm.scale[...].sharding

    def init_state(self, batch_size: int, capacity: int) -> State:
        """The state before the first token.

        Args:
          batch_size: Number of rows.
          capacity: Number of tokens that a row will read in total: the slots of a Transformer's
            cache. A RetNet's state has a fixed size.
        """
        return self.mixer_type.init_state(self.config, batch_size, capacity)


def _stacked(mixer: Callable[..., Mixer], config: ModelConfig, keys: Array) -> Block:
    """Layers of one kind as a Block whose parameters are stacked: a layer for each random key."""
    return jax.vmap(lambda key: Block(mixer, config, rngs=nnx.Rngs(params=key)))(keys)


class RetNet(LanguageModel):
    """The language model with multi-scale retention; with `attention_layers`, a hybrid."""

    mixer = "retention"
    mixer_type = MultiScaleRetention


class Transformer(LanguageModel):
    """The same language model with softmax attention."""

    mixer = "attention"
    mixer_type = Attention

    def hidden_of_branches(
        self,
        tokens: Int[Array, "b t"],
        branches: Branches,
        state: KVCache | WindowCache | None = None,
    ) -> Float[Array, "b t d"]:
        """As `hidden`, for rows that each hold several continuations of one text.

        What the continuations share is in the row once, and `state` is read once for all of them.
        There is no state after them.

        Args:
          tokens: Token ids, int32.
          branches: Which tokens continue which.
          state: State that all branches of a row continue; None: nothing was read before.

        Raises:
          ValueError: as `hidden`.
        """
        _check_input(tokens, branches.until, None)
        if state is not None:
            check_state(self, state, len(tokens))
        context, layers = Attention.prepare_branches(self.config, state, branches)
        return self._hidden(tokens, context, layers, "chunkwise", None)[0]


class OwnMixerModel(LanguageModel):
    """The same language model with the `Mixer` that `config.mixer` names, "module:class".

    Raises:
      ConfigError: if that is not found or is no subclass of `Mixer`, and as `LanguageModel`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        found = own_object("model.mixer", config.mixer)
        if not (isinstance(found, type) and issubclass(found, Mixer)):
            raise ConfigError(
                f"model.mixer={config.mixer!r} is {found!r}, no subclass of "
                "retnet_jax.model.mixer.Mixer"
            )
        self.mixer, self.mixer_type = config.mixer, found
        super().__init__(config, rngs=rngs)


def build_model(config: ModelConfig, *, rngs: nnx.Rngs) -> LanguageModel:
    """The model that `config.mixer` names."""
    config.check()
    if is_own(config.mixer):
        return OwnMixerModel(config, rngs=rngs)
    return {"retention": RetNet, "attention": Transformer}[config.mixer](config, rngs=rngs)


def _wide_numbers() -> bool:
    """Whether jax allows numbers of 64 bits."""
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue] (set by setattr)


def check_state(model: LanguageModel, state: State, rows: int) -> None:
    """Raises `ValueError` if a state is of another model, or has another number of rows."""
    expected = _state_type(model)
    if not isinstance(state, expected):
        raise ValueError(
            f"state is a {type(state).__name__}; this model's is a {expected.__name__}"
        )
    if state.position.shape[0] != rows:
        raise ValueError(
            f"state has {state.position.shape[0]} rows for a batch of {rows}; "
            "`state.take` gives a row for each"
        )
    leaves = jax.tree.leaves(state.layers)
    if not leaves and expected is not RetentionState:
        raise ValueError("state has no layers; `init_state` gives an empty state")
    stacked = is_stacked(state.layers)
    if leaves and stacked != model.stacked_state:
        raise ValueError(
            "state is of the trained model, but this is a model for decoding (`for_decoding`)"
            if stacked
            else "state is of a model for decoding (`for_decoding`), but this one is not"
        )
    for leaf in leaves:
        found = leaf.shape[1 if stacked else 0]
        if found != rows:
            raise ValueError(f"state has layers of {found} rows for a batch of {rows}")
    if leaves:
        _check_layers(model, state, rows)


def _check_layers(model: LanguageModel, state: State, rows: int) -> None:
    """Raises `ValueError` if a state has other layers than the model, or of other sizes."""
    slots = getattr(state, "visible", None)
    capacity = 1 if slots is None else slots.shape[1]
    expected = jax.eval_shape(lambda: model.init_state(rows, capacity))
    if not model.stacked_state:
        numbers = [len(tuple(x.layers or ())) for x in (state, expected)]
        if numbers[0] != numbers[1]:
            raise ValueError(f"state has {numbers[0]} layers; this model has {numbers[1]}")
    widths = [short_conv_of(x.layers) for x in (state, expected)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"state is of a model with short_conv={widths[0]}; this model has "
            f"short_conv={widths[1]}"
        )
    wanted, found = (dict(jax.tree.leaves_with_path(x)) for x in (expected, state))
    if wanted.keys() != found.keys():
        raise ValueError("state is of a hybrid with other attention layers")
    for path, leaf in found.items():
        if leaf.shape != wanted[path].shape:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} is {list(leaf.shape)}, of a model with other "
                f"sizes; this model's is {list(wanted[path].shape)}"
            )


def _state_type(model: LanguageModel) -> type:
    """The type of a model's states."""
    if model.config.attention_layers:
        return HybridState
    if issubclass(model.mixer_type, Attention):
        return KVCache if model.config.window is None else WindowCache
    return RetentionState


def _check_input(tokens: Array, segment_ids: Array | None, dropout_keys: Array | None) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens are {tokens.dtype}{list(tokens.shape)}; they must be integers [b t], the "
            "token ids of rows"
        )
    if segment_ids is not None and segment_ids.shape != tokens.shape:
        raise ValueError(f"segment_ids {segment_ids.shape} do not fit tokens {tokens.shape}")
    if dropout_keys is None:
        return
    typed = jnp.issubdtype(dropout_keys.dtype, jax.dtypes.prng_key)
    if not typed or dropout_keys.shape != tokens.shape[:1]:
        raise ValueError(
            f"dropout_keys are {dropout_keys.dtype}{list(dropout_keys.shape)}; rows of "
            f"{list(tokens.shape)} tokens need {len(tokens)} typed keys, one for each row, such as "
            f"jax.random.split(jax.random.key(0), {len(tokens)})"
        )
