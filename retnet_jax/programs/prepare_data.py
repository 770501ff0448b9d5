r"""Builds the token store of a config before training, and prints its contents.

    python tools/prepare_data.py --config=configs/FILE.py --config.data.source=jsonl \
        --config.data.path='pile/*.jsonl.zst' --config.data.store=data/pile [--processes=8]

If it is stopped at any point, by Ctrl-C, SIGTERM or kill -9, the same command resumes the build. A
complete store is compared with the config, its files are verified, and its contents printed.
"""

import signal
import sys
from collections.abc import Callable

from absl import flags

from retnet_jax.config import Config
from retnet_jax.data.build import build_or_wait
from retnet_jax.data.round_trip import describe_round_trip
from retnet_jax.data.split import describe_tail
from retnet_jax.data.store_problems import check_files
from retnet_jax.data.stores import check_tokenizer, open_or_build
from retnet_jax.data.token_store import TokenStore
from retnet_jax.files import paths as files
from retnet_jax.pretrained import with_initial_model
from retnet_jax.programs import command_line
from retnet_jax.programs.missing_corpus import check_corpus


def main() -> None:
    """The program."""
    flags.DEFINE_integer("processes", None, "number of processes; default: one for each core", 1)
    command_line.define_config()
    command_line.run(lambda: interruptible(_main))


def interruptible(program: Callable[[], None]) -> int | None:
    """Runs a program; after Ctrl-C or SIGTERM it prints how to resume."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        program()
    except KeyboardInterrupt:
        print("stopped; the same command resumes the build", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return None


def _main() -> None:
    config = with_initial_model(command_line.given_config())
    prepare(config, command_line.prepare_command())


def prepare(config: Config, command: str) -> TokenStore:
    """Builds, finishes or opens the store of a config, and prints its contents.

    Args:
      config: The config, checked.
      command: Command that builds or finishes the store, for error messages and the manifest.
    """
    store = files.expanded(config.data.store)
    manifest, plan = (f"{store}/{name}.json" for name in ("manifest", "plan"))
    complete = files.exists(manifest) and not files.exists(plan)
    if not complete:
        check_corpus(config)
        check_tokenizer(config.data, config.model.vocab_size)
        build_or_wait(config.data, config.model.vocab_size, flags.FLAGS.processes, command)
    opened = open_or_build(config.data, config.model.vocab_size, command)
    if complete:
        check_files(opened)
    print(files.printable(table(opened)))
    return opened


def table(store: TokenStore) -> str:
    """The counts of each split, and the documents that were left out."""
    rows: list[tuple[str, ...]] = [("", "documents", "tokens", "bytes", "bytes/token")]
    for name, counts in store.manifest["splits"].items():
        numbers = [f"{counts[key]:,}" for key in ("documents", "tokens", "bytes")]
        rows.append((name, *numbers, f"{counts['bytes'] / counts['tokens']:.2f}"))
    lines = [f"{row[0]:<10}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows]
    tail = describe_tail(store.manifest)
    lines += [tail] if tail else []
    skipped = store.manifest["skipped"]
    counts = f"{store.manifest['duplicates']:,} duplicates, {skipped['count']:,} skipped"
    lines.append(f"left out: {counts}")
    lines += [f"  {count:,} {reason}" for reason, count in skipped["reasons"].items()]
    lines += [f"    {line}" for line in skipped["first"][:5]]
    lost = describe_round_trip(store.manifest.get("round_trip"))
    lines += [f"in a sample {lost}"] if lost else []
    return "\n".join([store.directory, *lines])
