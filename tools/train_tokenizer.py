r"""Trains a byte-level BPE on one or more corpora, before their stores are built.

    python tools/train_tokenizer.py --config=configs/FILE.py --output=data/tokenizer \
        --vocab_size=32000 --corpus='jsonl:pile/*.jsonl.zst' --corpus='parquet:stack/*.parquet'

Then build the stores with --config.data.tokenizer=data/tokenizer. Each --corpus is read with the
config's data options, except source and path. The same amount of text is taken from each. Without
--corpus the config's own corpus is read.
"""

import dataclasses

from absl import flags

from retnet_jax.data.bpe_sample import train_tokenizer
from retnet_jax.data.sources import Skipped
from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files
from retnet_jax.programs import command_line

flags.DEFINE_multi_string(
    "corpus", [], "corpus to read, SOURCE:PATH as in data.source and data.path; may be repeated"
)
flags.DEFINE_string("output", None, "directory to write tokenizer.json to", required=True)
flags.DEFINE_integer("vocab_size", None, "number of tokens; default: model.vocab_size", 257)


def main() -> None:
    """Trains and writes the tokenizer that the flags describe."""
    given, config = flags.FLAGS, command_line.given_config()
    output = files.local(given.output)
    if (output / "tokenizer.json").exists():
        raise ConfigError(f"--output={output} has a tokenizer.json already; give a new directory")
    try:  # now, so that no work is lost later
        output.mkdir(parents=True, exist_ok=True)
        (output / "tokenizer.json").touch()
        (output / "tokenizer.json").unlink()
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be written to: {error}") from error
    corpora = [config.data]
    if given.corpus:
        corpora = []
        for corpus in given.corpus:
            source, _, path = corpus.partition(":")
            corpora.append(dataclasses.replace(config.data, source=source, path=path))
            corpora[-1].check()
    skipped = Skipped()
    tokenizer = train_tokenizer(corpora, given.vocab_size or config.model.vocab_size, skipped)
    tokenizer.save(output)
    print(f"{output}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]}")
    if skipped.count:
        print(files.printable(f"skipped documents: {skipped.count} ({skipped})"))


if __name__ == "__main__":
    command_line.define_config()
    command_line.run(main)
