"""The architecture: the parts of the package, and imports that run only downward."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import retnet_jax

ROOT = Path(__file__).parent.parent
FLOORS = {
    "config": 0,
    "errors": 0,
    "own_objects": 0,
    "shapes": 0,
    "trees": 0,
    "waiting": 0,
    "provenance": 1,
    "files": 1,
    "parallel": 1,
    "ops": 2,
    "data": 2,
    "model": 3,
    "runs": 3,
    "interop": 4,
    "generation": 4,
    "pretrained": 5,
    "evaluation": 6,
    "training": 6,
    "aot": 7,
    "configs": 7,
    "programs": 8,
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "retnet_jax":
                yield from (f"retnet_jax.{alias.name}" for alias in node.names)
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_run_downward():
    for path in (ROOT / "retnet_jax").rglob("*.py"):
        parts = path.relative_to(ROOT / "retnet_jax").with_suffix("").parts
        if parts[0] == "__init__":
            continue
        for module in imported_modules(path):
            name = module.split(".")
            if name[0] != "retnet_jax" or len(name) == 1 or name[1] == parts[0]:
                continue
            assert FLOORS[name[1]] <= FLOORS[parts[0]], f"{path} imports {module}"


def test_the_root_of_the_package_holds_what_has_a_floor():
    here = {path.name.removesuffix(".py") for path in (ROOT / "retnet_jax").glob("[!_]*")}
    assert here == set(FLOORS)


def modules():
    """The names of all modules of the package."""
    for path in sorted((ROOT / "retnet_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__")


def test_no_exported_name_hides_a_module():
    names = set(modules())
    for package in {name.rpartition(".")[0] for name in names} - {""}:
        exported = getattr(importlib.import_module(package), "__all__", [])
        assert not {f"{package}.{name}" for name in exported} & names, package


def test_every_module_can_be_imported_by_its_path():
    for name in modules():
        assert importlib.import_module(name).__name__ == name
        assert eval(name, {"retnet_jax": retnet_jax}).__name__ == name


def test_what_the_package_exports_is_there():
    for name in retnet_jax.__all__:
        assert getattr(retnet_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'retain'"):
        retnet_jax.retain  # noqa: B018


def test_config_imports_no_jax():
    ours = ("retnet_jax.config.", "retnet_jax.own_objects.", "retnet_jax.errors.")
    paths = [*(ROOT / "retnet_jax/config").glob("*.py"), ROOT / "retnet_jax/own_objects.py"]
    for path in [*paths, ROOT / "retnet_jax/errors.py"]:
        modules = [f"{x}." for x in imported_modules(path)]
        others = {x.partition(".")[0] for x in modules if not x.startswith(ours)}
        # For types only: a remote path.
        assert others - {"etils"} <= set(sys.stdlib_module_names)
    done = in_new_process("import sys, retnet_jax.config.as_text", "print('jax' in sys.modules)")
    assert done == "False\n"


def in_new_process(*lines):
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_only_jax_and_flax():
    """In a process where the other libraries cannot be imported."""
    # orbax and optax are not blocked: flax itself imports them if they are installed.
    blocked = ["grain", "tokenizers", "ml_collections", "tensorboardX", "tqdm", "jaxtyping"]
    found = in_new_process(
        "import sys",
        "import retnet_jax",
        "print([name for name in ('jax', 'orbax', 'grain') if name in sys.modules])",
        f"sys.modules.update(dict.fromkeys({blocked!r}))",
        "from retnet_jax import RetNet, Transformer, ModelConfig, retention, for_decoding",
        "from retnet_jax import generate, load_pretrained",
        "print('torch' in sys.modules)",
    )
    assert found == "[]\nFalse\n"
