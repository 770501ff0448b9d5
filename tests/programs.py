"""Runs the repository's programs in the tests' own process, because starting one takes seconds."""

import contextlib
import io
import runpy
import sys
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
from absl import app, flags, logging

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT  # the working directory of the programs


class Done(NamedTuple):
    """The result of a program, with the fields of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def run(program, *arguments):
    """Runs a program of the repository, such as generate.py, as if from a shell."""
    app.define_help_flags()
    known, verbosity = set(flags.FLAGS), logging.get_verbosity()
    output, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(),
    ):
        # A warning of ml_collections when it loads a config file; a program would not raise it.
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
        patch.chdir(DIRECTORY)
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        patch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
        status = 0
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as error:
            status = error.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
        finally:
            _forget_flags(known, ROOT / program)
            logging.set_verbosity(verbosity)
    return Done(status, output.getvalue(), errors.getvalue())


def _forget_flags(known, program):
    """Deletes the flags of a program, but not those of libraries: another may define the same."""
    for name in set(flags.FLAGS) - known:
        module = flags.FLAGS.find_module_defining_flag(name)
        # ml_collections defines overrides of a config as flags of absl.
        if Path(module) == program or module.startswith(("retnet_jax.", "absl.flags.")):
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
