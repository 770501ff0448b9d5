"""The adapter for lm-evaluation-harness gives the results of eval.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_evaluation_tasks import BYTES, ROOT, ROWS, build, rows_of, runs

from retnet_jax import RetNet
from retnet_jax.evaluation.scoring import score
from retnet_jax.evaluation.task_requests import (
    draw_shots,
    task_requests,
    task_result,
)

__all__ = ["runs"]  # fixture


def run_harness(run, tmp_path, tasks, shots):
    """Results and samples of each task, from the command of lm-evaluation-harness."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    local = tmp_path / "tasks"
    subprocess.run(
        [sys.executable, ROOT / "tools/lm_eval_tasks.py", f"--data={ROWS}", f"--output={local}"],
        check=True,
    )
    command = [sys.executable, "-m", "retnet_jax.evaluation.harness", "run", "--log_samples"]
    command += ["--model", "retnet_jax", "--model_args", f"pretrained={run}", "--batch_size", "8"]
    command += ["--include_path", local, "--tasks", ",".join(f"{name}_local" for name in tasks)]
    command += ["--num_fewshot", str(shots), "--output_path", tmp_path / "out"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    samples = {}
    for name in tasks:
        (path,) = (tmp_path / "out").rglob(f"samples_{name}_local_*.jsonl")
        samples[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(results.read_text())["results"], samples


@pytest.mark.slow
def test_results_in_the_harness_equal_those_of_eval(runs, tmp_path):
    names = ("hellaswag", "wsc273")
    results, samples = run_harness(runs[0], tmp_path, names, shots=4)
    for name in names:
        task, rows, pool = rows_of(name)
        requests = task_requests(task, rows, draw_shots(task, rows, pool, 4), BYTES, "lm_eval")
        scores = score(build(RetNet), requests.pairs)
        expected = task_result(task, requests, scores)
        for metric in expected.correct:
            assert results[f"{name}_local"][f"{metric},none"] == expected.accuracy(metric)
            error = results[f"{name}_local"][f"{metric}_stderr,none"]
            assert error == pytest.approx(expected.standard_error(metric))
        found = [x for sample in samples[name] for x in sample["filtered_resps"]]
        for (likelihood, greedy), one in zip(found, scores, strict=True):
            assert float(likelihood) == pytest.approx(one.log_likelihood, abs=1e-3)
            assert (greedy in (True, "True")) == one.is_greedy


HARNESS = """
import json, sys
from lm_eval.api.instance import Instance
from retnet_jax.evaluation.harness import RetNetLM
options = dict(dtype="auto", trust_remote_code=True, add_bos_token=True, device="cuda")
lm = RetNetLM({run!r}, batch_size=2, max_length={length}, **options)
make = lambda kind, *args: Instance(kind, {{}}, args, 0)
texts = {texts!r}
rolling = lm.loglikelihood_rolling([make("loglikelihood_rolling", text) for text in texts])
options = {{"until": ["e", "\\n\\n"], "max_gen_toks": 20}}
generated = lm.generate_until([make("generate_until", text, options) for text in texts])
try:
    lm.generate_until([make("generate_until", "a", {{"num_beams": 3}})])
except ValueError as error:
    said = str(error)
for refused in (
    lambda: RetNetLM({run!r}, add_bos_token="False"),
    lambda: lm.chat_template(True),
    lambda: lm.loglikelihood([make("loglikelihood", "the end of a context", "")]),
):
    try:
        refused()
    except ValueError as error:
        said += " | " + str(error)
json.dump([rolling, generated, said], open({output!r}, "w"))
"""


@pytest.mark.parametrize("length", [None, 16])
@pytest.mark.slow
def test_rolling_likelihoods_and_generation_in_the_harness(runs, tmp_path, length):
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")
    from retnet_jax.evaluation.held_out_texts import encoded
    from retnet_jax.evaluation.perplexity import stateful_nll, window_nll
    from retnet_jax.generation.texts import Writer

    texts, output = ["Once upon a time there was", "x", "Grüße " * 20], str(tmp_path / "out.json")
    program = HARNESS.format(run=str(runs[0]), texts=texts, output=output, length=length)
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    rolling, generated, said = json.loads(Path(output).read_text())
    documents = encoded(texts, BYTES)
    if length is None:
        expected = stateful_nll(build(RetNet), documents, batch_size=2)
    else:
        expected = window_nll(build(RetNet), documents, window_length=length, batch_size=2)
    assert rolling == pytest.approx([-x.sum() for x in expected], rel=1e-5)
    writer = Writer(build(RetNet), BYTES, texts, 20, stop=["e", "\n\n"])
    list(writer)
    assert generated == [found.text for found in writer.continuations]
    assert not any("e" in text for text in generated)
    assert "unsupported generation arguments ['num_beams']" in said
    assert "add_bos_token=False is not supported" in said
    assert "--apply_chat_template: this model has no chat template" in said
    assert (
        "continuation '' after a context that ends in 'the end of a context' has no token" in said
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=runs/nowhere", "retnet_jax: runs/nowhere/config.json does not exist"),
        ("pretrained={run},max_length=2.5", "retnet_jax: max_length=2.5: expected an integer of"),
        ("pretrained={run},max_gen_toks=0", "retnet_jax: max_gen_toks=0: expected an integer of"),
    ],
)
@pytest.mark.slow
def test_an_error_in_the_input_of_the_harness_has_no_traceback(runs, tmp_path, arguments, message):
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")
    local = tmp_path / "tasks"
    subprocess.run(
        [sys.executable, ROOT / "tools/lm_eval_tasks.py", f"--data={ROWS}", f"--output={local}"],
        check=True,
    )
    command = [sys.executable, "-m", "retnet_jax.evaluation.harness", "run", "--model=retnet_jax"]
    command += [f"--model_args={arguments.format(run=runs[0])}", "--tasks=copa_local"]
    command += [f"--include_path={local}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
