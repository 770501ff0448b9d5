"""A run on gs://, written and read as one on a disk, with an emulator of Google Cloud Storage.

    PYTHONPATH=.:tests:.venv/gcs python tests/runs_on_gcs.py DIRECTORY

It is a program of its own because the packages in .venv/gcs are not installed in .venv. Small files
go through gcsfs, arrays through TensorStore; both use the emulator on the loopback address.
"""

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


ADDRESS = f"http://127.0.0.1:{(PORT := free_port())}"
os.environ |= {
    "STORAGE_EMULATOR_HOST": ADDRESS,
    "TENSORSTORE_GCS_HTTP_URL": ADDRESS,
    # No request goes elsewhere in search of credentials.
    "NO_GCE_CHECK": "true",
    "GCE_METADATA_HOST": f"127.0.0.1:{PORT}",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "JAX_PLATFORMS": "cpu",
}

import fsspec  # noqa: E402
import programs  # noqa: E402
from gcp_storage_emulator.server import create_server  # noqa: E402
from training_runs import small_config  # noqa: E402

from retnet_jax import load_pretrained  # noqa: E402
from retnet_jax.config.as_json import to_json  # noqa: E402
from retnet_jax.trees import named_leaves  # noqa: E402

RUN = "gs://bucket/runs/mine"


def run(program, *arguments):
    done = programs.run(program, *map(str, arguments))
    assert done.returncode == 0, (program, arguments, done.stderr)
    return done


def assert_same_parameters(one, other):
    one, other = named_leaves(load_pretrained(one)), named_leaves(load_pretrained(other))
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert leaf.tobytes() == other[name].tobytes(), name


def main(directory):
    programs.DIRECTORY = directory
    (directory / "text").mkdir()
    config = small_config(directory / "text")
    config = replace(config, train=replace(config.train, steps=4, eval_every=4, checkpoint_every=2))
    (directory / "config.py").write_text(
        "from retnet_jax.config.as_json import config_from_json\n"
        f"def get_config(): return config_from_json({to_json(config)!r})\n"
    )
    options = f"--config={directory}/config.py"
    assert "the run is finished" in run("train.py", options, f"--workdir={RUN}").stderr
    store = fsspec.filesystem("gs", use_listings_cache=False)
    store.put(f"{config.data.store}/", "bucket/store/", recursive=True)
    config = directory / "here"
    run("train.py", options, f"--workdir={config}")
    assert_same_parameters(RUN, config)
    assert f"{RUN}: intact\n" in run("tools/verify.py", RUN).stdout
    # The checkpoint of step 4 is damaged: the run is resumed from step 2, to the same end.
    store.pipe_file("bucket/runs/mine/checkpoints/4/model/_METADATA", b"{}")
    assert "step 4/4" in run("train.py", options, f"--workdir={RUN}").stderr
    assert_same_parameters(RUN, config)
    assert "the run is finished" in run("train.py", options, f"--workdir={RUN}").stderr

    for name, model in (("gs", RUN), ("here", config)):
        run("eval.py", model, f"--output={directory}/{name}.json")
    results = [json.loads((directory / f"{name}.json").read_text()) for name in ("gs", "here")]
    assert results[0]["protocols"]
    for name in ("protocols", "positions"):
        assert results[0][name] == results[1][name], name
    texts = [
        run("generate.py", x, "The", "--max_tokens=8", "--temperature=0") for x in (RUN, config)
    ]
    assert texts[0].stdout == texts[1].stdout

    run("tools/export.py", RUN, directory / "exported", "--layout=own")
    store.put(f"{directory}/exported/", "bucket/exported/", recursive=True)
    assert_same_parameters("gs://bucket/exported", config)
    run("generate.py", "gs://bucket/exported", "The", "--max_tokens=2")
    tuned = ("--config.data.store=gs://bucket/store", f"--workdir={directory}/tuned")
    assert "the run is finished" in run("train.py", options, *tuned).stderr
    begun = (f"--config.init_from={RUN}", f"--workdir={directory}/begun")
    begun += (f"--config.data.store={directory}/begun_store",)
    assert "the run is finished" in run("train.py", options, *begun).stderr
    store.pipe_file("bucket/prompt.txt", b"The licence\n")
    done = run("generate.py", RUN, "--prompt_file=gs://bucket/prompt.txt", "--max_tokens=2")
    assert done.stdout.startswith("The licence")
    assert not (directory / "gs:").exists()


if __name__ == "__main__":
    server = create_server("127.0.0.1", PORT, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        main(Path(sys.argv[1]))
    finally:
        server.stop()
    print("everything works")
