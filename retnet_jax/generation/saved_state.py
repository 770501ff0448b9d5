"""Saves a model's state after a text, so that a long text is read once and continued many times.

The file is safetensors: the arrays of a `Reading`, and in its metadata the model and tokenizer they
belong to. It can be loaded only with the same model, the same weights and the same dtypes.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.config import ModelConfig
from retnet_jax.data import Tokenizer
from retnet_jax.errors import CheckpointError, brief
from retnet_jax.files import atomic
from retnet_jax.files.paths import local
from retnet_jax.generation.decode import Progress, empty_progress
from retnet_jax.generation.texts import Reading
from retnet_jax.model import DecodingModel, LanguageModel
from retnet_jax.model.parameters import why_not_finite
from retnet_jax.trees import named_leaves, with_leaves

_FORMAT = "retnet-jax state 4"
# Until 3 a Transformer's cache was [b s h k]. Before 3 the digest was of the arrays alone; in 1 a
# config entered the fingerprint as its `repr`.
_OLD_FORMATS = ("retnet-jax state 3", "retnet-jax state 2", "retnet-jax state 1")


def save_reading(
    path: str | Path, reading: Reading, model: LanguageModel, tokenizer: Tokenizer
) -> None:
    """Writes a reading to a file, which appears when it is complete.

    Raises:
      CheckpointError: if the file exists or cannot be written, or if numbers are not finite.
    """
    from safetensors.numpy import save

    path = local(path)
    if path.exists():
        raise CheckpointError(f"{path} exists already: name another file, or delete it")
    progress = _portable(model, reading.progress)
    arrays = {name: np.asarray(x) for name, x in named_leaves(progress).items()}
    for name, x in arrays.items():
        if not np.isfinite(x.astype(np.float32)).all():
            raise CheckpointError(
                f"{path} is not written: {name} of the model's state is not finite; "
                f"{why_not_finite(model)}"
            )
    metadata = {
        "format": _FORMAT,
        "model": fingerprint_of_model(model),
        "tokenizer": tokenizer.fingerprint,
        "last_ids": json.dumps(reading.last_ids),
        "dtypes": json.dumps({name: x.dtype.name for name, x in arrays.items()}),
        "shapes": json.dumps({name: x.shape for name, x in arrays.items()}),
    }
    # As bytes, because safetensors does not know every dtype of ml_dtypes in numpy.
    plain = {name: np.frombuffer(x.tobytes(), np.uint8) for name, x in arrays.items()}
    metadata["sha256"] = _digest(metadata, plain)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, save(plain, metadata))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def load_reading(path: str | Path, model: LanguageModel, tokenizer: Tokenizer) -> Reading:
    """Reads a file of `save_reading`, for the same model with the same decoding options.

    Raises:
      CheckpointError: for a file that is missing, damaged, or of another model or tokenizer.
    """
    from safetensors import SafetensorError, safe_open

    path = local(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            plain = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; `save_reading` and --save_state write such files"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a saved state, or is damaged: {brief(error)}; read the text again"
        ) from error
    if metadata.get("format") not in (_FORMAT, *_OLD_FORMATS):
        raise CheckpointError(
            f"{path} is not a saved state; `save_reading` and --save_state write such files"
        )
    old = metadata["format"] in _OLD_FORMATS[1:]
    try:
        if not old and _digest(metadata, plain) != metadata["sha256"]:
            raise ValueError("another digest")
        arrays = _arrays(plain, json.loads(metadata["dtypes"]), json.loads(metadata["shapes"]))
        if old and _old_digest(arrays) != metadata["sha256"]:
            raise ValueError("another digest")
        if metadata["format"] != _FORMAT:
            arrays = {name: _slots_last(name, x) for name, x in arrays.items()}
        last_ids = json.loads(metadata["last_ids"])
        written_with = {name: metadata[name] for name in ("model", "tokenizer")}
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged: its contents have changed since it was written"
        ) from error
    describe = _old_description if metadata["format"] == _OLD_FORMATS[-1] else _description
    of_model = model_fingerprint(model, describe(model.config))
    for name, of in (("model", of_model), ("tokenizer", tokenizer.fingerprint)):
        if written_with[name] != of:
            raise CheckpointError(
                f"{path} was saved with another {name} or with other options (fingerprint "
                f"{written_with[name][:12]}, here {of[:12]}): read the text again"
            )
    rows, capacity = len(last_ids), _capacity(arrays)
    shape = jax.eval_shape(lambda: _portable(model, empty_progress(model, rows, capacity)))
    for name, expected in named_leaves(shape).items():
        found = arrays.get(name)
        if found is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
            kind = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise CheckpointError(
                f"{path} was saved with other options: {name} is {kind} and here "
                f"{expected.dtype} {list(expected.shape)}; give the dtype and state_dtype that it "
                "was saved with"
            )
    leaves = {name: jnp.asarray(array) for name, array in arrays.items()}
    progress = with_leaves(shape, leaves)
    if isinstance(model, DecodingModel):
        progress = progress._replace(state=model.from_portable(progress.state))
    return Reading(progress, last_ids)


def _portable(model: LanguageModel, progress: Progress) -> Progress:
    """A progress with its state as files have it, on every device."""
    if not isinstance(model, DecodingModel):
        return progress
    return progress._replace(state=model.portable(progress.state))


def fingerprint_of_model(model: LanguageModel) -> str:
    """SHA-256, in hex, of a model's options and of the beginning of every parameter."""
    return model_fingerprint(model, _description(model.config))


