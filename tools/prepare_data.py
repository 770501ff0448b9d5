r"""Builds the token store of a config ahead of training, and prints what it holds.

    python tools/prepare_data.py --config=configs/FILE.py [--config.data.path=...]

A store that is there already is checked against the config and printed.
"""

from retnet_jax import command_line
from retnet_jax.data import TokenStore, open_or_build
from retnet_jax.pretrained import with_initial_model

command_line.define_config()


def main() -> None:
    """Builds or opens the store that the config names."""
    config = with_initial_model(command_line.given_config())
    print(table(open_or_build(config.data, config.model.vocab_size)))


def table(store: TokenStore) -> str:
    """Counts of each split, and what was skipped."""
    rows = [("", "documents", "tokens", "bytes", "bytes/token")]
    for name, counts in store.manifest["splits"].items():
        numbers = [f"{counts[key]:,}" for key in ("documents", "tokens", "bytes")]
        rows.append((name, *numbers, f"{counts['bytes'] / counts['tokens']:.2f}"))
    lines = [f"{row[0]:<10}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows]
    skipped = store.manifest["skipped"]
    lines.append(f"skipped {skipped['count']}")
    lines += [f"  {line}" for line in skipped["first"][:5]]
    return "\n".join([str(store.directory), *lines])


if __name__ == "__main__":
    command_line.run(main)
