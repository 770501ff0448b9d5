"""Checkpoints: they are restored exactly, on any mesh, or not at all."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from test_train_step import CONFIG

from retnet_jax.config import MeshConfig
from retnet_jax.errors import CheckpointError, DamagedCheckpointError
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.runs import checkpoint, checkpoint_files
from retnet_jax.runs.checkpoint import Checkpoints, ParameterReader, restore_model
from retnet_jax.runs.checkpoint_files import problems
from retnet_jax.training.step import abstract_state, initial_state


@pytest.fixture
def shape():
    return abstract_state(CONFIG, make_mesh(MeshConfig()))


@functools.cache
def initial():
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(CONFIG, make_mesh(MeshConfig())))
    return jax.jit(partial(initial_state, CONFIG), out_shardings=shardings)()


@jax.jit
def added(state, number):
    return jax.tree.map(lambda x: x + number.astype(x.dtype), state)


def state_at(step):
    """A state with different numbers for each step."""
    return added(initial(), np.float32(step))


def items_of(state):
    return {"model": state.model, "optimizer": state.optimizer, "carry": state.carry}


def save(directory, steps, keep=3, keep_every=0):
    checkpoints = Checkpoints(directory, keep=keep, keep_every=keep_every)
    for step in steps:
        state = state_at(step)
        checkpoints.save(step, items_of(state), {"next_batch": step})
    checkpoints.wait()
    checkpoints.close()


def assert_equal(actual, expected):
    actual, expected = jax.device_get((actual, expected))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.compiles(60, reason="Orbax places each leaf, of its own shape, on eight devices")
def test_restore_is_exact_on_another_mesh(tmp_path):
    save(tmp_path, [5])
    other = abstract_state(CONFIG, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.latest_step() == 5
    items, progress = checkpoints.restore(5, items_of(other))
    model = items["model"]
    assert items["carry"] is None
    checkpoints.close()
    expected = state_at(5)
    assert_equal(items, items_of(expected))
    assert progress == {"step": 5, "format": 2, "next_batch": 5}
    kernel = model.layers.mixer.q.kernel[...]
    assert kernel.sharding.is_equivalent_to(other.model.layers.mixer.q.kernel.sharding, 3)


def test_a_checkpoint_does_not_change_while_training_continues(tmp_path):
    """The step donates its state, so its buffers are overwritten during the save."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    state = state_at(1)
    expected = jax.device_get(state.model)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    checkpoints.save(1, items_of(state), {"next_batch": 1})
    overwritten = overwrite(state)
    jax.block_until_ready(overwritten)
    checkpoints.wait()
    checkpoints.close()
    model, step = restore_model(tmp_path, abstract_state(CONFIG, make_mesh(MeshConfig())).model)
    assert step == 1
    assert_equal(model, expected)


def test_relative_directories_work(tmp_path, shape, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("run"), [1])
    assert restore_model(Path("run"), shape.model)[1] == 1


