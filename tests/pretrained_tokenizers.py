"""Small tokenizers of other models, trained here and written as their files."""

import base64
import functools
import io
import json

import pytest
import tokenizers as hf

from retnet_jax.data.tokenizers import load_tokenizer

TEXTS = [
    "def return self retention state chunk",
    "größer → 😀 naïve 你好",
    "for i in range(10):\n    x\n\n",
    "a  b   c",
    "",
]


@functools.cache
def llama_like():
    """BPE with byte fallback, spaces as U+2581 and one before the text; <unk> 0, <s> 1, </s> 2."""
    tokenizer = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = hf.decoders.Sequence(
        [
            hf.decoders.Replace("▁", " "),
            hf.decoders.ByteFallback(),
            hf.decoders.Fuse(),
            hf.decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = hf.trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["def return self state range"] * 3, trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][:3]  # without the bytes
    tokenizer = hf.Tokenizer.from_str(json.dumps(values))
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.enable_truncation(3)
    return tokenizer.to_str()


@functools.cache
def gpt_like():
    """Byte-level BPE whose only special token is <|endoftext|>."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer.to_str()


@functools.cache
def sentencepiece_model():
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["def return self retention state chunk"] * 9),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def llama(directory):
    (directory / "tokenizer.json").write_text(llama_like())
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
    return load_tokenizer(directory)


def gpt(directory):
    (directory / "tokenizer.json").write_text(gpt_like())
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    return load_tokenizer(directory)


def sentencepiece(directory):
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    return load_tokenizer(directory)


def cl100k(directory):
    """cl100k with its own ranks: the bytes, and some words."""
    pytest.importorskip("tiktoken")
    tokens = [bytes([byte]) for byte in range(256)]
    for word in (b"return", b" self", b"chunk"):
        tokens += [word[:n] for n in range(2, len(word) + 1) if word[:n] not in tokens]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (directory / "cl100k_base.tiktoken").write_bytes(b"".join(lines))
    return load_tokenizer(directory)


def byte_level_with(specials):
    """Byte-level BPE with these special tokens first."""
    values = json.loads(gpt_like().replace("<|endoftext|>", specials[0]))
    tokenizer = hf.Tokenizer.from_str(json.dumps(values))
    tokenizer.add_special_tokens([*specials])
    return tokenizer.to_str()
