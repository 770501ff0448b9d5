"""Compiled programs are kept on disk, so that later starts of a program need not compile them.

    compilation_cache.define_flag()
    ...
    compilation_cache.use(flags.FLAGS.compilation_cache)  # before anything is compiled

This is JAX's persistent compilation cache, in a directory of the user's cache for each version of
jaxlib and each kind of processor: a home directory may be shared by machines, and code that was
compiled for one may use instructions that another does not have. Only the programs use it; `import
retnet_jax` leaves JAX's settings alone.

JAX can bound its cache too, but then every later write fails after a process was killed during one
(the entry has no time of its last use). So `use` deletes old entries itself, at each start.
"""

import glob
import hashlib
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import flags

from retnet_jax.errors import ConfigError
from retnet_jax.files.paths import is_remote, local

MOST_BYTES = 2**30  # of all kept programs of a user, also those of other versions of jaxlib
_PROBE_BYTES = 2**20  # a disk with less space left is full
_KIND = "jaxlib-"  # how the name of a directory of kept programs begins
_ENTRY = "-cache"  # how JAX's names of entries end
_FAILURE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL
)


def define_flag() -> None:
    """Defines --compilation_cache."""
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Directory in which compiled programs are kept for the next start; off: none. Default: "
        "$JAX_COMPILATION_CACHE_DIR, otherwise a directory in ~/.cache; for several processes, "
        "which need a directory that all of them share: off",
    )


def use(given: str | None) -> None:
    """Makes JAX keep compiled programs. If the directory cannot be used, says so and returns.

    Args:
      given: The value of --compilation_cache; None: the default.

    Raises:
      ConfigError: for a directory in an object store.
    """
    if given in ("", "off"):
        jax.config.update("jax_enable_compilation_cache", False)
        return
    # The environment has chosen a directory, or none. Of several processes only the first one
    # writes, and on GPUs those that compile wait for each other: all must find the same entries.
    chosen = _option("jax_compilation_cache_dir") or not _option("jax_enable_compilation_cache")
    if given is None and (chosen or jax.distributed.is_initialized()):
        return
    if given is not None and is_remote(given):
        raise ConfigError(
            f"--compilation_cache={given} is not a directory of this machine: give one, or set "
            "JAX_COMPILATION_CACHE_DIR, which can also name a bucket"
        )
    try:
        root = default_root() if given is None else local(given).absolute()
        directory = root / kind_of_machine()
        _check_usable(directory)
        delete_oldest(root, MOST_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        reason = f"{type(error).__name__}: {error}"
        _say(
            f"compiled programs are not kept: {reason}; give another directory with "
            "--compilation_cache=DIR, or --compilation_cache=off"
        )
        return
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # All programs: a start has many small ones, and reading one takes a tenth of compiling it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _handle_failures(directory)


def default_root() -> Path:
    """The directory of all kept programs: `retnet_jax` in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "retnet_jax"


def _option(name: str) -> Any:
    """An option of JAX, which has them as attributes that no type checker knows."""
    return getattr(jax.config, name)


def kind_of_machine() -> str:
    """The name of the directory for this version of jaxlib, system and kind of processor."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    system = f"{platform.system()}-{platform.machine()}".lower()
    return f"{_KIND}{metadata.version('jaxlib')}-{system}-{processor_digest(text)}"


def processor_digest(cpuinfo: str) -> str:
    """Eight hexadecimal digits for a model of processor and its features.

    Args:
      cpuinfo: Text of /proc/cpuinfo, or on other systems any description of the processor. What
        differs between processors of one model, such as their number and clock, has no effect.
    """
    lines = [line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines()]
    values = {name.strip(): " ".join(sorted(value.split())) for name, _, value in lines}
    of_model = {name: value for name, value in values.items() if _DESCRIBES_MODEL.match(name)}
    return hashlib.sha256(repr(sorted((of_model or values).items())).encode()).hexdigest()[:8]


# Fields on x86, ARM, RISC-V and POWER.
_DESCRIBES_MODEL = re.compile(
    r"(vendor_id|cpu family|model|model name|stepping|flags|Features|CPU \w+|isa|uarch|cpu)$"
)


def delete_oldest(root: Path, most_bytes: int) -> None:
    """Deletes the entries that were used least recently until at most `most_bytes` remain.

    Other processes may use the cache meanwhile: one that misses an entry compiles it again.
    """
    total = 0
    for _, size, path in sorted(_entries(root), reverse=True):
        total += size
        if total > most_bytes:
            path.unlink(missing_ok=True)


def _entries(root: Path) -> Iterator[tuple[float, int, Path]]:
    """The time of the last use, the size and the path of each entry."""
    for path in root.glob(f"{_KIND}*/*{_ENTRY}"):
        try:
            found = path.stat()
        except FileNotFoundError:  # deleted by another process
            continue
        # Most systems update the time of access once a day.
        yield max(found.st_atime, found.st_mtime), found.st_size, path


def _check_usable(directory: Path) -> None:
    """Creates the directory; raises `OSError` if it cannot be written to."""
    # Whoever can write there can run code as this user.
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.mkdir(exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(_PROBE_BYTES))
        file.flush()


def _handle_failures(directory: Path) -> None:
    """Replaces JAX's warning for each entry that cannot be read or written.

    JAX does not replace an entry that exists, so one that was cut off by a killed process would be
    reported at every start: it is deleted, and JAX writes it again. After a failed write, as on a
    full disk, nothing more is written.
    """
    show = warnings.showwarning

    def handle(message, category, *where, **options):
        failure = _FAILURE.match(str(message))
        if failure is None:
            show(message, category, *where, **options)
            return
        action, program, reason = failure.groups()
        for path in directory.glob(f"{glob.escape(program)}-*{_ENTRY}"):
            path.unlink(missing_ok=True)
        if action == "reading":
            _say(f"the kept program {program} cannot be read ({reason}): it is compiled again")
        elif _option("jax_persistent_cache_min_compile_time_secs") < float("inf"):
            jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
            _say(f"compiled programs are no longer kept: {directory}: {reason}")

    warnings.showwarning = handle


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
