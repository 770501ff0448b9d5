r"""Makes a directory to give away from a training run, and uploads it to the Hugging Face hub.

    python tools/export.py RUN TARGET
    python tools/export.py RUN TARGET --layout=fla --license=apache-2.0 --push=OWNER/NAME

The newest checkpoint is written with the tokenizer, generation_config.json, the run's config as
training_config.json, and a model card, README.md, from the run's own records. Read the card before
you publish it. With the layout fla, transformers with flash-linear-attention loads the directory.
Other layouts and other checkpoints: tools/convert_checkpoint.py.
"""

from absl import flags

from retnet_jax import interop
from retnet_jax.config.as_json import to_json
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files import atomic, hub_upload
from retnet_jax.files.paths import AnyPath, local, place
from retnet_jax.interop.transformers_files import write_transformers_files
from retnet_jax.pretrained import read_pretrained
from retnet_jax.programs import command_line
from retnet_jax.programs.model_card import Exported, model_card


def main() -> None:
    """The program."""
    flags.DEFINE_string("run", None, "Directory of a training run; also the first argument")
    flags.DEFINE_string(
        "target", None, "Directory to write; must not exist, or be empty; also the second argument"
    )
    flags.DEFINE_enum("layout", "fla", ["fla", "own"], "Checkpoint format to write")
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "float16", "bfloat16"],
        "Dtype of the written parameters; default: float32, as they are trained",
    )
    flags.DEFINE_float(
        "max_file_gb", 5.0, "Largest size of a safetensors file, in 10^9 bytes", lower_bound=0.001
    )
    flags.DEFINE_string(
        "license", None, "Licence of the model, as the hub names it, such as apache-2.0"
    )
    flags.DEFINE_string("push", None, "OWNER/NAME on the Hugging Face hub to upload to")
    flags.DEFINE_bool(
        "private",
        False,
        "With --push: a new model can be seen by its owner only; an existing public one is refused",
    )
    command_line.run(_main, positional=("run", "target"))


def _main() -> None:
    given = flags.FLAGS
    if given.run is None or given.target is None:
        raise ConfigError("give the directory of a training run and a new directory: RUN TARGET")
    if given.private and given.push is None:
        raise ConfigError("--private is for --push=OWNER/NAME, which is not given")
    if given.push is not None:
        hub_upload.check_can_upload(given.push)
    export(
        given.run,
        given.target,
        given.layout,
        name=given.push,
        license=given.license,
        dtype=given.dtype,
        max_file_bytes=int(given.max_file_gb * 1e9),
    )
    print(f"{given.target}: written as {given.layout}; its model card is README.md")
    if given.push is not None:
        url = hub_upload.upload(local(given.target), given.push, given.private)
        print(f"{url}: uploaded")


def export(
    run: AnyPath,
    target: AnyPath,
    layout: str,
    *,
    name: str | None = None,
    license: str | None = None,
    **options,
) -> None:
    """Writes the newest checkpoint of a run to a directory, with all that its users need.

    Args:
      run: Directory of the run.
      target: Local directory to write; must not exist, or be empty. It appears when complete.
      layout: "fla" or "own".
      name: OWNER/NAME for the model card; None: the name of the directory.
      license: Identifier of the licence for the model card.
      options: Further options of `interop.convert`.

    Raises:
      ConfigError: if there is no run or no tokenizer, and if the layout cannot express the model,
        with the reasons.
      CheckpointError: if the target exists, or the checkpoint is missing or damaged.
    """
    directory, path = place(run), local(target)
    if not directory.is_dir():
        raise ConfigError(f"{run} is no directory: give the --workdir of a training run")
    if not (directory / "checkpoints").is_dir():
        raise ConfigError(
            f"{run} has no checkpoints/, so it is not a training run, from whose records the model "
            "card is written: give the --workdir of train.py; tools/convert_checkpoint.py converts "
            "other checkpoints"
        )
    config, tokenizer = read_pretrained(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; name a new directory")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with atomic.directory(path.absolute()) as unfinished:
        step = interop.convert(directory, unfinished, layout, **options)
        assert step is not None
        loads = write_transformers_files(tokenizer, unfinished) if layout == "fla" else False
        model = Exported(name or path.absolute().name, layout, step, license, loads)
        (unfinished / "training_config.json").write_text(to_json(config), encoding="utf-8")
        card = model_card(directory, config, model)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
