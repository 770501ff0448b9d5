"""Loads the tokenizer of a directory, of any kind, and finds the ids that open and end a text.

These ids may be in any of several files beside the tokenizer's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retnet_jax.data.tokenizers.base import (
    ADDED_NAME,
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

_OLD_NAMES = ("vocab.json", "merges.txt")  # GPT-2 and similar models, before tokenizer.json
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
    """The tokenizer in a directory or at a URL, from `Tokenizer.save` or of another model.

    Raises:
      FileNotFoundError: if there is no tokenizer.
      ValueError: if its file is damaged, or no file names the ids that open and end a text.
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
    """Whether a directory has the file of a tokenizer."""
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
        ours = _may_be_ours(json.loads(serialised))
    except Exception as error:  # `tokenizers` raises no narrower class
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    special = _known_special_ids(directory, found.token_to_id, found.id_to_token)
    bos = found.token_to_id(BOS)
    if ours and special in (None, (bos, (bos,))) and not (directory / CONFIG_NAME).exists():
        return BPETokenizer(serialised)
    if special is None:
        special = _special_ids(directory, found.token_to_id, found.id_to_token)
    return HuggingFaceTokenizer(serialised, *special)


def _may_be_ours(values: dict[str, Any]) -> bool:
    """Whether `train_bpe` writes such a tokenizer.json: byte-level, with `<bos>` alone added."""
    decoder = values.get("decoder") or {}
    added = [token["content"] for token in values.get("added_tokens", ())]
    return decoder.get("type") == "ByteLevel" and added == [BOS]


def _load_vocabulary(directory: Path) -> Tokenizer:
    """A byte-level BPE of a vocabulary and merges; what is saved is its tokenizer.json."""
    library = hugging_face()
    try:
        model = library.models.BPE.from_file(*(str(directory / name) for name in _OLD_NAMES))
    except Exception as error:  # `tokenizers` raises no narrower class
        raise ValueError(f"{directory / _OLD_NAMES[0]} is not a vocabulary: {error}") from error
    bpe = library.Tokenizer(model)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    if any(bpe.token_to_id(character) is None for character in alphabet):
        raise ValueError(f"{directory / _OLD_NAMES[0]} lacks some of the 256 bytes")
    in_front = bool(_values(directory / CONFIG_NAME).get("add_prefix_space", False))
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=in_front)
    bpe.decoder = library.decoders.ByteLevel()
    added = _values(directory / ADDED_NAME)
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
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    if not contents:  # the library takes empty contents for a missing argument
        raise ValueError(f"{path} is empty")

    added = _added_tokens(directory, model.get_piece_size())
    names = {i: token for token, i in added.items()}

    def id_of(piece: str) -> int | None:
        found = added[piece] if piece in added else model.piece_to_id(piece)
        return found if token_of(found) == piece else None

    def token_of(number: int) -> str | None:
        known = 0 <= number < model.get_piece_size()
        return model.id_to_piece(number) if known else names.get(number)

    own = {"bos": model.bos_id(), "eos": model.eos_id()}
    special = _special_ids(directory, id_of, token_of, own)
    return SentencePieceTokenizer(contents, *special, added)


def _added_tokens(directory: Path, pieces: int) -> dict[str, int]:
    """The ids of tokens added after those of a SentencePiece model, by token.

    They are in added_tokens.json and, since 2023, in tokenizer_config.json.

    Raises:
      ValueError: if an id is not a number, or two tokens have the same id.
    """
    path = directory / ADDED_NAME
    found = dict(_values(path))
    decoder = _values(directory / CONFIG_NAME).get("added_tokens_decoder") or {}
    for number, token in decoder.items():
        found.setdefault(token["content"], int(number))
    for token, number in found.items():
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{path}: the id of {token!r} is {number!r}, not a number from 0 on")
    behind = {token: number for token, number in found.items() if number >= pieces}
    if len(set(behind.values())) < len(behind):
        raise ValueError(f"{path}: two of the tokens have the same id: {behind}")
    return behind


def _special_ids(
    directory: Path,
    id_of: Callable[[str], int | None],
    token_of: Callable[[int], str | None],
    own: dict[str, int] | None = None,
) -> tuple[int, tuple[int, ...]]:
    """As `_known_special_ids`; raises `ValueError` where nothing is known."""
    found = _known_special_ids(directory, id_of, token_of, own)
    if found is None:
        raise ValueError(
            f"no file in {directory} says which token opens or ends a text; add it to "
            f'{directory / CONFIG_NAME}, such as {{"bos_token": "<s>", "eos_token": "</s>"}}'
        )
    return found


def _known_special_ids(
    directory: Path,
    id_of: Callable[[str], int | None],
    token_of: Callable[[int], str | None],
    own: dict[str, int] | None = None,
) -> tuple[int, tuple[int, ...]] | None:
    """The id that opens a text, and the ids that end one. If only one is known, it does both.

    They are searched as tokens in tokenizer_config.json and special_tokens_map.json, then in the
    tokenizer itself, then as ids in config.json and generation_config.json; the first found is
    used. If one of these files has several ids that end a text, all of them do.

    Returns None if no id is known.
    """

    def ids(name: str, key: str) -> list[int]:
        given = _values(directory / name).get(key)
        numbers = given if isinstance(given, list) else [given]
        numbers = [x for x in numbers if isinstance(x, int) and not isinstance(x, bool)]
        for number in numbers:
            if token_of(number) is None:
                raise ValueError(
                    f"{directory / name}: {key}={number} is not an id of the tokenizer"
                )
        return numbers

    def found(kind: str) -> int | None:
        for name in (CONFIG_NAME, "special_tokens_map.json"):
            token = _values(directory / name).get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and id_of(token) is not None:
                return id_of(token)
        if own is not None and own[kind] >= 0:
            return own[kind]
        for name in _ID_FILES:
            if numbers := ids(name, f"{kind}_token_id"):
                return numbers[0]
        return None

    bos, end = found("bos"), found("eos")
    opens, closes = end if bos is None else bos, bos if end is None else end
    if opens is None or closes is None:
        return None
    ends = [closes]
    for name in (CONFIG_NAME, *_ID_FILES):
        if isinstance(_values(directory / name).get("eos_token_id"), list):
            ends += ids(name, "eos_token_id")
    return opens, tuple(dict.fromkeys(ends))


_ID_FILES = ("config.json", "generation_config.json")


def _values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}
