"""The log of a run: no line is lost, and a failing logger does not end the training."""

import json
import resource
import sys
import types

import pytest
from etils import epath
from test_interop_directories import bucket

from retnet_jax.errors import ConfigError
from retnet_jax.runs.json_lines import JsonLines
from retnet_jax.runs.log import MetricsLog

__all__ = ["bucket"]  # a fixture


def record(step):
    return {"step": step, "loss": step / 8}


def line(step):
    return json.dumps(record(step)).encode() + b"\n"


def test_records_of_later_steps_and_an_incomplete_line_are_deleted(tmp_path):
    """Lines of other programs, even one that is not UTF-8, are kept."""
    path = epath.Path(tmp_path / "metrics.jsonl")
    foreign = [b"# restarted after the power cut\n", b'{"epoch": 1}\n', b"\xff\xfe torn\n"]
    path.write_bytes(line(1) + b"".join(foreign) + line(2) + line(5) + line(3) + b'{"step": 6, "lo')
    said = []
    lines = JsonLines(path, said.append, last_step=3)
    assert path.read_bytes() == line(1) + b"".join(foreign) + line(2) + line(3)
    assert said == [
        *(f"{path}, line {n} is not a record of a step; it is kept" for n in (2, 3, 4)),
        f"{path}: the last line was cut off and is deleted",
    ]
    lines.append(record(4))
    assert path.read_bytes().endswith(line(3) + line(4))


def test_an_object_store_gets_the_file_at_intervals_and_at_the_end(bucket, tmp_path):
    """Each write sends the whole file, so a write for each line would be quadratic in the lines."""
    bucket(tmp_path, "s3://b/run")
    path, writes = epath.Path("s3://b/run/metrics.jsonl"), []
    lines = JsonLines(path, pytest.fail)
    for step in range(1, 50):
        lines.append(record(step))
        if not writes or path.read_bytes() != writes[-1]:
            writes.append(path.read_bytes())
    assert writes == [line(1)]  # the rest within a minute
    lines.flush()
    assert path.read_bytes() == b"".join(map(line, range(1, 50)))
    again = JsonLines(path, pytest.fail, last_step=20)  # a run that is resumed
    again.append(record(21))
    again.flush()
    assert path.read_bytes() == b"".join(map(line, range(1, 22)))


def test_records_that_a_full_disk_refuses_are_written_later(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    said = []
    lines = JsonLines(path, said.append)
    lines.append(record(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no room for a whole line
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(line(1)) + 5, before[1]))
        lines.append(record(2))
        lines.append(record(3))
        assert path.read_bytes() == line(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(said) == 1
    assert "cannot be written now" in said[0]
    lines.append(record(4))
    assert path.read_bytes() == b"".join(map(line, (1, 2, 3, 4)))
    # Even if no record follows.
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(path.read_bytes()) + 5, before[1]))
        lines.append(record(5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.flush()
    assert path.read_bytes().endswith(line(4) + line(5))


def test_evaluations_are_known_by_their_evaluators(tmp_path):
    """The evaluators of one step; None stands for a record without a name."""
    log = MetricsLog(tmp_path, 0, 5)
    assert log.evaluators_at(2) == set()
    log.write(2, {"loss": 2.0})
    assert log.evaluators_at(2) == set()
    values = {"loss": 1.0, "other": float("inf")}
    found = log.write_evaluation(2, "held-out", values)
    assert found == {"step": 2, "evaluator": "held-out", "loss": 1.0, "other": None}
    log.write(4, {"held_out_loss": 1.0})
    log.close()
    resumed = MetricsLog(tmp_path, 4, 5)
    assert [resumed.evaluators_at(step) for step in (1, 2, 4)] == [set(), {"held-out"}, {None}]
    resumed.close()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that records its calls, and fails at the calls in `failing`."""
    module = types.SimpleNamespace(calls=[], failing=set())

    class Run:
        def log(self, values, step):
            module.calls.append(("log", step, values))
            if "log" in module.failing:
                raise ConnectionError("the network is gone")

        def finish(self):
            module.calls.append(("finish",))
            if "finish" in module.failing:
                raise RuntimeError("cannot finish")

    def init(**settings):
        if "init" in module.failing:
            raise PermissionError("no API key")
        module.calls.append(("init", settings))
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_evaluators_with_values_of_one_name_have_curves_of_their_own(tmp_path, wandb):
    log = MetricsLog(tmp_path, 0, 5, wandb="some-project")
    log.write(2, {"loss": 2.0})
    log.write_evaluation(2, "held-out loss", {"held_out_loss": 1.5, "held_out_loss/python": 1.25})
    log.write_evaluation(2, "recall", {"accuracy": 0.5, "loss": 3.0, "held_out_loss": 4.0})
    log.write_evaluation(2, "copying 8", {"accuracy": 0.25})
    log.close()
    curves = [x for call in wandb.calls if call[0] == "log" for x in call[2].items()]
    assert curves == [
        ("loss", 2.0),
        ("held_out_loss", 1.5),
        ("held_out_loss/python", 1.25),
        ("recall/accuracy", 0.5),
        ("recall/loss", 3.0),
        ("recall/held_out_loss", 4.0),
        ("copying_8/accuracy", 0.25),
    ]
    (events,) = tmp_path.glob("events.*")
    assert all(name.encode() in events.read_bytes() for name, _ in curves)


def test_two_runs_of_one_name_have_two_ids_and_a_resumed_run_keeps_its_id(wandb, tmp_path):
    for place in ("one/exp", "two/exp", "one/exp"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        log = MetricsLog(tmp_path / place, 0, 5, "retention")
        log.write(1, {"loss": 2.0})
        log.close()
    settings = [call[1] for call in wandb.calls if call[0] == "init"]
    ids = [found["id"] for found in settings]
    assert ids[0] == ids[2] != ids[1]
    assert {found["name"] for found in settings} == {"exp"}
    assert {found["resume"] for found in settings} == {"allow"}


def test_a_failure_of_weights_and_biases_is_reported_once(wandb, tmp_path, capfd):
    wandb.failing = {"log", "finish"}
    log = MetricsLog(tmp_path, 0, 5, "retention")
    for step in (1, 2, 3):
        assert log.write(step, {"loss": 2.0}) == {"step": step, "loss": 2.0}
    log.close()
    said = capfd.readouterr().err
    assert said.count("Weights & Biases failed (ConnectionError: the network is gone)") == 1
    assert [call[0] for call in wandb.calls] == ["init", "log"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_weights_and_biases_that_does_not_start_is_an_error_before_any_change(wandb, tmp_path):
    wandb.failing = {"init"}
    (tmp_path / "metrics.jsonl").write_bytes(line(1) + line(2))
    with pytest.raises(ConfigError, match=r"did not start \(PermissionError: no API key\); log in"):
        MetricsLog(tmp_path, 1, 5, "retention")
    assert (tmp_path / "metrics.jsonl").read_bytes() == line(1) + line(2)
