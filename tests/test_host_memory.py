"""The C library keeps freed memory: pages are not cleared again at every step."""

import json
import os
import subprocess
import sys

import pytest

FAULTS = """
import json, resource
from retnet_jax.programs.host_memory import keep_freed_memory

kept = keep_freed_memory()
def touch():
    b"x" * 2**25  # 8,192 pages
for _ in range(3):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def faults(**environment):
    """Whether memory is kept, and the page faults of ten arrays of 8,192 pages."""
    result = subprocess.run(
        [sys.executable, "-c", FAULTS],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if "MALLOC_" not in k} | environment,
    )
    return json.loads(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of Linux's glibc")
def test_freed_memory_is_used_again_without_page_faults():
    kept, count = faults(JAX_PLATFORMS="cpu")
    assert kept
    assert count < 100
    kept, count = faults(JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="8")  # the user has decided
    assert not kept
    assert count > 10_000
