"""Causal softmax attention with rotary positions: the mixer of the Transformer twin and of hybrids.

It has the interface of multi-scale retention, so that one Block, one trainer and one generator
serve both. Its state is a cache of keys and values (`kv_cache.py`): of all tokens so far, which
grows with the text, or of a window. Whole rows use flash attention where there is a kernel
(`ops/flash_attention.py`), and XLA in all other cases (`ops/attention.py`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from retnet_jax.config import ModelConfig
from retnet_jax.config.attention import AttentionLayers
from retnet_jax.model.kv_cache import (
    ConvolvedCache,
    KeysValues,
    KVCache,
    LayerCache,
    NewKeysValues,
    WindowCache,
    WindowKeysValues,
    is_stacked,
    write_slots,
    write_window,
)
from retnet_jax.model.layers import Linear, RMSNorm, ShortConvolution, convolve, split_heads
from retnet_jax.model.mixer import Mixer
from retnet_jax.model.places import (
    Branches,
    Places,
    Slots,
    find_places,
    find_slots,
    places_of_branches,
    seen_slots,
    seen_tokens,
    unchanged_slots,
    window_slots,
)
from retnet_jax.ops import flash_attention
from retnet_jax.ops.attention import (
    attend_in_window,
    attend_to_all,
    attend_to_cache,
    attend_to_used_slots,
    chunk_of_slots,
    without_padding,
)
from retnet_jax.ops.retention import (
    SplitDocuments,
    split_documents,
)
from retnet_jax.ops.rotation import Rotation, rotate, rotation
from retnet_jax.parallel.sharding import constrain
from retnet_jax.shapes import Activations, SegmentIds


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """The settings of an attention layer, of a Transformer or of a hybrid."""

    n_heads: int
    n_kv_heads: int
    head_width: int
    short_conv: int | None  # width of the convolutions of q, k and v; None: there are none
    qk_norm: bool
    window: int | None  # tokens that a query sees, itself included; None: all before it
    bias: bool  # in q, k and v
    out_bias: bool
    rotation: str
    rope_base: float

    @classmethod
    def of_transformer(cls, config: ModelConfig) -> "AttentionSettings":
        """The settings of all layers of a Transformer."""
        return cls(
            n_heads=config.n_heads,
            n_kv_heads=config.kv_heads,
            head_width=config.q_width // config.n_heads,
            short_conv=config.short_conv,
            qk_norm=config.qk_norm,
            window=config.window,
            bias=config.mixer_bias,
            out_bias=config.mixer_bias,
            rotation=config.rotation,
            rope_base=10_000.0,
        )

    @classmethod
    def of_layers(cls, config: ModelConfig, entry: AttentionLayers) -> "AttentionSettings":
        """The settings of an entry of `config.attention_layers`."""
        return cls(
            n_heads=entry.n_heads,
            n_kv_heads=entry.kv_heads,
            head_width=config.d_model // entry.n_heads,
            short_conv=None,
            qk_norm=False,
            window=entry.window,
            bias=entry.bias,
            out_bias=False,
            rotation="rope",
            rope_base=entry.rope_base,
        )

    def init_layers(self, batch_size: int, capacity: int, dtype: str, n: int) -> LayerCache:
        """Empty caches of `n` layers, in the activations' dtype."""
        slots = capacity if self.window is None else self.window
        shape = (n, batch_size, self.n_kv_heads, self.head_width, slots)
        kind = KeysValues if self.window is None else WindowKeysValues
        cache = kind(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        if self.short_conv is None:
            return cache
        shape = (n, batch_size, self.short_conv - 1)
        last = (jnp.zeros((*shape, h, self.head_width), dtype) for h in self.heads)
        return ConvolvedCache(cache, *last)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Numbers of heads of q, k and v."""
        return self.n_heads, self.n_kv_heads, self.n_kv_heads


class AttentionContext(NamedTuple):
    """Arrays that all layers with the same settings share, and what writes their caches."""

    turn: Rotation
    # For convolutions; None: each row is one document.
    documents: SplitDocuments | Branches | None
    attend: Callable  # (q, k, v, cache) -> y, named "retention" for jax.checkpoint
    write: Callable  # (cache, new keys and values) -> cache
    state: Callable  # (new keys and values of each layer) -> the state after the batch


class Attention(Mixer):
    """Softmax attention with its projections.

    The order: projections, convolutions, norm of q and k (`qk_norm`), rotation, attention.
    """

    inputs = ("q", "k", "v")  # the Linears that are applied to the input

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        value_scale: float,
        out_scale: float,
        entry: AttentionLayers | None = None,
    ):
        """Draws the parameters; `entry` is the layer's entry of `config.attention_layers`."""
        settings = AttentionSettings.of_transformer(config)
        if entry is not None:
            settings = AttentionSettings.of_layers(config, entry)
        d, bias = config.d_model, settings.bias
        inner, kv = (n * settings.head_width for n in (settings.n_heads, settings.n_kv_heads))
        self.q = Linear(d, inner, rngs=rngs, bias=bias)
        self.k = Linear(d, kv, rngs=rngs, bias=bias)
        self.v = Linear(d, kv, rngs=rngs, scale=value_scale, bias=bias)
        self.out = Linear(inner, d, rngs=rngs, scale=out_scale, bias=settings.out_bias)
        if settings.short_conv is not None:
            self.q_conv, self.k_conv, self.v_conv = (
                ShortConvolution(heads * settings.head_width, settings.short_conv, rngs=rngs)
                for heads in settings.heads
            )
        if settings.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(settings.head_width, config.norm_epsilon) for _ in range(2)
            )
        self.config = config
        self.settings = settings

    def __call__(
        self,
        x: Activations,
        state: LayerCache | None,
        context: AttentionContext,
        form: str,
    ) -> tuple[Activations, NewKeysValues]:
        """Attention of the tokens to their documents.

        It has only one form: `form` may be the name of any and makes no difference. The cache
        `state` is only read; the new keys and values are returned, and written into all layers'
        caches by `AttentionContext.state`.
        """
        settings = self.settings
        q, k, v = self.project(x)
        last, cache = (), state
        if settings.short_conv is not None:
            before = (None,) * 3
            if isinstance(state, ConvolvedCache):
                cache, before = state.cache, state[1:]
            convolutions = (self.q_conv, self.k_conv, self.v_conv)
            inputs, documents = (q, k, v), context.documents
            if isinstance(documents, Branches):
                q, k, v = (
                    convolution.of_branches(u, last_inputs, documents)
                    for convolution, u, last_inputs in zip(
                        convolutions, inputs, before, strict=True
                    )
                )
            else:
                (q, k, v), last = convolve(convolutions, inputs, before, documents, settings.heads)
        q = split_heads(q, settings.n_heads)  # [b t h k]
        k, v = (split_heads(y, settings.n_kv_heads) for y in (k, v))  # [b t g k]
        if settings.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, context.turn, settings.rotation, q.shape[-1] ** -0.5)
        k = rotate(k, context.turn, settings.rotation)
        # Where positions are split, each device needs the keys and values of all positions.
        k, v = constrain(k, "bshk"), constrain(v, "bshv")
        y = constrain(context.attend(q, k, v, cache), "bthv")
        read = None if state is None else jnp.isnan(y[0, 0, 0, 0]).astype(jnp.int32)
        return self.out(y.reshape(*x.shape[:2], -1)), NewKeysValues(k, v, read, last)

    @staticmethod
    def implementation(
        config: ModelConfig, shape: tuple[int, int], one_document: bool = False
    ) -> str:
        """The implementation that training uses for a batch of tokens [b t], as a sentence.

        To be called with the mesh set. `one_document`: the batch has no segment ids.
        """
        settings = AttentionSettings.of_transformer(config)
        return explain_choice(settings, config.dtype, shape, one_document)

    @staticmethod
    def init_state(config: ModelConfig, batch_size: int, capacity: int) -> KVCache | WindowCache:
        """An empty cache with `capacity` slots per row, or of the window's size."""
        settings = AttentionSettings.of_transformer(config)
        layers = settings.init_layers(batch_size, capacity, config.dtype, config.n_layers)
        position = jnp.zeros(batch_size, jnp.int32)
        if settings.window is not None:
            return WindowCache(layers, position)
        visible = jnp.zeros((batch_size, capacity), bool)
        return KVCache(layers, visible, jnp.zeros(batch_size, jnp.int32), position)

    @staticmethod
    def prepare(
        config: ModelConfig,
        state: KVCache | WindowCache | None,
        shape: tuple[int, int],
        segment_ids: SegmentIds | None,
    ) -> tuple[AttentionContext, Any]:
        """The context of a batch of tokens [b t], and the cache of each layer before them."""
        settings = AttentionSettings.of_transformer(config)
        fresh = state is None
        if state is None:
            state = Attention.init_state(config, shape[0], shape[1])._replace(layers=None)
        state = state.with_room(shape[1])
        places = find_places(state.position, shape, segment_ids, fresh)
        slots = None
        if isinstance(state, KVCache):
            slots = find_slots(state.visible, state.length, places)
        separate = state.layers is not None and not is_stacked(state.layers)
        context = attention_context(settings, config, places, slots, separate)
        if settings.short_conv is not None and segment_ids is not None:
            context = context._replace(documents=split_documents(segment_ids))

        def after(new) -> KVCache | WindowCache:
            layers = write_layers(context.write, state.layers, new)
            if slots is None:
                return WindowCache(layers, places.after)
            return KVCache(layers, slots.visible, slots.length, places.after)

        return context._replace(state=after), state.layers

    @staticmethod
    def prepare_branches(
        config: ModelConfig, state: KVCache | WindowCache | None, branches: Branches
    ) -> tuple[AttentionContext, Any]:
        """As `prepare`, for rows of branches. They cannot be written into a cache."""
        settings = AttentionSettings.of_transformer(config)
        fresh = state is None
        if state is None:
            state = Attention.init_state(config, *branches.place.shape)._replace(layers=None)
        places = places_of_branches(state.position, branches, fresh)
        slots = None
        if isinstance(state, KVCache):
            slots = unchanged_slots(state.visible, state.length)
        separate = state.layers is not None and not is_stacked(state.layers)
        context = attention_context(settings, config, places, slots, separate)
        return context._replace(documents=branches), state.layers


