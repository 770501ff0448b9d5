"""What holds for every input: of random options, files, ids and damage, many more under `slow`."""

import contextlib
import dataclasses
import fnmatch
import glob
import itertools
import json
import os
import stat
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pretrained_tokenizer import cl100k, gpt, llama, sentencepiece
from test_text_generation import BYTES, RetNet, Transformer, build

from retnet_jax import config as options_of
from retnet_jax.config import Config, OptimizerConfig, TrainConfig
from retnet_jax.config_json import config_from_json, options, to_json
from retnet_jax.data.corpus_files import corpus_files
from retnet_jax.data.tokenizers import ByteTokenizer, TextStream, train_bpe
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.generation.saved_state import load_reading, save_reading
from retnet_jax.generation.texts import Writer, _Row
from retnet_jax.programs.overrides import apply, option_from_text
from retnet_jax.runs.json_lines import JsonLines, records_in
from retnet_jax.training.clock import Clock, peak_flops
from retnet_jax.training.optim import learning_rate_factor, make_optimizer


def sizes(quick, slow):
    """The number of examples of a test, and of its long variant."""
    return pytest.mark.parametrize("most", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def holds_for(most, *strategies, **named):
    """Runs a function with so many examples, at once."""

    def run(function):
        checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
        settings(max_examples=most, suppress_health_check=checks)(
            given(*strategies, **named)(function)
        )()

    return run


# Options

NAN, INF = float("nan"), float("inf")
VALUES = [
    *(NAN, INF, -INF, 0, 0.0, -1, -0.5, 1, 3, 0.3, 1e300, -1e300, 1e-300, 1e-50, 1e30, 3.5e38),
    *(10**400, -(10**400), 2**31, 2**40, True, False, None, "x", "", "1", "nan", b"x", 1j),
    *(np.float32(0.5), np.float32(NAN), np.float64(0.5), np.float64(INF), np.int64(3)),
    *(np.bool_(True), np.zeros(2)),
    *((), [], [1], ("a",), (1.5,), (1, 2), (0.1, 0.2), (0.1, NAN), (True,), (None,), (10**400,)),
    *({}, {"a": 0.5}, {"a": NAN}, {"a": 10**400}, {"a": "x"}, {"a": True}, {1: 0.5}),
]
TEXTS = [
    *("nan", "inf", "-inf", "NaN", "1e400", "1e-50", "0", "-1", "", "None", "true", "x", "1,2"),
    *("(1,2)", "{}", "{'a':nan}", "a:nan", "a:inf", "a:0.5", "1/0", "0/0", "1e308/1e-308", "\0"),
    *("1" + "0" * 400, "1" * 5000, "1e6", "0.3", "[[", "\n", "nan,nan", "é", "\udcff"),
]
JSON = [
    *("NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400, "1" * 5000, "null", "true", "1.5"),
    *("-1", "0", '"x"', '"\\ud800"', "[]", "{}", "[NaN]", "[1e400, 1]", "[[1]]", '{"a": NaN}'),
    *('{"a": 1%s}' % ("0" * 400), "[" * 5000, '"\\u0000"', "[true]", "1e-50"),
]


def with_option(name, value):
    config = Config()
    apply(config, [(name, value)])
    return config


def is_sound(config):
    """Whether a config is accepted: then its numbers are finite and its types are declared."""
    config.check()
    json.dumps(dataclasses.asdict(config), allow_nan=False)
    read = config_from_json(to_json(config))  # this asks for the types of the fields
    return read == config and np.isfinite(np.float32(numbers_in(dataclasses.asdict(read)))).all()


def numbers_in(values):
    if isinstance(values, dict | tuple):
        inner = values.values() if isinstance(values, dict) else values
        return [number for value in inner for number in numbers_in(value)]
    return [values] if isinstance(values, int | float) else []


@pytest.mark.parametrize("name", options())
def test_an_option_is_a_value_of_its_type_or_an_error_with_its_name(name):
    field = name.rpartition(".")[2]
    for value in VALUES:
        try:
            assert is_sound(with_option(name, value)), value
        except ConfigError as error:
            message = str(error)
        else:
            continue
        assert field in message
        parts = value if isinstance(value, tuple | dict) else ()
        shown = {str(value), *map(repr, [value, *parts, *getattr(parts, "values", tuple)()])}
        # Long integers are told by their length.
        assert any(x in message for x in (*shown, "is empty", "=nan", " bits")), message
    for text in TEXTS:
        with contextlib.suppress(ConfigError):
            assert is_sound(with_option(name, option_from_text(name, text))), text
    section, _, field = name.rpartition(".")
    for text in JSON:
        values = json.loads(to_json(Config()))
        (values[section] if section else values)[field] = "@"
        with contextlib.suppress(ConfigError):
            assert is_sound(config_from_json(json.dumps(values).replace('"@"', text))), text


@pytest.mark.parametrize("section", [x.name for x in dataclasses.fields(Config)])
@pytest.mark.parametrize("value", [None, 3, {"steps": 3}, TrainConfig])
def test_a_section_is_one(section, value):
    with pytest.raises(ConfigError, match=rf"^{section}=.* is not of type "):
        Config(**{section: value}).check()


CHOICES = [x for name in ("OPTIMIZERS", "SCHEDULES", "DTYPES") for x in getattr(options_of, name)]
BY_TYPE = {
    float: st.one_of(
        st.floats(-45, 30).map(lambda power: 10**power),
        st.floats(0, 1),
        st.sampled_from([0.0, 1.0, -1.0, NAN, INF, 1e300, 0.99999999, 0.9999999, 1e-38]),
    ),
    int: st.one_of(st.integers(0, 12), st.sampled_from([-1, 375, 2**31 - 2, 2**31, 2**40])),
    str: st.sampled_from(CHOICES),
}


@st.composite
def optimizers(draw):
    """The default but for some options, and a number of steps."""
    fields = draw(st.lists(st.sampled_from(dataclasses.fields(OptimizerConfig)), max_size=4))
    values = {"warmup_steps": 2} | {field.name: draw(BY_TYPE[field.type]) for field in fields}
    steps = draw(st.one_of(st.integers(1, 20), st.sampled_from([2**31 - 1, 2**31, 10**6])))
    return Config(optimizer=OptimizerConfig(**values), train=TrainConfig(steps=steps))


def is_accepted(config):
    try:
        config.check()
    except ConfigError:
        return False
    return True


class Parameters(NamedTuple):
    """What `make_optimizer` tells apart by names."""

    kernel: jax.Array
    embedding: jax.Array
    scale: jax.Array


RNG = np.random.default_rng(0)
PARAMETERS = Parameters(*(RNG.normal(size=x).astype("f4") for x in ((2, 4, 3), (4, 3), (3,))))
ROWS = Parameters(*(np.arange(x.size).reshape(x.shape) % 4 > 1 for x in PARAMETERS))


@pytest.mark.compiles(150, reason="each operation of the optimiser by itself, so that none is new")
@sizes(60, 1000)
def test_accepted_options_give_finite_rates_and_updates(most):
    seen = {True: 0, False: 0}

    @holds_for(most, config=optimizers())
    def finite(config):
        seen[is_accepted(config)] += 1
        if not is_accepted(config):
            return
        steps, warm_up = config.train.steps, config.optimizer.warmup_steps
        factor = learning_rate_factor(config.optimizer, steps)
        near = {0, 1, warm_up - 1, warm_up, warm_up + 1, steps // 2, steps - 1}
        for step in (step for step in near if 0 <= step < steps):
            for peak in (config.optimizer.learning_rate, config.optimizer.muon_learning_rate):
                rate = np.float32(peak) * np.float32(factor(jnp.int32(step)))
                assert np.isfinite(rate), step
                assert 0 <= rate <= np.float32(peak) * 1.00001, step
        optimizer = make_optimizer(config.optimizer, steps)
        with jax.disable_jit():
            parameters, state = PARAMETERS, optimizer.init(PARAMETERS)
            for size in (0, 1, 1e-6):
                gradients = jax.tree.map(lambda x, row, size=size: size * x * row, PARAMETERS, ROWS)
                updates, state = optimizer.update(gradients, state, parameters)
                parameters = jax.tree.map(np.add, parameters, updates)
                for leaf in jax.tree.leaves((updates, parameters, state)):
                    assert np.isfinite(np.asarray(leaf, "f4")).all(), size

    assert min(seen.values()) > most / 8


@sizes(50, 500)
def test_shares_of_the_time_are_shares_however_clocks_are_set(most):
    """And there is no share of a peak that no data sheet names, as that of CPUs."""
    assert peak_flops(jax.devices()) is None

    @holds_for(
        most, before=st.floats(-1e9, 1e9), trained=st.floats(0, 1e9), steps=st.integers(1, 3)
    )
    def shares(before, trained, steps):
        clock = Clock(100, 1e6, peak_flops(jax.devices()))
        clock.restore(time.time() - before, trained)
        with clock.waiting("evaluation"):
            pass
        for _ in range(steps):
            clock.step()
        lap = clock.lap()
        assert "mfu" not in lap
        assert 0 < lap["goodput"] <= 1
        assert all(0 <= x <= 1 for name, x in lap.items() if name.endswith("_wait"))
        assert lap["training_seconds"] >= trained


# Files of a corpus

NAMES = [
    *("a", "b", "a.txt", "b.txt", "c d.txt", "é.txt", "e\u0301.txt", "[ab].txt", "[a]", "x\ny.txt"),
    *(".h.txt", ".d", "k,l.txt", "~", "~x.txt", "**", "*", "?.txt", "{a}.txt", "-r.txt", "😀"),
    *("\udcff.txt", "q'\".txt", "#.txt", "%20.txt", "a\\b.txt"),
]
PARTS = [
    *(
        "*",
        "*",
        "**",
        "**",
        "**",
        "*.txt",
        "*.txt",
        "?.txt",
        "[ab]*",
        "[!a]*",
        ".*",
        "*[.]txt",
        "*.tx?",
        "nothing",
    ),
    *("a", "[a]", "[ab].txt", "b", "~", "*\n*", "{a}.txt", "c d.txt", "*e*", "[", "[]]"),
]
# kind; the directory it is in and what a link leads to, counted among those there are; its name
NODES = st.lists(
    st.tuples(
        st.sampled_from(["file", "file", "directory", "directory", "link", "link", "dangling"]),
        st.integers(0, 30),
        st.integers(0, 30),
        st.sampled_from(NAMES),
        st.booleans(),
    ),
    min_size=5,
    max_size=18,
)
PATTERNS = st.lists(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join), min_size=1, max_size=3
)


def grow(top, nodes):
    """Makes a tree of files, directories and links, of which some lead up, around or nowhere."""
    directories, every = [top], [top]
    for kind, parent, target, name, relative in nodes:
        parent = directories[parent % len(directories)]
        path = os.path.join(parent, name)
        if os.path.lexists(path):
            continue
        if kind == "directory":
            os.mkdir(path)
            directories.append(path)
        elif kind == "file":
            with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(path)
        else:
            target = every[target % len(every)] if kind == "link" else os.path.join(top, "gone")
            os.symlink(
                os.path.relpath(target, os.path.realpath(parent)) if relative else target, path
            )
            if kind == "link" and os.path.isdir(path):
                directories.append(path)
        every.append(path)


def is_document(path):
    """A file, or a link that leads nowhere, which is to be reported."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def entries(directory):
    return [name for name in os.listdir(directory) if not name.startswith(".")]


def below(directory):
    """The real directories that can be reached from one."""
    found, waiting = {directory}, [directory]
    while waiting:
        here = waiting.pop()
        inner = {os.path.realpath(os.path.join(here, name)) for name in entries(here)}
        new = {path for path in inner if os.path.isdir(path)} - found
        found |= new
        waiting += new
    return found


def model_of_matches(directory, parts):
    """The real files that a pattern means, by sets: without an order, and without ways to them."""
    part, *rest = parts
    if part == "**":
        inner = (model_of_matches(each, rest or ["*"]) for each in below(directory))
        return set().union(*inner)
    names = [part]
    if glob.has_magic(part) and not os.path.lexists(os.path.join(directory, part)):
        candidates = os.listdir(directory) if part.startswith(".") else entries(directory)
        names = fnmatch.filter(candidates, part)
    found = set()
    for path in (os.path.join(directory, name) for name in names):
        if rest and os.path.isdir(path):
            found |= model_of_matches(os.path.realpath(path), rest)
        elif not rest and os.path.lexists(path) and is_document(path):
            found.add(os.path.realpath(path))
    return found


def meant(top, pattern):
    exact = os.path.join(top, pattern)
    if os.path.lexists(exact):
        return {os.path.realpath(exact)} - (
            {os.path.realpath(exact)} if os.path.isdir(exact) else set()
        )
    return model_of_matches(top, pattern.split("/"))


@sizes(250, 2000)
def test_patterns_give_each_real_file_once_however_they_are_typed(most, tmp_path, monkeypatch):
    counter = itertools.count()
    outcomes = {True: 0, False: 0}

    @holds_for(most, nodes=NODES, patterns=PATTERNS)
    def once(nodes, patterns):
        number = next(counter)
        top = os.path.realpath(tmp_path / f"{number} [x]")
        os.mkdir(top)
        grow(top, nodes)
        os.symlink(top, tmp_path / f"alias {number}")
        monkeypatch.chdir(top)
        monkeypatch.setenv("HOME", top)
        expected = [meant(top, pattern) for pattern in patterns]
        names = []
        outcomes[all(expected)] += 1
        for before in (top, ".", "~", f"{top}//.", f"../{number} [x]", f"../alias {number}"):
            path = " , ".join(f"{before}/{pattern}" for pattern in patterns)
            if not all(expected):
                with pytest.raises(ConfigError, match=r"(?s)data.path='.* (matches no|is a dir)"):
                    corpus_files(path)
                continue
            found = corpus_files(path)
            real = [os.path.realpath(file.path) for file in found]
            assert len(set(real)) == len(real)
            assert set(real) == set().union(*expected)
            assert not any(os.path.isdir(file.path) for file in found)
            names.append([file.name for file in found])
            assert names[-1] == sorted(set(names[-1]))
            names[-1] = list(zip(names[-1], real, strict=True))
        assert all(each == names[0] for each in names)

    assert min(outcomes.values()) > most / 10


# Text as it comes


def byte(directory):
    return ByteTokenizer()


def bpe(directory):
    return train_bpe(["größer → 😀 naïve 你好 return"] * 9, 270)


KINDS = pytest.mark.parametrize("make", [llama, gpt, sentencepiece, cl100k, byte, bpe])
CHARACTERS = "ab cd é😀你\ufffd\n\t▁ ወ\u0301\u200d\0"


def ids_of(tokenizer):
    """Ids of texts, and any ids at all, which are those of no text."""
    known = [i for i in range(min(tokenizer.vocab_size, 400)) if tokenizer.token(i) is not None]
    texts = st.text(CHARACTERS, max_size=120).map(tokenizer.encode)
    known.append(tokenizer.bos_id)
    return st.one_of(texts, st.lists(st.sampled_from(known), max_size=200))


def cut(ids, cuts):
    places = sorted(place % (len(ids) + 1) for place in cuts)
    return [ids[a:b] for a, b in itertools.pairwise([0, *places, len(ids)])]


CUTS = st.one_of(st.lists(st.integers(0, 200), max_size=6), st.just(range(201)))


@KINDS
@sizes(60, 2000)
def test_streamed_text_is_the_decoded_text(most, make, tmp_path):
    tokenizer = make(tmp_path)

    @holds_for(most, ids=ids_of(tokenizer), cuts=CUTS)
    def same(ids, cuts):
        stream = TextStream(tokenizer)
        text = "".join(stream.add(list(part)) for part in cut(ids, cuts)) + stream.rest()
        assert text == tokenizer.decode(ids)


@st.composite
def texts_and_stops(draw):
    """Stop strings, some in the middle of others, and a text of them and of parts of them."""
    stops = draw(st.lists(st.text("abcé😀\ufffd", min_size=1, max_size=5), max_size=2))
    stops += [stop[1:-1] for stop in stops if len(stop) > 2 and draw(st.booleans())]
    parts = [*stops, *(stop[:-1] for stop in stops), *(stop[1:] for stop in stops), "a", "é", "x"]
    return "".join(draw(st.lists(st.sampled_from(parts), max_size=12))), stops


@KINDS
@sizes(100, 2000)
def test_where_a_text_stops_does_not_depend_on_how_it_comes(most, make, tmp_path):
    """At the stop string that is complete first; of several that end there, at the longest."""
    tokenizer = make(tmp_path)

    @holds_for(most, text_and_stops=texts_and_stops(), cuts=CUTS, torn=st.booleans())
    def same(text_and_stops, cuts, torn):
        text, stops = text_and_stops
        ids = tokenizer.encode(text)
        ids = [*ids[:-1], tokenizer.end_id, *ids[:5]] if torn else ids
        row, given = _Row(TextStream(tokenizer), stops), ""
        for part in cut(ids, cuts):
            given += row.add(list(part), [0.0] * len(part), tokenizer.end_ids)
        given += row.rest()
        ends = [place for place, i in enumerate(ids) if i in tokenizer.end_ids]
        whole = tokenizer.decode(ids[: ends[0]] if ends else ids)
        found = [(whole.find(stop) + len(stop), -len(stop)) for stop in stops if stop in whole]
        end, length = min(found, default=(len(whole), 0))
        assert given == row.continuation.text == whole[: end + length]
        expected = "stop" if found else "end" if ends else "length"
        assert row.continuation.ended_by == expected


# Saved states


@pytest.mark.compiles(80, reason="a model is built and reads a text")
@pytest.mark.parametrize("kind", [RetNet, Transformer])
@sizes(400, 30_000)
def test_a_flipped_bit_in_a_saved_state_is_found(most, kind, tmp_path):
    model, path = build(kind), tmp_path / "text.state"
    save_reading(path, Writer(model, BYTES, ["Grüße", "x"], 3).reading, model, BYTES)
    intact = path.read_bytes()
    load_reading(path, model, BYTES)
    header = 8 + int.from_bytes(intact[:8], "little")
    rng = np.random.default_rng(0)
    places = {*rng.choice(8 * header, min(most, 8 * header), replace=False)}
    places |= {*rng.choice(8 * len(intact), min(most // 8, 8 * len(intact)), replace=False)}
    for place in sorted(map(int, places)):
        flipped = bytearray(intact)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError) as caught:
            load_reading(path, model, BYTES)
        assert "text.state" in str(caught.value), place


# Logs


def written_lines(path, count):
    lines = JsonLines(path, pytest.fail)
    records = [{"step": step, "loss": step / 8, "note": "é{}\n"} for step in range(1, count + 1)]
    for record in records:
        lines.append(record)
    return records


@sizes(150, 3000)
def test_a_damaged_end_of_a_log_costs_no_earlier_record_and_is_said(most, tmp_path):
    """What a crash leaves: a file cut off, or with zeros or old blocks where its end should be."""
    path = epath.Path(tmp_path / "metrics.jsonl")

    @holds_for(
        most,
        count=st.integers(1, 5),
        kind=st.sampled_from(["cut", "zeros", "zeros behind", "garbage"]),
        place=st.integers(0, 10**6),
        garbage=st.binary(min_size=1, max_size=40),
    )
    def said_and_kept(count, kind, place, garbage):
        path.unlink(missing_ok=True)
        records = written_lines(path, count)
        intact = path.read_bytes()
        place %= len(intact)
        damaged = {
            "cut": intact[:place],
            "zeros": intact[:place] + bytes(len(intact) - place),
            "zeros behind": intact + bytes(place % 50 + 1),
            "garbage": intact[:place] + garbage,
        }[kind]
        path.write_bytes(damaged)
        whole = (intact if kind == "zeros behind" else intact[:place]).count(b"\n")
        said = []
        lines = JsonLines(path, said.append, last_step=count)
        assert records_in(path)[:whole] == records[:whole]
        assert len(records_in(path)) == whole or said
        ends_a_line = damaged.endswith(b"\n") and kind == "cut"
        assert bool(said) != (ends_a_line or damaged == b"" or damaged == intact)
        lines.append({"step": count + 1})
        assert records_in(path)[:whole] == records[:whole]
        assert records_in(path)[-1] == {"step": count + 1}
