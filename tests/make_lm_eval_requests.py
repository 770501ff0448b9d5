"""Writes tests/lm_eval_requests.json: the requests that lm-evaluation-harness 0.4.13 makes.

    pip install lm-eval==0.4.13
    python tests/make_lm_eval_requests.py

Of the rows in tests/tasks, without and with four examples drawn by the harness's default seed.
"""

import json
import sys
import tempfile
from pathlib import Path

from lm_eval.tasks import TaskManager, get_task_dict

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.lm_eval_tasks import harness_tasks, task_files

HERE = Path(__file__).parent
SEED = 1234


def main() -> None:
    golden = {}
    with tempfile.TemporaryDirectory() as directory:
        files = task_files(HERE / "tasks", harness_tasks())
        for name, text in files.items():
            (Path(directory) / f"{name}.yaml").write_text(text, encoding="utf-8")
        manager = TaskManager(include_path=directory)
        for name in files:
            for shots in (0, 4):
                golden[f"{name.removesuffix('_local')} {shots}"] = requests(manager, name, shots)
    path = HERE / "lm_eval_requests.json"
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path, {key: len(value) for key, value in golden.items()})


def requests(manager: TaskManager, name: str, shots: int) -> list[tuple[str, str]]:
    """Context and continuation of each row's choices."""
    (task,) = get_task_dict([name], manager).values()
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(SEED)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


if __name__ == "__main__":
    main()
