"""Helpers for tests of token stores."""

from pathlib import Path

from retnet_jax.config import DataConfig

TEXTS = {f"{i}.txt": f"document {i} says {'na ' * (i % 7)}é\r\n" for i in range(40)}


def small_store_config(tmp_path):
    """Forty documents and an empty one, and the store to build from them."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, text in TEXTS.items():
        (corpus / name).write_bytes(text.encode())
    (corpus / "empty.txt").touch()
    return DataConfig(
        source="text",
        path=str(corpus / "*.txt"),
        tokenizer="byte",
        store=str(tmp_path / "deep" / "store"),
        held_out=0.2,
    )


def texts_of(store, split):
    return {
        name.rpartition("/")[2]: store.tokenizer.decode(split.document(i))
        for i, name in enumerate(split.names)
    }


def tokens_of(split):
    return split.read(0, split.token_count)


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }
