"""Executes the notebooks, each in a new kernel and a temporary directory, and prints the seconds.

The directories beside the notebooks, such as pretrained_model/, are copied there.

    python tests/run_notebooks.py                  # fails on an error or a traceback
    python tests/run_notebooks.py --write train    # saves the new outputs in notebooks/train.ipynb

Needs the extra `notebooks`.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

ROOT = Path(__file__).parent.parent
LONGEST_CELL = 900  # seconds; training takes minutes on a busy machine


def main() -> int:
    """Returns the number of notebooks that failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="save the outputs in notebooks/")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="notebooks to execute; all if none"
    )
    arguments = parser.parse_args()
    # The kernel imports this checkout's package, and keeps off an accelerator, as all tests do.
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    failed = 0
    names = arguments.names or sorted(x.stem for x in (ROOT / "notebooks").glob("*.ipynb"))
    for path in (ROOT / "notebooks" / f"{name}.ipynb" for name in names):
        start = time.perf_counter()
        notebook, problem = execute(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
        if problem:
            failed += 1
            print(problem, file=sys.stderr)
        elif arguments.write:
            nbformat.write(without_traces(notebook), path)
    return failed


def execute(path: Path) -> tuple[nbformat.NotebookNode, str]:
    """The executed notebook, and what went wrong, or "" if nothing did."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as directory:
        for beside in path.parent.glob("[!.]*/"):
            shutil.copytree(beside, Path(directory) / beside.name)
        client = NotebookClient(
            notebook,
            timeout=LONGEST_CELL,
            kernel_name="python3",
            resources={"metadata": {"path": directory}},
            record_timing=False,
            coalesce_streams=True,
            startup_timeout=LONGEST_CELL,
            extra_arguments=["--log-level=ERROR"],  # not its warning that TCP is not encrypted
        )
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError) as error:
            return notebook, str(error)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    errors = [output.text for output in outputs if output.get("name") == "stderr"]
    return notebook, "\n".join(text for text in errors if "Traceback" in text)


def without_traces(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without metadata of the machine that executed it."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
    return notebook


if __name__ == "__main__":
    sys.exit(main())
