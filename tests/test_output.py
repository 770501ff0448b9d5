"""Output that is no longer read or cannot be encoded, and signals that arrive twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import latest_step

from retnet_jax.parallel import processes
from retnet_jax.programs import command_line

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from pathlib import Path
from retnet_jax.programs.output import forgiving_output
def gone():
    open({told!r}, "a").write("gone ")
with forgiving_output(gone):
    for number in range(20_000):
        print("line", number)
        print("message", number, file=sys.stderr)
    open({told!r}, "a").write("done")
"""


def test_a_program_continues_when_head_has_ended(tmp_path):
    program = PROGRAM.format(told=str(tmp_path / "told"))
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout.readline() in (b"line 0\n", b"message 0\n")
        process.stdout.close()
        assert process.wait(60) == 0
    assert (tmp_path / "told").read_text() == "gone done"  # called once for two streams


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_outside_the_encoding_are_escaped(encoding):
    text = "Grüße \u4f60 \udcff"  # the last is a byte of a file name that is not UTF-8
    program = (
        "from retnet_jax.programs.output import forgiving_output\n"
        f"with forgiving_output(): print({text!a})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip() == text.encode(encoding, "backslashreplace")


@pytest.mark.slow
def test_a_run_is_saved_when_its_output_is_no_longer_read(config_file, tmp_path):
    command = [sys.executable, "train.py", f"--config={config_file}", "--config.train.steps=100000"]
    with subprocess.Popen(
        [*command, f"--workdir={tmp_path / 'run'}", "--config.train.checkpoint_every=100000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        for line in process.stdout:
            if line.startswith(b"step 5/"):
                break
        process.stdout.close()
        assert process.wait(120) == 0
    assert latest_step(tmp_path / "run") >= 5


@pytest.fixture
def as_in_the_foreground():
    """Shells start background processes with SIGINT ignored, and Python keeps that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("as_in_the_foreground")
def test_a_signal_that_arrives_twice_at_once_counts_once(monkeypatch, capfd):
    monkeypatch.setattr(processes, "SECONDS_TO_REPEAT", 1e9)
    with processes.stop_signals() as stop:
        assert not stop.seen(1)
        signal.raise_signal(signal.SIGINT)
        assert (stop.seen(2), stop.name) == (True, "SIGINT")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        monkeypatch.setattr(processes, "SECONDS_TO_REPEAT", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "SIGINT: saving; once more ends at once\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_before_training_has_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        command_line._reporting(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")
