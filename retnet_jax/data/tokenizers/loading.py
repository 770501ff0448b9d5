"""Finds out what kind of tokenizer a directory holds, and which ids open and end a text.

The special ids are named beside the tokenizer's file, in any of several places.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retnet_jax.data.tokenizers.base import (
    CONFIG_NAME,
    FILE_NAME,
    SENTENCEPIECE_NAME,
    TIKTOKEN_NAME,
    TOKENIZER_FILES,
    Tokenizer,
    hugging_face,
)
from retnet_jax.data.tokenizers.byte_level import BOS, BPETokenizer, ByteTokenizer
from retnet_jax.data.tokenizers.pretrained import (
    Cl100kTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    sentencepiece,
)
from retnet_jax.files import paths as files

_OLD_NAMES = ("vocab.json", "merges.txt")  # of GPT-2 and its like, before tokenizer.json
_FILES_READ = (
    *TOKENIZER_FILES,
    *_OLD_NAMES,
    CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
)


def load_tokenizer(directory: files.AnyPath) -> Tokenizer:
    """The tokenizer in a directory or at a URL: one that `save` wrote, or that came with a model.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if its file is damaged, or nothing says which ids open and end a text.
    """
    if files.is_remote(directory):
        with tempfile.TemporaryDirectory() as local:
            for name in _FILES_READ:
                if files.exists(f"{directory}/{name}"):
                    contents = files.read_bytes(f"{directory}/{name}")
                    (Path(local) / name).write_bytes(contents)
            if not has_tokenizer(local):
                raise FileNotFoundError(_no_tokenizer(directory))
            return load_tokenizer(local)
    directory = files.local(directory)
    if (directory / FILE_NAME).is_file():
        return _load_json(directory)
    if (directory / SENTENCEPIECE_NAME).is_file():
        return _load_sentencepiece(directory)
    if (directory / TIKTOKEN_NAME).is_file():
        return Cl100kTokenizer((directory / TIKTOKEN_NAME).read_bytes())
    if has_tokenizer(directory):
        return _load_vocabulary(directory)
    raise FileNotFoundError(_no_tokenizer(directory))


def _no_tokenizer(directory: files.AnyPath) -> str:
    return f"{directory} has none of {', '.join(TOKENIZER_FILES)}, nor {' and '.join(_OLD_NAMES)}"


def has_tokenizer(directory: files.AnyPath) -> bool:
    """Whether `load_tokenizer` would find a file."""
    directory = files.expanded(directory)
    old = all(files.exists(f"{directory}/{name}") for name in _OLD_NAMES)
    return old or any(files.exists(f"{directory}/{name}") for name in TOKENIZER_FILES)


def _load_json(directory: Path) -> Tokenizer:
    path = directory / FILE_NAME
    contents = path.read_bytes()
    if contents == ByteTokenizer.files[FILE_NAME]:
        return ByteTokenizer()
    try:
        serialised = contents.decode()
        found = hugging_face().Tokenizer.from_str(serialised)
        decoder = json.loads(serialised).get("decoder") or {}
        ours = decoder.get("type") == "ByteLevel" and found.token_to_id(BOS) is not None
        if ours and not (directory / CONFIG_NAME).exists():
            return BPETokenizer(serialised)
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    special = _special_ids(directory, found.token_to_id, found.id_to_token)
    return HuggingFaceTokenizer(serialised, *special)


def _load_vocabulary(directory: Path) -> Tokenizer:
    """A byte-level BPE of a vocabulary and merges; what is saved is its tokenizer.json."""
    library = hugging_face()
    try:
        model = library.models.BPE.from_file(*(str(directory / name) for name in _OLD_NAMES))
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(f"{directory / _OLD_NAMES[0]} is no vocabulary: {error}") from error
    bpe = library.Tokenizer(model)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    if any(bpe.token_to_id(character) is None for character in alphabet):
        raise ValueError(f"{directory / _OLD_NAMES[0]} lacks some of the 256 bytes")
    in_front = bool(_values(directory / CONFIG_NAME).get("add_prefix_space", False))
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=in_front)
    bpe.decoder = library.decoders.ByteLevel()
    added = _values(directory / "added_tokens.json")
    bpe.add_special_tokens(sorted(added, key=added.__getitem__))
    special = _special_ids(directory, bpe.token_to_id, bpe.id_to_token)
    return HuggingFaceTokenizer(bpe.to_str(), *special)


def _load_sentencepiece(directory: Path) -> Tokenizer:
    path = directory / SENTENCEPIECE_NAME
    contents = path.read_bytes()
    package = sentencepiece()
    try:
        model = package.SentencePieceProcessor(model_proto=contents)
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model: {error}") from error
    if not contents:  # which the library takes for no argument
        raise ValueError(f"{path} is empty")

    def id_of(piece: str) -> int | None:
        found = model.piece_to_id(piece)
        return found if model.id_to_piece(found) == piece else None

    def token_of(number: int) -> str | None:
        return model.id_to_piece(number) if 0 <= number < model.get_piece_size() else None

    own = {"bos": model.bos_id(), "eos": model.eos_id()}
    return SentencePieceTokenizer(contents, *_special_ids(directory, id_of, token_of, own))


def _special_ids(
    directory: Path,
    id_of: Callable[[str], int | None],
    token_of: Callable[[int], str | None],
    own: dict[str, int] | None = None,
) -> tuple[int, int]:
    """The ids that open and end a text; where only one is known, it does both.

    They are looked for as tokens in tokenizer_config.json and special_tokens_map.json, in the
    tokenizer itself, and as ids in config.json and generation_config.json; the first counts.
    """

    def found(kind: str) -> int | None:
        for name in (CONFIG_NAME, "special_tokens_map.json"):
            token = _values(directory / name).get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and id_of(token) is not None:
                return id_of(token)
        if own is not None and own[kind] >= 0:
            return own[kind]
        for name in ("config.json", "generation_config.json"):
            number = _values(directory / name).get(f"{kind}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int):
                if token_of(number) is None:
                    raise ValueError(
                        f"{directory / name}: {kind}_token_id={number} is no id of the tokenizer"
                    )
                return number
        return None

    bos, end = found("bos"), found("eos")
    if bos is None and end is None:
        raise ValueError(
            f"nothing in {directory} says which token opens or ends a text; write it to "
            f'{directory / CONFIG_NAME}, such as {{"bos_token": "<s>", "eos_token": "</s>"}}'
        )
    return (end if bos is None else bos), (bos if end is None else end)


def _values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}
