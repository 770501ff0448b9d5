"""Models in PyTorch to compare with ours, in training and decoding: torchscale's, a Transformer."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional
from torchscale.architecture.config import RetNetConfig
from torchscale.architecture.retnet import RetNetDecoder

from retnet_jax import interop
from retnet_jax.config import ModelConfig, OptimizerConfig
from retnet_jax.model import LanguageModel


def torchscale_decoder(config: ModelConfig, chunk: int | None = None) -> RetNetDecoder:
    """A RetNet of torchscale with random parameters; `chunk=None` is its parallel form."""
    options = RetNetConfig(
        decoder_embed_dim=config.d_model,
        decoder_value_embed_dim=config.v_width,
        decoder_retention_heads=config.n_heads,
        decoder_ffn_embed_dim=config.ffn_dim,
        decoder_layers=config.n_layers,
        vocab_size=config.vocab_size,
        share_decoder_input_output_embed=config.tie_embeddings,
        chunkwise_recurrent=chunk is not None,
        recurrent_chunk_size=chunk or 512,
    )
    return RetNetDecoder(options, nn.Embedding(config.vocab_size, config.d_model))


def torchscale_retnet(model: LanguageModel, chunk: int | None) -> nn.Module:
    """A RetNet of torchscale with a model's weights; `chunk=None` is its parallel form."""
    decoder = torchscale_decoder(model.config, chunk)
    with tempfile.TemporaryDirectory() as directory:
        interop.save(model, Path(directory) / "saved", "torchscale")
        (path,) = (Path(directory) / "saved").glob("*.safetensors")
        decoder.load_state_dict(safetensors.torch.load_file(path))
    return decoder


Cache = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, [b heads slots w]


class TorchTransformer(nn.Module):
    """The Transformer of a config with RMSNorm, a gated feed-forward layer and no biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.layers = nn.Sequential(*(_Layer(config) for _ in range(config.n_layers)))
        self.norm = nn.RMSNorm(config.d_model, config.norm_epsilon)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        hidden = self.norm(self.layers(self.embedding(tokens)))
        return functional.linear(hidden, self.embedding.weight), None

    def next_logits(self, tokens: torch.Tensor, caches: list[Cache], position: int) -> torch.Tensor:
        """Logits [b w] after one more token [b] at a position, which the caches get."""
        hidden = self.embedding(tokens[:, None])
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer.step(hidden, cache, position)
        return functional.linear(self.norm(hidden)[:, 0], self.embedding.weight)


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, ffn = config.d_model, config.ffn_width
        self.heads = config.n_heads
        self.norms = nn.ModuleList(nn.RMSNorm(d, config.norm_epsilon) for _ in range(2))
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.gate = nn.Linear(d, ffn, bias=False), nn.Linear(d, ffn, bias=False)
        self.down = nn.Linear(ffn, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (_rotated(part, 0) for part in qkv[:2])
        y = functional.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        return self._after_attention(x, y)

    def step(self, x: torch.Tensor, cache: Cache, position: int) -> torch.Tensor:
        """The layer for one token [b 1 d], whose key and value the cache gets."""
        qkv = self.qkv(self.norms[0](x)).view(len(x), 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        keys, values = cache
        keys[:, :, position] = _rotated(qkv[1], position)[:, :, 0]
        values[:, :, position] = qkv[2][:, :, 0]
        seen = slice(position + 1)
        y = functional.scaled_dot_product_attention(
            _rotated(qkv[0], position), keys[:, :, seen], values[:, :, seen]
        )
        return self._after_attention(x, y)

    def _after_attention(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        normed = self.norms[1](x)
        return x + self.down(functional.gelu(self.gate(normed)) * self.up(normed))


def _rotated(x: torch.Tensor, first: int) -> torch.Tensor:
    """Rotary positions, from `first` on, of [b heads t w]."""
    width, length = x.shape[-1], x.shape[-2]
    frequency = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    angle = (first + torch.arange(length))[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def torch_step(
    model: nn.Module, tokens: np.ndarray, optimizer: OptimizerConfig
) -> Callable[[], torch.Tensor]:
    """A function that takes a step with AdamW on rows of tokens and returns its loss."""
    inputs = torch.from_numpy(tokens).long()
    targets = inputs.roll(-1, dims=1)
    update = torch.optim.AdamW(
        model.parameters(),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )

    def step() -> torch.Tensor:
        update.zero_grad(set_to_none=True)
        logits, _ = model(inputs)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm)
        update.step()
        return loss.detach()

    return step


def transformer_decoding(
    model: TorchTransformer, config: ModelConfig, rows: int, position: int, room: int, tokens: int
) -> Callable[[], torch.Tensor]:
    """A function that decodes the next tokens greedily, with a cache as after `position` tokens."""
    dtype = model.embedding.weight.dtype
    shape = (rows, config.n_heads, position + room, config.d_model // config.n_heads)
    caches = [
        (torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)) for _ in model.layers
    ]
    places = iter(range(position, position + room))
    newest = torch.zeros(rows, dtype=torch.long)

    @torch.inference_mode()
    def decode() -> torch.Tensor:
        nonlocal newest
        for _ in range(tokens):
            newest = model.next_logits(newest, caches, next(places)).argmax(-1)
        return newest

    return decode


def torchscale_decoding(
    decoder: RetNetDecoder, config: ModelConfig, rows: int, position: int, room: int, tokens: int
) -> Callable[[], torch.Tensor]:
    """As `transformer_decoding`, with torchscale's recurrent form."""
    dtype = decoder.embed_tokens.weight.dtype
    heads = config.n_heads
    shape = (rows, heads, config.v_width // heads, config.q_width // heads)
    state: dict = {"is_first_step": False}
    for layer in range(config.n_layers):
        scale = torch.ones(heads, dtype=dtype)
        state[layer] = {"prev_key_value": torch.randn(shape, dtype=dtype), "scale": scale}
    # It takes the position from the length of the text so far, and reads its last token.
    text = torch.zeros((rows, position + room + 1), dtype=torch.long)
    lengths = iter(range(position + 1, position + room + 1))

    @torch.inference_mode()
    def decode() -> torch.Tensor:
        for _ in range(tokens):
            length = next(lengths)
            logits, _ = decoder(text[:, :length], incremental_state=state)
            text[:, length] = logits[:, -1].argmax(-1)
        return text

    return decode
