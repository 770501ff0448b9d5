r"""Downloads a public corpus, builds its token store, and prints the command that trains on it.

    python tools/prepare_corpus.py                                 lists the corpora
    python tools/prepare_corpus.py tinystories
    python tools/prepare_corpus.py paper --config=retnet_1p3b      the paper's mixture
    python tools/prepare_corpus.py c4:0.7,pile:0.3 --config=retnet_200m --tokens=5B
    python tools/prepare_corpus.py OWNER/NAME:SUBSET --text_field=content

The text is streamed from the Hugging Face hub until there is enough for --tokens tokens, and
written to compressed JSON lines, from which the store is built. If it is stopped at any point, the
same command resumes.
"""

import json
import re
import sys
from pathlib import Path

from absl import flags

from retnet_jax.config import TOKENIZERS, Config
from retnet_jax.configs.paper_settings import CORPUS
from retnet_jax.data.corpus_files import corpus_files
from retnet_jax.data.hub_text import FILES, RECORD, sample_text, stream_text
from retnet_jax.data.public_corpora import LARGE, Part, list_of_corpora, named_parts
from retnet_jax.data.store_options import pretrained_tokenizer
from retnet_jax.data.token_store import read_manifest
from retnet_jax.data.tokenizers import ByteTokenizer, Tokenizer, train_bpe
from retnet_jax.data.workers import say
from retnet_jax.errors import ConfigError
from retnet_jax.files import atomic
from retnet_jax.files import paths as files
from retnet_jax.programs import command_line
from retnet_jax.programs.prepare_data import interruptible, prepare
from retnet_jax.waiting import showing

_SAMPLE_CHARACTERS = 4_000_000  # from which the bytes of a token are measured
_PLAN = "tokens.json"


def main() -> None:
    """The program."""
    flags.DEFINE_string(
        "corpus",
        None,
        "corpus, or several with their shares: NAME or NAME:SHARE,NAME:SHARE; also the first "
        "argument. Without it the known corpora are listed",
    )
    flags.DEFINE_string(
        "tokens", None, "tokens to prepare, such as 10B; default: those that the config's run reads"
    )
    flags.DEFINE_string(
        "text", None, "directory for the text; default: one in data/text, for 'paper' data/corpus"
    )
    flags.DEFINE_string("text_field", None, "field with the text; default: the corpus's own")
    flags.DEFINE_integer("processes", None, "number of processes; default: one for each core", 1)
    large = any(re.split("[:=,]", x)[0] in LARGE for x in sys.argv[1:2])
    command_line.define_config(default="retnet_1p3b" if large else "quickstart")
    command_line.run(lambda: interruptible(_main), positional=("corpus",))


def _main() -> None:
    given = flags.FLAGS
    if given.corpus is None:
        print(list_of_corpora())
        return
    parts, config = named_parts(given.corpus), command_line.unfitted_config()
    for option in ("data.source", "data.path", "data.text_field", "data.mixture"):
        if option in command_line.config_options():
            raise ConfigError(
                f"--config.{option} is set by this program: leave it out (the field with the text "
                "is --text_field)"
            )
    is_paper = given.corpus == "paper" and config.data.path == CORPUS and given.text is None
    text = given.text or f"data/text/{'_'.join(part.name for part in parts)}"
    if is_paper:
        text = "data/corpus"
    if files.is_remote(text):
        raise ConfigError(f"--text={text} is not on a local disk: give a local directory")
    if files.is_remote(config.data.store):  # found out before hours of downloading
        raise ConfigError(
            f"--config.data.store={config.data.store} is not on a local disk: build the store in a "
            "local directory, and copy it there afterwards"
        )
    tokens = _number(given.tokens) if given.tokens else _tokens_of_run(config)
    directory = files.local(text)
    for part in parts:
        about = f" {part.corpus.about}." if part.corpus.about else ""
        say(f"{part.corpus.path}: licence {part.corpus.license}.{about}")
    _download(parts, config, directory, tokens)
    after = []
    if is_paper:
        config = command_line.given_config()
    else:
        pattern = f"{text}/**/{FILES}"
        config = command_line.config_for_corpus("jsonl", pattern)
        after = ["--config.data.source=jsonl", f"--config.data.path={pattern}"]
    _check_store(config)
    store = prepare(config, command_line.command_with_config(*_PREPARE_DATA, after=after))
    found = store.manifest["splits"]["train"]["tokens"]
    if abs(found - tokens) > 0.02 * tokens:
        print(f"{tokens:,} tokens were wanted, and the store has {found:,} to train on")
    train = command_line.command_with_config("train.py", "retnet-train", after=after)
    print(f"train on it with: {train}")


