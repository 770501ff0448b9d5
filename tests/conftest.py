"""Test set-up: eight simulated CPU devices, checked annotations, fast compilation, fixtures."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

import jaxtyping
import pytest
from hypothesis import settings

pytest_plugins = ["compilations"]

# All of this must be set before jax starts, here and in processes that tests start. An installed
# accelerator plugin would take its device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# No test asks the Hugging Face hub; test_hub.py has one of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
# Most of the tests' time is compilation, most of it in LLVM. Without its optimisations, and with
# fewer and simpler functions, compiling takes an eighth. An empty XLA_FLAGS= keeps them.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # later versions exit at unknown flags
os.environ.setdefault("XLA_FLAGS", FLAGS)
# Processes (pytest's workers, programs in tests) share compiled programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="retnet_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

jaxtyping.install_import_hook(
    ["retnet_jax.ops", "retnet_jax.model", "retnet_jax.generation.decode"],
    "beartype.beartype",
)

# No deadline, because compiling takes longer; derandomized, so that a failure is repeated.
settings.register_profile("jax", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("jax")


@pytest.fixture
def no_compilation_cache():
    """For tests that save programs: XLA for CPUs cannot save those that it read from the cache."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.hookimpl(tryfirst=True)  # before -m selects by marks
def pytest_collection_modifyitems(items):
    for item in items:
        if "tpu_compiler" in item.fixturenames:
            item.add_marker("compilers")


@pytest.fixture(scope="module")
def tpu_compiler():
    """XLA's compiler for TPUs, which needs no TPU."""
    pytest.importorskip("libtpu", reason="pip install libtpu, of the version of jax's extra tpu")
    from retnet_jax.aot import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name in ("XLA_FLAGS", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
            patch.setenv(name, "")
            patch.delenv(name)
        topologies.prepare()
        yield


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A small training run; modules with other data have their own `config`."""
    from training_runs import small_config

    return small_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def uninterrupted(config, tmp_path_factory):
    """The workdir of the whole run of `config`, which tests copy before they change it."""
    from retnet_jax.training.loop import train

    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(config, workdir).status == "finished"
    return workdir


@pytest.fixture
def config_file(config, tmp_path):
    """`config` as a file for the command line."""
    from training_runs import write_config

    return write_config(config, tmp_path)
