r"""Rewrites a checkpoint in another layout, tensor by tensor.

    python tools/convert_checkpoint.py --source=DIR --target=NEW --layout=fla
    python tools/convert_checkpoint.py --source=runs/mine --target=NEW --layout=torchscale \
        --dtype=bfloat16

The source is a checkpoint directory of flash-linear-attention, torchscale or syncdoth/RetNet, a
training run (its newest checkpoint is read), a directory written by this program, or the name of
a model on the Hugging Face hub. The tokenizer's files are copied. If the layout cannot express the
model with the same outputs, the reasons are printed and nothing is written.
"""

from absl import flags

from retnet_jax import interop
from retnet_jax.programs import command_line

flags.DEFINE_string(
    "source",
    None,
    "Directory of a checkpoint or a training run, or name on the Hugging Face hub",
    required=True,
)
flags.DEFINE_string(
    "target", None, "Directory to write; must not exist, or be empty", required=True
)
flags.DEFINE_enum(
    "layout",
    None,
    ["own", *interop.LAYOUTS],
    "Checkpoint format to write; fla_unfused: fla with fuse_norm=False",
    required=True,
    case_sensitive=True,
)
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "float16", "bfloat16"],
    "Dtype of the written parameters; default: that of the source",
)
flags.DEFINE_bool(
    "fold_head_norm", False, "Multiply fla's head norm scale into the output projection"
)
flags.DEFINE_bool(
    "fla_ignores_conv",
    False,
    "Write short convolutions in fla's layout, although fla drops them and computes other logits",
)
flags.DEFINE_float(
    "max_file_gb", 5.0, "Largest size of a safetensors file, in 10^9 bytes", lower_bound=0.001
)
flags.DEFINE_bool(
    "torch_file", False, "Write one PyTorch file as fairseq's instead of safetensors files"
)


def main() -> None:
    """Converts a checkpoint as the flags say."""
    given = flags.FLAGS
    interop.convert(
        given.source,
        given.target,
        given.layout,
        fold_head_norm=given.fold_head_norm,
        dtype=given.dtype,
        max_file_bytes=int(given.max_file_gb * 1e9),
        torch_file=given.torch_file,
        fla_ignores_conv=given.fla_ignores_conv,
    )
    print(f"{given.target}: written as {given.layout}")


if __name__ == "__main__":
    command_line.run(main)