_PREPARE_DATA = ("tools/prepare_data.py", "retnet-prepare")


def _download(parts: list[Part], config: Config, directory: Path, tokens: int) -> None:
    """Streams the text of each part, as much as its share of the tokens needs."""
    text_field = flags.FLAGS.text_field
    _check_no_other_text(parts, directory)
    path = directory / _PLAN
    plan = json.loads(path.read_text()) if path.exists() else {}
    kind = [config.data.tokenizer, config.model.vocab_size, [part.corpus.path for part in parts]]
    if plan.get("of") != kind:
        texts = [
            text
            for part in parts
            for text in sample_text(part.corpus, int(part.share * _SAMPLE_CHARACTERS), text_field)
        ]
        plan = {"of": kind, "bytes_per_token": _bytes_per_token(config, texts)}
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(plan, indent=1) + "\n")
    wanted = tokens * plan["bytes_per_token"] / (1 - config.data.held_out)
    say(f"{tokens:,} tokens need about {wanted / 1e6:,.1f} MB of text, written to {directory}")
    found = {}
    for part in parts:
        most = max(1, round(part.share * wanted))
        found[part.name] = stream_text(part.corpus, directory / part.name, most, text_field)
        if found[part.name] < most:
            size = found[part.name] / 1e6
            say(f"{part.corpus.path} has only {size:,.1f} MB of text: all of it is taken")
    for line in _other_shares(parts, found, directory):
        say(line)


def _check_no_other_text(parts: list[Part], directory: Path) -> None:
    """Raises `ConfigError` if an earlier command has left text of another corpus."""
    others = {str(path.parent.relative_to(directory)) for path in directory.rglob(RECORD)}
    others -= {part.name for part in parts}
    if others:
        raise ConfigError(
            f"{directory} also holds text of {', '.join(sorted(others))}, which would be in the "
            "store: give another directory with --text, or delete it there"
        )


def _other_shares(parts: list[Part], found: dict[str, int], directory: Path) -> list[str]:
    """Lines about the parts that have more of the text than they should have.

    Args:
      parts: The corpora.
      found: The bytes of text by the name of the part. An earlier command with other shares may
        have left more than this one needs.
      directory: The directory of the text.
    """
    total = sum(found.values())
    return [
        f"{part.corpus.path} is {found[part.name] / total:.0%} of the text, not {part.share:.0%}; "
        f"if an earlier command has downloaded more of it, delete {directory / part.name}"
        for part in parts
        if found[part.name] > (part.share + 0.02) * total
    ]


def _bytes_per_token(config: Config, texts: list[str]) -> float:
    """Measured on a sample, with the config's tokenizer or a BPE that is trained on the sample."""
    tokenizer: Tokenizer
    if config.data.tokenizer not in TOKENIZERS:
        tokenizer = pretrained_tokenizer(config.data)
    elif config.data.tokenizer == "byte":
        tokenizer = ByteTokenizer()
    else:
        with showing("measuring the bytes of a token on a sample"):
            tokenizer = train_bpe(texts, config.model.vocab_size)
    count = sum(1 + len(ids) for ids in tokenizer.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / count


def _check_store(config: Config) -> None:
    """Raises `ConfigError` if there is a store that was built from other text."""
    store = files.expanded(config.data.store)
    if not files.exists(f"{store}/manifest.json"):
        return
    built = sorted(source["bytes"] for source in read_manifest(store)["sources"])
    now = sorted(files.size(file.path) for file in corpus_files(config.data.path))
    if built != now:
        raise ConfigError(
            f"{store} was built from less or other text than there is now: delete it and give the "
            "same command again, or give another directory in --config.data.store"
        )


def _tokens_of_run(config: Config) -> int:
    return config.train.steps * config.train.batch_size * config.data.sequence_length


def _number(text: str) -> int:
    """A number of tokens such as 10B, 500M, 20k or 1e9."""
    found = re.fullmatch(r"([\d_]*\.?\d+(?:e\d+)?)\s*([kMBT]?)", text.strip())
    number = 0.0
    if found is not None:
        number = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2]]
    if not 1 <= number <= 1e15:
        raise ConfigError(f"--tokens={text} is no number of tokens: give one such as 10B or 500M")
    return round(number)
