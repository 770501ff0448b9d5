"""The files that `transformers` needs beside weights: tokenizer and `generation_config.json`."""

from __future__ import annotations

import json
from pathlib import Path

from retnet_jax.data.tokenizers import ByteTokenizer, Tokenizer
from retnet_jax.data.tokenizers.base import CONFIG_NAME, FILE_NAME, hugging_face
from retnet_jax.data.tokenizers.byte_level import BOS, byte_of_character


def write_transformers_files(tokenizer: Tokenizer, directory: Path) -> bool:
    """Writes a tokenizer and `generation_config.json` for `transformers` to a directory.

    `AutoTokenizer` then gives the ids of `tokenizer` with BOS in front, as documents have in
    training. Only there is "<bos>" inside a text its BOS.

    Args:
      tokenizer: Tokenizer of the model.
      directory: Directory of the exported model; it may have files of the tokenizer already.

    Returns:
      False if `transformers` cannot load this kind of tokenizer (a SentencePiece model, or the
      vocabulary of tiktoken); then the tokenizer's files stay as they are.
    """
    ends = list(tokenizer.end_ids)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if ends[1:] else ends[0]}
    _write(directory / "generation_config.json", generation)
    if FILE_NAME not in tokenizer.files:
        return False
    found = _byte_level() if isinstance(tokenizer, ByteTokenizer) else _from_file(tokenizer)
    bos, end = (found.id_to_token(i) for i in (tokenizer.bos_id, tokenizer.end_id))
    if found.encode("a").ids[:1] != [tokenizer.bos_id]:
        found.post_processor = hugging_face().processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos_id)],
        )
    (directory / FILE_NAME).write_text(found.to_str(), encoding="utf-8")
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    }
    if len(ends) > 1:
        values["eos_token_id"] = ends
    _write(directory / CONFIG_NAME, values)
    return True


def _from_file(tokenizer: Tokenizer):
    """The tokenizer of the library `tokenizers`."""
    return hugging_face().Tokenizer.from_str(tokenizer.files[FILE_NAME].decode())


def _byte_level():
    """`ByteTokenizer` in the library `tokenizers`: a BPE of the 256 bytes without merges."""
    hf = hugging_face()
    vocabulary = byte_of_character() | {BOS: ByteTokenizer.bos_id}
    found = hf.Tokenizer(hf.models.BPE(vocabulary, []))
    found.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = hf.decoders.ByteLevel(add_prefix_space=False)
    found.add_special_tokens([BOS])
    return found


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
