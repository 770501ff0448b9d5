r"""Builds the token store of a config ahead of training, and prints what it holds.

    python tools/prepare_data.py --config=configs/FILE.py --config.data.source=jsonl \
        --config.data.path='pile/*.jsonl.zst' --config.data.store=data/pile [--processes=8]

Killed at any point, the same command goes on with what is left to do. A store that is complete is
checked against the config and against the hashes of its files, and printed.
"""

from absl import flags

from retnet_jax.data import build_store
from retnet_jax.data.stores import open_or_build
from retnet_jax.data.token_store import TokenStore, check_files
from retnet_jax.files import paths as files
from retnet_jax.pretrained import with_initial_model
from retnet_jax.programs import command_line

flags.DEFINE_integer("processes", None, "that work in parallel; else one for each core", 1)


def main() -> None:
    """Builds, finishes or opens the store that the config names."""
    config = with_initial_model(command_line.given_config())
    manifest, plan = (f"{config.data.store}/{name}.json" for name in ("manifest", "plan"))
    complete = files.exists(manifest) and not files.exists(plan)
    command = command_line.prepare_command()
    if not complete:
        build_store(config.data, config.model.vocab_size, flags.FLAGS.processes, command)
    store = open_or_build(config.data, config.model.vocab_size, command)
    if complete:
        check_files(store)
    print(table(store))


def table(store: TokenStore) -> str:
    """Counts of each split, and what was left out."""
    rows = [("", "documents", "tokens", "bytes", "bytes/token")]
    for name, counts in store.manifest["splits"].items():
        numbers = [f"{counts[key]:,}" for key in ("documents", "tokens", "bytes")]
        rows.append((name, *numbers, f"{counts['bytes'] / counts['tokens']:.2f}"))
    lines = [f"{row[0]:<10}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows]
    skipped = store.manifest["skipped"]
    lines.append(f"{store.manifest['duplicates']:,} duplicates, {skipped['count']:,} skipped")
    lines += [f"  {count:,} {reason}" for reason, count in skipped["reasons"].items()]
    lines += [f"    {line}" for line in skipped["first"][:5]]
    return "\n".join([store.directory, *lines])


if __name__ == "__main__":
    command_line.define_config()
    command_line.run(main)
