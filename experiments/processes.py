"""Runs a function in a process of its own, to measure its memory or with other packages."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Compilers for devices that this machine does not have: `make .venv/cuda .venv/libtpu`.
COMPILERS = (Path(".venv/cuda"), Path(".venv/libtpu"))

_PROGRAM = """
import importlib, json, sys
module, name, arguments = json.loads(sys.argv[1])
found = getattr(importlib.import_module(module), name)(*arguments)
print(json.dumps(found))
"""


def in_own_process(
    function: Callable[..., Any], *arguments: Any, packages: Sequence[Path] = ()
) -> Any:
    """The result of a function in a new process; its errors end up on stderr.

    Args:
      function: Function of a module that can be imported.
      *arguments: Its arguments, as JSON can hold them.
      packages: Directories with packages for the process, before those of this one.

    Raises:
      subprocess.CalledProcessError: if the function fails.
    """
    module = function.__module__
    if module == "__main__":  # of `python -m`
        module = sys.modules["__main__"].__spec__.name
    call = json.dumps([module, function.__name__, arguments])
    path = [*map(str, packages), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA says that there is no GPU driver
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, call],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compilers() -> Sequence[Path]:
    """The directories of the compilers.

    Raises:
      SystemExit: if one is missing.
    """
    missing = [str(path) for path in COMPILERS if not path.exists()]
    if missing:
        raise SystemExit(f"the compilers are missing: make {' '.join(missing)} downloads them")
    return [path.absolute() for path in COMPILERS]
