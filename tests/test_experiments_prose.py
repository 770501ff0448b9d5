"""The texts of the prose experiment, from a small package index, and its differences."""

import hashlib
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from experiments import prose
from experiments.perplexity_by_size import MODELS
from experiments.prose_texts import Package, pages_of, prepare
from retnet_jax.errors import ConfigError

PAGE = "A page of documentation. " * 30
FILES = {
    "thing-1.0/docs/guide/start.rst": PAGE,
    "thing-1.0/docs/index.txt": PAGE + "index",
    "thing-1.0/docs/index.rst": PAGE + "the other index",
    "thing-1.0/docs/short.rst": "Too short.",
    "thing-1.0/docs/code.py": PAGE,
    "thing-1.0/src/notes.txt": PAGE,
}


def archive():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as files:
        for name, text in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            files.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


ARCHIVE = archive()


class Index(BaseHTTPRequestHandler):
    """A package index with one file."""

    def do_GET(self):
        self.server.asked.append(self.path)
        listed = {
            "files": [{"filename": "thing-1.0.tar.gz", "url": "../../files/thing-1.0.tar.gz"}]
        }
        answers = {
            "/simple/thing/": json.dumps(listed).encode(),
            "/files/thing-1.0.tar.gz": ARCHIVE,
        }
        body = answers.get(self.path)
        self.send_response(200 if body is not None else 404)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def index(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        yield server
        server.shutdown()
        thread.join()


def package(file="thing-1.0.tar.gz", name="thing"):
    return Package(name, file, hashlib.sha256(ARCHIVE).hexdigest())


def test_pages_are_downloaded_once(index, tmp_path):
    prepare((package(),), tmp_path)
    found = {x.name: x.read_text() for x in (tmp_path / "thing-1.0").iterdir()}
    assert found == {
        "docs__guide__start.rst.txt": PAGE,
        "docs__index.txt.txt": PAGE + "index",
        "docs__index.rst.txt": PAGE + "the other index",
    }
    asked = len(index.asked)
    prepare((package(),), tmp_path)
    assert len(index.asked) == asked


def test_only_pages_of_documentation_are_texts():
    assert set(pages_of(ARCHIVE)) == {
        "docs__guide__start.rst.txt",
        "docs__index.txt.txt",
        "docs__index.rst.txt",
    }


def test_another_file_of_this_name_is_refused(index, tmp_path):
    other = Package("thing", "thing-1.0.tar.gz", "0" * 64)
    with pytest.raises(ConfigError, match=r"thing-1.0.tar.gz .* has the SHA-256 .*, not 00.*other"):
        prepare((other,), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (package("thing-2.0.tar.gz"), "thing-2.0.tar.gz is not in the package index http.*/thing/"),
        (package(name="nothing"), "thing-1.0.tar.gz cannot be had from .*/nothing/: .*404"),
    ],
)
def test_what_cannot_be_had_is_named(index, tmp_path, wanted, message):
    with pytest.raises(ConfigError, match=message):
        prepare((wanted,), tmp_path)


def record(model, seed, bits, stateful=None):
    found = {"window": {"bits": bits, "bits_per_byte": sum(bits) / 20}}
    if stateful:
        found["stateful"] = {"bits": stateful, "bits_per_byte": sum(stateful) / 20}
    held_out = {"bytes": [10, 10], **found}
    return {"model": model, "size": "0.1M", "seed": seed, "rate": 0.04, "held_out": held_out}


def test_a_retnet_is_compared_in_both_ways():
    records = {
        "a": record("retnet", 0, [30, 20], [25, 15]),
        "b": record("transformer", 0, [24, 16]),
        "c": record("retnet", 1, [30, 22]),  # its Transformer is missing
    }
    final = prose.chosen("small", records)
    pair = ("retnet", "transformer")
    assert prose.difference(final, pair, "0.1M", "window").mean == pytest.approx(0.5)
    assert prose.difference(final, pair, "0.1M", "carried").mean == pytest.approx(0.0)
    assert prose.difference(final, pair, "0.3M", "window") is None


def test_runs_on_a_gpu_are_of_equal_parameters_and_follow_the_sweep():
    swept = prose.runs("gpu", {})
    assert len(swept) == len(prose.GPU_RATES) * len(MODELS) * 2
    for size in ("16M", "48M"):
        found = [run.about["non_embedding"] for run in swept if run.about["size"] == size]
        assert max(found) / min(found) < 1.01
        assert f"{round(found[0] / 1e6)}M" == size
    # Rates of 0.02 are best.
    records = {
        run.name: run.about | {"validation": 2 + abs(run.about["rate"] - 0.02)} for run in swept
    }
    later = {run.name for run in prose.runs("gpu", records)} - set(records)
    assert len(later) == len(MODELS) * 2
    assert all("_rate0.02_seed1" in name for name in later)
    records.pop("retnet_16M_rate0.01_seed0")
    assert not any(run.name == "retnet_16M_rate0.02_seed1" for run in prose.runs("gpu", records))
    assert not any("retnet_16M" in name for name in prose.chosen("gpu", records))
    # One model is still better with the highest rate: one more is tried before the second seed.
    records["retnet_conv_16M_rate0.04_seed0"]["validation"] = 1.9
    names = {run.name for run in prose.runs("gpu", records)}
    assert "retnet_conv_16M_rate0.08_seed0" in names
    assert "retnet_conv_16M_rate0.04_seed1" not in names
    assert "retnet_conv_16M_rate0.04_seed0" in prose.chosen("gpu", records)
