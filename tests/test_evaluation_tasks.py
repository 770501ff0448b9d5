"""The seven tasks: their texts against lm-evaluation-harness's, accuracy, and bad rows."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from flax import nnx

from retnet_jax import ModelConfig, RetNet, Transformer
from retnet_jax.config import Config, DataConfig
from retnet_jax.data.tokenizers import ByteTokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.measure import read_tasks
from retnet_jax.evaluation.plan import Plan
from retnet_jax.evaluation.prefix_trie import PrefixTrie
from retnet_jax.evaluation.run import evaluation_mesh
from retnet_jax.evaluation.scoring import Score, score, score_trie
from retnet_jax.evaluation.statistics import paired_difference
from retnet_jax.evaluation.task_requests import (
    draw_shots,
    encode_pairs,
    task_requests,
    task_result,
    task_texts,
)
from retnet_jax.evaluation.task_rows import read_rows
from retnet_jax.evaluation.tasks import TASKS
from retnet_jax.pretrained import load_checkpoint
from retnet_jax.programs.evaluate import print_evaluation
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.workdir import record_start

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tests" / "tasks"
GOLDEN = json.loads((ROOT / "tests" / "lm_eval_requests.json").read_text(encoding="utf-8"))
BYTES = ByteTokenizer()


def rows_of(name):
    task = TASKS[name]
    return task, *(read_rows(task, split, str(ROWS)) for split in (task.split, task.shots_from))


@pytest.mark.parametrize("shots", [0, 4])
@pytest.mark.parametrize("name", TASKS)
def test_texts_equal_those_of_the_harness(name, shots):
    """The recorded texts are from tests/make_lm_eval_requests.py, without rows as own examples."""
    task, rows, pool = rows_of(name)
    examples = draw_shots(task, rows, pool, shots)
    asked = task_texts(task, rows, examples, "lm_eval")
    found = [list(text) for _, texts in asked for text in texts]
    assert len(rows.rows) >= 8
    assert found == GOLDEN[f"{name} {shots}"]


@pytest.mark.parametrize("name", TASKS)
def test_clean_texts_have_single_spaces_and_correct_punctuation(name):
    task, rows, pool = rows_of(name)
    examples = draw_shots(task, rows, pool, 4)
    dirty = 0
    for variant in ("clean", "lm_eval"):
        asked = task_texts(task, rows, examples, variant)
        for whole in (a + b for _, texts in asked for a, b in texts):
            if variant == "lm_eval":
                dirty += bool(re.search(r"  | [.,;]| 's", whole))
            else:
                assert not re.search(r"  | [.,;]| 's [^v]", whole)
    assert dirty or name == "storycloze_2016"


@pytest.mark.parametrize("mode", ["per-document", "fixed"])
@pytest.mark.parametrize("name", TASKS)
def test_no_row_is_its_own_example(name, mode):
    task, rows, pool = rows_of(name)
    for seed in range(20):
        shots = draw_shots(task, rows, pool, 4, mode, seed)
        assert all(len(x) == 4 and row not in x for row, x in zip(rows.rows, shots, strict=True))
        if mode == "fixed":  # plus one, which replaces a row as its own example
            assert len({json.dumps(x) for examples in shots for x in examples}) <= 5


def test_accuracy_by_likelihood_and_by_likelihood_per_character():
    """Scores that know the answers, that prefer short choices, and that are all equal."""
    task, rows, _ = rows_of("hellaswag")
    requests = task_requests(task, rows, [()] * 8, BYTES, "lm_eval")
    labels = [question.label for question in requests.questions]
    oracle = [Score(0.0 if i % 4 == labels[i // 4] else -1.0, True) for i in range(32)]
    result = task_result(task, requests, oracle)
    assert result.accuracy() == result.accuracy("acc_norm") == 1
    assert result.standard_error() == 0
    assert (result.random, result.majority, result.rows) == (0.25, 0.25, 8)

    lengths = [[len(x) for x in row["endings"]] for row in rows.rows]
    short = task_result(task, requests, [Score(-len(b), True) for _, b in requests.texts])
    assert short.correct["acc"].tolist() == [
        int(np.argmin([len(b) for _, b in requests.texts[4 * i : 4 * i + 4]])) == labels[i]
        for i in range(8)
    ]
    # With equal log-likelihoods the longest choice has the highest one per character.
    even = task_result(task, requests, [Score(-100.0, True)] * 32)
    endings = [[len(b) - 1 for _, b in requests.texts[4 * i : 4 * i + 4]] for i in range(8)]
    assert even.correct["acc_norm"].tolist() == [
        int(np.argmax(row)) == label for row, label in zip(endings, labels, strict=True)
    ]
    assert lengths != endings  # the texts of lm-evaluation-harness leave out WikiHow's marks


def test_standard_errors_and_paired_differences_follow_the_formulas():
    one, other = np.array([1, 1, 0, 1, 1, 0]), np.array([1, 0, 0, 1, 0, 1])
    found = paired_difference(one, other)
    differences = np.array([0, 1, 0, 0, 1, -1])
    assert found.mean == pytest.approx(1 / 6)
    deviation = np.sqrt(np.square(differences - 1 / 6).sum() / 5)
    assert found.standard_error == pytest.approx(deviation / np.sqrt(6))
    assert found.z == pytest.approx(found.mean / found.standard_error)
    assert paired_difference(one, one).z == 0


def test_pairs_are_split_as_in_the_harness():
    pairs = encode_pairs(BYTES, [("a b ", "c"), ("a b", " c"), ("", "xy")])
    assert pairs[0] == pairs[1] == ([256, *b"a b"], [*b" c"])
    assert pairs[2] == ([256], [*b"xy"])


TINY = ModelConfig(vocab_size=257, d_model=32, n_layers=1, n_heads=2)


@functools.cache
def build(kind, seed=0):
    @jax.jit
    def made():
        model = kind(TINY, rngs=nnx.Rngs(seed))
        model.embedding = nnx.Param(model.embedding[...] * 20)
        return model

    return made()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["per-document", "fixed"])
@pytest.mark.parametrize("kind", [RetNet, Transformer])
def test_sharing_prefixes_of_a_task_changes_no_result(kind, mode):
    task, rows, pool = rows_of("hellaswag")
    shots = draw_shots(task, rows, pool, 4, mode)
    requests = task_requests(task, rows, shots, BYTES, "lm_eval")
    tries = [PrefixTrie(requests.pairs, reuse=reuse) for reuse in (True, False)]
    found, expected = (score_trie(build(kind), trie, batch_size=8) for trie in tries)
    assert [x.is_greedy for x in found] == [x.is_greedy for x in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)
    results = [task_result(task, requests, scores).correct for scores in (found, expected)]
    for metric in results[0]:
        assert results[0][metric].tolist() == results[1][metric].tolist()
    prompts = {a[: a.rfind("\n\n")] for a, _ in requests.texts}
    questions = [a[a.rfind("\n\n") :] for a, _ in requests.texts[::4]]
    most = 1 + sum(map(len, [*prompts, *questions, *(b for _, b in requests.texts)]))
    assert tries[0].tokens <= most


def make_run(directory, kind, seed):
    config = Config(model=build(kind).config, data=DataConfig(tokenizer="byte"))
    record_start(directory, config, None, BYTES)
    checkpoints = Checkpoints(directory / "checkpoints", keep=1)
    checkpoints.save(0, {"model": build(kind, seed)}, {"next_batch": 0})
    checkpoints.close()
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    return [
        make_run(directory / name, kind, seed)
        for name, kind, seed in (("one", RetNet, 0), ("other", RetNet, 1))
    ]


@pytest.mark.slow
@pytest.mark.compiles(70, reason="two models, two tasks, two numbers of shots")
def test_eval_compares_two_models_in_one_table(runs, tmp_path, capsys):
    output = tmp_path / "result.json"
    # A batch of three rows cannot be split over eight devices, so one device is used.
    options = {
        "parts": ("tasks",),
        "task_data": str(ROWS),
        "shots": (0, 1),
        "tasks": ("copa", "piqa"),
        "batch_size": 3,
    }
    print_evaluation(runs[0], against=runs[1], output=output, **options)
    table, record = capsys.readouterr().out, json.loads(output.read_text())
    tokens = []
    mesh = evaluation_mesh(batch_size=3, fsdp=False)
    for own, run in zip((record, record["against"]), runs, strict=True):
        model, _ = load_checkpoint(run, mesh)
        for found in own["tasks"]:
            task, rows, pool = rows_of(found["task"])
            shots = draw_shots(task, rows, pool, found["shots"])
            requests = task_requests(task, rows, shots, BYTES, "lm_eval")
            with jax.set_mesh(mesh):  # as in the program, so that nothing is compiled twice
                scores = score(model, requests.pairs, batch_size=3)
            expected = task_result(task, requests, scores)
            for metric in expected.correct:
                assert found[metric]["correct"] == expected.correct[metric].astype(int).tolist()
                assert found[metric]["mean"] == expected.accuracy(metric)
                assert f"{100 * expected.accuracy(metric):.2f}" in table
            tokens.append(found["tokens_read"])
            assert found["tokens_without_sharing"] > found["tokens_read"]
    assert f"{sum(tokens[:4]):,} tokens read" in table
    assert f"{sum(tokens[4:]):,} tokens read" in table
    assert set(record["first_less_second"]) == {
        f"{name}, {shots} shots" for name in ("copa", "piqa") for shots in (0, 1)
    }
    assert record["checkpoint_sha256"] != record["against"]["checkpoint_sha256"]
    assert [x["task"] for x in record["task_data"]] == ["copa", "piqa"]
    assert all(len(x["rows_sha256"]) == 64 for x in record["task_data"])
    markdown = output.with_suffix(".md").read_text()
    assert record["checkpoint_sha256"] in markdown
    assert "| piqa | 1 | acc_norm |" in markdown
    with pytest.raises(ConfigError, match=r"result\.json exists already"):
        print_evaluation(runs[0], output=output, **options)


def write_rows(directory, name, split, rows):
    path = directory / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in rows))


PIQA = json.loads((ROWS / "piqa/validation.jsonl").read_text().splitlines()[0])
WINOGRANDE = json.loads((ROWS / "winogrande/validation.jsonl").read_text().splitlines()[0])
COPA = json.loads((ROWS / "copa/validation.jsonl").read_text().splitlines()[0])
BAD = [
    ("piqa", [PIQA, {k: v for k, v in PIQA.items() if k != "sol2"}], "line 2: .*'sol2'.* missing"),
    ("piqa", [PIQA | {"goal": 3}], "line 1: goal=3 is of type int; piqa needs str"),
    ("piqa", [PIQA, "{"], "line 2: not JSON"),
    ("piqa", ["[1]"], r"line 1: \[1\] is not an object"),
    ("piqa", [PIQA | {"label": 2}], "line 1: piqa has 2 choices; .* label is choice 2"),
    ("piqa", [], "piqa has no rows in split 'validation'"),
    ("winogrande", [WINOGRANDE | {"sentence": "no blank"}], "line 1: not a row of winogrande"),
    ("copa", [COPA | {"question": "why"}], "line 1: not a row of copa .KeyError: 'why'"),
    ("copa", [COPA | {"choice1": ""}], "line 1: not a row of copa .IndexError"),
]


@pytest.mark.parametrize(("name", "rows", "message"), BAD)
def test_invalid_rows_are_refused(name, rows, message, tmp_path):
    write_rows(tmp_path, name, "validation", rows)
    with pytest.raises(ConfigError, match=message):
        read_rows(TASKS[name], "validation", str(tmp_path))


def test_a_missing_split_and_too_few_examples_are_refused(tmp_path):
    write_rows(tmp_path, "piqa", "validation", [PIQA])
    plan = Plan(parts=("tasks",), task_data=str(tmp_path), tasks=("piqa",), shots=(4,))
    with pytest.raises(ConfigError, match=r"piqa/train\.jsonl does not exist: .* goal, sol1"):
        read_tasks(plan)
    write_rows(tmp_path, "piqa", "train", [PIQA] * 3)
    with pytest.raises(ConfigError, match=r"4 shots need 5 rows .* only 3 \(.*train\.jsonl"):
        read_tasks(plan)
    with pytest.raises(
        ConfigError, match=r"the tasks need --data \(task_data in Python\): a directory with"
    ):
        read_tasks(Plan(parts=("tasks",)))


def test_a_choice_without_a_token_is_refused():
    class Deaf(ByteTokenizer):
        def encode_batch(self, texts):
            return [list(x.removesuffix(" no").encode()) for x in texts]

    task, rows, _ = rows_of("boolq")
    with pytest.raises(ConfigError, match=r"validation\.jsonl, line 1: choice 0 of boolq, ' no'"):
        task_requests(task, rows, [()] * 8, Deaf(), "lm_eval")


@pytest.mark.slow
def test_the_program_needs_none_of_the_optional_libraries(runs, tmp_path):
    """eval.py in a process in which importing them fails."""
    (tmp_path / "text.txt").write_text("some text of more than a few words\n" * 20)
    program = (
        "import sys, runpy\n"
        "for name in ('torch', 'transformers', 'datasets', 'lm_eval'): sys.modules[name] = None\n"
        "sys.argv = ['eval.py'] + sys.argv[1:]\n"
        "runpy.run_path('eval.py', run_name='__main__')"
    )
    arguments = [f"--workdir={runs[0]}", "--suite=paper,recall", f"--data={ROWS}", "--shots=0"]
    arguments += [f"--data={tmp_path}/*.txt", "--distances=16", "--trials=4"]
    arguments += ["--protocol=window,sliding,stateful", "--window-length=32", "--stride=8"]
    arguments += ["--context-lengths=128,256", "--shot-mode=fixed", "--tasks=copa,wsc273"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for expected in (
        "copa",
        "wsc273",
        "sliding 32 by 8",
        "0 to 127",
        "same last 128 tokens",
        "associative",
    ):
        assert expected in done.stdout


COMMAND_LINES = [
    (["--tasks=mmlu"], "--tasks: 'mmlu' is not one of hellaswag"),
    (["--suite=all"], "--suite: 'all' is not one of perplexity"),
    (["--shots=few", "--suite=tasks"], "--shots=few: each must be an integer >= 0"),
    (
        ["--suite=tasks"],
        "the tasks need --data (task_data in Python): a directory with TASK/SPLIT.jsonl",
    ),
    (["--data=a*.txt", "--data=b*.txt"], "--data names more than one set of text files"),
    ([f"--data={ROWS}"], "gives the rows of tasks, but --suite=perplexity has no tasks"),
    (["--suite=tasks", "--data=no/such"], "--data=no/such is no directory; the tasks need one"),
    (["--stride=4"], "--stride has no effect with --suite=perplexity and --protocol=window,"),
    (["--trials=4"], "--trials has no effect"),
    (["--seed=4"], "--seed has no effect"),
    (["--protocol="], "--protocol is empty; give at least one of window"),
    (["--output=result.md"], "name the JSON file; the Markdown goes beside it"),
    (
        ["--protocol=sliding", "--stride=9", "--window-length=8", f"--data={ROOT}/eval.py"],
        "stride=9 is not in 1 ... 8",
    ),
    (["--context-lengths=128,90000", f"--data={ROOT}/LICENS*"], "no document has 90000 tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMAND_LINES)
def test_invalid_command_lines_are_refused(runs, arguments, message):
    done = programs.run("eval.py", f"--workdir={runs[0]}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