def model_fingerprint(model: LanguageModel, description: str) -> str:
    """SHA-256, in hex, of a model's `description` and of the beginning of every parameter."""
    digest = hashlib.sha256(description.encode())
    for name, x in named_leaves(model).items():
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(np.asarray(x[(0,) * (x.ndim - 1)][:256] if x.ndim else x).tobytes())
    return digest.hexdigest()


def _description(config: ModelConfig) -> str:
    """The options that differ from their defaults, so that new options do not change it."""
    default = ModelConfig()
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
        and field.name not in _OF_TRAINING
    }
    # A hybrid's `attention_layers` are dataclasses.
    return json.dumps(values, sort_keys=True, default=dataclasses.asdict)


def _old_description(config: ModelConfig) -> str:
    """The `repr` that a config had when format 1 was written."""
    values = ", ".join(f"{name}={getattr(config, name)!r}" for name in _OLD_OPTIONS.split())
    return f"ModelConfig({values})"


# Options on which the function of a model does not depend.
_OF_TRAINING = ("init", "dropout", "activation_dropout")
_OLD_OPTIONS = (
    "mixer vocab_size d_model n_layers n_heads key_dim value_dim ffn ffn_dim norm norm_epsilon "
    "rotation row_normalizer decay decay_range tie_embeddings embedding_scale embedding_norm "
    "mixer_bias ffn_bias ffn_norm head_norm_scale post_norm deepnorm score_clamp dtype remat "
    "chunk_size"
)


def _capacity(arrays: dict[str, np.ndarray]) -> int:
    """The number of slots of a Transformer's cache; for a RetNet it has no effect."""
    return arrays["state/visible"].shape[1] if "state/visible" in arrays else 1


def _arrays(plain: dict[str, np.ndarray], dtypes: dict, shapes: dict) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(plain[name].tobytes(), jnp.dtype(dtypes[name])).reshape(shapes[name])
        for name in dtypes
    }


def _slots_last(name: str, x: np.ndarray) -> np.ndarray:
    """An array of a file before format 4: a cache [b s h k] as [b h k s]."""
    return np.moveaxis(x, -3, -1) if name.rpartition("/")[2] in ("keys", "values") else x


def _digest(metadata: dict[str, str], plain: dict[str, np.ndarray]) -> str:
    """SHA-256, in hex, of all that a file holds but for this."""
    of_text = {name: text for name, text in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(of_text, sort_keys=True).encode())
    for name, x in sorted(plain.items()):
        digest.update(f"{name} {x.size}".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()


def _old_digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
