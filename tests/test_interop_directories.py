"""Which files of a directory are read as a model, locally and on an object store."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx
from foreign_checkpoints import FIXTURES, copy_of, edit_config, leaves, tensors
from safetensors.numpy import load_file, save_file
from small_bucket import empty_bucket

from retnet_jax import interop, load_pretrained
from retnet_jax.data.tokenizers import ByteTokenizer
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.interop import presets
from retnet_jax.model import build_model

INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
NORM = "model.norm.weight"


def assert_same_model(one, other):
    for ours, theirs in zip(leaves(one), leaves(other), strict=True):
        assert ours.tobytes() == theirs.tobytes()


@pytest.fixture
def parts(tmp_path):
    """A model of fla in several files with an index."""
    interop.convert(FIXTURES / "fla/default", tmp_path / "parts", "fla", max_file_bytes=100_000)
    return tmp_path / "parts"


def weight_map(directory):
    return json.loads((directory / INDEX).read_text())["weight_map"]


def test_a_tensor_is_read_from_the_file_that_the_index_names(parts):
    """Other files may hold stale copies of it."""
    files = weight_map(parts)
    last = sorted(set(files.values()))[-1]
    stale = next(name for name, file in files.items() if file != last)
    found = load_file(parts / last)
    save_file(found | {stale: np.zeros(3, np.float32), "left": np.zeros(2)}, parts / last)
    assert_same_model(interop.load(parts), interop.load(FIXTURES / "fla/default"))


def test_a_tensor_missing_from_the_file_in_the_index_is_named(parts):
    file = parts / weight_map(parts)[NORM]
    found = load_file(file)
    del found[NORM]
    save_file(found, file)
    with pytest.raises(CheckpointError, match=f"{file.name} does not hold {NORM}, although"):
        interop.load(parts)


def test_a_single_file_that_contradicts_the_index_is_refused(parts):
    shutil.copy(FIXTURES / "fla/default/model.safetensors", parts)
    assert_same_model(interop.load(parts), interop.load(FIXTURES / "fla/default"))
    for change in (
        lambda found: found.update({NORM: found[NORM] + 1}),
        lambda found: found.pop(NORM),
    ):
        found = load_file(FIXTURES / "fla/default/model.safetensors")
        change(found)
        save_file(found, parts / "model.safetensors")
        with pytest.raises(CheckpointError) as error:
            interop.load(parts)
        assert f"{parts}/model.safetensors and the files that {parts}/{INDEX} names" in str(
            error.value
        )
        assert f"the first difference is in {NORM}" in str(error.value)


def test_an_index_without_its_files_is_ignored_with_a_warning(parts):
    for path in parts.glob("model-*.safetensors"):
        path.unlink()
    shutil.copy(FIXTURES / "fla/default/model.safetensors", parts)
    with pytest.warns(
        UserWarning, match=r"model.safetensors is read and .*: .*model-00001-of-00004"
    ):
        model = interop.load(parts)
    assert_same_model(model, interop.load(FIXTURES / "fla/default"))


@pytest.fixture
def torch_parts(tmp_path):
    """The model in two PyTorch files with an index, one of them with a stale tensor."""
    torch = pytest.importorskip("torch")
    directory = copy_of("fla/default", tmp_path / "torch")
    found = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(found)
    groups = {"pytorch_model-00001-of-00002.bin": names[:9]}
    groups["pytorch_model-00002-of-00002.bin"] = names[9:]
    for file, group in groups.items():
        torch.save({name: torch.from_numpy(found[name]) for name in group}, directory / file)
    stale = torch.load(directory / file) | {names[0]: torch.zeros(3)}
    torch.save(stale, directory / file)
    torch.save({}, directory / "training_args.bin")
    weight_map = {name: file for file, group in groups.items() for name in group}
    (directory / TORCH_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_pytorch_files_with_an_index(torch_parts):
    assert_same_model(interop.load(torch_parts), interop.load(FIXTURES / "fla/default"))
    interop.convert(torch_parts, torch_parts / "own", "own")
    assert_same_model(interop.load(torch_parts / "own"), interop.load(FIXTURES / "fla/default"))


def test_pytorch_files_that_contradict_their_index(torch_parts):
    index = torch_parts / TORCH_INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    first = torch_parts / "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps({"weight_map": weight_map | {NORM: first.name}}))
    with pytest.raises(CheckpointError, match=f"{first.name} does not hold {NORM}, although pyto"):
        interop.load(torch_parts)
    index.write_text(json.dumps({"weight_map": weight_map}))
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name} is missing, although {TORCH_INDEX} "):
        interop.load(torch_parts)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=f"{TORCH_INDEX} is not an index of tensors"):
        interop.load(torch_parts)


@pytest.mark.parametrize(
    "name",
    [
        *("cl100k_base.tiktoken", "chat_template.jinja", "spiece.model", "special_tokens_map.json"),
        *("sentencepiece.bpe.model", "vocab.bpe", "vocab.txt", "merges.txt", "tekken.json"),
    ],
)
def test_every_file_of_a_tokenizer_is_copied(name, tmp_path):
    directory = copy_of("fla/default", tmp_path / "in")
    for other in (name, "README.md", "training_args.bin.txt", "optimizer.json"):
        (directory / other).write_text(other)
    interop.convert(directory, tmp_path / "out", "own")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "model.safetensors", name}
    assert (tmp_path / "out" / name).read_text() == name


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e7), ("bfloat16", 3.4e38)])
def test_values_too_large_for_the_dtype_are_refused(dtype, value, tmp_path):
    model = interop.load(FIXTURES / "fla/default")
    scale = np.ones(model.config.d_model, np.float32)
    scale[3] = -value
    model.final_norm.scale = nnx.Param(scale)
    with pytest.raises(CheckpointError, match=r"final_norm/scale: .*is too large for " + dtype):
        interop.fla.save(model, tmp_path / "half", dtype=dtype)
    assert not any(tmp_path.iterdir())
    scale[3] = np.inf  # infinity has a value in every dtype
    model.final_norm.scale = nnx.Param(scale)
    interop.fla.save(model, tmp_path / "half", dtype=dtype)
    assert np.isinf(tensors(tmp_path / "half")[NORM][3])


def test_config_fields_may_be_null_but_not_of_another_type(tmp_path):
    directory = copy_of("fla/default", tmp_path / "in")
    edit_config(directory, max_position_embeddings=None)
    expected = interop.load(FIXTURES / "fla/default")
    assert_same_model(interop.load(directory), expected)
    edit_config(directory, intermediate_size=24.0)
    with pytest.raises(ConfigError, match=r"intermediate_size=24.0 is no int"):
        interop.load(directory)
    edit_config(directory, intermediate_size=24, hidden_ratio="4")
    with pytest.raises(ConfigError, match=r"hidden_ratio='4' is no float"):
        interop.load(directory)
    directory = copy_of("torchscale_head/a_h4", tmp_path / "torchscale")
    edit_config(directory, max_target_positions=2048.5)
    with pytest.raises(ConfigError, match=r"max_target_positions=2048.5 is no int"):
        interop.load(directory)


def test_paths_without_a_model_are_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainers = copy_of("fla/default", tmp_path / "trainer/checkpoint-100").parent
    (trainers / "config.json").write_text((trainers / "checkpoint-100/config.json").read_text())
    file = trainers / "checkpoint-100/model.safetensors"
    (tmp_path / "fla-hub").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/text.txt").touch()
    for directory, message in (
        ("fla-hub/retnet-1.3B-100B", "is no directory; for the model of this name on the Hugging"),
        (file, f"{file} is a file: name the directory it is in"),
        (trainers, f"name one of them, such as {trainers}/checkpoint-100"),
        (
            tmp_path / "notes",
            "checkpoints/) or a checkpoint with model.safetensors.index.json, model",
        ),
        (tmp_path / "notes", "found text.txt"),
    ):
        with pytest.raises(CheckpointError) as error:
            interop.load(directory)
        assert message in str(error.value)
        with pytest.raises(ConfigError) as error:
            load_pretrained(directory)
        assert message in str(error.value)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_tensors_inside_a_torch_file(key, tmp_path):
    torch = pytest.importorskip("torch")
    directory = copy_of("torchscale_head/a_h4", tmp_path / "in")
    state = {name: torch.from_numpy(value) for name, value in tensors(directory).items()}
    (directory / "weights.safetensors").unlink()
    torch.save({key: state, "epoch": 3}, directory / "model.pt")
    assert_same_model(interop.load(directory), interop.load(FIXTURES / "torchscale_head/a_h4"))
    torch.save({"network": state, "epoch": 3}, directory / "model.pt")
    with pytest.raises(CheckpointError, match=r"no named tensors, .*; found epoch, network"):
        interop.load(directory)


# Object stores: `epath` uses fsspec for them, here with a bucket in memory.


@pytest.fixture
def bucket():
    """Puts a local directory under a URL."""
    with empty_bucket() as system:

        def put(directory, url):
            for path in directory.rglob("*"):
                if path.is_file():
                    system.pipe_file(f"{url}/{path.relative_to(directory)}", path.read_bytes())
            return url

        yield put


def test_a_model_on_an_object_store_is_read_like_a_local_one(bucket, parts, tmp_path):
    expected = interop.load(FIXTURES / "fla/default")
    assert_same_model(load_pretrained(bucket(FIXTURES / "fla/default", "s3://b/fla")), expected)
    assert_same_model(load_pretrained(bucket(parts, "s3://b/parts")), expected)
    # The own layout stacks all layers in one tensor, which is read one layer at a time.
    ByteTokenizer().save(parts)
    model = build_model(presets.fla(vocab_size=257, d_model=16, n_heads=2), rngs=nnx.Rngs(0))
    interop.save(model, tmp_path / "own", "own")
    ByteTokenizer().save(tmp_path / "own")
    url = bucket(tmp_path / "own", "s3://b/own")
    assert_same_model(load_pretrained(url), model)
    interop.convert(url, tmp_path / "back", "own")
    assert (tmp_path / "back/tokenizer.json").read_bytes() == ByteTokenizer().files[
        "tokenizer.json"
    ]
    assert_same_model(interop.load(tmp_path / "back"), model)


def test_a_damaged_file_on_an_object_store_is_refused(bucket, tmp_path):
    directory = copy_of("fla/default", tmp_path / "in")
    whole = (directory / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:5], whole[:3000], whole[:-1], b"\xff" * 100):
        (directory / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"s3://b/in/model.safetensors is missing, trunc"):
            load_pretrained(bucket(directory, "s3://b/in"))
    with pytest.raises(ConfigError, match=r"s3://b/none is no directory"):
        load_pretrained("s3://b/none")
    with pytest.raises(ConfigError, match=r"s3://b/out is not on a local disk: write to a local"):
        interop.convert(FIXTURES / "fla/default", "s3://b/out", "own")
