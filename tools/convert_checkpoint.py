r"""Rewrites a checkpoint in another layout, tensor by tensor.

    python tools/convert_checkpoint.py --source=DIR --target=NEW --layout=fla
    python tools/convert_checkpoint.py --source=runs/mine --target=NEW --layout=torchscale \
        --dtype=bfloat16

The source is a directory of flash-linear-attention, torchscale, syncdoth/RetNet, or our own: a
training run, of which the newest checkpoint is read, or what this program wrote. The tokenizer's
files come along. A model that the layout cannot express with the same outputs is refused, and
nothing is written.
"""

from absl import flags

from retnet_jax import interop
from retnet_jax.programs import command_line

flags.DEFINE_string("source", None, "directory of a checkpoint", required=True)
flags.DEFINE_string("target", None, "directory to write; must not exist", required=True)
flags.DEFINE_enum(
    "layout", None, ["own", *interop.LAYOUTS], "layout to write", required=True, case_sensitive=True
)
flags.DEFINE_enum(
    "dtype", None, ["float32", "float16", "bfloat16"], "of the parameters; else as they are"
)
flags.DEFINE_bool(
    "fold_head_norm", False, "multiply the head norm's scale (fla) into the output projection"
)
flags.DEFINE_float("max_file_gb", 5.0, "largest safetensors file, in 10^9 bytes", lower_bound=0.001)
flags.DEFINE_bool("torch_file", False, "write one PyTorch file, nested as fairseq's, instead")


def main() -> None:
    """Converts as the flags say."""
    given = flags.FLAGS
    interop.convert(
        given.source,
        given.target,
        given.layout,
        fold_head_norm=given.fold_head_norm,
        dtype=given.dtype,
        max_file_bytes=int(given.max_file_gb * 1e9),
        torch_file=given.torch_file,
    )
    print(f"{given.target}: written as {given.layout}")


if __name__ == "__main__":
    command_line.run(main)
