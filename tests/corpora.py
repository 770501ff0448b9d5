"""Helpers that write and read corpora."""

import gzip

import pytest

from retnet_jax.config import DataConfig
from retnet_jax.data.sources import Skipped, read_documents


def read(source, path="", **options):
    skipped = Skipped()
    config = DataConfig(source=source, path=str(path), **options)
    return list(read_documents(config, skipped)), skipped


def compressed(path, data):
    """The data, compressed as the ending of the file's name says."""
    if path.name.endswith(".gz"):
        return gzip.compress(data)
    if path.name.endswith(".zst"):
        # Two frames, as tools that compress in parallel write them.
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2
        compress = zstandard.ZstdCompressor().compress
        return compress(data[:half]) + compress(data[half:])
    return data


def write_parquet(path, rows, row_group_size):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(Table.from_pylist(rows), path, row_group_size=row_group_size)
