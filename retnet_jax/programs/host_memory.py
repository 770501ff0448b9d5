"""Memory of a process that computes on a CPU: what a step frees is kept for the next step."""

import ctypes
import os
import platform
import sys
from pathlib import Path

# Parameters of mallopt(3), and their values here.
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -8, -3, -1, -2
_LARGEST = 2**31 - 1
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory in this process; to be called before jax starts its threads.

    A step on a CPU allocates and frees the same buffers every time. By default glibc returns large
    ones to the system, which then clears their pages for the next step: 26,000 page faults in a
    step of the quickstart, a fifth of its processor time (`python -m benchmarks.host_memory`).

    Nothing is done where an accelerator is found (its host does little of this, and one arena slows
    threads that allocate at once), with another C library, and where the environment has settings
    of its own (MALLOC_...).

    Returns:
      Whether it was done.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith("MALLOC_") for name in os.environ) or not _only_cpu():
        return False
    library = ctypes.CDLL(None)
    settings = {
        _ARENA_MAX: 1,  # other arenas have heaps of at most 64 MiB
        _MMAP_THRESHOLD: _LARGEST,
        _TRIM_THRESHOLD: _LARGEST,
        _TOP_PAD: 2**24,
    }
    return all(library.mallopt(*setting) == 1 for setting in settings.items())


def _only_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or not any(Path(device).exists() for device in _ACCELERATORS)