def attention_context(
    settings: AttentionSettings,
    config: ModelConfig,
    places: Places,
    slots: Slots | None,
    separate: bool,  # each layer has a cache of its own, as in a model for decoding
) -> AttentionContext:
    """The context of layers with some settings; `slots` is None for layers with a window."""
    turn = rotation(
        places.place,
        settings.head_width,
        settings.rotation,
        config.accumulation_dtype,
        longest=places.place.shape[1] if places.fresh else None,
        base=settings.rope_base,
    )
    if slots is None:
        assert settings.window is not None
        write = partial(_write_window, settings, window_slots(places, settings.window))
    else:
        # Without the NaN a write beyond the last slot would silently be moved to earlier slots.
        turn = turn._replace(cos=jnp.where(slots.overflows, jnp.nan, turn.cos))
        write = partial(_write_slots, slots.start)
    if places.fresh:
        attend = _attend_to_batch(settings, config.dtype, places)
    else:
        seen, seen_new = (
            seen_slots(places, slots, settings.window),
            seen_tokens(places, settings.window),
        )
        read, window = attend_to_cache, settings.window or 0
        if slots is None and separate and window > chunk_of_slots(places.place.shape[1]):
            read = partial(attend_to_used_slots, used=jnp.minimum(places.before, window))

        def attend(q, k, v, cache):
            return read(q, k, v, *cache, seen=seen, seen_new=seen_new)

    return AttentionContext(turn, None, attend, partial(_write, write), state=write)


