r"""Writes task files with which lm-evaluation-harness reads the paper's tasks from local data.

    python tools/lm_eval_tasks.py --data=TASKS --output=tasks_local
    python -m retnet_jax.evaluation.harness run --model retnet_jax \
        --model_args pretrained=runs/mine --include_path tasks_local --tasks hellaswag_local

TASKS is a directory with TASK/SPLIT.jsonl, as for eval.py. Each task file includes the harness's
own file, so prompts and metrics are the same. One difference: the harness's wsc273 may show the
evaluated row itself as an example; wsc273_local never does.
"""

import importlib.util
import json
from pathlib import Path

from absl import flags

from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.tasks import TASKS
from retnet_jax.programs import command_line

FILES = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "wsc273": "wsc273/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "storycloze_2016": "storycloze/storycloze_2016.yaml",
}

flags.DEFINE_string("data", None, "Directory with TASK/SPLIT.jsonl", required=True)
flags.DEFINE_string("output", None, "Directory to write; must not exist", required=True)


def main() -> None:
    """Writes a file for each task for which there is data."""
    data, output = Path(flags.FLAGS.data).absolute(), Path(flags.FLAGS.output)
    if output.exists():
        raise ConfigError(f"--output={output} exists already: name another directory")
    written = task_files(data, harness_tasks())
    if not written:
        raise ConfigError(f"--data={data} has none of {', '.join(f'{name}/' for name in FILES)}")
    output.mkdir(parents=True)
    for name, text in written.items():
        (output / f"{name}.yaml").write_text(text, encoding="utf-8")
    print(f"{output}: {', '.join(written)}")


def harness_tasks() -> Path:
    """The directory of the harness's own tasks; the harness is not imported."""
    found = importlib.util.find_spec("lm_eval")
    if found is None:
        raise ConfigError("lm-evaluation-harness is not installed: pip install lm-eval")
    return Path(found.origin).parent / "tasks"


def task_files(data: Path, harness: Path) -> dict[str, str]:
    """The text of each task's file, by the task's name."""
    written = {}
    for name, file in FILES.items():
        if not (data / name).is_dir():
            continue
        task = TASKS[name]
        splits = {split: data / name / f"{split}.jsonl" for split in (task.split, task.shots_from)}
        if not splits[task.split].is_file():
            raise ConfigError(f"{splits[task.split]} does not exist; {name} is evaluated on it")
        there = {split: str(path) for split, path in splits.items() if path.is_file()}
        # JSON is YAML as well.
        options = {
            "include": str(harness / file),
            "task": f"{name}_local",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": there},
        }
        if task.shots_from == task.split:
            options["fewshot_split"] = task.split
        written[f"{name}_local"] = json.dumps(options, indent=2) + "\n"
    return written


if __name__ == "__main__":
    command_line.run(main)
