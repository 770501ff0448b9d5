"""An object store in this process's memory, under s3://.

`epath` keeps the file system that it first finds for a protocol, so all tests of a process must use
this one.
"""

import contextlib
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """s3:// in memory; as there, a directory exists only with a file in it."""

    protocol = "s3"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol("/" + path.removeprefix("s3://").strip("/"))

    def unstrip_protocol(self, name):
        return "s3://" + self._strip_protocol(name).lstrip("/")


@contextlib.contextmanager
def empty_bucket():
    """The file system of s3://, which is emptied when the `with` ends."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
    try:
        yield fsspec.filesystem("s3")
    finally:
        Bucket.store.clear()
        Bucket.pseudo_dirs[:] = [""]
