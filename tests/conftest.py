"""Test set-up: eight simulated CPU devices, and shape annotations that are checked."""

import os

# Before jax starts: an accelerator plugin that is installed would take its device for itself.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jaxtyping
import pytest
from hypothesis import settings

jaxtyping.install_import_hook(
    ["retnet_jax.ops", "retnet_jax.model", "retnet_jax.generation.decode"],
    "beartype.beartype",
)

# Compiling takes longer than any deadline; derandomized, so that a red test is red again.
settings.register_profile("jax", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("jax")


@pytest.fixture(scope="module")
def tpu_compiler():
    """XLA's compiler for TPUs, without one."""
    pytest.importorskip("libtpu", reason="pip install libtpu, of the version of jax's extra tpu")
    from retnet_jax.aot import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name in ("XLA_FLAGS", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
            patch.setenv(name, "")
            patch.delenv(name)
        topologies.prepare()
        yield
