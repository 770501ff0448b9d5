"""A pytest plugin that counts and limits the programs each test compiles, which take most time.

A program that jax's cache on disk already has, from another test or process, is not counted.
"""

from collections import Counter, defaultdict

import jax
import pytest

MOST = 40  # programs that one test may compile, each in 20 ms to some seconds
SHOWN = 15

_seconds = []  # for each program, including those from the cache
_from_cache = 0
_before = (0, 0, 0.0)  # counts at the start of the current phase: programs, from the cache, seconds


def _count(event, seconds, **_):
    global _from_cache
    if event == "/jax/core/compile/backend_compile_duration":
        _seconds.append(seconds)
    elif event == "/jax/compilation_cache/cache_retrieval_time_sec":
        _from_cache += 1


jax.monitoring.register_event_duration_secs_listener(_count)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = len(_seconds) - _from_cache
    result = yield
    programs = len(_seconds) - _from_cache - before
    marker = item.get_closest_marker("compiles")
    most = marker.args[0] if marker else MOST
    if programs > most:
        pytest.fail(
            f"{programs} programs were compiled, more than {most}. Outside of jax.jit every "
            "operation on jax arrays is a program for each shape: prepare inputs in numpy, put the "
            "rest under one jax.jit, keep shapes few. Where that cannot be: "
            "@pytest.mark.compiles(most, reason=...).",
            pytrace=False,
        )
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Adds the counts of each phase of a test to its report, also in workers."""
    global _before
    report = yield
    now = len(_seconds), _from_cache, sum(_seconds)
    report.user_properties.append(("compiled", [a - b for a, b in zip(now, _before, strict=True)]))
    _before = now
    return report


class Summary:
    """Lists the slowest tests at the end of a run."""

    def __init__(self):
        self.compiled = defaultdict(lambda: [0, 0, 0.0])
        self.seconds = Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        for name, counts in report.user_properties:
            if name == "compiled":
                found = self.compiled[report.nodeid]
                found[:] = [a + b for a, b in zip(found, counts, strict=True)]

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        totals = [sum(column) for column in zip(*self.compiled.values(), strict=True)]
        if not totals:
            return
        terminalreporter.section("compilations")
        write("  all s   compiling  programs  from cache")
        rows = [(sum(self.seconds.values()), totals, "all tests")]
        rows += [(s, self.compiled[test], test) for test, s in self.seconds.most_common(SHOWN)]
        for seconds, (programs, cached, compiling), test in rows:
            write(f"{seconds:7.1f} {compiling:11.1f} {programs - cached:9} {cached:11}  {test}")
