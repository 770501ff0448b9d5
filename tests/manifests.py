"""Changes the manifests of stores, and turns stores into those of an older format."""

import json
from pathlib import Path

from retnet_jax.data.token_store import manifest_text, read_manifest


def rewrite_manifest(directory, change):
    """Applies a function to a manifest and writes the result with a new digest."""
    manifest = read_manifest(str(directory))
    change(manifest)
    (Path(directory) / "manifest.json").write_text(manifest_text(manifest))


def make_format_3(directory):
    """Turns a store into one of format 3, by deleting what that does not have."""
    manifest = read_manifest(str(directory)) | {"format": 3}
    del manifest["tokenizer"]
    for shard in manifest["shards"]:
        del shard["blocks"]
        (Path(directory) / "shards" / shard["name"] / "blocks.npy").unlink()
    (Path(directory) / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
