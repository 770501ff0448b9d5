"""The architecture: imports run downward only, and `import retnet_jax` needs jax and flax alone."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {
    "config": 0,
    "config_json": 0,
    "errors": 0,
    "shapes": 0,
    "trees": 0,
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


def test_config_imports_no_jax():
    modules = set(imported_modules(ROOT / "retnet_jax" / "config.py"))
    assert modules - {"retnet_jax.errors"} <= set(sys.stdlib_module_names)
    errors = set(imported_modules(ROOT / "retnet_jax" / "errors.py"))
    assert errors <= set(sys.stdlib_module_names)


def test_import_needs_jax_and_flax_alone():
    """In a process where the other libraries cannot be imported."""
    # Not orbax and optax, which flax itself imports where it finds them.
    blocked = ["grain", "tokenizers", "ml_collections", "tensorboardX", "tqdm", "jaxtyping"]
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from retnet_jax import RetNet, Transformer, ModelConfig, retention, load_pretrained\n"
        "from retnet_jax import generate\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
