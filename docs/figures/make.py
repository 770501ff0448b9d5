"""Draws three_forms.png, the figure of the README: python docs/figures/make.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from retnet_jax.ops.retention.decay import log_decay
from retnet_jax.ops.retention.xla import decay_mask

LENGTH, CHUNK = 16, 4
SCORES, STATE = np.array([0.11, 0.34, 0.62]), np.array([0.90, 0.45, 0.08])  # blue, orange
FORMS = [  # title, use, and the size of its chunks
    ("parallel (Eq. 5): all scores at once", "the definition: $O(t^2)$", LENGTH),
    ("chunkwise (Eq. 7): chunk by chunk", "training, prompts: $O(t)$", CHUNK),
    ("recurrent (Eq. 6): token by token", "generation: $O(1)$ a token", 1),
]


def main() -> None:
    """Writes the figure beside this file."""
    gamma = log_decay("log_spaced", 4, (1 / 2, 1 / 512))[1:2]  # a head of the quickstart
    mask = np.asarray(decay_mask(jnp.asarray(gamma), LENGTH, None))[0, 0]  # [t s]
    plt.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.05), layout="constrained")
    for axis, (title, use, size) in zip(axes, FORMS, strict=True):
        draw(axis, mask, size)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(use, fontsize=11)
    axes[0].set_ylabel("output at token $n$", fontsize=11)
    figure.supxlabel(
        r"weight $\gamma^{n-m}$ of token $m$:   "
        r"blue from the scores $q_n \cdot k_m$,   "
        r"orange from the state $S_n = \gamma S_{n-1} + k_n^{\top} v_n$",
        fontsize=11,
    )
    path = Path(__file__).parent / "three_forms.png"
    figure.savefig(path, dpi=150, facecolor="white", pil_kwargs={"optimize": True})
    print(f"{path}: {path.stat().st_size:,} bytes")


def draw(axis, mask: np.ndarray, size: int) -> None:
    """The decay mask [t s], with the part that chunks of `size` tokens read from the state."""
    n, m = np.indices(mask.shape)
    from_state = n // size > m // size
    colour = np.where(from_state[..., None], STATE, SCORES)
    # Roots, so that old tokens remain visible.
    weight = np.sqrt(mask)[..., None]
    axis.imshow(1 - weight * (1 - colour), interpolation="nearest")
    for edge in range(LENGTH + 1):
        axis.axhline(edge - 0.5, color="white", linewidth=0.6)
        axis.axvline(edge - 0.5, color="white", linewidth=0.6)
    for start in range(0, LENGTH, size):
        if size > 1:
            axis.add_patch(
                Rectangle((start - 0.5,) * 2, size, size, fill=False, color="0.3", zorder=3)
            )
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("0.6")


if __name__ == "__main__":
    main()