def write_layers(write: Callable, cache: Any, new: Any) -> Any:
    """The caches of all layers after a batch: stacked, or a tuple of a model for decoding."""
    if type(new) is tuple:
        before = cache if cache is not None else (None,) * len(new)
        return tuple(write(*each) for each in zip(before, new, strict=True))
    return write(cache, new)


def _write(write: Callable, cache: LayerCache | None, new: NewKeysValues) -> LayerCache:
    """The cache of layers after a batch, with the last inputs of convolutions."""
    if not new.last:
        return write(cache, new)
    cache = cache.cache if isinstance(cache, ConvolvedCache) else None
    return ConvolvedCache(write(cache, new), *new.last)


def _write_slots(start, cache: KeysValues | None, new: NewKeysValues) -> KeysValues:
    if cache is None:
        return KeysValues(*(jnp.moveaxis(x, -3, -1) for x in new[:2]))
    return write_slots(cache, new, start)


def _write_window(
    settings: AttentionSettings, slots, cache: WindowKeysValues | None, new: NewKeysValues
) -> WindowKeysValues:
    if cache is None:
        *n, b, _, h, k = new.keys.shape
        empty = jnp.zeros((*n, b, h, k, settings.window), new.keys.dtype)
        cache = WindowKeysValues(empty, empty)
    return write_window(cache, new, slots)


def _attend_to_batch(settings: AttentionSettings, dtype: str, places: Places) -> Callable:
    """Attention where nothing was read before: in a kernel, in a window, or with all scores."""
    t = places.place.shape[1]
    if places.until is not None:
        mask = seen_tokens(places, settings.window)
        return lambda q, k, v, cache: attend_to_all(q, k, v, mask)
    window = _limit(settings, t)
    document = None if places.one_document else places.key_document
    kernel = flash_attention.best(_queries(settings, dtype, places.place.shape), document is None)
    if kernel is not None:
        run = partial(
            flash_attention.flash_attention,
            implementation=kernel,
            window=window,
        )
    elif window is not None:
        run = partial(attend_in_window, window=window)
    else:
        mask = None if document is None else seen_tokens(places, None)
        return lambda q, k, v, cache: attend_to_all(q, k, v, mask)
    if document is None or window is None:
        return lambda q, k, v, cache: run(q, k, v, document)
    return lambda q, k, v, cache: without_padding(run, q, k, v, document)


def _limit(settings: AttentionSettings, t: int) -> int | None:
    """The window, if it is shorter than rows of t tokens."""
    return settings.window if settings.window is not None and settings.window < t else None


def _queries(
    settings: AttentionSettings, dtype: str, shape: tuple[int, ...]
) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a batch's queries."""
    return jax.ShapeDtypeStruct((*shape, settings.n_heads, settings.head_width), dtype)


def explain_choice(
    settings: AttentionSettings, dtype: str, shape: tuple[int, int], one_document: bool
) -> str:
    """The implementation that training uses for a batch of tokens [b t], as a sentence."""
    said = flash_attention.explain_choice(_queries(settings, dtype, shape), one_document)
    if _limit(settings, shape[1]) is None:
        return said
    return said.replace("with all scores in memory", "with the scores of a window in memory")