def test_the_newest_are_kept(tmp_path, shape):
    save(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    model, step = restore_model(tmp_path, shape.model)
    assert step == 4
    assert_equal(model, state_at(4).model)


def test_every_mth_checkpoint_is_never_deleted(tmp_path):
    save(tmp_path, [1, 2, 3, 4, 5, 6, 7], keep=2, keep_every=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6", "7"]


def restore(directory, step, shape):
    with contextlib.closing(Checkpoints(directory, keep=3)) as checkpoints:
        return checkpoints.restore(step, items_of(shape))


@pytest.mark.parametrize("harm", ["cut off", "deleted"])
def test_every_file_of_a_checkpoint_is_needed(tmp_path, shape, harm):
    save(tmp_path, [1, 2])
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file())
    names = [str(path.relative_to(tmp_path / "2")) for path in files]
    names.remove("files.json")
    assert list(json.loads((tmp_path / "2" / "files.json").read_text())["files"]) == names
    for name in names:
        path = tmp_path / "2" / name
        content = path.read_bytes()
        if harm == "deleted":
            path.unlink()
        elif content:
            path.write_bytes(content[:-1])
        else:
            continue
        with pytest.raises(DamagedCheckpointError, match=re.escape(f"damaged: {name} ")):
            restore(tmp_path, 2, shape)
        path.write_bytes(content)
    assert restore(tmp_path, 2, shape)[1]["step"] == 2


@pytest.mark.slow
@pytest.mark.compiles(60, reason="saves and restores a state by itself")
def test_every_flipped_bit_is_found(tmp_path, shape):
    """Most flips give other numbers in Orbax, the rest errors of every kind."""
    save(tmp_path, [1, 2])
    rng = np.random.default_rng(0)
    newest = tmp_path / "2"
    readers = {
        "": [
            lambda: restore(tmp_path, 2, shape),
            lambda: restore_model(tmp_path, shape.model),
            lambda: ParameterReader(tmp_path, shape.model),
        ],
        "optimizer": [lambda: restore(tmp_path, 2, shape)],
    }
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        content = path.read_bytes()
        item = path.relative_to(newest).parts[0]
        for _ in range(3 if content else 0):
            damaged = bytearray(content)
            damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            for read in readers.get(item, readers[""]):
                with pytest.raises(DamagedCheckpointError, match="2 is damaged: "):
                    read()
            assert problems(newest)
        path.write_bytes(content)
    assert problems(newest) == []
    assert restore_model(tmp_path, shape.model)[1] == 2


def test_a_checkpoint_whose_list_is_missing_is_damaged(tmp_path, shape):
    save(tmp_path, [1])
    (tmp_path / "1" / "files.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"1 is damaged: .*files\.json is missing"):
        restore_model(tmp_path, shape.model)


def test_an_old_checkpoint_without_digests_loads_with_a_warning(tmp_path, shape):
    save(tmp_path, [1])
    of_then(tmp_path / "1")
    with pytest.warns(UserWarning, match="1 was written without digests"):
        model, _ = restore_model(tmp_path, shape.model)
    assert_equal(model, state_at(1).model)
    (tmp_path / "1" / "files.json").unlink()
    with pytest.warns(UserWarning, match="1 was written without digests"):
        restore_model(tmp_path, shape.model)


def of_then(path):
    """Turns a checkpoint into one from before there were digests, with only sizes in its list."""
    listed = json.loads((path / "files.json").read_text())["files"]
    sizes = {name: about["bytes"] for name, about in listed.items() if "/" in name}
    (path / "files.json").write_text(json.dumps(sizes))
    progress = path / "progress" / "metadata"
    without = {k: v for k, v in json.loads(progress.read_text()).items() if k != "format"}
    progress.write_text(json.dumps(without))
    (path / "files.json").write_text(
        json.dumps(sizes | {"progress/metadata": progress.stat().st_size})
    )


def test_a_checkpoint_has_no_name_until_its_files_are_listed(tmp_path, monkeypatch):
    seen = []

    def listing(path):
        seen.append((path.name, checkpoints.steps()))
        write_list(path)

    write_list = checkpoint_files.write_list
    monkeypatch.setattr(checkpoint_files, "write_list", listing)
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(4, items_of(state_at(4)), {"next_batch": 4})
    checkpoints.wait()
    checkpoints.close()
    assert seen == [("4.unfinished", [])]
    assert checkpoints.steps() == [4]


def test_unfinished_checkpoints_of_a_killed_run_are_deleted(tmp_path):
    save(tmp_path, [1])
    for name in ("2.unfinished", "2.unfinished.orbax-checkpoint-tmp", "0.deleted.unfinished"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    Checkpoints(tmp_path, keep=3).close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


DAMAGED = """
import os, sys
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
from pathlib import Path
sys.path.insert(0, "tests")
from test_checkpoint import CONFIG, items_of
from retnet_jax.config import MeshConfig
from retnet_jax.errors import DamagedCheckpointError
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.training.step import abstract_state

directory = Path(sys.argv[1])
shape = abstract_state(CONFIG, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
checkpoints = Checkpoints(directory, keep=3)
for pattern in ("_METADATA", "manifest.ocdbt", "d/*"):
    found = (directory / "2" / "model").glob(pattern)
    path = max(found, key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(bytes(byte ^ 0xA5 for byte in content))
    try:
        checkpoints.restore(2, items_of(shape))
    except DamagedCheckpointError as error:
        print(error)
    path.write_bytes(content)
checkpoints.restore(2, items_of(shape))
print("intact")
"""


def test_damage_without_digests_is_reported_in_one_line(tmp_path):
    """Old checkpoints have only sizes, so Orbax has to find the damage.

    In a process of its own, in which Orbax leaves reads behind that still go on.
    """
    save(tmp_path, [1, 2])
    of_then(tmp_path / "2")
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED, tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    *damaged, last = done.stdout.splitlines()
    assert (len(damaged), last) == (3, "intact"), done.stderr
    for line in damaged:
        assert line.startswith(f"checkpoint {tmp_path / '2'} is damaged: ")
        assert len(line) < 600


def test_if_a_checkpoint_is_deleted_while_it_is_loaded_the_newest_is_loaded(
    tmp_path, shape, monkeypatch
):
    save(tmp_path, [1, 2])
    seen = []

    def deleting(path, items):
        seen.append(path.name)
        if path.name == "2":  # the run saves step 3 and deletes step 2
            shutil.move(tmp_path / "1", tmp_path / "3")
            shutil.rmtree(tmp_path / "2")
        return True

    monkeypatch.setattr(checkpoint, "_verify", deleting)
    model, step = restore_model(tmp_path, shape.model)
    assert (seen, step) == (["2", "3"], 3)
    assert_equal(model, state_at(1).model)


def test_a_checkpoint_deleted_between_parameters_is_an_error(tmp_path, shape):
    save(tmp_path, [1])
    reader = ParameterReader(tmp_path, shape.model)
    np.testing.assert_array_equal(reader.read("embedding"), state_at(1).model.embedding[...])
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(CheckpointError, match="1 was deleted while it was read"):
        reader.read("embedding")


def test_a_damaged_checkpoint_is_renamed(tmp_path):
    save(tmp_path, [1, 2])
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.set_aside(2)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, items_of(state_at(7)), {"next_batch": 2})
    checkpoints.wait()
    items, _ = checkpoints.restore(2, items_of(initial()))
    checkpoints.close()
    assert_equal(items["model"], state_at(7).model)
    (aside,) = tmp_path.glob("2.damaged-*")
    assert (aside / "model").is_dir()


def test_an_unfinished_checkpoint_is_never_loaded(tmp_path, shape):
    save(tmp_path, [1, 2])
    shutil.move(tmp_path / "2", tmp_path / "2.orbax-checkpoint-tmp")
    assert restore_model(tmp_path, shape.model)[1] == 1
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.latest_step() == 1
    checkpoints.close()


def test_another_models_checkpoint_is_refused_with_every_difference(tmp_path):
    save(tmp_path, [1])
    model = dataclasses.replace(CONFIG.model, d_model=32, tie_embeddings=False)
    wider = abstract_state(dataclasses.replace(CONFIG, model=model), make_mesh(MeshConfig()))
    with pytest.raises(CheckpointError, match="is of another model") as error:
        restore_model(tmp_path, wider.model)
    lines = str(error.value).splitlines()
    assert "  head: found nothing, expected (48, 32)" in lines
    assert "  layers/mixer/q/kernel: found (2, 16, 16), expected (2, 32, 32)" in lines
    assert len(lines) == 1 + len(jax.tree.leaves(wider.model))


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, [1])
    checkpoints = Checkpoints(tmp_path, keep=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(
        CheckpointError, match=r"needed, 1 are free .* newest good one is of step 1"
    ):
        checkpoints.save(2, items_of(state_at(2)), {"next_batch": 2})
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_no_checkpoint_is_an_error(tmp_path, shape):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        restore_model(tmp_path, shape.model)
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        restore_model(tmp_path / "nothing", shape.model)


def test_a_process_hashes_all_that_it_wrote_and_the_first_the_rest(tmp_path):
    save(tmp_path, [1])
    path = epath.Path(tmp_path / "1")
    names = checkpoint_files.files_under(path)
    written = json.loads((path / "files.json").read_text())
    checkpoint_files.hash_own(path, 0)
    own = list(json.loads((path / "files.0.json").read_text()))
    # Orbax adds a small index of all processes; the arrays are in what each has written.
    assert own == [x for x in names if "/ocdbt.process_0/" in x or x.endswith("/process_0")]
    assert any("/ocdbt.process_0/d/" in name for name in own)
    checkpoint_files.write_list(path)
    assert json.loads((path / "files.json").read_text()) == written
    assert not (path / "files.0.json").exists()
