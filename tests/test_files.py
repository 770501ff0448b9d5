"""Files appear complete or not at all, and only one process holds a lock."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from etils import epath

from retnet_jax.files import atomic, lock, paths
from retnet_jax.files.digests import sha256_of, sha256_of_file


@pytest.mark.parametrize("kind", [Path, epath.Path])
def test_a_file_is_the_old_one_until_the_new_one_is_complete(kind, tmp_path, monkeypatch):
    path = kind(tmp_path) / "file"
    atomic.write_text(path, "old é\r\n")
    assert Path(path).read_bytes() == "old é\r\n".encode()

    def full(self, contents):
        with open(self, "wb") as file:
            file.write(contents[:2])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            atomic.write_text(path, "new")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
    assert sha256_of_file(path) == sha256_of("old é\r\n".encode())
    atomic.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_directory_appears_with_all_its_files_or_not(tmp_path):
    path = tmp_path / "deep" / "directory"

    def fail(unfinished):
        (unfinished / "one").touch()
        assert not path.exists()
        assert atomic.is_unfinished(unfinished)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic.directory(path) as unfinished:
        fail(unfinished)
    assert list(path.parent.iterdir()) == []
    path.mkdir()  # an empty directory is replaced
    with atomic.directory(path) as unfinished:
        (unfinished / "one").touch()
    assert [x.name for x in path.iterdir()] == ["one"]
    with pytest.raises(OSError, match="not empty"), atomic.directory(path):
        pass
    assert [x.name for x in path.parent.iterdir()] == ["directory"]


def test_a_directory_is_held_by_one_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; from retnet_jax.files import lock\n"
        "with lock.held(Path(sys.argv[1])): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        holder = rf"process {process.pid} on \S+$"
        with pytest.raises(lock.HeldError, match=holder), lock.held(tmp_path):
            pass
        assert re.match(holder, lock.holder(tmp_path))
        process.kill()
    with lock.held(tmp_path):
        pass
    assert lock.holder(tmp_path) is None


def test_a_process_that_waits_for_a_deleted_lock_file_takes_the_new_one(tmp_path):
    waiting, held = threading.Event(), threading.Event()

    def second():
        with lock.held(tmp_path, waiting=lambda _: waiting.set()):
            held.set()
            assert lock.holder(tmp_path) is not None

    thread = threading.Thread(target=second)
    with lock.held(tmp_path):
        thread.start()
        assert waiting.wait(60)
        assert not held.is_set()
        (tmp_path / lock.FILE_NAME).unlink()
    thread.join(60)
    assert held.is_set()


def test_paths_as_a_person_types_them(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.expanded("~/runs/x") == "/home/me/runs/x"
    assert paths.local(Path("~/x")) == Path("/home/me/x")
    assert paths.expanded("gs://bucket/~") == "gs://bucket/~"
    assert paths.printable("é\udcff") == "é\\udcff"
