"""Compiled programs on disk: their directory, their deletion, and a second start reads them."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import programs
import pytest

from retnet_jax.programs import compilation_cache
from retnet_jax.programs.compilation_cache import (
    default_root,
    delete_oldest,
    kind_of_machine,
    processor_digest,
)

ROOT = Path(__file__).parent.parent

CPUINFO = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
cpu MHz\t\t: 2596.124
flags\t\t: fpu sse2 avx2 avx512f

processor\t: 1
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
cpu MHz\t\t: 2000.000
flags\t\t: fpu sse2 avx2 avx512f
"""
ARM = "processor\t: 0\nBogoMIPS\t: 243\nFeatures\t: fp asimd sve\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (CPUINFO, " avx512f", ""),
        (CPUINFO, "AMD EPYC", "AMD EPYC 2"),
        (ARM, " sve", ""),
        (ARM, "0xd40", "0xd41"),
        ("arm", "arm", "i386"),
    ],
)
def test_another_processor_has_another_directory(text, old, new):
    assert processor_digest(text) != processor_digest(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [("2596.124", "2700.000"), ("fpu sse2", "sse2 fpu"), (CPUINFO[CPUINFO.index("\n\n") :], "\n")],
)
def test_clocks_and_numbers_of_processors_have_no_effect(old, new):
    assert processor_digest(CPUINFO) == processor_digest(CPUINFO.replace(old, new))


def test_the_root_is_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == tmp_path / ".cache" / "retnet_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_root() == tmp_path / ".cache" / "retnet_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert default_root() == tmp_path / "elsewhere" / "retnet_jax"


def test_the_entries_used_least_recently_are_deleted(tmp_path):
    names = ["jaxlib-1-a/old-cache", "jaxlib-2-b/newer-cache", "jaxlib-2-b/newest-cache"]
    for age, name in enumerate(reversed(names)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / names[0], (2e9, 1e9))  # read later than all others were written
    others = [tmp_path / "notes", tmp_path / "jaxlib-2-b" / "notes", tmp_path / "mine-cache"]
    for path in others:
        path.write_bytes(bytes(1000))
    delete_oldest(tmp_path, 300)
    assert all((tmp_path / name).exists() for name in names)
    delete_oldest(tmp_path, 299)
    assert [(tmp_path / name).exists() for name in names] == [True, False, True]
    assert all(path.exists() for path in others)


@pytest.fixture
def unchanged_settings():
    """Checks that a test left JAX's settings as they were."""
    names = ("compilation_cache_dir", "enable_compilation_cache")
    before = [getattr(jax.config, f"jax_{name}") for name in names]
    yield
    assert [getattr(jax.config, f"jax_{name}") for name in names] == before


@pytest.mark.usefixtures("unchanged_settings")
def test_the_directory_of_the_environment_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"]  # of conftest.py
    compilation_cache.use(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unchanged_settings")
def test_a_file_in_the_way_is_reported(tmp_path, capsys):
    (tmp_path / "file").touch()
    compilation_cache.use(str(tmp_path / "file"))
    message = capsys.readouterr().err
    assert message.startswith("compiled programs are not kept: ")
    assert str(tmp_path / "file") in message
    assert message.count("\n") == 1


@pytest.mark.usefixtures("unchanged_settings")
def test_a_full_disk_is_reported(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
    try:
        compilation_cache.use(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "compiled programs are not kept: OSError: " in capsys.readouterr().err


@pytest.mark.usefixtures("unchanged_settings")
@pytest.mark.parametrize("program", ["train.py", "eval.py", "generate.py"])
def test_every_program_has_the_option(program, tmp_path):
    config = ["--config=quickstart"] if program == "train.py" else []
    done = programs.run(
        program, *config, f"--workdir={tmp_path}/run", "--compilation_cache=gs://bucket/cache"
    )
    assert done.returncode == 2
    assert "--compilation_cache=gs://bucket/cache is not a directory" in done.stderr


COMPILES = """
import jax
import retnet_jax
from retnet_jax import RetNet
assert jax.config.jax_compilation_cache_dir is None
from collections import Counter
from retnet_jax.programs import compilation_cache
assert jax.config.jax_compilation_cache_dir is None
counts = Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
{before}
compilation_cache.use({given!r})
{after}
for name in ("first", "second", "third"):
    def function(x):
        return x + len(name)
    function.__name__ = name
    jax.jit(function)(1.0)
print(counts["cache_hits"], counts["cache_misses"])
"""


def counts_of_process(directory, given=None, before="", after=""):
    """Hits, misses and stderr of a process that compiles three programs."""
    environment = {x: os.environ[x] for x in os.environ if "CACHE" not in x}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES.format(given=given, before=before, after=after)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"XDG_CACHE_HOME": str(directory)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return *map(int, done.stdout.split()), done.stderr


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    hits, misses, errors = counts_of_process(tmp_path)
    assert (hits, errors) == (0, "")
    entries = sorted((tmp_path / "retnet_jax" / kind_of_machine()).glob("*-cache"))
    assert misses == len(entries) >= 3
    assert entries[0].parent.stat().st_mode & 0o777 == 0o700
    # Cut off, as by a process that was killed while it wrote.
    cut = next(path for path in entries if path.name.startswith("jit_second-"))
    whole = cut.read_bytes()
    cut.write_bytes(whole[:20])
    hits, misses, errors = counts_of_process(tmp_path)
    assert (hits, misses) == (len(entries) - 1, 1)
    assert errors.startswith("the kept program jit_second cannot be read (")
    assert errors.count("\n") == 1
    assert len(cut.read_bytes()) > 20


def test_a_disk_that_becomes_full_is_reported_once(tmp_path):
    directory = tmp_path / "retnet_jax" / kind_of_machine()
    directory.mkdir(parents=True)
    (directory / "jit_old-0123-cache").touch()
    hits, _, errors = counts_of_process(
        tmp_path,
        before="compilation_cache.MOST_BYTES = -1",
        after="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))",
    )
    assert errors.startswith(f"compiled programs are no longer kept: {directory}: OSError: ")
    assert errors.count("\n") == 1
    assert list(directory.iterdir()) == []  # also without the old entry, which was too much
    assert hits == 0


def test_off_keeps_nothing(tmp_path):
    assert counts_of_process(tmp_path, given="off") == (0, 0, "")
    assert not list(tmp_path.iterdir())
