"""Stores whose manifests say something else, or are of an older format."""

import json
from pathlib import Path

from retnet_jax.data.token_store import manifest_text, read_manifest


def rewrite_manifest(directory, change):
    """Applies a function to a manifest; what it makes of it counts as written."""
    manifest = read_manifest(str(directory))
    change(manifest)
    (Path(directory) / "manifest.json").write_text(manifest_text(manifest))


def make_format_3(directory):
    """Takes away what a store of format 3 does not have."""
    manifest = read_manifest(str(directory)) | {"format": 3}
    del manifest["tokenizer"]
    for shard in manifest["shards"]:
        del shard["blocks"]
        (Path(directory) / "shards" / shard["name"] / "blocks.npy").unlink()
    (Path(directory) / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
