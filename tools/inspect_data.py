r"""Shows the contents of a token store, and the batches that training reads from it.

    python tools/inspect_data.py --store=data/stdlib
    python tools/inspect_data.py --store=data/pile --split=held_out --documents=5
    python tools/inspect_data.py --config=configs/quickstart.py --step=100 --rows=2
    python tools/inspect_data.py --store=data/pile --plot=lengths.png

With --config it also shows the batch of a step, with the parts of documents in each window.
"""

from collections.abc import Iterator

import numpy as np
from absl import flags

from retnet_jax.config import Config
from retnet_jax.data import BatchStream, Split, Tokenizer, open_store, open_stores
from retnet_jax.data.round_trip import describe_round_trip
from retnet_jax.data.split import describe_tail
from retnet_jax.data.token_store import TokenStore
from retnet_jax.data.windows import packed_starts
from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files
from retnet_jax.programs import command_line
from retnet_jax.programs.missing_corpus import check_corpus

flags.DEFINE_string("store", None, "directory or URL of a store")
flags.DEFINE_enum("split", "train", ["train", "held_out"], "split to show")
flags.DEFINE_integer("documents", 2, "number of documents to show", 0)
flags.DEFINE_integer("characters", 300, "characters to show of each text", 1)
flags.DEFINE_integer("sequence_length", 2048, "tokens in a window; with --config the config's", 1)
flags.DEFINE_integer("step", 0, "step whose batch to show, from 0, with --config", 0)
flags.DEFINE_integer("rows", 4, "number of rows of that batch to show", 0)
flags.DEFINE_string("plot", None, "file to save a plot of document lengths to")


def main() -> None:
    """Prints what the flags ask for."""
    given = flags.FLAGS
    if (given.store is None) == (given.config is None):
        raise ConfigError("give either --store=DIRECTORY or --config=FILE")
    config = None if given.config is None else command_line.given_config()
    if config is None:
        stores = [open_store(given.store)]
    else:
        command = command_line.prepare_command()
        check_corpus(config)
        found = open_stores(config.data, config.model.vocab_size, command)
        stores = list(found.stores.values())
    length = given.sequence_length if config is None else config.data.sequence_length
    for store in stores:
        print("\n".join(describe(store, given.split, length)))
        print("\n".join(first_documents(store, given.split, given.documents, given.characters)))
    if config is not None:
        print("\n".join(batch_rows(config, found, given.step, given.rows, given.characters)))
    if given.plot is not None:
        plot(stores, given.split, files.expanded(given.plot))


def describe(store: TokenStore, split: str, sequence_length: int) -> Iterator[str]:
    """Options, counts, skipped documents, lengths of documents, and padding of windows."""
    manifest = store.manifest
    yield store.directory
    options = ", ".join(f"{k}={v}" for k, v in manifest["options"].items() if v not in ("", [], 0))
    yield f"  built with {files.printable(options)}"
    yield f"  {'':<9}{'documents':>14}{'tokens':>18}{'bytes':>18}{'bytes/token':>13}"
    for name, counts in manifest["splits"].items():
        ratio = counts["bytes"] / counts["tokens"]
        cells = f"{counts['documents']:>14,}{counts['tokens']:>18,}{counts['bytes']:>18,}"
        yield f"  {name:<9}{cells}{ratio:>13.2f}"
    tail = describe_tail(manifest)
    if tail:
        yield f"  {tail}"
    if not store.has_block_digests:
        yield "  no digests of blocks, so tokens are not verified; build it again to add them"
    skipped = manifest["skipped"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped["reasons"].items())
    yield f"  left out: {manifest['duplicates']:,} duplicates, {skipped['count']:,} skipped"
    if reasons:
        yield f"    {reasons}"
    lost = describe_round_trip(manifest.get("round_trip"))
    if lost:
        yield f"  in a sample {lost}"
    documents: Split = getattr(store, split)
    lengths = documents.lengths
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int)
    shown = ", ".join(f"{x:,}" for x in quantiles)
    yield f"  tokens in a document of {split} (minimum, 10%, median, 90%, maximum): {shown}"
    yield from histogram(lengths)
    windows = len(packed_starts(documents, sequence_length)) - 1
    padding = 1 - documents.token_count / (windows * sequence_length)
    yield f"  packed windows of {sequence_length:,} tokens: {windows:,}, {padding:.1%} padding"


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """A bar for each range of lengths between powers of two."""
    powers = np.bincount(np.log2(np.maximum(lengths, 1)).astype(int))
    for power in range(int(np.flatnonzero(powers)[0]), len(powers)):
        bar = "#" * round(50 * powers[power] / powers.max())
        yield f"    {2**power:>10,} to {2 ** (power + 1) - 1:>10,} {powers[power]:>12,} {bar}"


def first_documents(store: TokenStore, split: str, count: int, characters: int) -> Iterator[str]:
    """The first documents of a split, as text."""
    documents: Split = getattr(store, split)
    for index in range(min(count, len(documents))):
        tokens = documents.document(index)
        yield f"  --- {files.printable(documents.name(index))}: {len(tokens):,} tokens"
        yield shortened(store.tokenizer, tokens, characters)


def batch_rows(config: Config, stores, step: int, rows: int, characters: int) -> Iterator[str]:
    """The first rows of the batch of a step."""
    stream = BatchStream(
        [store.train for store in stores.stores.values()],
        stores.weights,
        sequence_length=config.data.sequence_length,
        batch_size=config.train.batch_size,
        bos_id=stores.tokenizer.bos_id,
        seed=config.train.seed,
        policy=config.data.windows,
    )
    batch = stream[step]
    real = batch.segment_ids > 0
    yield (
        f"batch of step {step}: {len(batch.tokens)} windows of {config.data.sequence_length} "
        f"tokens, {config.data.windows}; {batch.segment_ids.max(axis=1).sum()} parts of documents, "
        f"{1 - real.mean():.1%} padding"
    )
    for row in range(min(rows, len(batch.tokens))):
        continued = ", continues its previous window" if batch.continues[row] else ""
        yield f"  === row {row}: {real[row].sum()} tokens{continued}"
        for segment in range(1, batch.segment_ids[row].max() + 1):
            tokens = batch.tokens[row][batch.segment_ids[row] == segment]
            yield f"  --- part {segment}: {len(tokens):,} tokens"
            yield shortened(stores.tokenizer, tokens, characters)


def shortened(tokenizer: Tokenizer, tokens: np.ndarray, characters: int) -> str:
    """A text; if it is too long, its beginning and its end."""
    text = tokenizer.decode(tokens.tolist())
    if len(text) > characters:
        half = characters // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return "\n".join(f"    {line}" for line in text.splitlines())


def plot(stores: list[TokenStore], split: str, path: str) -> None:
    """Plots the cumulative distributions of documents and of tokens over document length."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for store in stores:
        lengths = np.sort(getattr(store, split).lengths)
        share = np.cumsum(lengths) / lengths.sum()
        name = store.directory.rstrip("/").rpartition("/")[2]
        (line,) = axes.plot(lengths, np.arange(1, len(lengths) + 1) / len(lengths), label=name)
        axes.plot(lengths, share, "--", color=line.get_color(), label=f"{name}, by tokens")
    axes.set_xscale("log")
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("share of documents up to this length")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"saved a plot of document lengths to {path}")


if __name__ == "__main__":
    command_line.define_config(required=False)
    command_line.run(main)
