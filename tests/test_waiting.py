"""The line that shows what a program is doing and for how long, and the thread that writes it."""

import os
import signal
import sys
import termios
import threading
import time

import pytest

from retnet_jax import waiting
from retnet_jax.waiting import showing, showing_first_call, with_first


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.0)


@pytest.fixture
def never(monkeypatch):
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 1000.0)


def wait_for(written, text):
    """Collects what is written until it has `text`."""
    found = ""
    deadline = time.monotonic() + 60
    while text not in found and time.monotonic() < deadline:
        found += written()
        time.sleep(0.001)
    return found


def test_long_work_is_one_line_with_its_time(at_once, capsys):
    with showing("compiling"):
        begun = wait_for(lambda: capsys.readouterr().err, "... ")
    assert begun == "compiling ... "  # before the work is done
    assert capsys.readouterr().err == "0 s\n"


def test_short_work_shows_nothing(never, capsys):
    with showing("compiling"):
        pass
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_if_disabled(at_once, capsys):
    threads = threading.active_count()
    with showing("compiling", enabled=False):
        assert threading.active_count() == threads
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_line_that_disappears(at_once, monkeypatch):
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    with os.fdopen(reader, "rb", buffering=0) as screen, os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with showing("compiling"):
            shown = wait_for(lambda: screen.read(1000).decode(), "compiling ... 0 s")
        assert "\n" not in shown
        assert screen.read(1000).decode().split("\r")[-2].strip(" ") == ""  # overwritten


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_no_thread_is_left_after_an_error(seconds, monkeypatch):
    monkeypatch.setattr(waiting, "AFTER_SECONDS", seconds)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="no memory"), showing("compiling"):
        raise ValueError("no memory")
    assert threading.active_count() == threads


def test_ctrl_c_interrupts_the_work(at_once, capsys):
    def compile_for_long():
        with showing("compiling"):
            wait_for(lambda: capsys.readouterr().err, "... ")
            signal.raise_signal(signal.SIGINT)

    threads = threading.active_count()
    # A shell's background jobs ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            compile_for_long()
    finally:
        signal.signal(signal.SIGINT, before)
    assert threading.active_count() == threads
    assert capsys.readouterr().err == "0 s\n"


def test_only_the_first_call_is_shown(at_once, capsys):
    def add(a, b):
        wait_for(lambda: capsys.readouterr().err, "adding" if not b else "")
        return a + b

    call = showing_first_call(add, "adding")
    assert call(1, 0) == 1
    assert capsys.readouterr().err == "0 s\n"
    assert call(2, 3) == 5
    assert capsys.readouterr().err == ""


def test_the_first_item_is_computed_at_once_and_the_others_when_asked_for(never):
    asked = []

    def items():
        for number in range(3):
            asked.append(number)
            yield number

    found = with_first(items(), "counting")
    assert asked == [0]
    assert next(found) == 0
    assert asked == [0]
    assert list(found) == [1, 2]
    assert list(with_first([], "counting")) == []
