"""Other implementations of RetNet in numpy: their equations, token by token, with their names.

It uses no code of this package, and so can test shapes for which there is no recorded fixture.
"""

import math

import numpy as np

erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "swish": lambda x: x / (1 + np.exp(-x)),
}


def torchscale(weights, config, tokens):
    """Logits [b t w] of torchscale, in its recurrent form.

    Weights with biases are of a version before October 2023, with LayerNorm instead of RMSNorm and
    no gate in the feed-forward layer.
    """
    gammas = 1 - 2.0 ** (-5 - np.arange(config["decoder_retention_heads"]))
    old = "layers.0.retention.q_proj.bias" in weights
    return _torchscale(weights, config, tokens, gammas, "layer" if old else "rms")


def syncdoth(weights, config, tokens):
    """Logits [b t w] of syncdoth/RetNet: torchscale with other names and some more options."""
    heads = config["decoder_retention_heads"]
    gammas = 1 - 2.0 ** (-5 - np.arange(heads))
    if config["use_lm_decay"]:
        gammas = 1 - np.exp(np.linspace(math.log(1 / 32), math.log(1 / 512), heads))
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    head = "embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    weights["output_projection.weight"] = weights[head + ".weight"]
    return _torchscale(weights, config, tokens, gammas, "rms")


def _torchscale(weights, config, tokens, gammas, kind):
    heads, epsilon = config["decoder_retention_heads"], config["layernorm_eps"]
    width = config["decoder_embed_dim"]

    def linear(name, x):
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)

    def norm(x, name=None, kind=kind):
        x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon)
        if name is None:
            return y
        return y * weights[name + ".weight"] + weights.get(name + ".bias", 0.0)

    def turn(x, n):
        angle = np.repeat(10_000.0 ** -np.linspace(0, 1, x.shape[-1] // 2), 2) * n
        every_two = np.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape)
        return x * np.cos(angle) + every_two * np.sin(angle)

    def retention(x, layer):
        q, k, v, gate = (
            linear(f"layers.{layer}.retention.{name}_proj", x) for name in ("q", "k", "v", "g")
        )
        b, t, _ = x.shape
        q, k, v = (y.reshape(b, t, heads, -1) for y in (q, k, v))
        k = k * k.shape[-1] ** -0.5
        state = np.zeros((b, heads, v.shape[-1], k.shape[-1]))
        total, outputs = np.zeros(heads), []
        for n in range(t):
            total = total * gammas + 1
            state = state * gammas[:, None, None] + v[:, n, :, :, None] * turn(k[:, n, :, None], n)
            y = (state @ turn(q[:, n], n)[..., None])[..., 0] / np.sqrt(total)[:, None]
            outputs.append(norm(y).reshape(b, -1))
        return linear(
            f"layers.{layer}.retention.out_proj", ACTIVATIONS["swish"](gate) * np.stack(outputs, 1)
        )

    def ffn(x, layer):
        name = f"layers.{layer}.ffn."
        inner = ACTIVATIONS[config["activation_fn"]](linear(name + "fc1", x))
        if name + "gate.weight" in weights:
            inner = inner * linear(name + "gate", x)
        if name + "ffn_layernorm.weight" in weights:
            biased = name + "ffn_layernorm.bias" in weights
            inner = norm(inner, name + "ffn_layernorm", "layer" if biased else "rms")
        return linear(name + "fc2", inner)

    x = weights["embed_tokens.weight"][tokens]
    x = x if config["no_scale_embedding"] else x * math.sqrt(width)
    x = norm(x, "layernorm_embedding") if config["layernorm_embedding"] else x
    alpha = (2 * config["decoder_layers"]) ** 0.25 if config["deepnorm"] else 1.0
    for layer in range(config["decoder_layers"]):
        for part, name in ((retention, "retention_layer_norm"), (ffn, "final_layer_norm")):
            name = f"layers.{layer}.{name}"
            if config["decoder_normalize_before"]:
                x = alpha * x + part(norm(x, name), layer)
            else:
                x = norm(alpha * x + part(x, layer), name)
    x = norm(x, "layer_norm") if config["decoder_normalize_before"] else x
    return linear("output_projection", x)


def fla(weights, config, tokens):
    """Logits [b t w] of flash-linear-attention, token by token; `attn` as in its config."""
    entries = config.get("attn") or []
    attentions = {
        layer: entry
        for entry in ([entries] if isinstance(entries, dict) else entries)
        for layer in entry["layers"]
    }
    heads, epsilon = config["num_heads"], config["norm_eps"]

    def linear(name, x):
        return x @ weights[name + ".weight"].T

    def rms(x, name):
        scale = weights.get(name + ".weight", 1.0)
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * scale

    def turn(x, n, base=10_000.0):
        half = x.shape[-1] // 2
        angle = n * base ** (-2 * np.arange(half) / x.shape[-1])
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def retention(x, name):
        q, k, v, gate = (linear(f"{name}.{letter}_proj", x) for letter in "qkvg")
        b, t, _ = x.shape
        q, k, v, gate = (y.reshape(b, t, heads, -1) for y in (q, k, v, gate))
        state = np.zeros((b, heads, k.shape[-1], v.shape[-1]))
        gamma, outputs = 1 - 2.0 ** (-5 - np.arange(heads)), []
        for n in range(t):
            update = turn(k[:, n], n)[..., None] * v[:, n, :, None]
            state = state * gamma[:, None, None] + update
            query = turn(q[:, n], n) * k.shape[-1] ** -0.5
            y = rms((query[..., None, :] @ state)[..., 0, :], f"{name}.g_norm_swish_gate")
            outputs.append((y * ACTIVATIONS["swish"](gate[:, n])).reshape(b, -1))
        return linear(f"{name}.o_proj", np.stack(outputs, 1))

    def attention(x, name, entry):
        b, t, d = x.shape
        width = d // entry["num_heads"]
        q, k, v = (
            linear(f"{name}.{letter}_proj", x) + weights.get(f"{name}.{letter}_proj.bias", 0.0)
            for letter in "qkv"
        )
        q, k, v = (y.reshape(b, t, -1, width) for y in (q, k, v))
        k, v = (np.repeat(y, entry["num_heads"] // y.shape[2], axis=2) for y in (k, v))
        base = entry.get("rope_theta", 10_000.0)
        q, k = (np.stack([turn(y[:, n], n, base) for n in range(t)], 1) for y in (q, k))
        outputs = []
        for n in range(t):
            first = max(0, n + 1 - (entry.get("window_size") or t))
            scores = np.einsum("bhk,bshk->bhs", q[:, n], k[:, first : n + 1]) * width**-0.5
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            outputs.append(np.einsum("bhs,bshk->bhk", p, v[:, first : n + 1]).reshape(b, -1))
        return linear(f"{name}.o_proj", np.stack(outputs, 1))

    x = weights["model.embeddings.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        y = rms(x, f"{name}.attn_norm")
        if layer in attentions:
            x = x + attention(y, f"{name}.attn", attentions[layer])
        else:
            x = x + retention(y, f"{name}.attn")
        y = rms(x, f"{name}.mlp_norm")
        inner = ACTIVATIONS["swish"](linear(f"{name}.mlp.gate_proj", y))
        x = x + linear(f"{name}.mlp.down_proj", inner * linear(f"{name}.mlp.up_proj", y))
    head = "model.embeddings" if config["tie_word_embeddings"] else "lm_head"
    return linear(head, rms(x, "model.norm"))
