"""A flipped bit in a saved state."""

import numpy as np
import pytest
from properties import sizes
from test_text_generation import BYTES, RetNet, Transformer, build

from retnet_jax.errors import CheckpointError
from retnet_jax.generation.saved_state import load_reading, save_reading
from retnet_jax.generation.texts import Writer


@pytest.mark.compiles(80, reason="a model is built and reads a text")
@pytest.mark.parametrize("kind", [RetNet, Transformer])
@sizes(400, 30_000)
def test_a_flipped_bit_in_a_saved_state_is_found(most, kind, tmp_path):
    model, path = build(kind), tmp_path / "text.state"
    save_reading(path, Writer(model, BYTES, ["Grüße", "x"], 3).reading, model, BYTES)
    intact = path.read_bytes()
    load_reading(path, model, BYTES)
    header = 8 + int.from_bytes(intact[:8], "little")
    rng = np.random.default_rng(0)
    places = {*rng.choice(8 * header, min(most, 8 * header), replace=False)}
    places |= {*rng.choice(8 * len(intact), min(most // 8, 8 * len(intact)), replace=False)}
    for place in sorted(map(int, places)):
        flipped = bytearray(intact)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError) as caught:
            load_reading(path, model, BYTES)
        assert "text.state" in str(caught.value), place
