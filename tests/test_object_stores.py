"""Runs on gs://, with an emulator; and what is said where an object store cannot be used."""

import os
import subprocess
import sys

import fsspec
import programs
import pytest
from etils import epath
from small_bucket import empty_bucket

from retnet_jax.errors import ConfigError
from retnet_jax.files import paths

GCS = programs.ROOT / ".venv/gcs"  # gcsfs and an emulator; made by `make test-all`


@pytest.mark.slow
@pytest.mark.skipif(not GCS.exists(), reason="needs .venv/gcs, which `make .venv/gcs` installs")
def test_a_run_on_gcs_is_like_one_on_a_disk(tmp_path):
    """Trained, resumed from a damaged checkpoint, verified, evaluated, generated from, exported."""
    path = f"{programs.ROOT}:{programs.ROOT}/tests:{GCS}"
    done = subprocess.run(
        [sys.executable, programs.ROOT / "tests/runs_on_gcs.py", tmp_path],
        env=os.environ | {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.endswith("everything works\n")


@pytest.fixture
def bucket():
    with empty_bucket() as system:
        yield system


def test_a_directory_without_files_has_no_entries(bucket, tmp_path):
    bucket.pipe_file("/b/run/config.json", b"{}")
    assert [x.name for x in paths.entries(epath.Path("s3://b/run"))] == ["config.json"]
    assert paths.entries(epath.Path("s3://b/run/checkpoints")) == []
    assert paths.entries(epath.Path(tmp_path / "none")) == []


def test_files_that_other_processes_write_are_seen(bucket):
    paths.place("s3://b")
    assert fsspec.config.conf["s3"]["use_listings_cache"] is False


def test_a_url_where_a_local_path_is_needed():
    message = "gs://b/out is a URL, but this file or directory must be on a local disk: give a path"
    with pytest.raises(ConfigError, match=message):
        paths.local("gs://b/out")
    done = programs.run("generate.py", "runs/x", "The", "--output=gs://b/out")
    assert (done.returncode, message in done.stderr) == (2, True)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for program, *arguments in (("eval.py",), ("generate.py", "The")):
        done = programs.run(program, "gs://bucket/run", *arguments)
        assert done.returncode == 2, done.stderr
        assert "gs://bucket/run cannot be read: " in done.stderr
        assert "gcsfs" in done.stderr
